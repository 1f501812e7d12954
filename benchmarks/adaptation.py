"""What a network learned in context: trials on fresh matrices, with its memory kept and wiped.

    python benchmarks/meta.py --suites goals --models S5 none    # trains runs, in meta_runs/
    python benchmarks/adaptation.py meta_runs/goals-{S5,none}-*/runs/* --out goals_adaptation
    python benchmarks/adaptation.py runs/A runs/B --out long --trial-length 32
    python benchmarks/adaptation.py runs/A --out new --held-out-tasks pendulum-heavy

Evaluates finished runs of s5_ppo_meta.py, with S5 or without memory, with the flags given, which
takes a minute or more each; the runs stay as they are. Writes OUT.csv, the script's adaptation.csv
of each seed, and OUT.png, score by episode of the trial; prints the scores over the second half of
trials as Markdown. Scores: 0 the better of random actions and none, 1 a specialist.
"""

import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import tyro
from common import load, read, save, write
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import s5_ppo_meta
from s5_ppo_meta import Environment, refuse

COLORS = {"kept": "C0", "wiped every episode": "C1", "wiped every step": "C2"}
COLORS |= {"trained without": "black"}
LOWEST = -0.6  # score at which the figures end


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]  # finished runs
    out: Path  # files begin with this
    held_out_tasks: tuple[str, ...] | None = None  # in place of the run's own
    eval_trials: int | None = None  # in place of the run's own
    trial_length: int | None = None  # in place of the run's own


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
    lines = [
        Line2D([], [], color=color, label=memory.replace("kept", "memory kept"))
        for memory, color in COLORS.items()
        if any(row["memory"] == memory for row in rows)
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=2)
    save(figure, path)


def main():
    args = tyro.cli(Args, description=__doc__)
    if not args.runs:
        sys.exit("error: name finished runs")
    names = ("held_out_tasks", "eval_trials", "trial_length")
    settings = {name: x for name in names if (x := getattr(args, name)) is not None}
    evaluated = [evaluate(run_dir, settings) for run_dir in args.runs]
    rows, last = [row for _, rows in evaluated for row in rows], evaluated[-1][0]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    write(args.out.with_name(f"{args.out.name}.csv"), rows)
    plot(rows, tasks, last, args.out.with_name(f"{args.out.name}.png"))
    print_table(rows, tasks, last.held_out_tasks)


if __name__ == "__main__":
    main()
