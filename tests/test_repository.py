"""What keeps several single-file scripts honest: no drift between copies, no dependency declared twice differently."""

import ast
import csv
import re
import tomllib
from itertools import combinations
from pathlib import Path

import pytest

from s5_ppo_meta import TASKS

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(ROOT.glob("*.py"))
TREES = {path.stem: ast.parse(path.read_text()) for path in SCRIPTS}

# Definitions that differ between scripts on purpose, and why. All others of one name must be the same text.
MODEL = {"Args": "the flags of the sequence model", "SequenceModel": "S5, LSTM or Transformer"}
TASK = MODEL | {
    "Args": "the flags of the task",
    "Environment": "a memory task, or trials of several control tasks",
    "Timestep": "a trial's rewards come scaled and raw",
    "EnvState": "a trial has a place in it, and matrices",
    "ActorCritic": "discrete actions, or continuous ones and a prediction",
    "Transition": "as ActorCritic",
    "TrainState": "the spread of each task's returns",
    "ppo_loss": "as ActorCritic",
    "make_train": "as TrainState",
    "evaluate": "greedy episodes, or trials with three kinds of memory",
    "setup": "--eval-only",
    "main": "what is evaluated",
}


def definitions(path):
    source = path.read_text()
    nodes = (n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef | ast.ClassDef))
    return {node.name: ast.get_source_segment(source, node) for node in nodes}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_inline_dependencies_are_those_of_pyproject(path):
    (block,) = re.findall(r"(?m)^# /// script\n((?:^#(?:| .*)\n)+?)^# ///$", path.read_text())
    inline = tomllib.loads("".join(line[2:] for line in block.splitlines(keepends=True)))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert inline["dependencies"] == project["dependencies"]
    assert inline["requires-python"] == project["requires-python"]


@pytest.mark.parametrize("name", TREES)
def test_no_script_imports_another(name):
    imported = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert not imported & set(TREES)


@pytest.mark.parametrize(("one", "other"), list(combinations(SCRIPTS, 2)), ids=lambda p: p.stem)
def test_definitions_of_one_name_are_the_same_text(one, other):
    ours, theirs = definitions(one), definitions(other)
    differ = {name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]}
    intended = TASK if "s5_ppo_meta" in (one.stem, other.stem) else MODEL
    if {one.stem, other.stem} == {"s5_ppo_memory", "s5_ppo_meta"}:  # the same model
        intended = {name: why for name, why in intended.items() if name != "SequenceModel"}
    assert differ <= intended.keys(), f"{one.name} and {other.name} have drifted apart"


@pytest.mark.parametrize("other", ["lstm_ppo", "transformer_ppo"])
def test_flags_differ_in_the_sequence_model_only(other):
    def args(name):
        before, rest = definitions(ROOT / f"{name}.py")["Args"].split("    # ---- sequence model")
        return before, rest.split("    # ---- actor and critic")[1]

    ours, theirs = args("s5_ppo_memory"), args(other)
    assert theirs[0] == ours[0] and theirs[1].split("    @property")[0] == ours[1].split("    @property")[0]
    # Behind the flags come what is derived and refused: nothing that S5 refuses is let through, but what --dt-min is.
    missing = [line for line in ours[1].splitlines() if line not in theirs[1].splitlines()]
    assert all("dt_m" in line for line in missing)


@pytest.mark.parametrize(("other", "own"), [("lstm_ppo", []), ("transformer_ppo", ["QUERY_BLOCK = 64"])])
def test_imports_and_constants_are_the_same(other, own):
    def rest(name):
        return [ast.unparse(n) for n in TREES[name].body[1:] if not isinstance(n, ast.FunctionDef | ast.ClassDef)]

    ours, theirs = rest("s5_ppo_memory"), rest(other)
    assert [line for line in theirs if line not in ours] == own
    assert [line.split("(")[0] for line in ours if line not in theirs] == ["s5_scan.defvjp"]


def test_no_definition_is_listed_as_different_that_is_not():
    for listed, others in ((MODEL, ("lstm_ppo", "transformer_ppo")), (TASK, ("s5_ppo_meta",))):
        ours = definitions(ROOT / "s5_ppo_memory.py")
        theirs = [definitions(ROOT / f"{name}.py") for name in others]
        same = {name for name in listed if all(ours[name] == x[name] for x in theirs)}
        assert same <= (MODEL.keys() if listed is TASK else set())  # TASK holds all of MODEL


def test_the_figures_of_the_readme_are_there():
    figures = re.findall(r"\]\((benchmarks/[^)]+)\)", (ROOT / "README.md").read_text())
    assert len(figures) > 5 and all((ROOT / path).is_file() for path in figures)


@pytest.mark.parametrize("name", TREES)
def test_every_flag_has_help_and_is_read(name):
    (args,) = (n for n in TREES[name].body if isinstance(n, ast.ClassDef) and n.name == "Args")
    flags = [n.target.id for n in args.body if isinstance(n, ast.AnnAssign)]
    text = definitions(ROOT / f"{name}.py")["Args"]  # tyro shows the comment behind a flag as its help
    assert [flag for flag in flags if not re.search(rf"(?m)^    {flag}: .+  # [\w-].{{8,}}", text)] == []

    args.body = [n for n in args.body if getattr(n, "name", None) != "check"]  # to refuse a value is not to use it
    read = {n.attr for n in ast.walk(TREES[name]) if isinstance(n, ast.Attribute)}
    assert [flag for flag in flags if flag not in read] == []


def test_the_readme_sets_up_and_tests_in_two_commands():
    (block,) = re.findall(r"(?ms)^```bash\n(.*?)^```$", (ROOT / "README.md").read_text())
    install, test = block.splitlines()
    assert install.startswith("pip install")
    assert test.startswith("pytest")


def test_the_reference_scores_of_all_tasks_are_the_measured_ones():
    with (ROOT / "benchmarks" / "reference_scores.csv").open(newline="") as f:
        rows = list(csv.DictReader(f))
    assert {row["task"] for row in rows} == set(TASKS)
    for row in rows:
        task = TASKS[row["task"]]
        assert task.zero == pytest.approx(max(float(row["random"]), float(row["idle"])), rel=0.01)
        assert task.spread == pytest.approx(float(row["spread"]), rel=0.01)
        if row["task"] == "mountain-car":  # which the specialist does not solve: 1 is where gym has it solved
            assert float(row["specialist"]) < task.zero and task.one == 90.0
        else:
            assert task.one == pytest.approx(float(row["specialist"]), rel=0.01)
