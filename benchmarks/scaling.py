"""S5, LSTM and Transformer: time and memory against sequence length, of a layer, a PPO update and an acting step.

    python benchmarks/scaling.py                      # a quarter of an hour on 2 idle CPU cores
    python benchmarks/scaling.py --parts layer        # one part; the table keeps the others
    python benchmarks/scaling.py --parts              # draw the stored tables of all devices again

All with the scripts' own code. The layer: forward and backward over 8 sequences of width 64, the Transformer's window
as long as the sequence. The update: one rollout of 8 environments on a memory of half its length and one epoch of 2
minibatches, network as by default, window as long as the rollout. The acting step: 32 environments, against the
context, which for S5 and LSTM is always the same carry; and, as "environments", against their number (in the column
`length`), with a context of 256. The models take turns within one process, so that a slow moment
slows them all; the median of 20 repeats counts, or of as many as start within 10 seconds, but 3 at least. Where one
call holds several gradient or acting steps, as in training, times are those of one. Peak memory is what the compiler
sets aside for intermediate values. Slopes are fitted from length 1,024 on. Writes scaling_<device>.csv and .png beside
this file; a cell is blank where it was not run: attention above --max-attention-length.
"""

import csv
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lstm_ppo
import s5_ppo_memory
import transformer_ppo

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).resolve().parent
SCRIPTS = {"S5": s5_ppo_memory, "LSTM": lstm_ppo, "Transformer": transformer_ppo}
WIDTH, SEQUENCES = 64, 8


@dataclass
class Args:
    parts: tuple[Literal["layer", "update", "acting step", "environments"], ...] = (
        "layer",
        "update",
        "acting step",
        "environments",
    )
    """what to measure"""
    min_length: int = 64
    """shortest sequence"""
    max_length: int = 16_384
    """longest sequence of S5 and LSTM"""
    max_attention_length: int = 4_096
    """longest sequence of the Transformer; its time grows with the square"""


def script_args(script, length, **flags):
    """The script's defaults; the Transformer's window covers the whole sequence."""
    if script is transformer_ppo:
        flags["context_length"] = length
    return script.Args(d_model=WIDTH, **flags)


def layer(script, length):
    """Gradient steps on the mean square output of one S5, LSTM or attention layer, without the block around it."""
    args = script_args(script, length, num_layers=1)
    module = {"s5_ppo_memory": "S5", "lstm_ppo": "LSTM", "transformer_ppo": "Attention"}[script.__name__]
    module = getattr(script, module)(args)
    keys = jax.random.split(jax.random.key(0), 3)
    u = jax.random.normal(keys[0], (length, SEQUENCES, WIDTH))
    reset = jax.random.bernoulli(keys[1], 0.01 / length, (length, SEQUENCES))
    (state,) = script.SequenceModel(args).initial_carry(SEQUENCES)
    params = module.init(keys[2], state, u[:1], reset[:1])

    def loss(params, u):
        return jnp.square(module.apply(params, state, u, reset)[1]).mean()

    def descend(_, inputs):
        return jax.tree.map(lambda x, g: x - 1e-6 * g, inputs, jax.grad(loss, argnums=(0, 1))(*inputs))

    # A call of one step mostly waits for fresh memory.
    return jax.jit(lambda *inputs: jax.lax.fori_loop(0, 4, descend, inputs)), (params, u), 4


def update(script, length):
    """One whole PPO update: rollout, advantages, an epoch of two minibatches."""
    flags = {"memory_length": length // 2, "num_envs": SEQUENCES, "num_steps": length, "num_minibatches": 2}
    flags |= {"update_epochs": 1, "log_interval": 1, "total_timesteps": SEQUENCES * length}
    args = script_args(script, length, **flags)
    init, train = script.make_train(args, script.Environment(args))
    return jax.jit(train), (jax.jit(init)(jax.random.key(0)),)


def acting_step(script, length, num_envs=32):
    """One step of the whole network; keys that are masked cost the same as those that are not."""
    args = script_args(script, length)
    network, carry = script.ActorCritic(args, 2), script.SequenceModel(args).initial_carry(num_envs)
    obs, reset = jnp.ones((1, num_envs, 7)), jnp.zeros((1, num_envs), bool)
    params = network.init(jax.random.key(0), carry, obs, reset)

    def act(params, carry, obs):  # several steps in one call, as in a rollout
        def step(_, state):
            carry, obs = state
            carry, logits, value = network.apply(params, carry, obs, reset)
            return carry, obs + 1e-6 * (logits.mean() + value.mean())  # else the compiler would leave the heads out

        return jax.lax.fori_loop(0, 64, step, (carry, obs))

    return jax.jit(act), (params, carry, obs), 64


def environments(script, num_envs):
    return acting_step(script, 256, num_envs)


def measure(what, length, args):
    """A row for each script: milliseconds and MiB."""
    compiled = {}
    for name, script in SCRIPTS.items():
        if script is transformer_ppo and what is not environments and length > args.max_attention_length:
            continue
        function, inputs, *steps = what(script, length)
        compiled[name] = (function.lower(*inputs).compile(), inputs, *(steps or [1]))
    seconds, begun = {name: [] for name in compiled}, None
    for repeat in range(21):
        if repeat == 1:
            begun = time.perf_counter()  # the first is warm-up
        if repeat > 3 and time.perf_counter() - begun > 10:
            break
        for name, (function, inputs, steps) in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*inputs))
            if repeat:
                seconds[name].append((time.perf_counter() - start) / steps)
    rows = []
    for name in SCRIPTS:
        row = {"what": what.__name__.replace("_", " "), "model": name, "length": length, "ms": None, "MiB": None}
        if name in compiled:
            memory = compiled[name][0].memory_analysis().temp_size_in_bytes
            row |= {"ms": round(1e3 * float(np.median(seconds[name])), 4), "MiB": round(memory / 2**20, 3)}
        row |= {
            "date": date.today().isoformat(),
            "commit": subprocess.getoutput(f'git -C "{HERE}" rev-parse --short HEAD'),
        }
        rows.append(row)
    print(rows[0]["what"], length, {row["model"]: (row["ms"], row["MiB"]) for row in rows}, flush=True)
    return rows


def read(path):
    if not path.exists():
        return []
    with path.open(newline="") as f:
        rows = [r | {k: float(r[k]) if r[k] else None for k in ("ms", "MiB")} for r in csv.DictReader(f)]
    return [r | {"length": int(float(r["length"]))} for r in rows]


def plot(path):
    """scaling_<device>.png from the table of that device."""
    rows, device = read(path), path.stem.removeprefix("scaling_")
    fig, axes = plt.subplots(2, 3, figsize=(11, 6.4), layout="constrained")
    panels = [
        ("layer", "ms"),
        ("update", "ms"),
        ("acting step", "ms"),
        ("layer", "MiB"),
        ("update", "MiB"),
        ("environments", "ms"),
    ]
    for ax, (what, unit) in zip(axes.flat, panels, strict=True):
        for name in SCRIPTS:
            mine = [r for r in rows if (r["what"], r["model"]) == (what, name) and r[unit]]
            if not mine:
                continue
            x, y = np.array([r["length"] for r in mine]), np.array([r[unit] for r in mine])
            label = name
            if (x >= 1024).sum() > 1:
                slope, overall = (np.polyfit(*np.log((x[x >= n], y[x >= n])), 1)[0] for n in (1024, 0))
                print(f"{device}, {what}, {name}: {unit} grows as T^{slope:.2f} from 1,024 on, T^{overall:.2f} overall")
                label += f" (slope {slope:.2f})"
            ax.loglog(x, y, marker="o", markersize=3, label=label)
        axis = {"acting step": "context length", "environments": "environments"}.get(what, "sequence length")
        ax.set(xlabel=axis, ylabel=unit, title="acting step, context 256" if what == "environments" else what)
        if ax.lines:
            ax.legend(fontsize="x-small")
        else:
            ax.set_axis_off()
            ax.set_title(f"{ax.get_title()}: not measured")
    fig.suptitle(device)
    fig.savefig(path.with_suffix(".png"), dpi=150)


def main():
    args = tyro.cli(Args, description=__doc__)
    jax.config.update("jax_default_matmul_precision", "highest")  # as the scripts do
    device = jax.devices()[0].device_kind.replace(" ", "-")
    lengths = [2**n for n in range(4, 20) if args.min_length <= 2**n <= args.max_length]
    path = HERE / f"scaling_{device}.csv"
    rows = read(path)
    parts = {"layer": layer, "update": update, "acting step": acting_step, "environments": environments}
    for part in args.parts:
        rows = [row for row in rows if row["what"] != part]
        for length in lengths if part != "environments" else [2**n for n in range(9)]:
            rows += measure(parts[part], length, args)
            with path.open("w", newline="") as f:
                table = csv.DictWriter(f, max(rows, key=len), lineterminator="\n")
                table.writeheader()
                table.writerows(rows)
    for path in HERE.glob("scaling_*.csv"):
        plot(path)


if __name__ == "__main__":
    main()
