"""Puts the sequence model of one script into another: every model on every task.

    python benchmarks/compose.py lstm_ppo.py s5_ppo_meta.py > lstm_ppo_meta.py
    python lstm_ppo_meta.py

The section `Sequence model` of the first script, its flags and the checks of these take the place
of the second's. A flag that both have keeps the second's default. To bring a model of your own,
write it into a copy of a memory script, test it there, and compose.
"""

import ast
import re
import sys
from pathlib import Path

SECTION = re.compile(r"# ==== Sequence model.*?(?=\n# ==== )", re.DOTALL)
FLAGS = re.compile(r"    # ---- sequence model\n(.*?)\n\n", re.DOTALL)
# What a memory script derives from its memory length, where the task has none.
DEFAULTS = {"dt_slow": "0.0", "dt_min": "0.001", "dt_max": "2.0"}
DEFAULTS |= {"max_timescale": "2000.0", "context_length": "256"}
FLAG = re.compile(r"    (\w+): (.+?) = (.+?)  (# .+)")


def checks(script, flags):
    """The statements of __post_init__ that speak of a flag of the model, as text."""
    (args,) = (n for n in ast.parse(script).body if getattr(n, "name", "") == "Args")
    (function,) = (n for n in args.body if getattr(n, "name", "") == "__post_init__")
    read = [{n.attr for n in ast.walk(x) if isinstance(n, ast.Attribute)} for x in function.body]
    texts = [ast.get_source_segment(script, x, padded=True) + "\n" for x in function.body]
    return [text for text, names in zip(texts, read, strict=True) if names & flags]


def compose(model, task):
    """The text of script `task` with the sequence model of script `model`."""
    new, old = (dict((m[1], m) for m in FLAG.finditer(FLAGS.search(x)[0])) for x in (model, task))
    for text in checks(task, old.keys() - new.keys()):
        task = task.replace(text, "")
    added, defaults = checks(model, new.keys() - old.keys()), {}
    if "self.memory_length" not in task:
        added, defaults = [text for text in added if "memory_length" not in text], DEFAULTS
    lines = ["    # ---- sequence model"]
    for name, flag in new.items():
        default = old[name][3] if name in old else defaults.get(name, flag[3])
        kind = flag[2] if default == "None" else flag[2].removesuffix(" | None")
        lines.append(f"    {name}: {kind} = {default}  {flag[4]}")
    last = "        if self.num_updates * self.update_epochs"  # the last check, in every script
    task = task.replace(last, "".join(added) + last)
    task = FLAGS.sub(lambda _: "\n".join(lines) + "\n\n", task)
    return SECTION.sub(lambda _: SECTION.search(model)[0], task)


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print(compose(*(Path(path).read_text() for path in sys.argv[1:])), end="")


if __name__ == "__main__":
    main()
