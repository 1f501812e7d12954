"""How soon a memory script is done, and what its agent then answers: the README's first command.

    python benchmarks/first_minute.py               # s5_ppo_memory.py with its defaults
    python benchmarks/first_minute.py lstm_ppo.py   # another script, or the README's flags:
    python benchmarks/first_minute.py s5_ppo_memory.py --memory-length 1024 \\
        --total-timesteps 2500000

Seconds from process start to exit, compile included, and the mean return of greedy episodes (1:
every answer right, 0: guessed) at 1/2, 1, 2, 4 and 8 times the memory length trained. Seeds 0 to 4,
one after another, with no compilation cache: up to a minute a seed on two idle cores. Appends a row
a seed to first_minute.csv; there, rows with a success_rate are of older versions.
"""

import os
import subprocess
import sys
import tempfile
import time

from common import HERE, append, results_of, train


def main():
    script, *flags = sys.argv[1:] or ["s5_ppo_memory.py"]
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    for seed in range(5):
        with tempfile.TemporaryDirectory() as folder:
            start = time.time()
            quiet = {"env": environment, "stdout": subprocess.DEVNULL}
            run_dir = train(script, ["--seed", seed, *flags], folder, **quiet)
            seconds = time.time() - start
            config, results = results_of(run_dir)
        row = {"script": script, "flags": " ".join(flags), "seed": seed}
        row |= {"memory_length": config["args"]["memory_length"]}
        names = ("return_at_half", "return", "return_at_double")
        names += ("return_at_4_times", "return_at_8_times")
        returns = [x[0] for x in results["mean_return"].values()]
        row |= dict(zip(names, returns, strict=True))
        row |= {"seconds": round(seconds, 1), "steps_per_second": results["steps_per_second"]}
        row |= {"compiled_after": round(results["compiled_after"], 1)}
        row |= {"device": config["device"], "date": time.strftime("%Y-%m-%d")}
        append(HERE / "first_minute.csv", row | {"commit": config["git_commit"][:7]})


if __name__ == "__main__":
    main()
