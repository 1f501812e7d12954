"""Environment steps per second of s5_ppo_meta.py, and what the time goes to.

    python benchmarks/meta_speed.py                      # suite classic; 4 minutes on 2 idle cores
    python benchmarks/meta_speed.py --suite cartpole

An update with E passes over the rollout takes R + E L: whole updates with the script's number of
passes and with one give both. The physics P, with trials and projections, is timed alone, on random
actions; R - P is left to the network that acts. The compile, of the start and of the training, is
timed without a compilation cache. Appends a row to meta_speed.csv beside this file.
"""

import os
import time
from dataclasses import dataclass, replace
from typing import Literal

import jax
import numpy as np
import tyro
from common import HERE, append, made_by

from s5_ppo_meta import SUITES, Environment, make_train
from s5_ppo_meta import Args as ScriptArgs


@dataclass
class Args:
    suite: Literal[tuple(SUITES)] = "classic"  # suite of s5_ppo_meta.py
    repeats: int = 8  # timed updates of each kind


def compiled_physics(env, args):
    """One rollout of random actions, and what it starts from."""

    def step(state, key):
        action = jax.random.normal(key, (args.num_envs, args.projected_action_size))
        return env.step(key, state, action)

    def rollout(key, state):
        return jax.lax.scan(step, env.redraw(key, state), jax.random.split(key, args.num_steps))

    state, _ = jax.jit(env.reset, static_argnums=1)(jax.random.key(0), args.num_envs)
    inputs = jax.random.key(1), state
    return jax.jit(rollout).lower(*inputs).compile(), inputs


def compiled_update(env, args):
    """One update, and what it starts from."""
    init, train = make_train(args, env)
    state = jax.jit(init)(jax.random.key(0))
    return jax.jit(train).lower(state).compile(), (state,)


def main():
    args = tyro.cli(Args, description=__doc__)
    jax.config.update("jax_enable_compilation_cache", False)
    script = replace(ScriptArgs(suite=args.suite), log_interval=1)
    env = Environment(script.train_tasks, script)
    start = time.perf_counter()
    programs = [compiled_update(env, script)]
    compile_seconds = time.perf_counter() - start
    programs += (
        compiled_update(env, replace(script, update_epochs=1)),
        compiled_physics(env, script),
    )
    seconds = np.zeros((args.repeats + 1, len(programs)))
    for i in range(len(seconds)):
        for j, (program, inputs) in enumerate(programs):
            start = time.perf_counter()
            jax.block_until_ready(program(*inputs))
            seconds[i, j] = time.perf_counter() - start
    update, short, physics = np.median(seconds[1:], axis=0)  # the first of each warms up
    learning = (update - short) * script.update_epochs / (script.update_epochs - 1)
    row = {
        "cores": len(os.sched_getaffinity(0)),
        "suite": args.suite,
        "num_envs": script.num_envs,
        "num_minibatches": script.num_minibatches,
        "steps_per_second": round(script.batch_size / update),
        "physics_share": f"{physics / update:.2f}",
        "acting_share": f"{(update - learning - physics) / update:.2f}",
        "learning_share": f"{learning / update:.2f}",
        "compile_seconds": f"{compile_seconds:.0f}",
    }
    append(HERE / "meta_speed.csv", row | made_by())


if __name__ == "__main__":
    main()
