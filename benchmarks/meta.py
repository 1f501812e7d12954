"""Every sequence model on the suites of s5_ppo_meta.py: equal steps, parameters within 10 %.

    python benchmarks/meta.py --suites cartpole --models S5 none   # most of an hour on one core
    python benchmarks/meta.py                                      # everything: weeks on one core
    python benchmarks/meta.py --seeds                              # only draws and prints again

"none" is the network without memory. The run of a suite, a model and a seed lives in a folder of
--runs-dir, with its program. One that has finished is only read; one that has not goes on where it
stopped, so the same command resumes. No two commands at a time should have a run in common. Beside
this file, where new rows replace older ones of the same run, it writes:

- meta.csv: mean score over the second half of the trials of the run's own evaluation, of each task
  and memory, with its 95 % interval. Seconds are those of the training, without compiling.
- meta_curves.csv, .png: training score against steps; held-out score at the end.
- meta_adaptation.csv, .png: score by episode of the trial; where a trial is one, reward by step.
  Drawn for training tasks.

Prints interquartile means over tasks and seeds (Agarwal et al. 2021). Their 95 % intervals draw
seeds for each task anew, as if tasks had networks of their own: they are rather too narrow.
"""

import importlib.util
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import pandas as pd
import tyro
from common import HERE, ROOT, load, made_by, results_of, save
from compose import compose
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

# Steps of a run, steps that the Transformer attends to, flags. It attends to a rollout, as far as
# gradients reach, for 256 steps run a quarter as fast; through four blocks it hears of 4 x 127.
SUITES = {
    "goals": (15_000_000, 128, ["--log-interval", 4]),
    "cartpole": (15_000_000, 128, ["--log-interval", 4]),
    "classic": (96_000_000, 128, []),
    "dmc-small": (120_000_000, 128, ["--ent-coef", 0.002]),
}
# Blocks as many and as wide as S5's, of as many units as give 1 to 6 % more parameters than S5 has.
# The LSTM's slowest gates last as long as S5's slowest states, 2 / dt_min.
MODELS = {
    "S5": [],
    "LSTM": ["--hidden-size", 24, "--max-timescale", 2000],
    "Transformer": ["--mlp-size", 40],
    "none": ["--num-layers", 0, "--head-size", 200],
}
SOURCES = {"LSTM": "lstm_ppo", "Transformer": "transformer_ppo"}  # of what is composed
COLORS = {"S5": "C0", "LSTM": "C1", "Transformer": "C2", "none": "black"}
TABLES = ("meta", "meta_curves", "meta_adaptation")
RUN, BINS, LOWEST = ["suite", "model", "seed", "steps"], 50, -0.6  # score at which figures end


@dataclass
class Args:
    suites: tuple[Literal[tuple(SUITES)], ...] = tuple(SUITES)  # what to train on
    models: tuple[Literal[tuple(MODELS)], ...] = tuple(MODELS)  # what to train
    seeds: tuple[int, ...] = (0, 1, 2)  # one run each
    steps: int | None = None  # of a run, in whole log intervals; None: those of SUITES
    runs_dir: Path = Path("meta_runs")  # where the runs live


def flags_of(suite, model, seed=0, steps=None):
    usual, context, flags = SUITES[suite]
    flags = ["--suite", suite, "--seed", seed, "--total-timesteps", steps or usual, *flags]
    flags += MODELS[model] + ["--context-length", context] * (model == "Transformer")
    return list(map(str, flags))


def write_program(folder, model):
    """s5_ppo_meta.py with a model of MODELS, and its commit beside it; its path."""
    text, source = (ROOT / "s5_ppo_meta.py").read_text(), SOURCES.get(model, "s5_ppo")
    if model in SOURCES:
        text = compose((ROOT / f"{source}.py").read_text(), text)
    path = folder / f"{source}_meta.py"
    path.write_text(text)
    (folder / "commit").write_text(made_by()["commit"])  # a run may go on under a later one
    return path


def import_from(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def train(folder, model, flags):
    """Begins a run, or goes on with it. Whether it has finished shows in its folder."""
    begun = sorted(folder.glob("runs/*/checkpoint.gz"))
    if begun:
        (program,), flags = folder.glob("*.py"), ["--resume", begun[-1].parent.relative_to(folder)]
    else:
        folder.mkdir(parents=True, exist_ok=True)
        program = write_program(folder, model)
    command = [sys.executable, program.name, *map(str, flags)]
    print(folder, *command[1:], flush=True)
    subprocess.run(command, cwd=folder)


def rewards_by_step(script, args, state, key):
    """Mean raw reward in BINS parts of trials that are one episode, which none ends early."""
    env = script.Environment(args.train_tasks + args.held_out_tasks, args, trials_end=False)
    params, rows = jax.tree.map(lambda x: x[0], state.params), []
    trials = jax.jit(partial(script.run_trials, params, key, args=args, env=env))
    for memory, wiped in (("kept", False), ("wiped every step", True)):
        rewards = np.asarray(trials(wipe_episode=False, wipe_step=wiped)[0])  # (S, K E)
        width = len(rewards) // BINS
        rewards = rewards[: width * BINS].reshape(BINS, width, len(env.names), -1).mean((1, 3))
        for (i, k), mean in np.ndenumerate(rewards):
            rows.append((env.names[k], memory, "step", (i + 0.5) * width, mean))
    return pd.DataFrame(rows, columns=["task", "memory", "unit", "place", "mean"])


def tables_of(script, run_dir, model):
    """What a finished run adds to each of TABLES."""
    args, state, keys = load(script, run_dir)
    config, results = results_of(run_dir)
    metrics = pd.read_csv(run_dir / "metrics.csv")
    speed = metrics["charts/SPS"]  # so that the seconds of a resumed run are all there
    scores = pd.DataFrame(results["second_half"])[["task", "memory", "mean", "ci95"]].assign(
        parameters=sum(x[0].size for x in jax.tree.leaves(state.params)),
        seconds=round((args.log_interval * args.batch_size / speed).sum()),
        steps_per_second=results["steps_per_second"],
        device=config["device"],
        date=pd.Timestamp(run_dir.name.split("__")[-1][:8]).date(),
        commit=(run_dir.parents[1] / "commit").read_text(),
        run=run_dir.name,
    )
    some = metrics.index // -(-len(metrics) // 100)
    curves = {"step": ("global_step", "last"), "score": ("charts/score", "mean")}
    curves = metrics.groupby(some).agg(**curves)
    if args.trial_length == 1:
        places = rewards_by_step(script, args, state, keys[0])
    else:
        places = pd.read_csv(run_dir / "adaptation.csv").rename(columns={"episode": "place"})
        places = places[places["place"] != "second half"].assign(unit="episode")
    own = dict(zip(RUN, (args.suite, model, args.seed, metrics["global_step"].max()), strict=True))
    for table in (scores, places):
        trained = table["task"].isin(args.train_tasks)
        table.insert(0, "split", np.where(trained, "training", "held out"))
    if not args.num_layers:  # there is nothing to wipe
        scores, places = (x[x["memory"] == "kept"] for x in (scores, places))
    return [x.assign(**own)[[*RUN, *x.columns]] for x in (scores, curves, places)]


def stored(name):
    path = HERE / f"{name}.csv"
    if not path.exists():
        return pd.DataFrame(columns=[*RUN, "run"])
    return pd.read_csv(path, dtype={"commit": str})  # 21e9518 is no number


def store(name, new):
    old = stored(name).set_index(RUN)
    old = old[~old.index.isin(new.set_index(RUN).index)].reset_index()
    table = pd.concat([old, new] if len(old) else [new]).sort_values(RUN, kind="stable")
    table.to_csv(HERE / f"{name}.csv", index=False, float_format="%.5g")


def interquartile_mean(scores):
    """Of the last two axes, tasks and seeds: without the lowest and the highest quarter."""
    scores = np.sort(scores.reshape(*scores.shape[:-2], -1))
    cut = scores.shape[-1] // 4
    return scores[..., cut : scores.shape[-1] - cut].mean(-1)


def bootstrap(scores, resamples=5000):
    """95 % interval of the interquartile mean of scores (tasks, seeds), seeds drawn by task."""
    picks = np.random.default_rng(0).integers(scores.shape[1], size=(resamples, *scores.shape))
    means = interquartile_mean(np.take_along_axis(scores[None], picks, axis=-1))
    return np.percentile(means, (2.5, 97.5))


def summary(rows, split, memory="kept"):
    """Interquartile mean and both ends of its interval, of one suite and model; or None."""
    rows = rows[(rows["split"] == split) & (rows["memory"] == memory)]
    scores = rows.pivot(index="task", columns="seed", values="mean").to_numpy()
    return (interquartile_mean(scores), *bootstrap(scores)) if scores.size else None


def print_table(table):
    """Markdown: a line a suite and model, with blanks where there is no run."""

    def text(*which):
        if not (found := summary(*which)):
            return ""
        mean, low, high = found  # one seed has no interval
        return f"{mean:.2f} [{low:.2f}, {high:.2f}]" if low < high else f"{mean:.2f}"

    names = ["suite", "model", "training", "held out", "training, wiped every step"]
    names += ["parameters", "steps", "seconds a run", "seeds"]
    print(f"\n|{'|'.join(names)}|\n{'|---' * len(names)}|")
    for suite, model in product(SUITES, MODELS):
        mine = table[(table["suite"] == suite) & (table["model"] == model)]
        for steps, rows in mine.groupby("steps"):
            cells = [text(rows, "training"), text(rows, "held out")]
            cells.append(text(rows, "training", "wiped every step"))
            runs = rows.drop_duplicates("seed")
            cells += [
                f"{runs['parameters'].max():,}",
                f"{steps:,}",
                f"{runs['seconds'].mean():,.0f}",
            ]
            print("|" + "|".join([suite, model, *cells, " ".join(map(str, runs["seed"]))]) + "|")
        if not len(mine):
            print(f"|{suite}|{model}|{'|' * 6}not run|")


def draw(ax, rows, x, y, style="-"):
    """Mean over seeds and, behind it, their range, at each x that all tasks and seeds have."""
    for model, mine in rows.groupby("model"):
        seeds = mine.groupby([x, "seed"])[y].agg(["mean", "size"]).unstack()
        seeds = seeds[(seeds["size"] == seeds["size"].max().max()).all(axis=1)]["mean"]
        ax.plot(seeds.index, seeds.mean(axis=1), style, color=COLORS[model])
        ends = seeds.min(axis=1), seeds.max(axis=1)
        ax.fill_between(seeds.index, *ends, color=COLORS[model], alpha=0.2, linewidth=0)


def plot(*tables):
    """meta_curves.png and meta_adaptation.png: a panel a suite and number of its steps."""
    suites = list(tables[0].groupby(["suite", "steps"]).groups)
    size = {"figsize": (3.2 * len(suites) + 2.6, 3.6), "layout": "constrained"}
    figures = [Figure(**size), Figure(**size)]
    axes = zip(*(f.subplots(1, len(suites), squeeze=False)[0] for f in figures), strict=True)
    for (suite, steps), (above, below) in zip(suites, axes, strict=True):
        scores, curves, places = (x[(x["suite"] == suite) & (x["steps"] == steps)] for x in tables)
        draw(above, curves, "step", "score")
        for i, (model, rows) in enumerate(scores.groupby("model")):
            if held_out := summary(rows, "held out"):
                mean, low, high = held_out
                at = steps * (1.05 + 0.03 * i), mean, [[mean - low], [high - mean]]
                above.errorbar(*at, fmt="o", markersize=4, color=COLORS[model])
        title = f"{suite}, {steps / 1e6:.0f} million steps"
        above.set(title=title, xlabel="steps", ylabel="score")
        unit, places = places["unit"].iloc[0], places[places["split"] == "training"]
        for memory, style in (("kept", "-"), (f"wiped every {unit}", ":")):
            draw(below, places[places["memory"] == memory], "place", "mean", style)
        below.set(title=title, xlabel=f"{unit} of the trial")
        below.set_ylabel("score" if unit == "episode" else "reward of a step")
    models = [Line2D([], [], color=color, label=model) for model, color in COLORS.items()]
    looks = {"training, range of seeds": {}, "held out, 95 %": {"marker": "o", "linestyle": ""}}
    looks = looks, {"memory kept": {}, "wiped every episode, or step": {"linestyle": ":"}}
    for figure, name, more in zip(figures, TABLES[1:], looks, strict=True):
        for ax in figure.axes:
            low, high = ax.get_ylim()
            ax.set_ylim(max(low, LOWEST) if high > LOWEST else low, high)
        more = [Line2D([], [], color="grey", label=label, **x) for label, x in more.items()]
        figure.legend(handles=[*models, *more], loc="outside right upper")
        save(figure, HERE / f"{name}.png")


def main():
    args = tyro.cli(Args, description=__doc__)
    for suite, model, seed in product(args.suites, args.models, args.seeds):
        folder = args.runs_dir / f"{suite}-{model}-{seed}-{args.steps or SUITES[suite][0]}"
        if not any(folder.glob("runs/*/eval.json")):
            train(folder, model, flags_of(suite, model, seed, args.steps))
        for path in folder.glob("runs/*/eval.json"):
            if path.parent.name not in stored("meta")["run"].values:
                (program,) = folder.glob("*.py")
                tables = tables_of(import_from(program), path.parent, model)
                for name, table in zip(TABLES[::-1], tables[::-1], strict=True):
                    store(name, table)  # meta.csv, where it is looked up, last
    tables = list(map(stored, TABLES))
    if len(tables[0]):
        plot(*tables)
    print_table(tables[0])


if __name__ == "__main__":
    main()
