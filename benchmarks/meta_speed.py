"""Environment steps per second of s5_ppo_meta.py, and what the time goes to: physics, acting and learning.

    python benchmarks/meta_speed.py                      # suite classic; about 4 minutes on 2 cores
    python benchmarks/meta_speed.py --suite cartpole

An update with E passes over the rollout takes R + E L: whole updates with the script's number of passes and with one
give both. The physics P, with trials and projections, is timed alone, on random actions; R - P is left to the network
that acts. The compile, of the start and of the training, is timed with no compilation cache (rows before 2026-11-25: of
the training alone). Appends a row to meta_speed.csv beside this file.
"""

import csv
import dataclasses
import os
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from s5_ppo_meta import SUITES, Environment, make_train
from s5_ppo_meta import Args as ScriptArgs


@dataclass
class Args:
    suite: Literal[tuple(SUITES)] = "classic"
    """suite of s5_ppo_meta.py"""
    repeats: int = 8
    """timed updates of each kind"""


def compiled_physics(env, args):
    """One rollout of random actions, and what it starts from."""

    def step(state, key):
        action_key, env_key = jax.random.split(key)
        action = jax.random.normal(action_key, (args.num_envs, args.projected_action_size))
        return env.step(env_key, state, action, jnp.ones(len(env.names)))

    @jax.jit
    def rollout(key, state):
        key, pool_key = jax.random.split(key)
        keys = jax.random.split(key, args.num_steps)
        return jax.lax.scan(step, env.redraw(pool_key, state), keys)

    state, _ = jax.jit(env.reset, static_argnums=1)(jax.random.key(0), args.num_envs)
    return rollout.lower(jax.random.key(1), state).compile(), (jax.random.key(1), state)


def compiled_update(env, args):
    init, train = make_train(args, env)
    start = time.perf_counter()
    state = jax.jit(init)(jax.random.key(0))
    train = jax.jit(train).lower(state).compile()
    return train, (state,), time.perf_counter() - start


def main():
    args = tyro.cli(Args, description=__doc__)
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_default_matmul_precision", "highest")
    script = dataclasses.replace(ScriptArgs(suite=args.suite), log_interval=1)
    env = Environment(script.train_tasks, script)
    *whole, compile_seconds = compiled_update(env, script)
    one_pass = compiled_update(env, dataclasses.replace(script, update_epochs=1))[:2]
    programs = (whole, one_pass, compiled_physics(env, script))
    seconds = np.zeros((args.repeats + 1, len(programs)))
    for i in range(len(seconds)):
        for j, (program, inputs) in enumerate(programs):
            start = time.perf_counter()
            jax.block_until_ready(program(*inputs))
            seconds[i, j] = time.perf_counter() - start
    update, short, physics = np.median(seconds[1:], axis=0)  # the first of each warms up
    learning = (update - short) * script.update_epochs / (script.update_epochs - 1)
    row = {
        "date": date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
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
    print(row)
    path = Path(__file__).with_name("meta_speed.csv")
    with path.open("a", newline="") as f:
        writer = csv.DictWriter(f, row, lineterminator="\n")
        if f.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
