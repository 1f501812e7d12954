"""What S5, an LSTM and a Transformer remember: at one memory length, and at lengths not trained.

    python benchmarks/memory_length.py --models S5 --lengths 128            # three minutes
    python benchmarks/memory_length.py --one-length --models LSTM --lengths 4 16 64
    python benchmarks/memory_length.py --lengths                            # draws the tables again

Every run has its script's defaults, which follow from --memory-length. By default environments have
lengths spread up to it, and the agent is asked at FACTORS times that. With --one-length it is
trained and asked at that length alone, as in the paper, on 4,000 episodes or a few more (the paper:
10,000). The Transformer attends to the last 2 x LENGTH steps: it cannot see a cue beyond.

Returns are means of 128 greedy answers: 1 if all are right, 0 if guessed. Writes a row a model,
length and seed to memory_length.csv and memory_generalisation.csv, and draws memory_length.png.
"""

import tempfile
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Literal

import jax
import pandas as pd
import tyro
from common import HERE, load, results_of, save, train

# The paper's figure, mean returns read off to about 0.02; A2C, 1 environment, 10,000 episodes.
PAPER = {
    "S5": (1, 1, 1, 1, 1, 1, 1, 1, 0.5, 0),
    "LSTM": (1, 1, 0.85, 0.5, 0.1, 0.2, 0.35, 0.25, -0.05, 0.1),
    "Transformer": (1, 1, 1, 0.75, 1, 1, 1, 0.7, -0.25, 0.05),  # self-attention
}
LENGTHS, FACTORS = tuple(2**n for n in range(2, 13)), (0.5, 1, 2, 4, 8, 16, 32, 64)
SCRIPTS = {"S5": "s5_ppo_memory", "LSTM": "lstm_ppo", "Transformer": "transformer_ppo"}
ONE_LENGTH, SPREAD = HERE / "memory_length.csv", HERE / "memory_generalisation.csv"
KEY = ["model", "trained", "asked", "seed"]


@dataclass
class Args:
    models: tuple[Literal[tuple(SCRIPTS)], ...] = tuple(SCRIPTS)  # what to train
    lengths: tuple[int, ...] = (128,)  # longest memory trained
    num_seeds: int = 5  # seeds 0, 1, ... of each length
    one_length: bool = False  # train and ask at that length alone
    run: Path | None = None  # a finished run of that model and length, instead of training one


def rows_of(model, run_dir, asked):
    """Rows of a table from a finished run: what each seed answers at these lengths."""
    script = import_module(SCRIPTS[model])
    args, state, keys = load(script, run_dir)
    config, results = results_of(run_dir)
    ask = partial(script.evaluate, args=args, env=script.Environment(args))
    ask = jax.jit(jax.vmap(ask, (0, 0, None)))
    made = {"steps_a_seed": args.num_updates * args.batch_size, "device": config["device"]}
    made |= {"seconds_all_seeds": round(results["trained_after"])}
    made |= {"date": date.today().isoformat(), "commit": config["git_commit"][:7]}
    rows = []
    for length in asked:
        returns = ask(state.params, keys, length).mean(1).tolist()
        print(f"{model}, trained to {args.memory_length}, asked at {length}: {returns}", flush=True)
        for seed, mean in enumerate(returns, args.seed):
            row = {"model": model, "trained": args.memory_length, "asked": length, "seed": seed}
            rows.append(row | {"greedy_return": round(mean, 4)} | made)
    return pd.DataFrame(rows)


def read(path):
    empty = pd.DataFrame(columns=[*KEY, "greedy_return"])
    return pd.read_csv(path) if path.exists() else empty


def plot(path, one_length, spread):
    """Left: trained to 128, asked further. Right: one length, ours above the paper's."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 13, "axes.titlesize": 13}):
        figure = Figure(figsize=(9, 6.2), layout="constrained")
        axes = figure.subplot_mosaic([["left", "right"], ["key", "paper"]], height_ratios=[2, 1])
        left, right, paper, key = (axes[name] for name in ("left", "right", "paper", "key"))
        tables = (left, spread[spread.trained == 128]), (right, one_length)
        for i, model in enumerate(SCRIPTS):  # lines coincide: so widths differ
            looks = {"color": f"C{i}", "linewidth": (5, 3, 1.5)[i]}
            for ax, table in tables:
                rows = table[table.model == model]
                mean = rows.groupby("asked").greedy_return.mean()
                ax.plot(mean.index, mean, alpha=0.8, **looks)
                apart = rows.asked * 1.03 ** (rows.seed - 2)
                ax.plot(apart, rows.greedy_return, ".", color=looks["color"])
            paper.plot(LENGTHS[: len(PAPER[model])], PAPER[model], "o-", markersize=4, **looks)
            key.plot([], [], label=model, **looks)
        key.plot([], [], "k.", label="one seed; lines: means")
        key.plot([], [], ":", color="grey", label="guessing")
        left.set(title="Trained on 4 to 128 steps")
        shade = {"color": "grey", "alpha": 0.2, "linewidth": 0}
        left.axvspan(4, 128, **shade)
        key.fill_between([], [], label="trained", **shade)
        key.set_axis_off()
        key.legend(loc="center")
        right.set(title="Trained and asked at one length")
        paper.set(title="the same in the paper")
        for ax in (left, right, paper):
            ax.axhline(0, color="grey", linewidth=1, linestyle=":")
            ax.set_xscale("log", base=2)
            ax.set_xticks(LENGTHS[::2], LENGTHS[::2])
            ax.set(xlim=(3.4, 9800), xlabel="memory length, steps")
            ax.set(ylabel="mean return", yticks=(0, 0.5, 1), ylim=(-0.4, 1.1))
        save(figure, path)


def main():
    args = tyro.cli(Args, description=__doc__)
    path = ONE_LENGTH if args.one_length else SPREAD
    for model, length in product(args.models, args.lengths):
        flags = ["--memory-length", length, "--num-seeds", args.num_seeds]
        flags += ["--min-memory-length", length] if args.one_length else []
        asked = [length] if args.one_length else [int(length * factor) for factor in FACTORS]
        with tempfile.TemporaryDirectory() as folder:
            run_dir = args.run or train(f"{SCRIPTS[model]}.py", flags, folder)
            rows = rows_of(model, run_dir, asked)
        table = pd.concat([read(path), rows]).drop_duplicates(KEY, keep="last").sort_values(KEY)
        table.to_csv(path, index=False)
    plot(HERE / "memory_length.png", read(ONE_LENGTH), read(SPREAD))


if __name__ == "__main__":
    main()
