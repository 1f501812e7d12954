"""s5_ppo_meta.py with one of its tricks taken out.

    python benchmarks/ablations.py                      # everything: some hours on one core
    python benchmarks/ablations.py --suites cartpole --variants "as it is" "no change" --seeds 0

Each variant is a copy of the script with the snippets of PATCHES replaced, or run with FLAGS, for
the steps of SUITES: 50 to 120 updates, early in what the README's runs get. A run is judged by its
training: mean score of the episodes that ended in the last 25 updates, on matrices drawn anew for
each trial, and of each task the return. Writes ablations.csv beside this file, a row a run, and
prints the scores; a run whose gradient was not finite has none. For one device only. Rows of
variants that are not here are of tricks that the script no longer has: see their commits.
"""

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import tyro
from common import HERE, ROOT, made_by, read, write

from s5_ppo_meta import Args as ScriptArgs

SUITES = {"goals": 4_915_200, "cartpole": 3_072_000, "classic": 7_372_800}
FLAGS = {
    "frequencies of zero": ["--frequency-scale", "0"],
    "no LayerNorm": ["--no-layer-norm"],
    "no inner products": ["--no-inner-products"],
    "inner products, no S5": ["--num-layers", "0"],
    "value beyond time limits": ["--bootstrap-truncated", "True"],  # as in all suites but goals
    "no value beyond time limits": ["--bootstrap-truncated", "False"],
}

SEEN = "[obs, *direction_and_size(change[..., :p]), *direction_and_size(change[..., p:])]"
PATCHES = {
    "as it is": [],
    **{variant: [] for variant in FLAGS},
    "raw change": [(SEEN, "[obs, change]")],
    "no change": [(SEEN, "[obs]")],
    # the sums and the last outcome stay
    "inner products, no S5": [("jnp.full_like(reset, self.args.num_layers == 0)", "reset")],
}


@dataclass
class Args:
    suites: tuple[Literal[tuple(SUITES)], ...] = tuple(SUITES)  # what to train on
    variants: tuple[Literal[tuple(PATCHES)], ...] = tuple(PATCHES)  # what to train
    seeds: tuple[int, ...] = (0, 1, 2)  # one run each
    steps: int | None = None  # of a run, in whole log intervals; None: those of SUITES


def patched(variant):
    """The text of the script with a variant's snippets replaced."""
    text = (ROOT / "s5_ppo_meta.py").read_text()
    for old, new in PATCHES[variant]:
        assert text.count(old) == 1, f"{variant}: {text.count(old)} times in the script: {old}"
        text = text.replace(old, new)
    return text


def flagged(suite, variant):
    """The script's Args."""
    return tyro.cli(ScriptArgs, args=["--suite", suite, *FLAGS.get(variant, [])])


def run(suite, variant, seed, steps, *more):
    """A row of ablations.csv."""
    flags = ["--suite", suite, "--total-timesteps", steps, "--log-interval", 5]
    flags += ["--seed", seed, "--held-out-tasks", "--eval-trials", 1]
    flags += [*FLAGS.get(variant, []), *more]
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "s5_ppo_meta.py")
        script.write_text(patched(variant))
        ended = subprocess.run([sys.executable, script, *map(str, flags)], cwd=folder)
        rows = [row for path in Path(folder).glob("runs/*/metrics.csv") for row in read(path)]
    result = {"suite": suite, "variant": variant, "seed": seed, "score": None, "steps": steps}
    if not ended.returncode:
        for name in (x for x in rows[0] if x.startswith(("charts/score", "charts/episodic_ret"))):
            mean = np.nanmean([float(row[name]) for row in rows[-5:]])
            result[name.split("/")[-1]] = round(float(mean), 4)
    return result | made_by()


def main():
    args = tyro.cli(Args, description=__doc__)
    path, columns = HERE / "ablations.csv", ("suite", "variant", "seed", "steps")
    for suite, variant, seed in product(args.suites, args.variants, args.seeds):
        if variant in FLAGS and flagged(suite, variant) == flagged(suite, "as it is"):
            continue
        row = run(suite, variant, seed, args.steps or SUITES[suite])
        print(row, flush=True)
        new = tuple(str(row[x]) for x in columns)
        rows = [r for r in read(path) if tuple(r[x] for x in columns) != new]
        write(path, [*rows, row])
    table = pd.read_csv(path).pivot_table("score", ["suite", "steps", "variant"], "seed")
    print(table.to_string(float_format="%.2f"))


if __name__ == "__main__":
    main()
