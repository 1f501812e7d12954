"""What a memory knows of a new body: how well it foresees what its actions do, step by step.

    python benchmarks/foresight.py runs/SEED_0 runs/SEED_1 runs/WITHOUT_MEMORY    # minutes

Takes finished runs of s5_ppo_meta.py, of one suite, each by its first seed; those with --num-layers
0 are the network without memory. In trials on fresh matrices, with the weights fixed, the network
predicts at every step the change of observation and reward. The squared error, in the units of
training (each entry's usual change in the task, cut at 3 of them) and divided by the mean of all
squared changes, is drawn against the step of the episode, for the first episode of a trial and for
the later ones, beside the error of predicting no change at all. Where it falls away from that, the
agent learns the body; where later episodes begin lower, it has kept that. Units are those of one
run: levels do not compare between runs exactly. Writes SUITE_foresight.{csv,png} beside this file.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from common import HERE, load, save, spread_of, write
from matplotlib.figure import Figure

import s5_ppo_meta
from s5_ppo_meta import TASKS, ActorCritic, Environment, outcome_of

FIRST_STEPS = 100  # of an episode, that are drawn
WHICH = ("first episode", "later episodes")
LINES = (  # with memory, which episodes, what, label, colour
    (True, WHICH[1], "no_change", "no change predicted, later episodes", "black"),
    (False, WHICH[1], "error", "network without memory, later episodes", "grey"),
    (True, WHICH[0], "error", WHICH[0], "C1"),
    (True, WHICH[1], "error", WHICH[1], "C0"),
)


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]  # finished runs
    trials: int = 64  # trials of each task and run
    episodes: int = 4  # length of a trial, in time limits of the longest task


def rollout(args, params, spread, key, trials, episodes):
    """Prediction and change (S, K, E, o + 1), done (S, K, E), of E trials of each of K tasks."""
    names = args.train_tasks + args.held_out_tasks
    env, network = Environment(names, args, trials_end=False), ActorCritic(args)
    reset_key, key = jax.random.split(key)
    num_steps = episodes * max(TASKS[name].episode_length for name in names)
    num_envs = len(names) * trials

    def step(state, key):
        env_state, obs, reset, carry = state
        action_key, env_key = jax.random.split(key)
        seen = obs[None], reset[None]
        _, (mean, log_std), _, _ = network.apply(params, carry, *seen)
        action = mean + jnp.exp(log_std) * jax.random.normal(action_key, mean.shape)
        carry, _, _, prediction = network.apply(params, carry, *seen, action)
        env_state, now = env.step(env_key, env_state, action[0], spread)
        change = outcome_of(now.final_obs, args) - outcome_of(obs, args)
        return (env_state, now.obs, now.reset, carry), (prediction[0], change, now.done)

    @jax.jit
    def run():
        start = (*env.reset(reset_key, num_envs), jnp.ones(num_envs, bool))
        start = (*start, network.initial_carry(num_envs))
        return jax.lax.scan(step, start, jax.random.split(key, num_steps))[1]

    return [np.asarray(x).reshape(num_steps, len(names), trials, *x.shape[2:]) for x in run()]


def unforeseen(prediction, change, done):
    """Of one task, (S, E, o + 1) and (S, E): {which episodes: (2, FIRST_STEPS) by step of these}.

    The two are the error of the prediction, and of predicting that nothing changes.
    """
    usual = np.abs(change).mean((0, 1))  # the units of training
    target = np.clip(change / (usual + 1e-4), -3, 3)
    power = np.square(target).mean(-1) / np.square(target).mean()
    error = np.square(prediction - target).mean(-1) / np.square(target).mean()
    steps = np.arange(len(done))[:, None]
    begun = np.vstack([np.zeros_like(done[:1]), done[:-1]])  # the first step of a later episode
    place = steps - np.maximum.accumulate(np.where(begun, steps, 0))
    episode, errors = begun.cumsum(0), {}
    for which, mine in zip(WHICH, (episode == 0, episode > 0), strict=True):
        sums = [np.bincount(place[mine], x, FIRST_STEPS) for x in (error[mine], power[mine], None)]
        sums = [x[:FIRST_STEPS] for x in sums]
        with np.errstate(invalid="ignore"):
            errors[which] = np.array(sums[:2]) / sums[2]
    return errors


def plot(rows, held_out, path):
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    columns = min(len(tasks), 4)
    height = -(-len(tasks) // columns)
    size = max(3 * columns + 0.5, 6), 2.6 * height + 0.9
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(height, columns, squeeze=False, sharey=True)
    for ax in axes.flat[len(tasks) :]:
        ax.set_axis_off()
    for task, ax in zip(tasks, axes.flat, strict=False):
        for memory, which, what, label, color in LINES:
            runs = {}
            for row in rows:
                if (row["task"], row["episodes"], row["num_layers"] > 0) == (task, which, memory):
                    runs.setdefault(row["seed"], []).append(row[what])
            if curves := [*runs.values()]:
                steps, style = np.arange(1, FIRST_STEPS + 1), ":" if what == "no_change" else "-"
                if style == "-":
                    ax.plot(steps, np.transpose(curves), color=color, alpha=0.35, linewidth=0.8)
                ax.plot(steps, np.mean(curves, axis=0), style, color=color, label=label)
        title = task + " (held out)" * (task in held_out)
        ax.set(title=title, xscale="log", xlabel="step of the episode", ylim=(0, 2))
    for ax in axes[:, 0]:
        ax.set_ylabel("squared error, relative")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    save(figure, path)


def main():
    args = tyro.cli(Args, description=__doc__)
    loaded, rows = [load(s5_ppo_meta, run_dir) for run_dir in args.runs], []
    if len({run.suite for run, _, _ in loaded}) != 1:
        sys.exit("error: name finished runs of one suite")
    for run_dir, (run, state, keys) in zip(args.runs, loaded, strict=True):
        names = run.train_tasks + run.held_out_tasks
        first = jax.tree.map(lambda x: x[0], state.params), spread_of(run, state, names, TASKS)
        outcome = rollout(run, *first, keys[0], args.trials, args.episodes)
        for k, task in enumerate(names):
            for which, errors in unforeseen(*(x[:, k] for x in outcome)).items():
                shown = (f"{i + 1}: {errors[0, i]:.2f}" for i in (0, 1, 3, 9, 31, 99))
                print(run_dir.name, task, which, *shown, flush=True)
                own = {"seed": run.seed, "num_layers": run.num_layers}
                own |= {"task": task, "episodes": which}
                for i, (error, no_change) in enumerate(errors.T.round(4).tolist()):
                    rows.append(own | {"step": i + 1, "error": error, "no_change": no_change})
    write(HERE / f"{run.suite}_foresight.csv", rows)
    plot(rows, run.held_out_tasks, HERE / f"{run.suite}_foresight.png")


if __name__ == "__main__":
    main()
