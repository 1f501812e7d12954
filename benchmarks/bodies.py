"""Bodies that no training has shown: how many, and how different, must those of the training be?

    python benchmarks/bodies.py                     # trains 18 runs: an hour on one core
    python benchmarks/bodies.py --ranges 1 2        # a part of it; other rows stay
    python benchmarks/bodies.py --ranges            # draws and prints again

The robot, the swimmer and the arm of suite goals. Each trial draws how far an action moves the
body, RANGE times less to RANGE times more than usual, on a log scale: any such number, or one of
--counts of them, evenly spread. The trained network is then asked at ASKED times the usual, inside
and outside of its range. A score is 0 for doing nothing with that body, 1 for a rule that sees the
goal, with gains that suit the body best. It is of the second half of trials.

Writes bodies.csv, a row a run, task and strength, and bodies.png, scores against strength.
"""

import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import tyro
from common import HERE, ROOT, load, made_by, save
from matplotlib.figure import Figure
from meta import import_from
from reference_scores import rule

from s5_ppo_meta import TASKS

ASKED = tuple(2.0 ** (i / 2) for i in range(-4, 5))  # strengths, times the usual
# What an EnvParams field is at a strength: an action moves point and swimmer that much further.
BODIES = {
    "point-goal": {"max_force": lambda strength: 0.2 * strength},
    "swimmer-goal": {"dt": lambda strength: 0.3 * strength**0.5},
    "reacher-goal": {"torque_scale": lambda strength: 2.0 * strength},
}
FLAGS = ["--suite", "goals", "--held-out-tasks", "--log-interval", 5, "--eval-trials", 1]
GAINS = [*product((0.18, 0.36, 0.72, 1.0), (0.3, 0.6, 1.0, 1.4))]  # of the rules: pull, friction
KEY = ["range", "count", "seed", "steps"]


@dataclass
class Args:
    ranges: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0)  # with bodies without number
    counts: tuple[int, ...] = (2, 8)  # numbers of bodies, in the range 2
    seeds: tuple[int, ...] = (0, 1, 2)  # one run each
    steps: int = 4_915_200  # of a run, in whole log intervals
    eval_trials: int = 64  # of each task and strength


def program(limit, count):
    """The script with bodies that are drawn anew for each trial; count 0: without number."""
    text = (ROOT / "s5_ppo_meta.py").read_text()
    old = "jax.random.uniform(k, (n,), minval=low, maxval=high)"
    new = "jax.random.uniform(k, (n,))"
    if count:
        new = f"jnp.floor({new} * {count}) / {max(1, count - 1)}"
    assert text.count(old) == text.count("\nTASKS |= POPGYM\n") == 1
    text = text.replace(old, f"low * (high / low) ** ({new})")
    ranges = {
        name: {field: (at(1 / limit), at(limit)) for field, at in fields.items()}
        for name, fields in BODIES.items()
    }
    drawn = f"for name, drawn in {ranges}.items():\n"
    drawn += "    TASKS[name] = TASKS[name]._replace(ranges=drawn)\n"
    return text.replace("\nTASKS |= POPGYM\n", f"\nTASKS |= POPGYM\n{drawn}")


def with_bodies(env, strengths):
    """An environment whose copies have these strengths (n,), each task alike."""
    for task, name in zip(env.tasks, env.names, strict=True):
        body = {field: at(strengths) for field, at in BODIES[name].items()}
        draw = task.draw_trials
        task.draw_trials = lambda key, n, draw=draw, b=body: draw(key, n)._replace(body=b)
    return env


def references(env, key, strengths):
    """Rewards without actions (S, K, n), and by each rule of GAINS (G, S, K, n).

    env is the agent's, unprojected. With the key of its trials they start as these do.
    """
    longest = max(task.task.episode_length for task in env.tasks)

    @jax.jit
    @jax.vmap
    def rewards(moves, pull, friction):
        def step(states, key):
            tasks = zip(env.names, states, strict=True)
            actions = [rule(name, state, pull, friction) for name, state in tasks]
            states, now = env.step(key, states, moves * jnp.concatenate(actions).clip(-1, 1))
            return states, now.raw_reward.reshape(len(env.names), -1)

        states, _ = env.reset(key, len(env.names) * len(strengths))
        return jax.lax.scan(step, states, jax.random.split(key, longest))[1]

    moves = jnp.array([0.0, *[1.0] * len(GAINS)])
    idle, *rules = np.asarray(rewards(moves, *jnp.array([GAINS[0], *GAINS]).T))
    return idle, np.stack(rules)


def ask(script, run_dir, eval_trials):
    """Names of tasks, mean scores in the second half of trials, and 95 % intervals (K, ASKED)."""
    args, state, keys = load(script, run_dir)
    strengths, K = np.repeat(ASKED, eval_trials), len(args.train_tasks)
    args.eval_trials = len(strengths)

    def make(**kwargs):
        given = replace(args, **kwargs)
        return with_bodies(script.Environment(args.train_tasks, given, trials_end=False), strengths)

    params = jax.tree.map(lambda x: x[0], state.params)
    trials = partial(script.run_trials, wipe_episode=False, wipe_step=False, args=args, env=make())
    rewards = np.asarray(jax.jit(trials)(params, keys[0])[0])  # (S, K n)
    reset_key = jax.random.split(keys[0])[0]
    idle_rewards, rule_rewards = references(make(projection=False), reset_key, strengths)
    means, widths = np.zeros((2, K, len(ASKED)))
    for k, name in enumerate(args.train_tasks):
        length, episodes = TASKS[name].episode_length, args.trial_length
        idle, rules = idle_rewards[:length, k].sum(0), rule_rewards[:, :length, k].sum(1)
        returns = rewards.reshape(-1, K, len(strengths))[: length * episodes, k]
        returns = returns.reshape(episodes, length, -1).sum(1)[episodes // 2 :].mean(0)
        for i, mine in enumerate(np.split(np.arange(len(strengths)), len(ASKED))):
            best = rules[:, mine].mean(1).argmax()
            above, most = returns[mine] - idle[mine], rules[best, mine] - idle[mine]
            means[k, i] = above.mean() / most.mean()
            error = (above - means[k, i] * most).std(ddof=1) / np.sqrt(eval_trials)
            widths[k, i] = 1.96 * error / most.mean()
    return args.train_tasks, means, widths


def run(limit, count, seed, args):
    """Trains one network and asks it; rows of the table."""
    flags = [*FLAGS, "--seed", seed, "--total-timesteps", args.steps]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "s5_ppo_meta_bodies.py")
        path.write_text(program(limit, count))
        subprocess.run([sys.executable, path.name, *map(str, flags)], cwd=folder, check=True)
        (run_dir,) = Path(folder, "runs").glob("*")
        names, means, widths = ask(import_from(path), run_dir, args.eval_trials)
    rows = [
        dict(zip(KEY, (limit, count, seed, args.steps), strict=True))
        | {"task": name, "strength": round(at, 4), "score": round(float(mean), 4)}
        | {"ci95": round(float(width), 4)}
        | made_by()
        for name, *columns in zip(names, means, widths, strict=True)
        for at, mean, width in zip(ASKED, *columns, strict=True)
    ]
    return pd.DataFrame(rows)


def plot(path, table):
    """Scores, means of three tasks, against strength: ranges on the left, counts on the right."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    table = table.assign(count=table["count"].replace(0, np.inf))  # so that "any" comes last
    for i, ((limit, count), rows) in enumerate(table.groupby(["range", "count"])):
        scores, looks = rows.groupby("strength")["score"].mean(), {"color": f"C{i}"}
        one = limit == 1
        if count == np.inf:
            label = "one body" if one else f"any to {limit:g} times"
            left.plot(scores.index, scores, "o-", label=label, **looks)
        if limit == 2 or one:
            label = "one body" if one else "any" if count == np.inf else f"{count:g} bodies"
            right.plot(scores.index, scores, "o-", label=label, **looks)
    left.set(title="Range of bodies in training", ylabel="score: 1 is a rule that sees the goal")
    right.set(title="Number of bodies in training, to 2 times")
    for ax in (left, right):
        ax.set_xscale("log", base=2)
        ax.set(xlabel="how far an action moves the body asked", ylim=(0, 1))
        ax.set_xticks((0.25, 0.5, 1, 2, 4), ("1/4", "1/2", "1", "2", "4"))
        ax.legend(fontsize="small", loc="lower center")
    right.axvspan(0.5, 2, color="grey", alpha=0.15, linewidth=0)
    save(figure, path)


def print_table(table):
    """Markdown: mean scores of each seed from half to twice the usual strength, and beyond."""
    print("\n|range|bodies|1/2 to 2|beyond|ratio|\n|---|---|---|---|---|")
    for (limit, count), rows in table.groupby(["range", "count"]):
        near = rows["strength"].between(0.49, 2.01)
        near, far = (rows[x].groupby("seed")["score"].mean() for x in (near, ~near))
        cells = (" ".join(f"{x:.2f}" for x in cell) for cell in (near, far, far / near))
        bodies = 1 if limit == 1 else count or "any"
        print("|" + "|".join(map(str, [f"{limit:g}", bodies, *cells])) + "|")


def main():
    args = tyro.cli(Args, description=__doc__)
    path = HERE / "bodies.csv"
    wanted = [*product(args.ranges, (0,)), *product((2.0,) if args.ranges else (), args.counts)]
    for (limit, count), seed in product(wanted, args.seeds):
        rows = run(limit, count, seed, args)
        old = pd.read_csv(path, dtype={"commit": str}) if path.exists() else rows[:0]
        table = pd.concat([old, rows]).drop_duplicates([*KEY, "task", "strength"], keep="last")
        table.sort_values([*KEY, "task", "strength"]).to_csv(path, index=False)
        print(rows.pivot(index="task", columns="strength", values="score").to_string())
    table = pd.read_csv(path)
    plot(HERE / "bodies.png", table)
    print_table(table)


if __name__ == "__main__":
    main()
