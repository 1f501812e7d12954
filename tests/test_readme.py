"""What the README shows can be done as it stands: its snippet runs, its diffs apply and train."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TINY = """--num-envs 4 --num-steps 8 --num-minibatches 2 --d-model 8 --num-layers 1 --encoder-size 8
          --head-size 8 --eval-episodes 4 --log-interval 1 --total-timesteps 64"""


def blocks(language):
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", (ROOT / "README.md").read_text())


def test_the_snippet_runs():
    (snippet,) = blocks("python")
    assert "assert" in snippet
    exec(compile(snippet, "README.md", "exec"), {})


def apply(diff, source):
    """Puts the lines with + in the place of those with -, which are there once."""
    for removed, added in re.findall(r"((?:^-.*\n)+)((?:^\+.*\n)+)", diff, re.MULTILINE):
        old, new = (re.sub(r"(?m)^[-+]", "", lines) for lines in (removed, added))
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source


def test_the_diffs_apply_and_the_scripts_they_make_train(tmp_path):
    environment, model = blocks("diff")
    changed = apply(model, apply(environment, (ROOT / "s5_ppo_memory.py").read_text()))
    assert "Average()" in changed and "CartPole" in changed
    (tmp_path / "mine.py").write_text(changed)
    command = [sys.executable, "mine.py", *TINY.split()]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0 and "mean return" in run.stdout, run.stderr
    (path,) = tmp_path.glob("runs/*/metrics.csv")
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize(("name", "most"), [("README.md", 1300), ("benchmarks/README.md", 2500)])
def test_it_is_short(name, most):
    words = [word for word in (ROOT / name).read_text().split() if re.search(r"\w", word)]
    assert len(words) <= most


def test_it_sets_up_and_tests_in_two_commands():
    install, test = blocks("bash")[0].splitlines()
    assert install.startswith("pip install") and test.startswith("pytest")
    text = (ROOT / "README.md").read_text()
    figures = re.findall(r"\]\((benchmarks/[^)]+)\)", text)
    assert figures and all((ROOT / path).is_file() for path in figures)
