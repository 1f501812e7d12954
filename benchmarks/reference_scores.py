"""What a return is worth in each task of s5_ppo_meta.py: the numbers in its table TASKS.

    python benchmarks/reference_scores.py                                    # all tasks; hours on 2 cores
    python benchmarks/reference_scores.py --tasks halfcheetah --steps 4000000    # one; the table keeps the others
    python benchmarks/reference_scores.py --steps 0                          # random and no actions only, minutes

Writes reference_scores.csv beside this file. Of each task, over whole episodes: the mean return of uniformly random
actions and of no action, and the standard deviation of the discounted returns of random actions; and the mean return
that one seed of s5_ppo_meta.py reaches on that task alone, unprojected, over the last tenth of its training (actions
are drawn, as in the evaluation of the script; an episode that the end of a trial cuts off counts as it is). Columns
`command` and `commit` are what made the row: older versions had another network and step size.
"""

import csv
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from s5_ppo_meta import TASKS, CopiesOf, Environment  # noqa: E402
from s5_ppo_meta import Args as ScriptArgs  # noqa: E402


@dataclass
class Args:
    tasks: tuple[str, ...] = tuple(TASKS)
    """rows of TASKS"""
    steps: int = 1_500_000
    """training steps of a specialist; 0 keeps the stored ones"""
    episodes: int = 256
    """episodes of random and of no actions"""


def flags(name):
    """Flags of s5_ppo_meta.py for one task without projections."""
    sizes = ScriptArgs(suite="locomotion")
    task = CopiesOf(name, sizes)
    return {
        "train_tasks": (name,),
        "held_out_tasks": (),
        "projected_obs_size": task.obs_size,
        "projected_action_size": task.action_size,
        "projection": False,
        "trial_length": 2 * task.task.episode_length,
        "trial_episodes": 0,
    }


def fixed_policy(name, random, episodes):
    """Mean return of the first episode in each copy, and the spread of all discounted returns, scale removed."""
    args = ScriptArgs(**flags(name))
    env, A = Environment((name,), args, trials_end=False), args.projected_action_size

    def step(carry, key):
        state, returns, alive = carry
        action_key, env_key = jax.random.split(key)
        action = random * jax.random.uniform(action_key, (episodes, A), minval=-1, maxval=1)
        state, timestep = env.step(env_key, state, action, jnp.ones(1))
        returns += jnp.where(alive, timestep.raw_reward, 0.0)
        return (state, returns, alive & ~timestep.done), timestep.discounted_return

    @jax.jit
    def run(key):
        key, reset_key = jax.random.split(key)
        state, _ = env.reset(reset_key, episodes)
        start = (state, jnp.zeros(episodes), jnp.ones(episodes, bool))
        return jax.lax.scan(step, start, jax.random.split(key, TASKS[name].episode_length))

    (_, returns, _), discounted = run(jax.random.key(0))
    return float(returns.mean()), float(discounted.std())


def specialist(name, steps):
    command = [sys.executable, str(HERE.parent / "s5_ppo_meta.py"), "--total-timesteps", str(steps), "--no-projection"]
    command += ["--eval-trials", "2", "--anneal-lr", "--num-layers", "2"]
    command += ["--num-envs", "160", "--num-minibatches", "4", "--update-epochs", "4"]
    for flag, value in flags(name).items():
        if flag != "projection":
            values = value if isinstance(value, tuple) else (value,)
            command += ["--" + flag.replace("_", "-"), *map(str, values)]
    print(" ".join(command[1:]), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(command, cwd=folder, check=True)
        (metrics,) = Path(folder, "runs").glob("*/metrics.csv")
        with metrics.open(newline="") as f:
            rows = list(csv.DictReader(f))
    last = [row[f"charts/episodic_return/{name}"] for row in rows[-max(1, len(rows) // 10) :]]
    return float(np.mean([float(x) for x in last if x]))


def read(path):
    if not path.exists():
        return {}
    with path.open(newline="") as f:
        return {row["task"]: row for row in csv.DictReader(f)}


def main():
    args = tyro.cli(Args, description=__doc__)
    path = HERE / "reference_scores.csv"
    for name in args.tasks:
        start, old = time.time(), read(path).get(name, {})
        random_return, spread = fixed_policy(name, 1.0, args.episodes)
        idle_return, _ = fixed_policy(name, 0.0, args.episodes)
        row = {"task": name, "random": random_return, "idle": idle_return, "spread": spread}
        row |= {key: old.get(key) for key in ("specialist", "specialist_steps", "seconds", "command", "commit")}
        if args.steps:
            row |= {"specialist": specialist(name, args.steps), "specialist_steps": args.steps}
            row["seconds"] = round(time.time() - start)
            row["command"] = f"benchmarks/reference_scores.py --tasks {name} --steps {args.steps}"
            row["commit"] = subprocess.getoutput(f'git -C "{HERE}" rev-parse --short HEAD')
        row = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
        print(row, flush=True)
        rows = read(path) | {name: row}
        with path.open("w", newline="") as f:
            table = csv.DictWriter(f, row, lineterminator="\n")
            table.writeheader()
            table.writerows(rows[name] for name in TASKS if name in rows)


if __name__ == "__main__":
    main()
