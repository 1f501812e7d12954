"""Trains one memory length under every combination of some flags at once, by vmap: what limits long memories?

    python benchmarks/sweep.py --updates 120 --base.memory-length 2048 --base.num-steps 4096 \\
        --grid "ent_coef=0.01,0.03 learning_rate=0.0003,0.001 gae_lambda=0.95,0.5,0"

Only flags that are plain numbers in the computation can be swept (ent_coef, learning_rate, gae_lambda, gamma, dt_min,
dt_max, ...), two seeds each; the others are the same for all. Prints, for each eighth of the run, the mean return of
sampled actions. benchmarks/LOG.md has what came out of an earlier form of it.
"""

import dataclasses
import itertools
import sys
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import s5_ppo_memory as script

SEEDS = 2


@dataclass
class Args:
    grid: str
    """FLAG=VALUE,VALUE,... FLAG=VALUE,..."""
    updates: int = 120
    """updates of every run"""
    base: script.Args = field(default_factory=lambda: script.Args(log_interval=2, total_timesteps=10**9))
    """the flags that all runs share"""


def main():
    args = tyro.cli(Args, description=__doc__)
    grid = {name: [float(v) for v in values.split(",")] for name, values in (x.split("=") for x in args.grid.split())}
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    swept = {name: jnp.array([c[name] for c in combinations for _ in range(SEEDS)]) for name in grid}
    keys = jnp.stack([jax.random.key(seed) for _ in combinations for seed in range(SEEDS)])
    env = script.Environment(args.base)
    script.np.log = jnp.log  # dt_min and dt_max are traced here

    def init(key, flags):
        return script.make_train(dataclasses.replace(args.base, **flags), env)[0](key)

    def train(state, flags):
        return script.make_train(dataclasses.replace(args.base, **flags), env)[1](state)

    state = jax.jit(jax.vmap(init))(keys, swept)
    train = jax.jit(jax.vmap(train), donate_argnums=0)
    returns = []
    for _ in range(args.updates // args.base.updates_per_call):
        state, metrics = train(state, swept)
        returns.append(np.asarray(metrics["charts/episodic_return"]))
    eighths = np.array_split(np.array(returns), 8)
    for i in range(len(keys)):
        flags = " ".join(f"{name}={value:g}" for name, value in combinations[i // SEEDS].items())
        print(f"{flags} seed {i % SEEDS}: " + " ".join(f"{part[:, i].mean():5.2f}" for part in eighths))


if __name__ == "__main__":
    main()
