"""Wall-clock seconds of a memory script, from process start, and its greedy success, for seeds 0 to 4.

    python benchmarks/first_minute.py                    # s5_ppo_memory.py with its defaults: memory length 128
    python benchmarks/first_minute.py lstm_ppo.py        # another script
    python benchmarks/first_minute.py s5_ppo_memory.py --zoh    # and any flags of it; here, the paper's input scaling

One run after another, without a compilation cache. Appends a row a seed to first_minute.csv beside this file.
"""

import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main():
    script, *flags = sys.argv[1:] or ["s5_ppo_memory.py"]
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    for seed in range(5):
        command = [sys.executable, str(HERE.parent / script), "--seed", str(seed), *flags]
        with tempfile.TemporaryDirectory() as folder:
            start = time.time()
            subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
            seconds = time.time() - start
            (run_dir,) = Path(folder, "runs").iterdir()
            evaluation = json.loads((run_dir / "eval.json").read_text())
            config = json.loads((run_dir / "config.json").read_text())
        trained = config["args"]["memory_length"]
        success = {r["memory_length"]: r["success_rate"] for r in evaluation["results"]}
        row = {"date": date.today().isoformat(), "commit": (config["git_commit"] or "")[:7], "script": script}
        row |= {"flags": " ".join(flags), "memory_length": trained, "seed": seed, "success_rate": success[trained]}
        row |= {"at_half": success[trained // 2], "at_double": success[2 * trained], "at_4_times": success[4 * trained]}
        row |= {"seconds": round(seconds, 1)}
        row |= {"compile_seconds": round(evaluation["compile_seconds"], 1)}
        row |= {"steps_per_second": round(evaluation["steps_per_second"])}
        row |= {"host_share": round(evaluation["host_share"], 4), "device": config["device"]}
        print(row, flush=True)
        with (HERE / "first_minute.csv").open("a", newline="") as f:
            writer = csv.DictWriter(f, row, lineterminator="\n")
            if f.tell() == 0:
                writer.writeheader()
            writer.writerow(row)


if __name__ == "__main__":
    main()
