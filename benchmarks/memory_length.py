"""What S5, an LSTM and a Transformer remember: at one memory length, and at lengths not trained.

    python benchmarks/memory_length.py                        # S5, every length, 5 seeds: hours
    python benchmarks/memory_length.py --models LSTM --lengths 512       # a cell; the others stay
    python benchmarks/memory_length.py --generalise                      # S5, 3 minutes on one core
    python benchmarks/memory_length.py --generalise --models LSTM Transformer --lengths 128 512
    python benchmarks/memory_length.py --search --models LSTM   # what SETTINGS was chosen from
    python benchmarks/memory_length.py --lengths                # draws the stored tables again

1. The paper's protocol, memory_length.csv: trained and asked at one length, at most 10,000 episodes
   a seed (EPISODES). The flags, printed, are those of `flags`: for this task, and equal for all
   models but for what they are of. GRID was searched at SEARCH_LENGTH with two seeds
   (memory_search.csv, by an older version, whose entropy bonus fell to zero).
2. --generalise, memory_generalisation.csv: trained with the script's defaults, so on a spread of
   lengths up to LENGTHS, then asked at FACTORS times that. The Transformer attends to the last 2 x
   LENGTH + 2 steps: it sees no cue beyond, and has to fail from 4 x on.

Returns are means of 128 greedy answers, 1 if all are right and 0 if guessed. A row a model, length
and seed; both tables are drawn in memory_length.png.
"""

import tempfile
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib import import_module
from itertools import product
from typing import Literal

import jax
import numpy as np
import tyro
from common import HERE, load, read, results_of, save, train, write

# The paper's figure, mean returns read off to about 0.02; A2C, 1 environment, 10,000 episodes.
PAPER = {
    "S5": (1, 1, 1, 1, 1, 1, 1, 1, 0.5, 0),
    "LSTM": (1, 1, 0.85, 0.5, 0.1, 0.2, 0.35, 0.25, -0.05, 0.1),
    "Transformer": (1, 1, 1, 0.75, 1, 1, 1, 0.7, -0.25, 0.05),  # self-attention
}
LENGTHS, FACTORS = tuple(2**n for n in range(2, 13)), (0.5, 1, 2, 4, 8, 16)
SCRIPTS = {"S5": "s5_ppo_memory", "LSTM": "lstm_ppo", "Transformer": "transformer_ppo"}
SEARCH_LENGTH, SEARCH_SEEDS = 256, 2
EPISODES = {256: 2500, 1024: 2000, 2048: 2500, 4096: 5100}  # of a seed; 5,000 at other lengths
# Lambda and discount, step size, entropy bonus. One action counts and is paid at once, so that
# credit for the ones before it, and whatever the critic says of them, is noise: both 0.
NAMES = ("gae-lambda", "gamma", "learning-rate", "ent-coef")
CREDIT = ((0.0, 0.0), (0.0, 0.99), (0.95, 0.99))
GRID = [
    dict(zip(NAMES, (*credit, *rest), strict=True))
    for credit, *rest in product(CREDIT, (3e-4, 1e-3), (0.01, 0.1))
]
SETTINGS = dict(zip(NAMES, (0.0, 0.0, 3e-4, 0.1), strict=True))  # among the best of each model


@dataclass
class Args:
    models: tuple[Literal[tuple(SCRIPTS)], ...] = ("S5",)  # what to train
    lengths: tuple[int, ...] | None = None  # trained; None: 4 to 4,096, or 128 with --generalise
    num_seeds: int = 5  # seeds 0, 1, ... of each length
    generalise: bool = False  # train a spread of lengths, ask at others
    search: bool = False  # try GRID at SEARCH_LENGTH


def flags(model, length, num_seeds, settings):
    """The paper's task. A rollout spans two episodes: gradients reach from question to cue."""
    num_steps, episodes = max(128, 2 * length), EPISODES.get(length, 5000)
    own = {
        "S5": {"dt-min": min(1e-3, 0.4 / length), "dt-max": min(0.1, 12.8 / length)},
        "LSTM": {"max-timescale": max(2000, 5 * length)},
        "Transformer": {"context-length": length + 2},
    }
    task = {"memory-length": length, "min-memory-length": length, "num-seeds": num_seeds}
    task |= {"total-timesteps": max(episodes * (length + 1), 16 * num_steps)}
    task |= {"num-envs": 16, "num-steps": num_steps, "update-epochs": 8}
    return task | own[model] | settings


def run(model, given, folder):
    """A run's directory, its eval.json, and columns for all its rows."""
    line = [x for name, value in given.items() for x in (f"--{name}", value)]
    run_dir = train(f"{SCRIPTS[model]}.py", line, folder)
    config, results = results_of(run_dir)
    columns = {"seconds_all_seeds": round(results["trained_after"]), "device": config["device"]}
    columns |= {"date": date.today().isoformat(), "commit": config["git_commit"][:7]}
    return run_dir, results, columns


def at_one_length(model, length, num_seeds, settings):
    """Rows of memory_length.csv."""
    with tempfile.TemporaryDirectory() as folder:
        given = flags(model, length, num_seeds, settings)
        run_dir, results, columns = run(model, given, folder)
        metrics = read(run_dir / "metrics.csv")
    rows = []
    for seed, mean in enumerate(results["mean_return"][str(length)]):
        mine = [row for row in metrics if int(row["seed"]) == seed]
        steps = [int(r["global_step"]) for r in mine if float(r["charts/episodic_return"]) >= 0.5]
        row = {"model": model, "length": length, "seed": seed, "gamma": settings["gamma"]}
        row |= {"greedy_return": round(mean, 4)}
        row |= {"episodes": int(mine[-1]["global_step"]) // (length + 1)}
        row |= {"episodes_to_return_0.5": steps[0] // (length + 1) if steps else None}
        rows.append(row | columns)
    return rows


def at_other_lengths(model, length, num_seeds):
    """Rows of memory_generalisation.csv."""
    given = {"memory-length": length, "num-seeds": num_seeds}
    if model == "Transformer":
        given["context-length"] = 2 * length + 2
    script = import_module(SCRIPTS[model])
    with tempfile.TemporaryDirectory() as folder:
        run_dir, _, columns = run(model, given, folder)
        args, state, keys = load(script, run_dir)
    ask = partial(script.evaluate, args=args, env=script.Environment(args))
    ask = jax.jit(jax.vmap(ask, (0, 0, None)))
    rows = []
    for asked in (int(length * factor) for factor in FACTORS):
        means = ask(state.params, keys, asked).mean(1).tolist()
        print(f"{model}, trained to {length}, asked at {asked}: {means}", flush=True)
        for seed, mean in enumerate(means):
            row = {"model": model, "length": length, "asked": asked, "seed": seed}
            rows.append(row | {"greedy_return": round(mean, 4)} | columns)
    return rows


def replace(path, rows, columns):
    """Puts rows in place of those that are equal in these columns."""

    def of(row):
        return tuple(str(row[name]) for name in columns)

    new = {of(row) for row in rows}
    rows = [row for row in read(path) if of(row) not in new] + rows
    numbers = "length", "asked", "seed"
    rows.sort(key=lambda r: (r["model"], *(int(r.get(name, 0)) for name in numbers)))
    write(path, rows)


def pick(rows, model, trained=None):
    """(3, n): where to draw the rows of a model, their returns and seeds."""
    numbers = []
    for row in (row for row in rows if row["model"] == model):
        length = int(row["length"])
        x = int(row["asked"]) / length if trained else length
        if trained in (None, length):
            numbers.append((x, float(row["greedy_return"]), int(row["seed"])))
    return np.array(numbers).reshape(-1, 3).T


def medians(ax, picked, style, **looks):
    """A line through the medians of the seeds, and a point a seed, a little apart."""
    x, y, seed = picked
    places = np.unique(x)
    ax.plot(places, [np.median(y[x == place]) for place in places], style, alpha=0.8, **looks)
    ax.plot(x * 1.03 ** (seed - 2), y, ".", color=looks["color"], markersize=5)


def plot(path, one_length, generalisation):
    """Left: asked at lengths not trained. Right: one length, ours above the paper's."""
    import matplotlib
    from matplotlib.figure import Figure

    trained = sorted({int(row["length"]) for row in generalisation})
    with matplotlib.rc_context({"font.size": 13, "axes.titlesize": 13}):
        figure = Figure(figsize=(9, 6.2), layout="constrained")
        axes = figure.subplot_mosaic([["left", "right"], ["key", "paper"]], height_ratios=[2, 1])
        left, right, paper, key = (axes[name] for name in ("left", "right", "paper", "key"))
        for i, name in enumerate(SCRIPTS):  # lines coincide: so widths differ
            looks = {"color": f"C{i}", "linewidth": (6, 3.5, 1.5)[i]}
            for length, style in zip(trained, ("-", "--", ":", "-."), strict=False):
                medians(left, pick(generalisation, name, length), style, **looks)
            medians(right, pick(one_length, name), "-", **looks)
            paper.plot(LENGTHS[:10], PAPER[name], "o-", alpha=0.8, markersize=4, **looks)
            key.plot([], [], label=name, **looks)
        key.plot([], [], "k.", label="one seed; lines: medians")
        key.plot([], [], ":", color="grey", label="guessing")
        for length, style in zip(trained[1:], ("--", ":", "-."), strict=False):
            key.plot([], [], style, color="black", label=f"trained to {length}")
        key.set_axis_off()
        key.legend(loc="center", ncols=2, fontsize="small")
        to = f" of 4 to {trained[0]} steps" if len(trained) == 1 else ""
        left.set(title=f"Trained on a spread{to}", xlabel="length asked / longest trained")
        right.set(title="Trained and asked at one length")
        paper.set(title="the same in the paper")
        for ax in (left, right, paper):
            ax.axhline(0, color="grey", linewidth=1, linestyle=":")
            ax.set_xscale("log", base=2)
            ax.set(ylabel="mean return", yticks=(-1, -0.5, 0, 0.5, 1), ylim=(-1.1, 1.1))
        left.axvline(1, color="grey", linewidth=1)
        left.set_xticks(FACTORS, ("1/2", *map(str, FACTORS[1:])))
        paper.set_ylim(-0.4, 1.15)
        for ax in (right, paper):
            ax.set(xlim=(3.4, 4900), xlabel="memory length, steps")
            ax.set_xticks(LENGTHS[::2], LENGTHS[::2])
        save(figure, path)


def main():
    args = tyro.cli(Args, description=__doc__)
    one_length, generalisation = HERE / "memory_length.csv", HERE / "memory_generalisation.csv"
    default = (SEARCH_LENGTH,) if args.search else (128,) if args.generalise else LENGTHS
    for model, length in product(args.models, default if args.lengths is None else args.lengths):
        if args.search:
            for settings in GRID:
                rows = at_one_length(model, length, SEARCH_SEEDS, settings)
                rows = [settings | row for row in rows]
                replace(HERE / "memory_search.csv", rows, ("model", "length", "seed", *settings))
        elif args.generalise:
            rows = at_other_lengths(model, length, args.num_seeds)
            replace(generalisation, rows, ("model", "length"))
        else:
            rows = at_one_length(model, length, args.num_seeds, SETTINGS)
            replace(one_length, rows, ("model", "length"))
    plot(HERE / "memory_length.png", read(one_length), read(generalisation))


if __name__ == "__main__":
    main()
