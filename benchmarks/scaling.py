"""Time and memory of S5, LSTM and Transformer by length: a layer, a PPO update, an acting step.

    python benchmarks/scaling.py                      # a quarter of an hour on 2 idle CPU cores
    python benchmarks/scaling.py --parts layer        # one part; the table keeps the others
    python benchmarks/scaling.py --parts              # draws the stored tables of all devices again

All with the scripts' own code. The layer: forward and backward over 8 sequences of width 64, the
Transformer's window as long as the sequence. The update: one rollout of 8 environments, memories of
up to half its length, one epoch of 2 minibatches, the network by default, the window as long as the
rollout. The acting step: 32 environments, against the context, which for S5 and LSTM is always the
same carry; and, as "environments", against their number (in the column `length`), with a context
of 256. The models take turns in one process: a slow moment slows all. Times are medians of 20
repeats, or of as many as start in 10 seconds, but 3 at least; where a call holds several steps, as
in training, of one step. Memory is what the compiler sets aside for intermediate values. Writes
scaling_<device>.csv and .png beside this file; a cell is blank where it was not run, as attention
is above --max-attention-length.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from common import HERE, made_by, read, save, write
from matplotlib.figure import Figure

import lstm_ppo
import s5_ppo_memory
import transformer_ppo

SCRIPTS = {"S5": s5_ppo_memory, "LSTM": lstm_ppo, "Transformer": transformer_ppo}
LAYERS = {"S5": "S5", "LSTM": "LSTM", "Transformer": "Attention"}
WIDTH, SEQUENCES = 64, 8


def script_args(model, length, **flags):
    """The script's defaults; the Transformer's window covers the whole sequence."""
    window = {"context_length": length} if model == "Transformer" else {}
    return SCRIPTS[model].Args(d_model=WIDTH, **window, **flags)


def layer(model, length):
    """Gradient steps on the mean square output of one layer, without the block around it."""
    args = script_args(model, length, num_layers=1)
    module, keys = (
        getattr(SCRIPTS[model], LAYERS[model])(args),
        jax.random.split(jax.random.key(0), 3),
    )
    u = jax.random.normal(keys[0], (length, SEQUENCES, WIDTH))
    reset = jax.random.bernoulli(keys[1], 0.01 / length, (length, SEQUENCES))
    (state,) = SCRIPTS[model].SequenceModel(args).initial_carry(SEQUENCES)
    params = module.init(keys[2], state, u[:1], reset[:1])

    def loss(params, u):
        return jnp.square(module.apply(params, state, u, reset)[1]).mean()

    def descend(_, inputs):
        grads = jax.grad(loss, argnums=(0, 1))(*inputs)
        return jax.tree.map(lambda x, g: x - 1e-6 * g, inputs, grads)

    def steps(*inputs):  # a call of one step mostly waits for fresh memory
        return jax.lax.fori_loop(0, 4, descend, inputs)

    return jax.jit(steps), (params, u), 4


def update(model, length):
    """One whole PPO update: rollout, advantages, an epoch of two minibatches."""
    flags = {"memory_length": length // 2, "num_envs": SEQUENCES, "num_steps": length}
    flags |= {"num_minibatches": 2, "update_epochs": 1, "log_interval": 1}
    args, script = script_args(model, length, **flags), SCRIPTS[model]
    init, train = script.make_train(args, script.Environment(args))
    return jax.jit(train), (jax.jit(init)(jax.random.key(0)),), 1


def acting_step(model, length, num_envs=32):
    """One step of the whole network; keys that are masked cost the same as those that are not."""
    args, script = script_args(model, length), SCRIPTS[model]
    network, carry = script.ActorCritic(args, 2), script.SequenceModel(args).initial_carry(num_envs)
    obs, reset = jnp.ones((1, num_envs, 5)), jnp.zeros((1, num_envs), bool)
    params = network.init(jax.random.key(0), carry, obs, reset)

    def act(params, carry, obs):  # several steps in one call, as in a rollout
        def step(_, state):
            carry, obs = state
            carry, logits, value = network.apply(params, carry, obs, reset)
            return carry, obs + 1e-6 * (logits.mean() + value.mean())  # or no head is computed

        return jax.lax.fori_loop(0, 64, step, (carry, obs))

    return jax.jit(act), (params, carry, obs), 64


def environments(model, num_envs):
    return acting_step(model, 256, num_envs)


PARTS = {"layer": layer, "update": update, "acting step": acting_step, "environments": environments}


@dataclass
class Args:
    parts: tuple[Literal[tuple(PARTS)], ...] = tuple(PARTS)  # what to measure
    min_length: int = 64  # shortest sequence
    max_length: int = 16_384  # longest sequence of S5 and LSTM
    max_attention_length: int = 4_096  # longest of the Transformer: its time grows as the square


def models_to_run(part, size, args):
    """All, but attention only up to --max-attention-length."""
    too_long = part != "environments" and size > args.max_attention_length
    return [model for model in SCRIPTS if not (model == "Transformer" and too_long)]


def compile_part(part, model, length):
    """A compiled function, its arguments, and how many steps it makes."""
    function, inputs, steps = PARTS[part](model, length)
    return function.lower(*inputs).compile(), inputs, steps


def measure(part, length, compiled):
    """A row for each model: milliseconds and MiB. compiled: compile_part of those to be run."""
    seconds, begun = {model: [] for model in compiled}, None
    for repeat in range(21):
        if repeat == 1:
            begun = time.perf_counter()  # the first is warm-up
        if repeat > 3 and time.perf_counter() - begun > 10:
            break
        for model, (function, inputs, steps) in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*inputs))
            if repeat:
                seconds[model].append((time.perf_counter() - start) / steps)
    rows, by = [], made_by()
    for model in SCRIPTS:
        row = {"what": part, "model": model, "length": length, "ms": None, "MiB": None}
        if model in compiled:
            mib = compiled[model][0].memory_analysis().temp_size_in_bytes / 2**20
            ms = 1e3 * float(np.median(seconds[model]))
            row |= {"ms": round(ms, 4), "MiB": round(mib, 3)}
        print(row, flush=True)
        rows.append(row | by)
    return rows


def plot(path):
    """scaling_<device>.png from the table of that device."""
    rows = [row for row in read(path) if row["ms"]]
    panels = [(what, "ms") for what in ("layer", "update", "acting step")]
    panels += [("layer", "MiB"), ("update", "MiB"), ("environments", "ms")]
    panels = [panel for panel in panels if any(row["what"] == panel[0] for row in rows)]
    columns = -(-len(panels) // 2)
    figure = Figure(figsize=(0.5 + 3.5 * columns, 6.4), layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False).flat
    for ax in axes[len(panels) :]:
        ax.remove()
    for ax, (what, unit) in zip(axes, panels, strict=False):
        for i, model in enumerate(SCRIPTS):
            mine = [row for row in rows if (row["what"], row["model"]) == (what, model)]
            x, y = np.array([(r["length"], r[unit]) for r in mine], float).reshape(-1, 2).T
            if len(x):
                ax.loglog(x, y, marker="o", markersize=4, color=f"C{i}", label=model)
            for start in (0, 1024) if (x >= 1024).sum() > 1 else ():
                slope = np.polyfit(*np.log((x[x >= start], y[x >= start])), 1)[0]
                print(f"{path.stem}, {what}, {model}: {unit} as T^{slope:.2f} from {start} on")
        axis = {"acting step": "context length", "environments": "environments"}
        title = {"environments": "acting step, context 256", "acting step": "acting step, 32 envs"}
        ax.set(title=title.get(what, what), xlabel=axis.get(what, "sequence length"), ylabel=unit)
        ax.legend(fontsize="small")
    figure.suptitle(path.stem.removeprefix("scaling_"))
    save(figure, path.with_suffix(".png"))


def main():
    args = tyro.cli(Args, description=__doc__)
    path = HERE / f"scaling_{jax.devices()[0].device_kind.replace(' ', '-')}.csv"
    lengths = [2**n for n in range(20) if args.min_length <= 2**n <= args.max_length]
    for part in args.parts:
        rows = [row for row in read(path) if row["what"] != part]
        sizes = [2**n for n in range(9)] if part == "environments" else lengths
        with ThreadPoolExecutor() as pool:
            compiled = {
                size: {
                    model: pool.submit(compile_part, part, model, size)
                    for model in models_to_run(part, size, args)
                }
                for size in sizes
            }
        for size in sizes:
            programs = {model: program.result() for model, program in compiled[size].items()}
            rows += measure(part, size, programs)
            write(path, rows)
    for path in HERE.glob("scaling_*.csv"):
        plot(path)


if __name__ == "__main__":
    main()
