"""Time and memory of one S5 layer, forward and backward, against sequence length: three ways to scan, and the paper's.

    python benchmarks/s5_layer.py    # some minutes on 2 idle CPU cores

Compares, in one process, the two scans of s5_ppo_memory.py (step by step, and associative with the reset folded into
the transition) with the paper's operator, which carries the reset as a third element and is differentiated by JAX: in
the same layer, and in a layer with complex products, as S5 is written down and the paper's public code has it.
Width 64, 32 complex states, 16 sequences. Prints a table and writes s5_layer_<device>.csv and .png beside this file.
"""

import csv
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import s5_ppo_memory
from s5_ppo_memory import S5, Args

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).resolve().parent
WIDTH, SEQUENCES, STEPS = 64, 16, 8
LENGTHS = [2**n for n in range(6, 15)]


def three_element_scan(a_bar, bu, reset, state, parallel):
    """The paper's operator on elements (a, b, reset); the stored state enters as one element before the sequence."""
    a = jnp.broadcast_to(a_bar, bu.shape)
    a = jnp.concatenate([jnp.ones_like(a[:1]), a])
    b = jnp.concatenate([state[None], bu])
    c = jnp.concatenate([jnp.zeros_like(reset[:1]), reset])[..., None]

    def combine(left, right):
        (a_i, b_i, c_i), (a_j, b_j, c_j) = left, right
        return jnp.where(c_j, a_j, a_j * a_i), jnp.where(c_j, b_j, a_j * b_i + b_j), c_i | c_j

    return jax.lax.associative_scan(combine, (a, b, c))[1][1:]


def complex_layer(params, state, u, reset):
    """S5 as it is written down, x = scan(B u) and y = 2 Re(C x) + D u, with the parameters of our layer."""
    p, P = params["params"], params["params"]["log_dt"].size
    lam, dt = jax.lax.complex(-jnp.exp(p["log_decay"]), p["frequency"]), jnp.exp(p["log_dt"])
    b_bar = jax.lax.complex(p["B"][:, :P], p["B"][:, P:]) * jnp.sqrt(-jnp.expm1(2 * lam.real * dt))  # (D, P)
    c = jax.lax.complex(p["C"][:P], -p["C"][P:])  # (P, D)
    x = three_element_scan(jnp.exp(lam * dt), u.astype(complex) @ b_bar, reset, state, True)
    return x[-1], 2 * (x @ c).real + p["D"] * u


SCANS = {
    "step by step": lambda *x: s5_scan(*x[:4], False),
    "associative": lambda *x: s5_scan(*x[:4], True),
    "three-element operator": three_element_scan,
    "the same, complex products": None,
}
s5_scan = s5_ppo_memory.s5_scan


def compile_layer(scan, length):
    """Compiled STEPS gradient steps on one layer, and its arguments."""
    args = Args(d_model=WIDTH)
    layer = S5(args)
    keys = jax.random.split(jax.random.key(0), 3)
    u = jax.random.normal(keys[0], (length, SEQUENCES, WIDTH))
    reset = jax.random.bernoulli(keys[1], 0.01, (length, SEQUENCES))
    state = jnp.zeros((SEQUENCES, args.state_size), jnp.complex64)
    params = layer.init(keys[2], state, u[:1], reset[:1])

    apply = layer.apply if scan else complex_layer

    def loss(params, u):
        return jnp.square(apply(params, state, u, reset)[1]).mean()

    def descend(_, inputs):
        return jax.tree.map(lambda x, g: x - 1e-6 * g, inputs, jax.grad(loss, argnums=(0, 1))(*inputs))

    # Several gradient steps in one call, as in training: a call on its own mostly waits for fresh memory.
    s5_ppo_memory.s5_scan = scan
    compiled = jax.jit(lambda *inputs: jax.lax.fori_loop(0, STEPS, descend, inputs)).lower(params, u).compile()
    s5_ppo_memory.s5_scan = s5_scan
    return compiled, (params, u)


def main():
    jax.config.update("jax_default_matmul_precision", "highest")  # as the script does
    device = jax.devices()[0].device_kind.replace(" ", "-")
    commit = subprocess.getoutput(f'git -C "{HERE}" rev-parse --short HEAD')
    rows = []
    for length in LENGTHS:
        layers = {name: compile_layer(scan, length) for name, scan in SCANS.items()}
        seconds = {name: [] for name in SCANS}
        for repeat in range(6):  # in turn, so that a slow moment of the machine slows all three; the first is warm-up
            for name, (compiled, inputs) in layers.items():
                start = time.perf_counter()
                jax.block_until_ready(compiled(*inputs))
                if repeat:
                    seconds[name].append((time.perf_counter() - start) / STEPS)
        for name, (compiled, _) in layers.items():
            memory = compiled.memory_analysis().temp_size_in_bytes
            rows.append({"length": length, "scan": name, "ms": 1e3 * np.median(seconds[name]), "MiB": memory / 2**20})
            rows[-1] |= {"date": date.today().isoformat(), "commit": commit}
        ms = {row["scan"]: float(row["ms"]) for row in rows[-len(SCANS) :]}
        ours = ms["step by step" if jax.default_backend() == "cpu" else "associative"]
        print(length, {name: f"{t:.2f} ms, {t / ours:.2f} times ours" for name, t in ms.items()}, flush=True)

    path = HERE / f"s5_layer_{device}"
    with path.with_suffix(".csv").open("w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows({**row, "ms": f"{row['ms']:.3f}", "MiB": f"{row['MiB']:.2f}"} for row in rows)
    fig, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for name in SCANS:
        mine = [row for row in rows if row["scan"] == name]
        x = np.array([row["length"] for row in mine])
        for ax, unit in zip(axes, ("ms", "MiB"), strict=True):
            y = np.array([row[unit] for row in mine])
            slope = np.polyfit(np.log(x[x >= 1024]), np.log(y[x >= 1024]), 1)[0]
            print(f"{name}: {unit} grows as T^{slope:.2f} from T = 1,024 on")
            ax.loglog(x, y, marker="o", label=f"{name} (slope {slope:.2f})")
            ax.set(xlabel="sequence length T", ylabel=unit)
            ax.legend(fontsize="x-small")
    fig.suptitle(f"one S5 layer, forward and backward, {device}")
    fig.savefig(path.with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    main()
