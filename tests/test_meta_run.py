"""The program as a user runs it: what it leaves, how it goes on, and what it refuses."""

import contextlib
import csv
import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import jax
import numpy as np
import pytest

import s5_ppo_meta as meta
from s5_ppo_meta import MEMORIES, SUITES, Args, load_checkpoint

SCRIPT = Path(meta.__file__).resolve()
TASKS = ("inverted-pendulum", "cartpole-positions")  # one of brax, one of gymnax
TINY = """--suite cartpole --train-tasks inverted-pendulum cartpole-positions
          --held-out-tasks mountain-car --trial-length 1 --num-envs 4 --num-steps 8
          --num-minibatches 2 --update-epochs 1 --d-model 8 --state-size 4 --num-layers 1
          --encoder-size 8 --head-size 8 --eval-trials 2 --log-interval 2"""
CALLS, STEPS = 8, 2 * 4 * 8
LONG = f"{TINY} --anneal-lr --checkpoint-interval 0 --total-timesteps {CALLS * STEPS}"


def start(cwd, flags):
    variables = os.environ | {"COLUMNS": "80"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [sys.executable, SCRIPT, *flags.split()], cwd=cwd, env=variables, **pipes
    )


def finish(process):
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def run(cwd, flags):
    """Exit code, stdout and stderr of `main` in this process, which has imported all it needs."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE
    handlers = {number: signal.getsignal(number) for number in numbers}
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(cwd):
        patch.setattr(sys, "argv", [str(SCRIPT), *flags.split()])
        patch.setenv("MPLBACKEND", "agg")
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                meta.main()
        except SystemExit as error:
            code = error.code
            if isinstance(code, str):  # as Python itself does
                code = print(error.code, file=err) or 1
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return code, out.getvalue(), err.getvalue()


def run_dir(cwd):
    (path,) = (cwd / "runs").iterdir()
    return path


def rows(path, name="metrics.csv"):
    with (path / name).open(newline="") as f:
        return list(csv.DictReader(f))


def results(path):
    """All numbers of a run that its flags and seed decide."""
    numbers = [{name: x for name, x in row.items() if name != "charts/SPS"} for row in rows(path)]
    return numbers, rows(path, "adaptation.csv")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("uninterrupted")
    code, out, err = finish(start(cwd, LONG))
    assert code == 0, err
    return run_dir(cwd), out


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run that was killed (-9) after a few checkpoints."""
    cwd = tmp_path_factory.mktemp("killed")
    process = start(cwd, LONG)
    while process.poll() is None:
        if any(len(rows(path.parent)) >= 2 for path in cwd.glob("runs/*/metrics.csv")):
            process.send_signal(signal.SIGKILL)
        time.sleep(0.01)
    code, _, err = finish(process)
    assert code == -signal.SIGKILL, err
    assert 2 <= len(rows(run_dir(cwd))) < CALLS, "the run was over before the signal came"
    return run_dir(cwd)


# ---- what a run leaves
def test_a_run_leaves_its_flags_numbers_plot_and_parameters(uninterrupted):
    path, out = uninterrupted
    config = json.loads((path / "config.json").read_text())
    assert config["args"].keys() == {f.name for f in dataclasses.fields(Args)}
    assert config["args"]["train_tasks"] == list(TASKS)
    assert config["versions"]["jax"] == jax.__version__
    assert (path / "adaptation.png").read_bytes().startswith(b"\x89PNG")
    assert list(path.glob("tensorboard/**/events.*"))
    assert (path / "checkpoint.gz").is_file()
    table = rows(path)
    assert [int(row["global_step"]) for row in table] == [STEPS * (i + 1) for i in range(CALLS)]
    assert {row["seed"] for row in table} == {"0"}
    assert all(np.isfinite(float(x)) for row in table for k, x in row.items() if "losses/" in k)
    assert all(float(row["charts/physics_failures"]) == 0 for row in table)
    for row in table:  # the score is the mean over tasks of which an episode ended
        returns = {name: float(row[f"charts/episodic_return/{name}"]) for name in TASKS}
        scores = [meta.score(x, name) for name, x in returns.items() if np.isfinite(x)]
        mean = np.mean(scores) if scores else np.nan
        assert float(row["charts/score"]) == pytest.approx(mean, rel=1e-3, nan_ok=True)
    returns = {name.rpartition("/")[2] for name in table[0] if "episodic_return" in name}
    assert returns == set(TASKS)  # what is held out never reaches training
    assert any(float(row["charts/episodic_return/cartpole-positions"]) > 0 for row in table)
    # The evaluation is of all tasks, also those held out.
    names = (*TASKS, "mountain-car")
    adaptation = rows(path, "adaptation.csv")
    assert [(row["task"], row["memory"], row["episode"], row["trials"]) for row in adaptation] == [
        (task, memory, episode, "2")
        for episodes in (("0",), ("second half",))
        for task, memory, episode in product(names, MEMORIES, episodes)
    ]
    assert all(np.isfinite(float(row[name])) for row in adaptation for name in ("mean", "ci95"))
    evaluation = json.loads((path / "eval.json").read_text())
    half = [row for row in adaptation if row["episode"] == "second half"]
    assert [str(row["mean"]) for row in evaluation["second_half"]] == [row["mean"] for row in half]
    assert evaluation["trained_after"] > evaluation["compiled_after"] > 0
    held_out = {line.split()[0]: "held out" in line for line in out.splitlines()}
    assert [held_out[name] for name in names] == [False, False, True]


# ---- going on
def test_after_a_kill_the_resumed_run_is_the_uninterrupted_one(tmp_path, killed, uninterrupted):
    path = shutil.copytree(killed, tmp_path / "elsewhere")
    code, _, err = run(tmp_path, "--resume elsewhere")
    assert code == 0, err
    assert results(path) == results(uninterrupted[0])


def test_a_resumed_run_passes_physics_that_fails(tmp_path, killed, monkeypatch):
    """A copy of each task is left in a state from which no number follows."""
    path = shutil.copytree(killed, tmp_path / "run")
    before = rows(path)

    def load(*inputs):
        state, saved_rows = load_checkpoint(*inputs)
        bad = jax.tree.map(np.array, state)
        brax, gymnax = (env_state.inner for env_state in bad.actor[0])
        brax.pipeline_state.qd[0, 1] = np.nan
        gymnax.theta[0, 0] = np.inf
        return jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), bad, state), saved_rows

    monkeypatch.setattr(meta, "load_checkpoint", load)
    monkeypatch.setattr(meta, "report", lambda *inputs: None)
    code, _, err = run(tmp_path, "--resume run")
    assert code == 0, err
    table = rows(path)
    assert table[: len(before)] == before and len(table) == CALLS
    failures = [float(row["charts/physics_failures"]) for row in table[len(before) :]]
    assert failures == [2, *[0] * (len(failures) - 1)]
    assert all(np.isfinite(float(x)) for row in table for k, x in row.items() if "losses/" in k)


@pytest.mark.slow
def test_a_finished_run_goes_on_for_longer_as_if_it_had_been_asked_to_at_once(tmp_path):
    short, long = (f"{TINY} --total-timesteps {calls * STEPS}" for calls in (2, 4))
    folders = [tmp_path / name for name in ("at once", "in two parts")]
    for folder, flags in zip(folders, (long, short), strict=True):
        folder.mkdir()
        code, _, err = run(folder, flags)
        assert code == 0, err
    at_once, in_two_parts = map(run_dir, folders)
    assert len(rows(in_two_parts)) == 2
    flags = f"--resume runs/{in_two_parts.name} --total-timesteps {4 * STEPS}"
    code, _, err = run(folders[1], flags)
    assert code == 0, err
    assert results(in_two_parts) == results(at_once)
    code, _, err = run(folders[1], f"--resume runs/{in_two_parts.name} --d-model 16")
    assert code == 1 and "error" in err and "sizes" in err.splitlines()[-1], err
    assert results(in_two_parts) == results(at_once)


@pytest.mark.slow
def test_seeds_side_by_side_differ(tmp_path):
    code, _, err = run(tmp_path, f"{TINY} --total-timesteps {2 * STEPS} --num-seeds 2 --seed 3")
    assert code == 0, err
    table = rows(run_dir(tmp_path))
    assert [row["seed"] for row in table] == ["3", "4"] * 2
    assert table[0]["losses/policy_loss"] != table[1]["losses/policy_loss"]
    assert {row["trials"] for row in rows(run_dir(tmp_path), "adaptation.csv")} == {"4"}


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_ends_the_run_and_keeps_the_last_good_checkpoint(
    tmp_path, killed
):
    path = shutil.copytree(killed, tmp_path / "run")
    before = rows(path)
    code, _, err = run(tmp_path, "--resume run --learning-rate 1e30")
    assert code == 1 and "error: the gradient was not finite after step" in err, err
    assert "--learning-rate" in err
    table = rows(path)
    assert table[: len(before)] == before
    assert all(np.isfinite(float(x)) for row in table for k, x in row.items() if "losses/" in k)
    code, _, err = run(tmp_path, "--resume run --learning-rate 1e-3")
    assert code == 0, err
    assert len(rows(path)) == CALLS


# ---- what it refuses
IMPOSSIBLE = {  # of which tyro tells, with exit code 2
    "unknown flag": ("--num-envz 3", "--num-envz"),
    "not a number": ("--num-envs many", "--num-envs"),
    "unknown suite": ("--suite jumping", "--suite"),
    "unknown task": ("--train-tasks cartpool", "--train-tasks"),
    "unknown held-out task": ("--held-out-tasks cartpool", "--held-out-tasks"),
    "no task": ("--train-tasks", "--train-tasks"),
    "trained on and held out": (
        "--train-tasks reacher --held-out-tasks reacher",
        "--held-out-tasks",
    ),
    "trained on twice": ("--train-tasks reacher reacher", "--train-tasks"),
    "unequal shares of tasks": (
        "--train-tasks reacher cartpole pendulum --num-envs 128",
        "--num-envs",
    ),
    "broken minibatches": ("--num-envs 10 --num-minibatches 4", "--num-envs"),
    "unequal shares of devices": ("--num-devices 2 --num-envs 32", "--num-envs"),
    "no rollout": ("--num-steps 0", "--num-steps"),
    "no trials": ("--eval-trials 0", "--eval-trials"),
    "trials of no length": ("--trial-length 0", "--trial-length"),
    "more than 31 bits": ("--total-timesteps 10000000000000", "--total-timesteps"),
}
BAD = {  # said in one line, with exit code 1
    "observation too large": ("--projected-obs-size 1", "point-goal"),
    "action too large": ("--suite classic --projected-action-size 1", "point-robot"),
    "held-out task too large": ("--held-out-tasks reacher", "reacher"),
    "more devices than there are": ("--num-devices 999 --num-envs 95904", "999"),
    "no such run": ("--resume runs/nowhere", "runs/nowhere"),
}


def assert_refused(code, out, err, *named):
    assert code == 1 and not out
    assert len(err.splitlines()) == 1 and err.startswith("error: "), err
    assert all(name in err for name in named), err


@pytest.mark.parametrize(("flags", "named"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_impossible_flags_are_named(tmp_path, flags, named):
    code, out, err = run(tmp_path, flags)
    assert code == 2 and named in out + err, out + err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("flags", "named"), BAD.values(), ids=BAD)
def test_other_bad_input_is_refused_in_one_line_and_leaves_nothing(tmp_path, flags, named):
    assert_refused(*run(tmp_path, flags), named)
    assert not list(tmp_path.iterdir())


def test_a_refused_run_exits_with_1(tmp_path):
    flags, named = BAD["no such run"]
    assert_refused(*finish(start(tmp_path, flags)), named)
    assert not list(tmp_path.iterdir())


# ---- flags
@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_gives_what_no_flag_overrides(suite):
    args = Args(suite=suite)
    given = {name: x for name, x in SUITES[suite]._asdict().items() if x is not None}
    assert given.items() <= dataclasses.asdict(args).items()
    names = ("mountain-car",)
    changed = Args(suite=suite, trial_length=7, projected_obs_size=99, held_out_tasks=names)
    expected = dataclasses.asdict(args) | {
        "trial_length": 7,
        "projected_obs_size": 99,
        "held_out_tasks": names,
    }
    assert dataclasses.asdict(changed) == expected


def test_a_resumed_run_has_its_flags_and_those_beside_it(tmp_path, monkeypatch):
    flags = "--suite classic --seed 3 --no-projection --train-tasks reacher cartpole --anneal-lr"
    (tmp_path / "config.json").write_text(json.dumps({"flags": flags.split()}))

    def parsed(beside):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--resume", str(tmp_path), *beside.split()])
        return meta.parse_flags()[0]

    args = parsed("")
    assert (args.suite, args.seed, args.projection, args.anneal_lr) == ("classic", 3, False, True)
    assert args.train_tasks == ("reacher", "cartpole") and args.resume == tmp_path
    changed = parsed("--train-tasks pendulum --projection --num-envs 64 --seed 4")
    expected = {"train_tasks": ("pendulum",), "projection": True, "num_envs": 64, "seed": 4}
    assert dataclasses.asdict(changed) == dataclasses.asdict(args) | expected
