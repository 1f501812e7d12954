"""Time and memory of one S5 layer, forward and backward, against length, by four ways to scan.

    python benchmarks/s5_layer.py    # some minutes on 2 idle CPU cores

The two forms of s5_scan in s5_ppo_memory.py, step by step and associative, whatever the device; the
paper's operator, which carries the reset as a third element, in the same layer; and that in a layer
with complex products, as S5 is written down and the paper's public code has it. Width 64, 32
complex states, 16 sequences. Prints and writes s5_layer_<device>.csv and .png beside this file.
"""

import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from common import HERE, made_by, save, write
from matplotlib.figure import Figure

import s5_ppo_memory
from s5_ppo_memory import S5, Args, s5_scan

SEQUENCES, STEPS = 16, 8
ARGS = Args(d_model=64, state_size=32)
LENGTHS = [2**n for n in range(6, 15)]


def as_on(backend):
    """s5_scan in the form that it has there."""

    def scan(*inputs):
        with mock.patch.object(jax, "default_backend", return_value=backend):
            return s5_scan(*inputs)

    return scan


def three_element_scan(a_bar, bu, reset, state):
    """The paper's operator on (a, b, reset); the stored state is one element in front."""
    a = jnp.broadcast_to(a_bar, bu.shape)
    a = jnp.concatenate([jnp.ones_like(a[:1]), a])
    b = jnp.concatenate([state[None], bu])
    c = jnp.concatenate([jnp.zeros_like(reset[:1]), reset])[..., None]

    def combine(left, right):
        (a_i, b_i, c_i), (a_j, b_j, c_j) = left, right
        return jnp.where(c_j, a_j, a_j * a_i), jnp.where(c_j, b_j, a_j * b_i + b_j), c_i | c_j

    return jax.lax.associative_scan(combine, (a, b, c))[1][1:]


def complex_layer(params, state, u, reset):
    """S5 as it is written down, x = scan(B u), y = 2 Re(C x) + D u, by our layer's parameters."""
    p, P = params["params"], params["params"]["log_dt"].size
    lam, dt = jax.lax.complex(-jnp.exp(p["log_decay"]), p["frequency"]), jnp.exp(p["log_dt"])
    b_bar = jax.lax.complex(p["B"][:, :P], p["B"][:, P:])  # (D, P)
    b_bar *= jnp.sqrt(-jnp.expm1(2 * lam.real * dt))
    c = jax.lax.complex(p["C"][:P], -p["C"][P:])  # (P, D)
    x = three_element_scan(jnp.exp(lam * dt), u.astype(complex) @ b_bar, reset, state)
    return x[-1], 2 * (x @ c).real + p["D"] * u


SCANS = {
    "step by step": as_on("cpu"),
    "associative": as_on("gpu"),
    "three-element operator": three_element_scan,
    "the same, complex products": None,
}


def layer_with(scan):
    """What applies our layer with another scan; None stands for complex_layer."""

    def apply(*inputs):
        with mock.patch.object(s5_ppo_memory, "s5_scan", scan):
            return S5(ARGS).apply(*inputs)

    return apply if scan else complex_layer


def compile_layer(scan, length):
    """Compiled STEPS gradient steps on one layer, and its arguments."""
    keys, apply = jax.random.split(jax.random.key(0), 3), layer_with(scan)
    u = jax.random.normal(keys[0], (length, SEQUENCES, ARGS.d_model))
    reset = jax.random.bernoulli(keys[1], 0.01, (length, SEQUENCES))
    state = jnp.zeros((SEQUENCES, ARGS.state_size), jnp.complex64)
    params = S5(ARGS).init(keys[2], state, u[:1], reset[:1])

    def loss(params, u):
        return jnp.square(apply(params, state, u, reset)[1]).mean()

    def descend(_, inputs):
        grads = jax.grad(loss, argnums=(0, 1))(*inputs)
        return jax.tree.map(lambda x, g: x - 1e-6 * g, inputs, grads)

    def steps(*inputs):  # as in training: a call of one step mostly waits for fresh memory
        return jax.lax.fori_loop(0, STEPS, descend, inputs)

    return jax.jit(steps).lower(params, u).compile(), (params, u)


def main():
    rows, by = [], made_by()
    for length in LENGTHS:
        layers = {name: compile_layer(scan, length) for name, scan in SCANS.items()}
        seconds = {name: [] for name in SCANS}
        for repeat in range(6):  # in turn: a slow moment slows all. The first is warm-up
            for name, (compiled, inputs) in layers.items():
                start = time.perf_counter()
                jax.block_until_ready(compiled(*inputs))
                if repeat:
                    seconds[name].append((time.perf_counter() - start) / STEPS)
        ms = {name: 1e3 * np.median(x) for name, x in seconds.items()}
        for name, (compiled, _) in layers.items():
            mib = compiled.memory_analysis().temp_size_in_bytes / 2**20
            row = {"length": length, "scan": name, "ms": round(ms[name], 3), "MiB": round(mib, 2)}
            rows.append(row | by)
        ours = ms["step by step" if jax.default_backend() == "cpu" else "associative"]
        print(length, {name: f"{t:.2f} ms, {t / ours:.2f} x ours" for name, t in ms.items()})

    path = HERE / f"s5_layer_{by['device'].replace(' ', '-')}"
    write(path.with_suffix(".csv"), rows)
    figure = Figure(figsize=(9, 4), layout="constrained")
    for ax, unit in zip(figure.subplots(1, 2), ("ms", "MiB"), strict=True):
        for name in SCANS:
            x, y = np.array([(r["length"], r[unit]) for r in rows if r["scan"] == name]).T
            slope = np.polyfit(np.log(x[x >= 1024]), np.log(y[x >= 1024]), 1)[0]
            ax.loglog(x, y, marker="o", label=f"{name}, T^{slope:.2f} from 1,024")
        ax.set(xlabel="sequence length T", ylabel=unit)
        ax.legend(fontsize="small")
    figure.suptitle(f"one S5 layer, forward and backward, {by['device']}")
    save(figure, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
