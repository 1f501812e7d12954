"""What the memory of s5_ppo_meta.py knows of a new body: how well it foresees what its actions do, step by step.

    python benchmarks/foresight.py runs/SEED_0 runs/SEED_1 runs/SEED_2 runs/WITHOUT_MEMORY    # minutes

Takes finished runs of one suite. In trials on fresh matrices, with the weights fixed, the network predicts at every
step the change of observation and reward. The squared error, in the units of training (each entry's usual change in the
task, cut at 3 of them) and divided by the mean of all squared changes, is drawn against the step of the episode, for
the first episode of a trial and for the later ones, beside the error of predicting no change at all. Where it falls
away from that, the agent learns the body; where later episodes begin lower, it has kept that. Units are those of one
run, so levels do not compare between runs exactly. Writes SUITE_foresight.{csv,png} beside this file.
"""

import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import orbax.checkpoint as ocp
import tyro

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from s5_ppo_meta import TASKS, ActorCritic, Environment, outcome_of  # noqa: E402
from s5_ppo_meta import Args as ScriptArgs  # noqa: E402

FIRST_STEPS = 100  # of an episode, that are drawn
WHICH = ("first episode", "later episodes")


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """finished runs; those with --num-layers 0 are drawn as the network without memory"""
    trials: int = 64
    """trials of each task and run"""
    episodes: int = 4
    """length of a trial, in time limits of the longest task; episodes that end early are more"""


def load(run_dir):
    """The flags of a run, its parameters and (K,) what it divides rewards by."""
    stored = json.loads((run_dir / "config.json").read_text())["args"]
    args = ScriptArgs(**{name: tuple(x) if isinstance(x, list) else x for name, x in stored.items()})
    checkpoints = ocp.CheckpointManager((run_dir / "checkpoint").absolute())
    state = checkpoints.restore(checkpoints.latest_step(), args=ocp.args.StandardRestore())
    params, var = jax.tree.map(lambda x: jnp.asarray(x)[0], (state["params"], state["return_var"]))  # of the first seed
    spread = [TASKS[name].spread for name in args.held_out_tasks]
    return args, params, jnp.concatenate([jnp.sqrt(var) + 1e-3, jnp.array(spread)])


def rollout(args, params, spread, trials, episodes):
    """Prediction and change (S, K, E, o + 1), and done (S, K, E), of E trials of each of K tasks."""
    names = args.train_tasks + args.held_out_tasks
    env, network = Environment(names, args, trials_end=False), ActorCritic(args)
    reset_key, key = jax.random.split(jax.random.key(args.seed + 2**31))
    num_steps = episodes * max(TASKS[name].episode_length for name in names)

    def step(state, key):
        env_state, timestep, carry = state
        action_key, env_key = jax.random.split(key)
        seen = timestep.obs[None], timestep.reset[None]
        _, (mean, log_std), _, _ = network.apply(params, carry, *seen)
        action = mean + jnp.exp(log_std) * jax.random.normal(action_key, mean.shape)
        carry, _, _, prediction = network.apply(params, carry, *seen, action)
        env_state, after = env.step(env_key, env_state, action[0], spread)
        change = outcome_of(after.final_obs, args) - outcome_of(timestep.obs, args)
        return (env_state, after, carry), (prediction[0], change, after.done)

    @jax.jit
    def run():
        num_envs = len(names) * trials
        start = (*env.reset(reset_key, num_envs), network.initial_carry(num_envs))
        return jax.lax.scan(step, start, jax.random.split(key, num_steps))[1]

    return [np.asarray(x).reshape(num_steps, len(names), trials, *x.shape[2:]) for x in run()]


def unforeseen(prediction, change, done):
    """Of one task, (S, E, o + 1) and (S, E): {which episodes: (2, FIRST_STEPS) by step of the episode}.

    The two are the error of the prediction, and of predicting that nothing changes.
    """
    usual = np.abs(change).mean((0, 1))  # the units of training
    target = np.clip(change / (usual + 1e-4), -3, 3)
    power = np.square(target).mean(-1) / np.square(target).mean()
    error = np.square(prediction - target).mean(-1) / np.square(target).mean()
    steps = np.arange(len(done))[:, None]
    begun = np.vstack([np.zeros_like(done[:1]), done[:-1]])  # a step is the first of an episode other than the first
    place = steps - np.maximum.accumulate(np.where(begun, steps, 0))
    episode = begun.cumsum(0)
    errors = {}
    for which, mine in zip(WHICH, (episode == 0, episode > 0), strict=True):
        sums = [np.bincount(place[mine], x, FIRST_STEPS)[:FIRST_STEPS] for x in (error[mine], power[mine], None)]
        with np.errstate(invalid="ignore"):
            errors[which] = np.array(sums[:2]) / sums[2]
    return errors


def plot(rows, held_out, path):
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    columns = min(len(tasks), 5)
    height = -(-len(tasks) // columns)
    size = max(3 * columns + 1, 6.5), max(2.8 * height, 3.4)  # the legend has to fit below a single task too
    fig, axes = plt.subplots(height, columns, figsize=size, layout="constrained", squeeze=False)
    for ax in axes.flat[len(tasks) :]:
        ax.set_axis_off()
    lines = (  # layers, which episodes, what, label, color
        (1, WHICH[1], "no_change", "no change predicted, later episodes", "black"),
        (0, WHICH[1], "error", "network without memory, later episodes", "grey"),
        (1, WHICH[0], "error", WHICH[0], "C1"),
        (1, WHICH[1], "error", WHICH[1], "C0"),
    )
    for task, ax in zip(tasks, axes.flat, strict=False):
        for layers, which, what, label, color in lines:
            mine = [r for r in rows if (r["task"], r["episodes"], min(r["num_layers"], 1)) == (task, which, layers)]
            curves = np.array([[r[what] for r in mine if r["seed"] == seed] for seed in {r["seed"] for r in mine}])
            if curves.size:
                steps, style = np.arange(1, FIRST_STEPS + 1), ":" if what == "no_change" else "-"
                if style == "-":
                    ax.plot(steps, curves.T, color=color, alpha=0.35, linewidth=0.8)
                ax.plot(steps, curves.mean(0), style, color=color, label=label)
        ax.set(xscale="log", xlabel="step of the episode", ylabel="squared error of prediction", ylim=(0, 2))
        ax.set_title(task + (" (held out)" if task in held_out else ""))
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="x-small")
    fig.savefig(path, dpi=150)


def main():
    args = tyro.cli(Args, description=__doc__)
    loaded, rows = [load(run_dir) for run_dir in args.runs], []
    if len({run.suite for run, _, _ in loaded}) != 1:
        sys.exit("error: runs: name finished runs of one suite, under runs/")
    for run_dir, (run, params, spread) in zip(args.runs, loaded, strict=True):
        prediction, change, done = rollout(run, params, spread, args.trials, args.episodes)
        for k, task in enumerate(run.train_tasks + run.held_out_tasks):
            for which, errors in unforeseen(prediction[:, k], change[:, k], done[:, k]).items():
                print(run_dir.name, task, which, *(f"{i + 1}: {errors[0, i]:.2f}" for i in (0, 1, 3, 9, 31, 99)))
                own = {"seed": run.seed, "num_layers": run.num_layers, "task": task, "episodes": which}
                for i, (error, no_change) in enumerate(errors.T.round(4).tolist()):
                    rows.append(own | {"step": i + 1, "error": error, "no_change": no_change})
    name = f"{run.suite}_foresight"
    with (HERE / f"{name}.csv").open("w", newline="") as f:
        table = csv.DictWriter(f, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    plot(rows, run.held_out_tasks, HERE / f"{name}.png")


if __name__ == "__main__":
    main()
