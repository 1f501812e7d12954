"""What a return is worth in each task of s5_ppo_meta.py: the numbers in its table TASKS.

    python benchmarks/reference_scores.py                          # all tasks: hours on 2 cores
    python benchmarks/reference_scores.py --tasks pendulum --steps 4000000    # others stay
    python benchmarks/reference_scores.py --steps 0                # no specialists: minutes

Writes reference_scores.csv beside this file. Of each task, over whole episodes: the mean return of
uniformly random actions and of no action; `spread`, the standard deviation of the discounted
returns of random actions (TASKS' return_std); and the mean return that one seed of s5_ppo_meta.py
reaches on that task alone, unprojected, over the last tenth of its training (actions are drawn, and
an episode that the end of a trial cuts off counts as it is). `command` and `commit` are what made
the specialist: older versions had another network and step size. Where the goal is hidden, the
specialist is a rule that sees it.
"""

import tempfile
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from common import HERE, made_by, read, train, write

from s5_ppo_meta import DMC, POPGYM, TASKS, Environment, ProjectedTask
from s5_ppo_meta import Args as ScriptArgs


@dataclass
class Args:
    tasks: tuple[str, ...] = tuple(x for x in TASKS if x not in DMC | POPGYM)  # rows of TASKS
    steps: int = 1_500_000  # training steps of a specialist; 0 keeps the stored ones
    episodes: int = 256  # episodes of random and of no actions


def alone(name):
    """Args of s5_ppo_meta.py for one task without projections."""
    task = ProjectedTask(name, ScriptArgs(suite="classic"))  # whose sizes any task fits
    return {
        "train_tasks": (name,),
        "held_out_tasks": (),
        "projected_obs_size": task.obs_size,
        "projected_action_size": task.action_size,
        "trial_length": 2,
    }


def random_actions(key, state, size):
    return jax.random.uniform(key, (len(state.episode_length), size), minval=-1, maxval=1)


def no_actions(key, state, size):
    return jnp.zeros((len(state.episode_length), size))


# Pull to the goal and friction, as shares of a step: the best of twelve pairs, and of sixteen.
GAINS = {"Swimmer-misc": (0.36, 0.6), "Reacher-misc": (0.72, 1.2)}


def rule(name, state, pull, friction):
    """Actions (n, 2) towards the goal, which it sees: straight, or as by a spring, with friction.

    The arm is pulled by its hand. Its two angles are counted from the horizontal.
    """
    inner, body = state.inner, TASKS[name].params | state.trial.body
    body = {field: jnp.reshape(value, (-1, 1)) for field, value in body.items()}
    if TASKS[name].env_id == "PointRobot-misc":
        return (inner.goal - inner.pos) / body["max_force"]
    if TASKS[name].env_id == "Swimmer-misc":
        to_goal, speed = inner.goal_xy - inner.xy, inner.xy_vel
    else:
        x, y = jnp.cos(inner.angles), jnp.sin(inner.angles)
        to_goal = inner.goal_xy - jnp.stack([x.sum(1), y.sum(1)], axis=1)
        to_goal, speed = x * to_goal[:, 1:] - y * to_goal[:, :1], inner.angle_vels
    push = pull * to_goal / body["dt"] ** 2 - friction * speed / body["dt"]
    return push / body.get("torque_scale", 1.0)


def to_the_goal(name):
    """The rule as a policy."""
    gains = GAINS.get(TASKS[name].env_id, (1, 0))  # the point robot has no use for them
    return lambda key, state, size: rule(name, state, *gains)


def fixed_policy(name, policy, episodes):
    """Mean return of the first episode in each copy, and the spread of all discounted returns.

    policy: a function of a key, the task's EnvState and the size of an action.
    """
    args = ScriptArgs(**alone(name), projection=False)
    gamma = 0.99
    env, A = Environment((name,), args, trials_end=False), args.projected_action_size

    def step(carry, key):
        state, returns, discounted, alive = carry
        action_key, env_key = jax.random.split(key)
        state, now = env.step(env_key, state, policy(action_key, state[0], A))
        returns += jnp.where(alive, now.raw_reward, 0.0)
        discounted = gamma * discounted + now.raw_reward
        now_and_next = discounted, jnp.where(now.done, 0.0, discounted)
        return (state, returns, now_and_next[1], alive & ~now.done), now_and_next[0]

    @jax.jit
    def run(key):
        key, reset_key = jax.random.split(key)
        state, _ = env.reset(reset_key, episodes)
        zeros = jnp.zeros(episodes)
        start = state, zeros, zeros, jnp.ones(episodes, bool)
        return jax.lax.scan(step, start, jax.random.split(key, TASKS[name].episode_length))

    (_, returns, _, _), discounted = run(jax.random.key(0))
    return float(returns.mean()), float(discounted.std())


def specialist(name, steps):
    """Mean return over the last tenth of a run."""
    flags = ["--no-projection", "--no-inner-products", "--total-timesteps", steps]
    flags += ["--num-layers", 2, "--num-envs", 160, "--num-minibatches", 4, "--update-epochs", 4]
    flags += ["--eval-trials", 2]
    for flag, value in alone(name).items():
        values = value if isinstance(value, tuple) else (value,)
        flags += ["--" + flag.replace("_", "-"), *values]
    with tempfile.TemporaryDirectory() as folder:
        rows = read(train("s5_ppo_meta.py", flags, folder) / "metrics.csv")
    last = rows[-max(1, len(rows) // 10) :]
    return float(np.nanmean([float(row[f"charts/episodic_return/{name}"]) for row in last]))


def main():
    args = tyro.cli(Args, description=__doc__)
    path = HERE / "reference_scores.csv"
    for name in args.tasks:
        start, rows = time.time(), {row["task"]: row for row in read(path)}
        random_return, spread = fixed_policy(name, random_actions, args.episodes)
        idle_return, _ = fixed_policy(name, no_actions, args.episodes)
        row = {"task": name, "random": random_return, "idle": idle_return, "spread": spread}
        has_rule = TASKS[name].same_start  # a hidden goal
        if has_rule:
            row |= {"specialist": fixed_policy(name, to_the_goal(name), args.episodes)[0]}
        elif args.steps:
            row |= {"specialist": specialist(name, args.steps), "specialist_steps": args.steps}
        if "specialist" in row:
            row["seconds"] = round(time.time() - start)
            effort = f"--episodes {args.episodes}" if has_rule else f"--steps {args.steps}"
            row["command"] = f"benchmarks/reference_scores.py --tasks {name} {effort}"
            row["commit"] = made_by()["commit"]
        row = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
        print(row, flush=True)
        rows[name] = rows.get(name, {}) | row
        write(path, [rows[task] for task in TASKS if task in rows])


if __name__ == "__main__":
    main()
