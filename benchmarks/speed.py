"""Environment steps per second of s5_ppo_memory.py, as a share of what matrix products would allow.

    python benchmarks/speed.py    # a minute on 2 idle CPU cores

The script's defaults. Training, and a bare product of (2048, 128) by (128, 128) matrices, the
largest in that network, run in turn in one process, so that both see the same machine. Appends a
row to speed.csv beside this file; rows before 2026-11-26 are of an older version.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from common import HERE, append, made_by

from s5_ppo_memory import ActorCritic, Args, Environment, make_train

PRODUCTS = 400


def main():
    jax.config.update("jax_enable_compilation_cache", False)
    args = Args()
    env = Environment(args)
    init, train = make_train(args, env)
    state = jax.jit(init)(jax.random.key(0))
    start = time.perf_counter()
    train = jax.jit(train).lower(state).compile()
    compile_seconds = time.perf_counter() - start

    @jax.jit
    def products(x, w):
        return jax.lax.fori_loop(0, PRODUCTS, lambda _, x: x @ w, x)

    inputs = jnp.ones((2048, 128)), jnp.eye(128)
    seconds = np.zeros((11, 2))
    for i in range(len(seconds)):
        for j, run in enumerate((lambda: train(state), lambda: products(*inputs))):
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[i, j] = time.perf_counter() - start
    training, product = seconds[1:].T  # the first of each warms up

    # Forward to act, and forward and backward, thrice the work of forward, in each epoch.
    forward = jax.jit(ActorCritic(args, env.num_actions).apply)
    _, obs, reset, carry = state.actor
    forward = forward.lower(state.params, carry, obs[None], reset[None])
    flop = forward.compile().cost_analysis()["flops"] / args.num_envs * (1 + 3 * args.update_epochs)
    steps = args.log_interval * args.batch_size
    ceiling = PRODUCTS * 2 * 2048 * 128 * 128 / np.median(product)
    row = {
        "compile_seconds": f"{compile_seconds:.1f}",
        "steps_per_second_median": round(steps / np.median(training)),
        "steps_per_second_best": round(steps / training.min()),
        "mflop_per_step": f"{flop / 1e6:.2f}",
        "matmul_gflop_per_second": round(ceiling / 1e9),
        "share_of_ceiling": f"{flop * steps / np.median(training) / ceiling:.2f}",
    }
    append(HERE / "speed.csv", row | made_by())


if __name__ == "__main__":
    main()
