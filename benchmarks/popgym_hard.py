"""POPGym's five Hard tasks of the paper: S5, an LSTM, a Transformer and a network without memory.

    python benchmarks/popgym_hard.py                                # everything: days on two cores
    python benchmarks/popgym_hard.py --tasks RepeatPrevious --models S5 LSTM --steps 2000000
    python benchmarks/popgym_hard.py --tasks                        # draws and prints what is there

Tasks with discrete actions are those of the memory scripts, pendulums those of s5_ppo_meta.py, with
one unprojected episode a trial and, for the LSTM and the Transformer, composed by compose.py. FLAGS
are the same for all tasks and, but for the sizes of the sequence models, which give them as many
parameters, within 10 %, for all models. As in the paper's code the agent sees its last action.

A run trains all seeds side by side. It stays in runs/popgym/ until it is done and goes on from
there if it was interrupted; what popgym.csv has is not run again without --again. Returns are
POPGym's, at most 1: `max_return` is its metric, the maximum over training of the mean return of the
episodes that ended in ten updates, `final_return` the mean over the last tenth of training. Writes
popgym.csv, a row a task, model and seed, popgym_curves.csv, 100 points of each, and popgym.png.
"""

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from itertools import product
from typing import Literal, NamedTuple

import compose
import numpy as np
import pandas as pd
import tyro
from common import HERE, ROOT, results_of, save


class Task(NamedTuple):
    flags: str
    scale: float  # what a return of the script, or a score, counts in POPGym
    paper: dict  # its mean returns


def paper(*returns):
    return dict(zip(("S5", "GRU", "MLP"), returns, strict=True))


CART_POLE = "--env-id CartPole-v1 --seen 0 2 --env-params max_steps_in_episode"
PENDULUM = "--suite cartpole --held-out-tasks --no-projection --projected-obs-size 2"
PENDULUM += " --no-inner-products --trial-length 1 --train-tasks"
REPEAT = "--env-id RepeatPrevious --memory-length 64 --min-memory-length 64"
TASKS = {
    "StatelessCartPole": Task(f"{CART_POLE} 600", 1 / 600, paper(1.0, 1.0, 0.26)),
    "NoisyStatelessCartPole": Task(
        f"{CART_POLE} 200 --noise-std 0.3", 1 / 200, paper(0.28, 0.27, 0.22)
    ),
    "StatelessPendulum": Task(f"{PENDULUM} pendulum-stateless", 1.0, paper(0.79, 0.75, 0.41)),
    "NoisyStatelessPendulum": Task(f"{PENDULUM} pendulum-noisy", 1.0, paper(0.55, 0.61, 0.34)),
    "RepeatPrevious": Task(REPEAT, 1.0, paper(0.91, -0.46, -0.48)),
}
FLAGS = """--num-envs 64 --num-steps 256 --num-minibatches 8 --update-epochs 4 --log-interval 10
    --learning-rate 1e-3 --anneal-lr --gamma 0.99 --gae-lambda 0.95 --ent-coef 0.0
    --encoder-size 128 --head-size 128 --d-model 64"""
MEMORY = "--observe-action --eval-episodes 64"  # of the memory scripts
META = "--eval-trials 64"  # of s5_ppo_meta.py
# S5 as in s5_ppo_meta.py: a memory of what was when needs states that turn.
S5 = "--state-size 128 --layer-norm --frequency-scale 1 --state-coef 0 --sparsity-coef 0"
S5 += " --dt-slow 0 --dt-min 0.001 --dt-max 2"
MODELS = {
    "S5": ("s5_ppo_memory.py", f"--num-layers 2 {S5}"),
    "LSTM": ("lstm_ppo.py", "--num-layers 2 --hidden-size 60 --max-timescale 2000"),
    "Transformer": (
        "transformer_ppo.py",
        "--num-layers 2 --num-heads 4 --key-size 16 --mlp-size 160 --context-length 128",
    ),
    "none": ("s5_ppo_memory.py", f"--num-layers 0 {S5}"),
}
RUNS, KEY = ROOT / "runs" / "popgym", ["task", "model", "seed", "steps"]


@dataclass
class Args:
    tasks: tuple[Literal[tuple(TASKS)], ...] = tuple(TASKS)  # what to train on
    models: tuple[Literal[tuple(MODELS)], ...] = tuple(MODELS)  # what to train
    num_seeds: int = 3  # seeds 0, 1, ... side by side
    steps: int = 15_000_000  # of a seed, in whole log intervals
    again: bool = False  # run also what is in the table


def prepare(task, model, folder):
    """The script of a model for a task, composed if need be, and its flags."""
    (script, own), flags = MODELS[model], TASKS[task].flags
    if "--env-id" in flags:
        return ROOT / script, f"{flags} {FLAGS} {MEMORY} {own}".split()
    path = ROOT / "s5_ppo_meta.py"
    if not script.startswith("s5"):
        text = compose.compose((ROOT / script).read_text(), path.read_text())
        path = folder / script.replace("ppo", "ppo_meta")
        path.write_text(text)
    return path, f"{flags} {FLAGS} {META} {own}".split()


def run(task, model, args):
    """Directory of a finished run, and its network's number of parameters."""
    folder = RUNS / f"{task}__{model}__{args.num_seeds}__{args.steps}"
    if args.again:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    script, flags = prepare(task, model, folder)
    flags += f"--num-seeds {args.num_seeds} --total-timesteps {args.steps}".split()
    for checkpoint in folder.glob("runs/*/checkpoint.gz"):  # of a run that was interrupted
        flags = ["--resume", checkpoint.parent.relative_to(folder)]
    command = [sys.executable, *map(str, [script, *flags])]
    print(" ".join(command[1:]), flush=True)
    ended = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
    print(ended.stdout, flush=True)
    run_dir, size = re.search(r"(\S+): ([\d,]+) parameters", ended.stdout).groups()
    return folder / run_dir, int(size.replace(",", ""))


def rows_of(task, model, steps, run_dir, parameters):
    """Rows of popgym.csv and of popgym_curves.csv, one a seed and one a point of each curve."""
    metrics, (config, results) = pd.read_csv(run_dir / "metrics.csv"), results_of(run_dir)
    name = "charts/score" if "charts/score" in metrics else "charts/episodic_return"
    metrics["mean_return"] = metrics[name] * TASKS[task].scale
    made = {"parameters": parameters, "steps_per_second": results["steps_per_second"]}
    made |= {"device": config["device"], "date": date.today().isoformat()}
    made |= {"commit": config["git_commit"][:7]}
    rows, points = [], []
    for seed, mine in metrics.groupby("seed"):
        row = {"task": task, "model": model, "seed": seed, "steps": steps}
        # As long as all seeds trained, however often they were interrupted; without compiling.
        seconds = (np.diff(mine.global_step, prepend=0) / mine["charts/SPS"]).sum()
        last = mine.mean_return[mine.global_step > 0.9 * mine.global_step.max()]
        returns = {"max_return": mine.mean_return.max(), "final_return": last.mean()}
        rows.append(row | {x: round(y, 4) for x, y in returns.items()})
        rows[-1] |= {"seconds_all_seeds": round(seconds)} | made
        thin = mine.iloc[:: -(-len(mine) // 100)][["global_step", "mean_return"]]
        points += [row | point for point in thin.round(4).to_dict("records")]
    return pd.DataFrame(rows), pd.DataFrame(points)


def read(path):
    columns = [*KEY, "global_step", "mean_return", "max_return"]
    return pd.read_csv(path) if path.exists() else pd.DataFrame(columns=columns)


def replace(path, new):
    """Puts new rows in the place of those of the same runs."""
    old, runs = read(path), pd.MultiIndex.from_frame(new[KEY])
    kept = old[~pd.MultiIndex.from_frame(old[KEY]).isin(runs)]
    pd.concat([kept, new] if len(kept) else [new]).to_csv(path, index=False)


def plot(path, curves):
    """A panel a task that was run: of each model the mean of the seeds, bold, and each seed."""
    from matplotlib.figure import Figure

    tasks = [task for task in TASKS if (curves.task == task).any()]
    figure = Figure(figsize=(3.2 * len(tasks) + 1, 3.4), layout="constrained")
    for task, ax in zip(tasks, figure.subplots(1, len(tasks), squeeze=False)[0], strict=True):
        for i, model in enumerate(MODELS):
            mine = curves[(curves.task == task) & (curves.model == model)]
            table = mine.pivot_table("mean_return", "global_step", "seed")
            ax.plot(table.index / 1e6, table, color=f"C{i}", alpha=0.35, linewidth=0.8)
            label = model.replace("none", "without memory")
            ax.plot(table.index / 1e6, table.mean(axis=1), color=f"C{i}", label=label)
        of_paper = {"color": "black", "linestyle": "--", "linewidth": 1}
        ax.axhline(TASKS[task].paper["S5"], label="the paper's S5, maximum", **of_paper)
        ax.set(title=task, xlabel="million steps", ylabel="mean return")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    save(figure, path)


def print_table(table):
    """Markdown: maxima over training, a number a seed, beside the paper's means of eight seeds."""
    print("| maximum over training |", " | ".join([*MODELS, "paper: S5, GRU, MLP"]), "|")
    print("|---" * (len(MODELS) + 2) + "|")
    for task, row in TASKS.items():
        cells = []
        for model in MODELS:
            mine = table[(table.task == task) & (table.model == model)].sort_values("seed")
            cells.append(" ".join(f"{x:.2f}" for x in mine.max_return) or "–")
        paper = " ".join(f"{x:.2f}" for x in row.paper.values())
        print("|", " | ".join([task, *cells, paper]), "|")


def main():
    args = tyro.cli(Args, description=__doc__)
    path, curves = HERE / "popgym.csv", HERE / "popgym_curves.csv"
    for task, model in product(args.tasks, args.models):
        done = {*read(path)[KEY].itertuples(index=False, name=None)}
        wanted = {(task, model, seed, args.steps) for seed in range(args.num_seeds)}
        if wanted <= done and not args.again:
            continue
        rows, points = rows_of(task, model, args.steps, *run(task, model, args))
        replace(curves, points)
        replace(path, rows)
    table, points = (x[x.steps == args.steps] for x in (read(path), read(curves)))
    if len(points):
        plot(HERE / "popgym.png", points)
    print_table(table)


if __name__ == "__main__":
    main()
