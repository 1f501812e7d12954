"""Environment steps per second of s5_ppo_memory.py, as a share of what the machine's matrix products would allow.

    python benchmarks/speed.py    # a minute on 2 idle CPU cores

Memory length 30, 32 environments x 256 steps, 4 epochs x 4 minibatches, encoder 128-64, 2 layers of 64, heads 128-128.
Training and a bare product of (2048, 128) by (128, 128) matrices, the largest in that network, run in turn in one
process, so that both see the same machine. Appends a row to speed.csv beside this file.
"""

import csv
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from s5_ppo_memory import ActorCritic, Args, Environment, SequenceModel, make_train

HERE = Path(__file__).resolve().parent
PRODUCTS = 400


def main():
    jax.config.update("jax_default_matmul_precision", "highest")  # as the script does
    args = Args(memory_length=30)
    env = Environment(args)
    init, train = make_train(args, env)
    state = jax.jit(init)(jax.random.key(0))
    start = time.perf_counter()
    train = jax.jit(train).lower(state).compile()
    compile_seconds = time.perf_counter() - start

    @jax.jit
    def products(x, w):
        return jax.lax.fori_loop(0, PRODUCTS, lambda _, x: x @ w, x)

    x, w = jnp.ones((2048, 128)), jnp.eye(128)
    jax.block_until_ready((train(state), products(x, w)))
    train_seconds, product_seconds = [], []
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready(train(state))
        train_seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        jax.block_until_ready(products(x, w))
        product_seconds.append(time.perf_counter() - start)

    # Forward once to act, and forward and backward (three times the work of forward) in each epoch.
    carry = SequenceModel(args).initial_carry(args.num_envs)
    forward = jax.jit(ActorCritic(args, env.num_actions).apply).lower(
        state.params, carry, jnp.zeros((1, args.num_envs, env.obs_size)), jnp.zeros((1, args.num_envs), bool)
    )
    flop_per_step = forward.compile().cost_analysis()["flops"] / args.num_envs * (1 + 3 * args.update_epochs)
    steps = args.log_interval * args.batch_size
    ceiling = PRODUCTS * 2 * 2048 * 128 * 128 / np.median(product_seconds)
    row = {
        "date": date.today().isoformat(),
        "commit": subprocess.getoutput(f'git -C "{HERE}" rev-parse --short HEAD'),
        "device": jax.devices()[0].device_kind,
        "compile_seconds": f"{compile_seconds:.1f}",
        "steps_per_second_median": round(steps / np.median(train_seconds)),
        "steps_per_second_best": round(steps / np.min(train_seconds)),
        "mflop_per_step": f"{flop_per_step / 1e6:.2f}",
        "matmul_gflop_per_second": round(ceiling / 1e9),
        "share_of_ceiling": f"{flop_per_step * steps / np.median(train_seconds) / ceiling:.2f}",
    }
    print(row)
    path = HERE / "speed.csv"
    with path.open("a", newline="") as f:
        writer = csv.DictWriter(f, row, lineterminator="\n")
        if f.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
