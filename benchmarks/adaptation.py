"""What a network learned in context: trials on fresh matrices, with its memory kept and wiped.

    python benchmarks/adaptation.py --suite goals       # trains 6 runs: 40 minutes on one core
    python benchmarks/adaptation.py --suite cartpole    # 25 minutes
    python benchmarks/adaptation.py --suite classic     # 3.5 hours on one core
    python benchmarks/adaptation.py --suite classic runs/A runs/B     # of finished runs
    python benchmarks/adaptation.py runs/A runs/B --out long --trial-length 32
    python benchmarks/adaptation.py runs/A --out new --held-out-tasks pendulum-heavy

A suite stands for seeds 0, 1 and 2 of s5_ppo_meta.py with FLAGS, with memory and without
(--num-layers 0), trained in runs/, where no other run may be started meanwhile. All runs are then
evaluated with the flags given, which takes a minute or more each; the runs stay as they are. Writes
OUT.csv, the script's adaptation.csv of each seed; OUT.png, score by episode of the trial; of
several tasks OUT_scores.png, a dot a seed; and prints the scores over the second half of trials as
Markdown. Of a suite, OUT is SUITE_adaptation beside this file (and SUITE_scores.png), and its rows
of adaptation_runs.csv there are replaced. Scores: 0 the better of random actions and none, 1 a
specialist.
"""

import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro
from common import HERE, ROOT, load, read, results_of, save, train, write
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import s5_ppo_meta
from s5_ppo_meta import Environment, refuse

LONG = ["--total-timesteps", "96000000"]
FLAGS = {"goals": [], "cartpole": [], "classic": LONG}
COLORS = {"kept": "C0", "wiped every episode": "C1", "wiped every step": "C2"}
COLORS |= {"trained without": "black"}
LOWEST = -0.6  # score at which the figures end


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()  # finished runs; else a suite is trained
    suite: Literal[tuple(FLAGS)] | None = None  # suite of s5_ppo_meta.py
    out: Path | None = None  # files begin with this
    held_out_tasks: tuple[str, ...] | None = None  # in place of the run's own
    eval_trials: int | None = None  # in place of the run's own
    trial_length: int | None = None  # in place of the run's own


def train_suite(suite):
    """Directories of six new runs."""
    flags, run_dirs = ["--suite", suite, *FLAGS[suite]], []
    for layers, seed in ((layers, seed) for layers in (4, 0) for seed in range(3)):
        given = [*flags, "--seed", seed, "--num-layers", layers]
        run_dirs.append(train("s5_ppo_meta.py", given, ROOT))
    return run_dirs


def evaluate(run_dir, settings):
    """Args, and the rows of each seed."""
    args, state, keys = load(s5_ppo_meta, run_dir)
    with refuse(run_dir, ValueError):
        args = replace(args, num_seeds=1, **settings)
        env = Environment(args.train_tasks + args.held_out_tasks, args, trials_end=False)
    rows = []
    for i in range(len(keys)):
        print(f"\n{run_dir}, seed {args.seed + i}")
        one = jax.tree.map(lambda x, i=i: x[i : i + 1], state)
        with tempfile.TemporaryDirectory() as folder:
            s5_ppo_meta.report(Path(folder), one, keys[i : i + 1], {}, args, env)
            written = read(Path(folder, "adaptation.csv"))
        if not args.num_layers:  # there is nothing to wipe
            written = [r | {"memory": "trained without"} for r in written if r["memory"] == "kept"]
        numbers = ({x: f"{float(row[x]):.4g}" for x in ("mean", "ci95")} for row in written)
        own = {"run": run_dir.name, "seed": args.seed + i}
        rows += [own | row | short for row, short in zip(written, numbers, strict=True)]
    return args, rows


def pick(rows, task, memory, name, half=False):
    """A column of the rows as an array (seeds, episodes), as far as all seeds have as many.

    half: of the second halves of trials, (seeds, 1).
    """
    wanted, seeds = (task, memory, half), {}
    for row in rows:
        if (row["task"], row["memory"], row["episode"] == "second half") == wanted:
            seeds.setdefault((row["run"], row["seed"]), []).append(float(row[name]))
    shortest = min(map(len, seeds.values()), default=0)
    return np.array([x[:shortest] for x in seeds.values()]).reshape(len(seeds), shortest)


def print_table(rows, tasks, held_out):
    """Markdown: scores over the second half of trials, a number a seed, and their intervals."""

    def text(numbers):
        return " ".join(f"{x:.2f}" for x in np.ravel(numbers)) or "–"

    scores = {
        task: [pick(rows, task, memory, "mean", half=True) for memory in COLORS] for task in tasks
    }
    for name, of_group in (("training", False), ("held out", True)):
        members = [scores[task] for task in tasks if (task in held_out) == of_group]
        if len(members) > 1:
            scores[f"**mean, {name}**"] = [np.mean(x, 0) for x in zip(*members, strict=True)]
    print("\n| score |", " | ".join(COLORS), "|\n|---|" + len(COLORS) * "---|")
    for task, columns in scores.items():
        print(f"| {task}{', held out' * (task in held_out)} |", " | ".join(map(text, columns)), "|")
    print("\n| 95 % over trials, widest seed |", " | ".join(COLORS), "|\n|---|---|---|---|---|")
    for task in tasks:
        widths = (pick(rows, task, memory, "ci95", half=True) for memory in COLORS)
        print(f"| {task} |", " | ".join(f"{x.max():.2f}" if x.size else "–" for x in widths), "|")


def plot(rows, tasks, args, path):
    """Score against the episode of a trial: mean over seeds, bold, and each seed."""
    columns = min(len(tasks), 3)
    lines = -(-len(tasks) // columns)
    size = max(3 * columns + 0.5, 6), 2.8 * lines + 0.9
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for ax in axes.flat[len(tasks) :]:
        ax.set_axis_off()
    for task, ax in zip(tasks, axes.flat, strict=False):
        for memory, color in COLORS.items():
            mean = pick(rows, task, memory, "mean")
            if mean.size:
                ax.plot(mean.T, color=color, alpha=0.35, linewidth=0.8)
                ax.plot(mean.mean(0), color=color)
        title = task + " (held out)" * (task in args.held_out_tasks)
        ax.set(title=title, xlabel="episode of the trial", ylim=(LOWEST, 1.1))
    for ax in axes[:, 0]:
        ax.set_ylabel("score")
    save_with_legend(figure, rows, path)


def save_with_legend(figure, rows, path):
    present = {row["memory"] for row in rows}
    lines = [
        Line2D([], [], color=color, label=memory.replace("kept", "memory kept"))
        for memory, color in COLORS.items()
        if memory in present
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=2)
    save(figure, path)


def plot_scores(rows, tasks, held_out, path):
    """Score over the second half of a trial: a row a task, a dot a seed."""
    tasks = sorted(tasks, key=lambda task: task in held_out)
    figure = Figure(figsize=(7, 0.34 * len(tasks) + 1.4), layout="constrained")
    ax = figure.subplots()
    for i, (memory, color) in enumerate(COLORS.items()):
        for place, task in enumerate(tasks, start=1):
            score = pick(rows, task, memory, "mean", half=True).ravel()
            y = np.full(len(score), place + 0.16 * (i - 1.5))
            ax.plot(np.maximum(score, LOWEST), y, "o", color=color, markersize=5)
            below = score < LOWEST  # a triangle where a dot lies further left
            ax.plot(np.full(below.sum(), LOWEST), y[below], "<", color=color, markersize=8)
    border = sum(task not in held_out for task in tasks) + 0.5
    if border < len(tasks):
        ax.axhline(border, color="black", linewidth=0.8)
        ax.text(LOWEST + 0.02, border + 0.1, "held out:", va="top", fontsize="small")
    for score in (0, 1):
        ax.axvline(score, color="grey", linestyle=":", linewidth=1)
    ax.set_yticks(range(1, len(tasks) + 1), tasks)
    ax.invert_yaxis()
    ax.set(xlim=(LOWEST - 0.05, 1.1), xlabel="score: 0 random actions or none, 1 a specialist")
    save_with_legend(figure, rows, path)


def table_row(run_dir, suite, args):
    """A row of adaptation_runs.csv."""
    config, results = results_of(run_dir)
    row = {"suite": suite, "seed": args.seed, "num_layers": args.num_layers}
    row |= {"steps": args.num_updates * args.batch_size, "device": config["device"]}
    row |= {"trained_after": round(results["trained_after"]), "run": run_dir.name}
    row |= {"steps_per_second": results["steps_per_second"], "commit": config["git_commit"][:7]}
    return row | {"command": " ".join(["s5_ppo_meta.py", *map(str, config["flags"])])}


def main():
    args = tyro.cli(Args, description=__doc__)
    if not args.suite and not (args.runs and args.out):
        sys.exit("error: name a --suite, or finished runs and --out")
    out = args.out or HERE / f"{args.suite}_adaptation"
    names = ("held_out_tasks", "eval_trials", "trial_length")
    settings = {name: x for name in names if (x := getattr(args, name)) is not None}
    run_dirs = args.runs or train_suite(args.suite)
    evaluated = [evaluate(run_dir, settings) for run_dir in run_dirs]
    rows, last = [row for _, rows in evaluated for row in rows], evaluated[-1][0]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    if args.suite and not args.out:
        table = HERE / "adaptation_runs.csv"
        kept = [row for row in read(table) if row["suite"] != args.suite]
        new = [
            table_row(run, args.suite, x) for run, (x, _) in zip(run_dirs, evaluated, strict=True)
        ]
        write(table, kept + new)
    write(out.with_name(f"{out.name}.csv"), rows)
    plot(rows, tasks, last, out.with_name(f"{out.name}.png"))
    if len(tasks) > 1:
        name = f"{out.name.removesuffix('_adaptation')}_scores.png"
        plot_scores(rows, tasks, last.held_out_tasks, out.with_name(name))
    print_table(rows, tasks, last.held_out_tasks)


if __name__ == "__main__":
    main()
