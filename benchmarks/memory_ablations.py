"""How far s5_ppo_memory.py remembers with one of its tricks taken out.

    python benchmarks/memory_ablations.py                              # half an hour on one core
    python benchmarks/memory_ablations.py --variants "no ReLU" "one block"

Each variant is a copy of the script with the snippets of PATCHES replaced, or run with FLAGS. It is
trained to 128 steps and asked at FACTORS times that, 128 greedy episodes each. Its seeds, 20 to 24,
are those that the design was chosen on; what the README claims is of others, 0 to 4. Writes mean
returns to memory_ablations.csv, a row a variant and seed, and prints how many seeds are all right.
"""

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
import tyro
from common import HERE, ROOT, made_by, results_of

FACTORS = (1, 2, 4, 8, 16, 32, 64)
FLAGS = {
    "one block": ["--num-layers", 1],
    "no slow states": ["--dt-slow", 0],
    "size of the states costs nothing": ["--state-coef", 0],
    "even input costs nothing": ["--sparsity-coef", 0],
    "states turn at first, as HiPPO has it": ["--frequency-scale", 1],
    "input scaled by zero-order hold": ["--zoh"],
    "LayerNorm, no ReLU": ["--layer-norm"],
    "one length, 128": ["--min-memory-length", 128],
}
PATCHES = {
    "as it is": [],
    **{variant: [] for variant in FLAGS},
    "no ReLU": [("else nn.relu(x)", "else x")],
    "biases in the encoder": [
        ("self.args.encoder_size, use_bias=False", "self.args.encoder_size"),
        ("self.args.d_model, use_bias=False", "self.args.d_model"),
    ],
}


@dataclass
class Args:
    variants: tuple[Literal[tuple(PATCHES)], ...] = tuple(PATCHES)  # what to train
    seed: int = 20  # first of five


def patched(variant):
    """The text of the script with a variant's snippets, and the lengths asked, replaced."""
    text = (ROOT / "s5_ppo_memory.py").read_text()
    for old, new in [("(0.5, 1, 2, 4, 8)", str(FACTORS)), *PATCHES[variant]]:
        assert text.count(old) == 1, f"{variant}: {text.count(old)} times in the script: {old}"
        text = text.replace(old, new)
    return text


def rows_of(variant, seed):
    """Rows of memory_ablations.csv: trains and asks five seeds side by side."""
    flags = ["--seed", seed, "--num-seeds", 5, *FLAGS.get(variant, [])]
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "s5_ppo_memory.py")
        script.write_text(patched(variant))
        subprocess.run([sys.executable, script, *map(str, flags)], cwd=folder, check=True)
        (run_dir,) = Path(folder, "runs").glob("*")
        results = results_of(run_dir)[1]
    table = pd.DataFrame({"variant": variant, "seed": range(seed, seed + 5)})
    table = table.assign(**results["mean_return"])
    return table.assign(seconds_all_seeds=round(results["trained_after"]), **made_by())


def main():
    args = tyro.cli(Args, description=__doc__)
    path, key = HERE / "memory_ablations.csv", ["variant", "seed"]
    for variant in args.variants:
        old = [pd.read_csv(path)] if path.exists() else []
        table = pd.concat([*old, rows_of(variant, args.seed)]).drop_duplicates(key, keep="last")
        table.to_csv(path, index=False)
    lengths = [str(128 * factor) for factor in FACTORS]
    right = (table.set_index("variant")[lengths] == 1).groupby(level=0, sort=False).sum()
    print(right.to_string())


if __name__ == "__main__":
    main()
