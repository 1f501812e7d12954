"""Success at memory lengths from 4 to 4,096 after at most 10,000 episodes of each seed, beside the paper's figure.

    python benchmarks/memory_length.py                              # S5, every length, 5 seeds: hours on a CPU
    python benchmarks/memory_length.py --lengths 512                # one length; the table keeps the others
    python benchmarks/memory_length.py --models LSTM --lengths 512  # another model, which gets as many steps
    python benchmarks/memory_length.py --lengths                    # draw the stored table again
    python benchmarks/memory_length.py --search --models LSTM       # what SETTINGS was chosen from

Each length and model is one run of its script with the flags that `flags` makes of it. GAE's lambda and the discount,
step size and entropy bonus are searched: GRID at memory length SEARCH_LENGTH, two seeds, memory_search.csv, where the
bonus ended at zero. SETTINGS, for all models, is among the best of each. Stored rows of the Transformer at 1,024 are
with a discount of 0.99 (column `gamma`) and a bonus that fell linearly to zero.
Writes memory_length.csv, a row a model, length and seed, and memory_length.png beside this file.
"""

import csv
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from datetime import date
from itertools import product
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).resolve().parent
LENGTHS = tuple(2**n for n in range(2, 13))
# The paper's figure, mean return read off the plot to about 0.02; A2C, one environment, 10,000 episodes, 5 seeds.
PAPER = {
    "S5": {4: 1, 8: 1, 16: 1, 32: 1, 64: 1, 128: 1, 256: 1, 512: 1, 1024: 0.5, 2048: 0},
    "LSTM": {4: 1, 8: 1, 16: 0.85, 32: 0.5, 64: 0.1, 128: 0.2, 256: 0.35, 512: 0.25, 1024: -0.05, 2048: 0.1},
    "self-attention": {4: 1, 8: 1, 16: 1, 32: 0.75, 64: 1, 128: 1, 256: 1, 512: 0.7, 1024: -0.25, 2048: 0.05},
}


SCRIPTS = {"S5": "s5_ppo_memory.py", "LSTM": "lstm_ppo.py", "Transformer": "transformer_ppo.py"}
SEARCH_LENGTH, SEARCH_SEEDS = 256, 2
# Of each seed, about; the paper has 10,000 at every length.
EPISODES = {256: 2500, 1024: 2000, 2048: 2500, 4096: 5100}  # 5,000 at other lengths
# Lambda and discount, step size, entropy bonus. One action counts and is paid at once, so that credit for the ones
# before it, and whatever the critic says of them, is noise: both 0 (LOG.md, item 21).
NAMES = ("gae-lambda", "gamma", "learning-rate", "ent-coef")
CREDIT = ((0.0, 0.0), (0.0, 0.99), (0.95, 0.99))
GRID = [dict(zip(NAMES, (*credit, *rest), strict=True)) for credit, *rest in product(CREDIT, (3e-4, 1e-3), (0.01, 0.1))]
SETTINGS = dict(zip(NAMES, (0.0, 0.0, 3e-4, 0.1), strict=True))


@dataclass
class Args:
    models: tuple[Literal["S5", "LSTM", "Transformer"], ...] = ("S5",)
    """scripts to run"""
    lengths: list[int] = field(default_factory=lambda: list(LENGTHS))
    """memory lengths to run"""
    num_seeds: int = 5
    """seeds 0, 1, ... of each length"""
    episodes: int | None = None
    """training episodes of each seed; None stands for EPISODES"""
    search: bool = False
    """try GRID at SEARCH_LENGTH instead, and write memory_search.csv"""


def flags(model, length, args, settings):
    """The rollout spans two episodes, so that every gradient reaches from the question back to its cue."""
    num_steps, episodes = max(128, 2 * length), args.episodes or EPISODES.get(length, 5000)
    own = {
        "S5": {"dt-min": min(1e-3, 0.4 / length), "dt-max": min(0.1, 12.8 / length)},
        "LSTM": {"max-timescale": max(2000, 5 * length)},
        "Transformer": {"context-length": length + 2},
    }
    return own[model] | {
        "memory-length": length,
        "num-seeds": args.num_seeds,
        "total-timesteps": max(episodes * (length + 1), 16 * num_steps),
        "num-envs": 16,
        "num-steps": num_steps,
        "update-epochs": 8,
        # Below zero it makes the actions that do not count regular, as greedy play will be: LOG.md, items 22 and 26.
        "final-ent-coef": -0.01,
        **settings,
    }


def train(model, length, args, settings):
    """Runs one model at one length; rows for the table."""
    command = [sys.executable, str(HERE.parent / SCRIPTS[model])]
    command += [str(x) for name, value in flags(model, length, args, settings).items() for x in (f"--{name}", value)]
    print(" ".join(command[1:]), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(command, cwd=folder, check=True)
        (run_dir,) = Path(folder, "runs").iterdir()
        evaluation = json.loads((run_dir / "eval.json").read_text())
        config = json.loads((run_dir / "config.json").read_text())
        metrics = read(run_dir / "metrics.csv")
    rows = []
    for result in evaluation["results"]:
        if result["memory_length"] != length:
            continue
        mine = [row for row in metrics if int(row["seed"]) == result["seed"]]
        solved = [int(row["global_step"]) for row in mine if float(row["charts/episodic_return"] or "nan") >= 0.5]
        rows.append(
            {
                "model": model,
                "length": length,
                "gamma": config["args"]["gamma"],
                "final_ent_coef": config["args"]["final_ent_coef"],
                "seed": result["seed"],
                "greedy_return": round(result["mean_return"], 4),
                "episodes": int(mine[-1]["global_step"]) // (length + 1),
                "episodes_to_return_0.5": solved[0] // (length + 1) if solved else None,
                "seconds_all_seeds": round(evaluation["total_seconds"]),
                "host_share": round(evaluation["host_share"], 5),  # of the loop: logging and checkpoints
                "device": config["device"],
                "date": date.today().isoformat(),
                "commit": (config["git_commit"] or "")[:7],
            }
        )
    return rows


def read(path):
    if not path.exists():
        return []
    with path.open(newline="") as f:
        return list(csv.DictReader(f))


def write(path, rows):
    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, max(rows, key=len), lineterminator="\n")  # columns were added over time
        writer.writeheader()
        writer.writerows(rows)


def search(args):
    path = HERE / "memory_search.csv"
    for model, settings in product(args.models, GRID):
        rows = [settings | row for row in train(model, SEARCH_LENGTH, replace(args, num_seeds=SEARCH_SEEDS), settings)]
        mine = {name: str(value) for name, value in {"model": model, **settings}.items()}
        rows = [row for row in read(path) if not mine.items() <= row.items()] + rows
        write(path, sorted(rows, key=lambda row: row["model"]))


def main():
    args = tyro.cli(Args, description=__doc__)
    if args.search:
        search(args)
        return
    path = HERE / "memory_length.csv"
    for model, length in product(args.models, args.lengths):
        rows = train(model, length, args, SETTINGS)
        rows += [row for row in read(path) if (row["model"], int(row["length"])) != (model, length)]
        write(path, sorted(rows, key=lambda row: (row["model"], int(row["length"]))))
    table = read(path)

    fig, ax = plt.subplots(figsize=(7, 4.8), layout="constrained")
    # Many lines and points coincide: so widths differ, and the five points of a cell stand a little apart.
    looks = (("C0", 5, 0.94), ("C1", 3, 1.0), ("C2", 1.5, 1.06))
    for (name, script), paper, (color, width, aside) in zip(SCRIPTS.items(), PAPER.items(), looks, strict=True):
        rows = [row for row in table if row["model"] == name]
        lengths, seeds, returns = np.array(
            [[float(row[x]) for x in ("length", "seed", "greedy_return")] for row in rows]
        ).T
        ax.plot(lengths * aside * 1.015 ** (seeds - 2), returns, ".", color=color, markersize=4)
        medians = {length: np.median(returns[lengths == length]) for length in np.unique(lengths)}
        ax.plot(
            medians.keys(), medians.values(), color=color, linewidth=width, alpha=0.7, label=f"{script}: median, seeds"
        )
        ax.plot(*zip(*paper[1].items(), strict=True), "o--", color=color, markersize=3, label=f"paper: {paper[0]}")
    ax.axhline(0, color="grey", linewidth=1, linestyle=":", label="chance")
    ax.set_xscale("log", base=2)
    ax.set_xticks(LENGTHS, LENGTHS)
    ax.set(xlabel="memory length, steps", ylabel="return, -1 to 1", title="bsuite memory length")
    fig.legend(loc="outside lower center", ncols=2, fontsize=8)
    fig.savefig(HERE / "memory_length.png", dpi=150)


if __name__ == "__main__":
    main()
