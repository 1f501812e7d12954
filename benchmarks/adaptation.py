"""Learning in context with three seeds, beside a network without memory: the tables and figures of the README.

    python benchmarks/adaptation.py                             # suite cartpole, 20 to 40 minutes on one core
    python benchmarks/adaptation.py --suite classic             # four and a half hours on one core; bodies as well
    python benchmarks/adaptation.py --suite locomotion          # for a GPU: ten minutes a run on an H100
    python benchmarks/adaptation.py --suite classic --runs runs/A runs/B    # finished runs, in place of training
    python benchmarks/adaptation.py --suite classic --runs runs/A runs/B --held-out-tasks cartpole-long pendulum-heavy

Trains s5_ppo_meta.py with FLAGS and seeds 0, 1 and 2, with memory and without (--num-layers 0; in the stored tables of
classic and bodies seed 0 alone), in runs/, where no other run may be started meanwhile. Writes, beside this file,
adaptation_runs.csv, a row a run; SUITE_adaptation.csv, the adaptation.csv of all runs; SUITE_adaptation.png, curves by
episode; SUITE_scores.png, of several tasks; and prints the tables of META_LOG.md. Scores: 0 is the better of random
actions and none, 1 a specialist. With --held-out-tasks copies of the runs are evaluated on these instead of the suite's
own, and SUITE_held_out.{csv,png} are written.
"""

import csv
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from s5_ppo_meta import SUITES, TASKS  # noqa: E402

LONG = ["--anneal-lr", "--total-timesteps", "96000000"]
GPU = ["--anneal-lr", "--total-timesteps", "160000000", "--num-envs", "7680", "--num-steps", "64"]
GPU += ["--num-minibatches", "96", "--log-interval", "5"]
FLAGS = {
    "cartpole": [],
    "classic": ["--suite", "classic", *LONG],
    "bodies": ["--suite", "bodies", *LONG],
    "locomotion": ["--suite", "locomotion", *GPU],
}
RUNS = [["--seed", str(seed), "--num-layers", str(layers)] for layers in (4, 0) for seed in (0, 1, 2)]
MEMORIES = ("memory kept", "wiped every episode", "wiped every step", "trained without")
LOWEST = -0.6  # score at which the figures end


@dataclass
class Args:
    suite: Literal[tuple(FLAGS)] = "cartpole"
    """suite of s5_ppo_meta.py"""
    runs: tuple[Path, ...] = ()
    """finished runs to read instead of training"""
    held_out_tasks: tuple[str, ...] = ()
    """tasks to evaluate finished runs on, if not those that they were evaluated on"""


def train(flags):
    """Runs the script in the repository's root and returns the new run directory."""
    folder = HERE.parent / "runs"
    before = set(folder.glob("*"))
    subprocess.run([sys.executable, "s5_ppo_meta.py", *flags], cwd=HERE.parent, check=True)
    (run_dir,) = set(folder.glob("*")) - before
    return run_dir


def evaluate(run_dir, held_out_tasks, folder):
    """Evaluates a copy of a run, so that the run keeps its own evaluation; returns the copy."""
    copy = shutil.copytree(run_dir, Path(folder) / run_dir.name)
    command = [sys.executable, str(HERE.parent / "s5_ppo_meta.py"), "--eval-only", str(copy)]
    subprocess.run([*command, "--held-out-tasks", *held_out_tasks], check=True)
    return copy


def read(path):
    if not path.exists():
        return []
    with path.open(newline="") as f:
        return list(csv.DictReader(f))


def write(path, rows):
    with path.open("w", newline="") as f:
        table = csv.DictWriter(f, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def load(run_dir, suite):
    """A row for adaptation_runs.csv, and rows for SUITE_adaptation.csv."""
    config, timing = (json.loads((run_dir / name).read_text()) for name in ("config.json", "eval.json"))
    args = config["args"]
    which = {"suite": suite, "seed": args["seed"], "num_layers": args["num_layers"]}
    (*_, last) = read(run_dir / "metrics.csv")
    run = which | {"steps": last["global_step"], "total_seconds": round(timing["total_seconds"])}
    run |= {"steps_per_second": round(timing["steps_per_second"]), "device": config["device"]}
    run |= {"run": run_dir.name, "command": config["command"]}
    rows = []
    for row in read(run_dir / "adaptation.csv"):
        if args["num_layers"] == 0:
            if row["memory"] != "kept":
                continue  # there is nothing to wipe
            row["memory"] = "trained without"
        numbers = ("x", "mean", "interval", "raw_return")
        numbers = {name: f"{float(row[name]):.4g}" if row[name] else "" for name in numbers}
        rows.append({"seed": args["seed"]} | row | numbers | {"memory": row["memory"].replace("kept", "memory kept")})
    return run, rows


def pick(rows, task, memory, against, name):
    """A column of the rows as an array (seeds, x), as far as all seeds have an x."""
    mine = [r for r in rows if (r["task"], r["memory"], r["against"]) == (task, memory, against)]
    runs = [[float(r[name] or "nan") for r in mine if r["seed"] == seed] for seed in sorted({r["seed"] for r in mine})]
    shortest = min(map(len, runs), default=0)
    return np.array([run[:shortest] for run in runs]).reshape(len(runs), shortest)


def print_table(rows, tasks, held_out):
    """The second halves of trials, a number a seed, and what else the README tells of them."""

    def text(numbers, form=".2f"):
        return " / ".join(f"{x:{form}}" for x in numbers) or "–"

    scores = {task: [pick(rows, task, memory, "second half", "mean").sum(1) for memory in MEMORIES] for task in tasks}
    for name, of_group in (("training", False), ("held-out", True)):
        members = [scores[task] for task in tasks if (task in held_out) == of_group]
        if members:
            scores[f"**mean of the {name} tasks**"] = [np.mean(x, axis=0) for x in zip(*members, strict=True)]
    print("\n| task |", " | ".join(MEMORIES), "|\n|---|---|---|---|---|")
    for task, columns in scores.items():
        print(f"| {task}{', held out' if task in held_out else ''} |", " | ".join(map(text, columns)), "|")
    for task in tasks:
        widest = [pick(rows, task, memory, "second half", "interval").max(initial=0) for memory in MEMORIES]
        print(f"{task}: widest interval over trials, column by column: ±", text(widest))
        for memory in MEMORIES[1:3]:
            worth = [pick(rows, task, memory, "kept minus this", name)[:, 0] for name in ("mean", "interval")]
            print(f"    kept minus {memory}: {text(worth[0])} ± {text(worth[1])}")
        for memory in MEMORIES:
            score = pick(rows, task, memory, "episode", "mean").T
            returns = TASKS[task].zero + score * (TASKS[task].one - TASKS[task].zero)
            shown = (f"{i}: {text(returns[i], '.4g')}" for i in (0, 1, 3, 15, 31) if i < len(returns))
            print(f"    {memory}, return by episode:", "; ".join(shown))


def plot(rows, tasks, held_out, path):
    """Score against the episode of a trial: mean over seeds and each seed."""
    columns = min(len(tasks), 5)
    lines = -(-len(tasks) // columns)
    size = max(3 * columns + 1, 6.5), max(2.8 * lines, 3.4)  # the legend has to fit below a single task too
    fig, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for ax in axes.flat[len(tasks) :]:
        ax.set_axis_off()
    for task, ax in zip(tasks, axes.flat, strict=False):
        for memory, color in zip(MEMORIES, ("C0", "C1", "C2", "grey"), strict=True):
            mean, trials = (pick(rows, task, memory, "episode", name) for name in ("mean", "trials"))
            if mean.size:  # and leave out episodes that few trials came to: they were chosen by being short
                many = np.flatnonzero((trials >= 0.5 * trials[:, :1]).all(0))
                ax.plot(many, mean[:, many].T, color=color, alpha=0.35, linewidth=0.8)
                ax.plot(many, mean[:, many].mean(0), color=color, label=memory)
        ax.set(xlabel="episode of the trial", ylabel="score", title=task + (" (held out)" if task in held_out else ""))
        ax.set_ylim(LOWEST, 1.1)  # what is worse is cut off
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="x-small")
    fig.savefig(path, dpi=150)


def plot_scores(rows, tasks, held_out, path):
    """Score over the second half of a trial: a row a task, a dot a seed, a colour a kind of memory."""
    tasks = sorted(tasks, key=lambda task: task in held_out)
    fig, ax = plt.subplots(figsize=(7, 0.34 * len(tasks) + 1.2), layout="constrained")
    for memory, color, shift in zip(MEMORIES, ("C0", "C1", "C2", "grey"), (-0.24, -0.08, 0.08, 0.24), strict=True):
        for place, task in enumerate(tasks):
            score = pick(rows, task, memory, "second half", "mean").ravel()
            shown = np.maximum(score, LOWEST)
            label = memory if place == 0 else None
            ax.plot(shown, np.full(len(score), place + shift), "o", color=color, markersize=4, alpha=0.8, label=label)
            below = shown[score < LOWEST]  # a triangle where a dot lies further left
            ax.plot(below, np.full(len(below), place + shift), "<", color=color, markersize=7)
    border = sum(task not in held_out for task in tasks) - 0.5
    ax.axhline(border, color="black", linewidth=0.8)
    ax.text(LOWEST + 0.02, border + 0.1, "held out:", va="top", fontsize="x-small")
    for score in (0, 1):
        ax.axvline(score, color="grey", linestyle=":", linewidth=1)
    ax.set_yticks(range(len(tasks)), tasks)
    ax.invert_yaxis()
    ax.set(xlim=(LOWEST - 0.05, 1.1), xlabel="score: 0 random actions or none, 1 a specialist")
    fig.legend(loc="outside lower center", ncols=4, fontsize="x-small")
    fig.savefig(path, dpi=150)


def main():
    args = tyro.cli(Args, description=__doc__)
    run_dirs = args.runs or [train(FLAGS[args.suite] + flags) for flags in RUNS]
    with tempfile.TemporaryDirectory() as folder:
        if args.held_out_tasks:
            run_dirs = [evaluate(path, args.held_out_tasks, folder) for path in run_dirs]
        loaded = [load(path, args.suite) for path in run_dirs]
    runs, rows = [run for run, _ in loaded], [row for _, rows in loaded for row in rows]
    held_out = args.held_out_tasks or SUITES[args.suite].held_out_tasks
    if not args.held_out_tasks:
        others = [row for row in read(HERE / "adaptation_runs.csv") if row["suite"] != args.suite]
        write(HERE / "adaptation_runs.csv", others + runs)
    name = f"{args.suite}_{'held_out' if args.held_out_tasks else 'adaptation'}"
    write(HERE / f"{name}.csv", rows)
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    plot(rows, tasks, held_out, HERE / f"{name}.png")
    if len(tasks) > 1:
        plot_scores(rows, tasks, held_out, HERE / f"{name.replace('adaptation', 'scores')}.png")
    print_table(rows, tasks, held_out)


if __name__ == "__main__":
    main()
