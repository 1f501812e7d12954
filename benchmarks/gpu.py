"""What bounds training on a GPU: time of an update and of its parts, by the number of environments.

    python benchmarks/gpu.py                                   # some minutes on an idle GPU
    XLA_FLAGS=--xla_gpu_enable_command_buffer=+WHILE python benchmarks/gpu.py --models S5

The memory scripts' defaults but for --num-envs; one update a call, medians of 5 calls. An update of
four passes over its rollout and one of one pass tell a pass from the acting. S5 also with the loop
of its rollout unrolled, with the scan step by step, and with no scan at all, which bounds what a
faster one could bring. At last s5_scan alone, without and with gradient, beside a copy of as many
numbers. Appends to gpu.csv beside this file: per_second are steps of environments, or of a scan
alone GB that go in and come out, each once; a cell is blank where memory did not suffice.
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from common import HERE, append, made_by

import lstm_ppo
import s5_ppo_memory
import transformer_ppo

SCRIPTS = {"S5": s5_ppo_memory, "LSTM": lstm_ppo, "Transformer": transformer_ppo}
SCAN, S5_SCAN = jax.lax.scan, s5_ppo_memory.s5_scan


@dataclass
class Args:
    num_envs: tuple[int, ...] = (64, 256, 1024, 4096, 16384)  # environments, each tried
    models: tuple[str, ...] = ("S5", "LSTM", "Transformer")  # the scripts, as they are
    unroll: tuple[int, ...] = (4, 16)  # steps of S5's rollout in one turn of the loop
    scans: tuple[str, ...] = ("step by step", "no scan")  # other scans of S5


def step_by_step(*inputs):
    """s5_scan as it is on a CPU."""
    with mock.patch.object(jax, "default_backend", return_value="cpu"):
        return S5_SCAN(*inputs)


def no_scan(a_bar, bu, reset, state):
    return jnp.where(reset[..., None], bu, bu * a_bar + state)


SCANS = {"as it is": S5_SCAN, "step by step": step_by_step, "no scan": no_scan}


def update(model, num_envs, epochs=4, unroll=1, scan="as it is"):
    """A program and a function that makes its inputs."""
    args = SCRIPTS[model].Args(num_envs=num_envs, update_epochs=epochs, log_interval=1)
    # Made anew for each program: JAX would trace the same functions once, and keep the first scan.
    init, train = SCRIPTS[model].make_train(args, SCRIPTS[model].Environment(args))

    def scan_with_unroll(f, start, xs=None, **kwargs):
        is_rollout = isinstance(xs, jax.Array) and len(xs) == args.num_steps
        return SCAN(f, start, xs, **kwargs, **{"unroll": unroll} if is_rollout else {})

    key = jax.random.key(0)
    with (
        mock.patch.object(jax.lax, "scan", scan_with_unroll),
        mock.patch.object(s5_ppo_memory, "s5_scan", SCANS[scan]),
    ):
        lowered = jax.jit(train).lower(jax.eval_shape(init, key))
    return lowered, jax.jit(init).lower(key)


def scan_alone(name, num_envs):
    """The same for a scan of 256 steps and 32 states, "copy", or either "with gradient"."""
    name, _, gradient = name.partition(" with ")
    function = SCANS.get(name, lambda a_bar, bu, reset, state: 1.5 * bu)

    def make(key):
        bu = jax.random.normal(key, (256, num_envs, 32), jnp.complex64)
        return jnp.exp(-0.1 + 0.1j * jnp.arange(32)), bu, jnp.abs(bu[..., 0]) < 0.1, bu[0]

    def run(inputs):
        a_bar, bu, reset, state = inputs
        out, vjp = jax.vjp(lambda bu: function(a_bar, bu, reset, state), bu)
        return (out, vjp(bu)) if gradient else out

    key = jax.random.key(0)
    return jax.jit(run).lower(jax.eval_shape(make, key)), jax.jit(make).lower(key)


def measure(program, make):
    """Median seconds of a call; None where memory does not suffice."""
    try:
        program, make = program.result(), make.result()
        inputs, seconds = make(jax.random.key(0)), []
        for _ in range(6):
            start = time.perf_counter()
            jax.block_until_ready(program(inputs))
            seconds.append(time.perf_counter() - start)
        return np.median(seconds[1:])
    except jax.errors.JaxRuntimeError as error:
        print(str(error)[:200])
        return None


def main():
    args, by = tyro.cli(Args, description=__doc__), made_by()
    by["xla_flags"] = os.environ.get("XLA_FLAGS", "")

    def store(what, num_envs, seconds, amount):
        row = {"what": what, "num_envs": num_envs, "ms": None, "per_second": None}
        if seconds:
            row |= {"ms": f"{1e3 * seconds:.3f}", "per_second": f"{amount / seconds:.0f}"}
        append(HERE / "gpu.csv", row | by)

    variants = {(m, f"passes {n}"): {"model": m, "epochs": n} for m in args.models for n in (1, 4)}
    variants |= {("S5", f"unroll {n}"): {"model": "S5", "unroll": n} for n in args.unroll}
    variants |= {("S5", name): {"model": "S5", "scan": name} for name in args.scans}
    names = ["copy", *SCANS] if args.scans else []
    alone = [name + more for name in names for more in ("", " with gradient")]
    with ThreadPoolExecutor() as pool:

        def compiled(lowered):
            return [pool.submit(x.compile) for x in lowered]

        updates = {
            (*variant, num_envs): compiled(update(num_envs=num_envs, **kwargs))
            for num_envs in args.num_envs
            for variant, kwargs in variants.items()
        }
        scans = {(x, n): compiled(scan_alone(x, n)) for n in args.num_envs for x in alone}
        for (model, variant, num_envs), programs in updates.items():
            steps = SCRIPTS[model].Args(num_envs=num_envs).batch_size
            store(f"{model}, {variant}", num_envs, measure(*programs), steps)
        for (name, num_envs), programs in scans.items():
            arrays = 4 if "gradient" in name else 2  # of 8 bytes a number
            gigabytes = arrays * 8e-9 * 256 * 32 * num_envs
            store(f"scan alone, {name}", num_envs, measure(*programs), gigabytes)


if __name__ == "__main__":
    main()
