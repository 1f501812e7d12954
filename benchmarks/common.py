"""What the benchmarks share: tables, runs of the scripts in the repository's root, figures."""

import csv
import json
import os
import subprocess
import sys
from datetime import date
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))  # for the imports that come after this one
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU is shared with `train`
jax.config.update("jax_default_matmul_precision", "highest")  # as the scripts do


def read(path):
    """Rows of a table, all cells strings; none where there is no table."""
    if not path.exists():
        return []
    with path.open(newline="") as f:
        return list(csv.DictReader(f))


def write(path, rows):
    """All columns that any row has: columns come and go over time."""
    columns = dict.fromkeys(name for row in rows for name in row)
    with path.open("w", newline="") as f:
        table = csv.DictWriter(f, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def append(path, row):
    print(row, flush=True)
    write(path, [*read(path), row])


def made_by():
    """What made a row, as columns."""
    commit = subprocess.getoutput(f'git -C "{HERE}" rev-parse --short HEAD')
    device = jax.devices()[0].device_kind
    return {"device": device, "date": date.today().isoformat(), "commit": commit}


def train(script, flags, folder, **kwargs):
    """Runs a script in a folder; the directory of the run."""
    before, command = set(Path(folder, "runs").glob("*")), [sys.executable, str(ROOT / script)]
    command += map(str, flags)
    print(" ".join(command[1:]), flush=True)
    subprocess.run(command, cwd=folder, check=True, **kwargs)
    (run_dir,) = set(Path(folder, "runs").glob("*")) - before
    return run_dir


def results_of(run_dir):
    """config.json and eval.json of a run, with the median of its steps per second in the latter."""
    config, results = (json.loads((run_dir / f"{x}.json").read_text()) for x in ("config", "eval"))
    speeds = sorted(float(row["charts/SPS"]) for row in read(run_dir / "metrics.csv"))
    return config, results | {"steps_per_second": round(speeds[len(speeds) // 2])}


def load(script, run_dir):
    """Args, train state and keys, with leading axis seeds, of a run of a script's module.

    Says in one line what is wrong with the run, if anything is.
    """
    with script.refuse(run_dir, Exception):
        stored = json.loads((run_dir / "config.json").read_text())["args"] | {"num_devices": 1}
        stored = {name: tuple(x) if isinstance(x, list) else x for name, x in stored.items()}
        args = script.Args(**stored)
        tasks = [args.train_tasks] if "train_tasks" in stored else []
        init, _ = script.make_train(args, script.Environment(*tasks, args))
        keys = jnp.stack([jax.random.PRNGKey(args.seed + i) for i in range(args.num_seeds)])
        like = jax.eval_shape(partial(jax.lax.map, init), keys)
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)  # any device
        state, _ = script.load_checkpoint(run_dir, like)
    return args, state, keys


def save(figure, path):
    figure.savefig(path, dpi=150, facecolor="white")  # white on dark pages too
