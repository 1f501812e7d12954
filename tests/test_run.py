"""The program as a user runs it: what it leaves, how it stops and goes on, and what it refuses."""

import csv
import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lstm_ppo
import s5_ppo_memory
import transformer_ppo
from s5_ppo_memory import Args, setup

ROOT = Path(__file__).resolve().parent.parent
SMALL = """--memory-length 3 --num-envs 4 --num-steps 8 --num-minibatches 2 --d-model 8 --num-layers 1
           --encoder-size 8 --head-size 8 --eval-episodes 8 --log-interval 2"""
TINY = f"{SMALL} --state-size 4"
CALLS = 60
LONG = f"{TINY} --anneal-lr --total-timesteps {CALLS * 2 * 32}"


def start(cwd, flags, script="s5_ppo_memory.py"):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "COLUMNS": "80"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, ROOT / script, *flags.split()], cwd=cwd, env=environment, **pipes)


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def run_dir(cwd):
    (path,) = (cwd / "runs").iterdir()
    return path


def rows(path):
    with (path / "metrics.csv").open(newline="") as f:
        return list(csv.DictReader(f))


def results(path):
    """All numbers of a run that its flags and seed decide."""
    numbers = [{name: x for name, x in row.items() if name != "charts/SPS"} for row in rows(path)]
    evaluation = json.loads((path / "eval.json").read_text())
    return numbers, evaluation["results"], evaluation["chance_return"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("uninterrupted")
    code, _, err = finish(start(cwd, LONG))
    assert code == 0, err
    return run_dir(cwd)


def interrupt(cwd, number, flags):
    """Sends a signal once a few calls are logged; returns exit code, stdout and the run directory."""
    process = start(cwd, flags)
    while process.poll() is None and not (list(cwd.glob("runs/*/metrics.csv")) and len(rows(run_dir(cwd))) >= 5):
        time.sleep(0.01)
    process.send_signal(number)
    code, out, _ = finish(process)
    assert 5 <= len(rows(run_dir(cwd))) < CALLS, "the run was over before the signal came"
    return code, out, run_dir(cwd)


# ---- what a run leaves
def test_a_run_leaves_its_flags_numbers_plot_and_parameters(uninterrupted):
    config = json.loads((uninterrupted / "config.json").read_text())
    assert config["args"]["memory_length"] == 3 and config["args"]["anneal_lr"]
    assert config["versions"]["jax"] == jax.__version__
    assert config["args"].keys() == {f.name for f in dataclasses.fields(Args)}
    assert (uninterrupted / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert list(uninterrupted.glob("tensorboard/**/events.*"))
    assert list((uninterrupted / "checkpoint").iterdir())
    table = rows(uninterrupted)
    assert [int(row["update"]) for row in table] == list(range(2, 2 * CALLS + 1, 2))
    assert [int(row["global_step"]) for row in table] == list(range(64, 64 * CALLS + 1, 64))
    assert all(float(row["charts/episodes"]) == 16 for row in table)
    assert float(table[-1]["charts/learning_rate"]) == pytest.approx(
        Args().learning_rate / (2 * CALLS * 4 * 2), rel=1e-3
    )
    evaluation = json.loads((uninterrupted / "eval.json").read_text())
    assert [r["memory_length"] for r in evaluation["results"]] == [1, 3, 6, 12]
    assert all(0 <= r["success_rate"] <= 1 for r in evaluation["results"])


def test_where_no_episode_ended_the_cell_is_empty(tmp_path):
    code, _, err = finish(start(tmp_path, f"{TINY} --memory-length 40 --total-timesteps 64 --num-seeds 2"))
    assert code == 0, err
    table = rows(run_dir(tmp_path))
    assert [(row["seed"], float(row["charts/episodes"])) for row in table] == [("0", 0), ("1", 0)]
    assert all(row["charts/episodic_return"] == row["charts/episodic_length"] == "" for row in table)
    assert not any("nan" in row.values() for row in table)
    assert (run_dir(tmp_path) / "learning_curve.png").exists()
    assert "nan" not in (run_dir(tmp_path) / "eval.json").read_text().lower()


# ---- stopping and going on
def test_ctrl_c_saves_and_the_resumed_run_is_the_uninterrupted_one(tmp_path, uninterrupted):
    code, out, path = interrupt(tmp_path, signal.SIGINT, LONG)  # no checkpoint is due before it
    assert code == 130
    assert f"--resume runs/{path.name}" in out
    last = int(rows(path)[-1]["update"])
    assert [x.name for x in (path / "checkpoint").iterdir()] == [str(last)] and (path / "learning_curve.png").exists()
    assert not (path / "eval.json").exists()
    code, out, err = finish(start(tmp_path, f"--resume runs/{path.name}"))
    assert code == 0, err
    assert f"update {last + 2} of" in out and f"update {last} of" not in out  # it did not begin anew
    assert results(run_dir(tmp_path)) == results(uninterrupted)


@pytest.mark.slow
def test_ctrl_c_while_it_compiles_ends_the_run_before_its_first_update(tmp_path):
    process = start(tmp_path, f"{TINY} --total-timesteps 640")
    while "parameters" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(0.2)  # compiling takes seconds
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert code == 130 and "stopped after update 0" in out and "--resume" in out, err
    path = run_dir(tmp_path)
    assert not (path / "metrics.csv").exists()
    code, _, err = finish(start(tmp_path, f"--resume {path}"))
    assert code == 0 and len(rows(path)) > 1, err


def test_after_a_kill_the_resumed_run_is_the_uninterrupted_one(tmp_path, uninterrupted):
    code, _, path = interrupt(tmp_path, signal.SIGKILL, f"{LONG} --checkpoint-interval 0")
    assert code == -signal.SIGKILL
    code, out, err = finish(start(tmp_path, f"--resume {path}"))
    assert code == 0, err
    assert "update 2 of" not in out  # it did not begin anew
    assert results(run_dir(tmp_path)) == results(uninterrupted)
    assert json.loads((path / "eval.json").read_text())["steps_per_second"] > 0
    code, _, err = finish(start(tmp_path, f"--resume {path}"))  # with nothing left to do it has no speed
    assert code == 0 and "steps_per_second" not in json.loads((path / "eval.json").read_text()), err


@pytest.mark.parametrize(
    ("script", "own"),
    [
        ("lstm_ppo.py", "--hidden-size 4"),
        ("transformer_ppo.py", "--context-length 5 --num-heads 1 --key-size 4 --mlp-size 4"),
    ],
)
def test_the_other_models_go_on_as_if_never_stopped(tmp_path, script, own):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for cwd, total in ((whole, 256), (parts, 128)):
        cwd.mkdir()
        code, out, err = finish(start(cwd, f"{SMALL} {own} --no-anneal-lr --total-timesteps {total}", script))
        assert code == 0 and "parameters" in out and "MiB" in out, err
    code, out, err = finish(start(parts, f"--resume {run_dir(parts)} --total-timesteps 256", script))
    assert code == 0 and "update 6 of 8" in out and "update 4 of 8" not in out, err
    assert results(run_dir(parts)) == results(run_dir(whole))


def test_resume_with_a_larger_total_goes_on_for_longer(tmp_path):
    code, _, err = finish(start(tmp_path, f"{TINY} --total-timesteps 32"))  # both totals are rounded up
    assert code == 0, err
    path = run_dir(tmp_path)
    first = rows(path)
    code, _, err = finish(start(tmp_path, f"--resume {path} --total-timesteps 160"))
    assert code == 0, err
    assert [int(row["global_step"]) for row in rows(path)] == [64, 128, 192]
    assert rows(path)[:1] == first
    assert json.loads((path / "config.json").read_text())["args"]["total_timesteps"] == 160
    code, _, err = finish(start(tmp_path, f"--resume {path} --total-timesteps 64"))
    assert_refused(code, err, "--total-timesteps")


def test_a_checkpoint_that_does_not_fit_the_network_is_refused_and_kept(tmp_path, uninterrupted):
    path = shutil.copytree(uninterrupted, tmp_path / "run")
    config = json.loads((path / "config.json").read_text())
    config["args"]["d_model"] *= 2
    (path / "config.json").write_text(json.dumps(config))
    code, _, err = finish(start(tmp_path, "--resume run --total-timesteps 1000000"))
    assert_refused(code, err, "--resume run has a checkpoint that does not fit")
    assert results(path) == results(uninterrupted) and json.loads((path / "config.json").read_text()) == config


def test_a_gradient_that_is_not_finite_ends_the_run_and_is_neither_saved_nor_logged(tmp_path):
    code, _, err = finish(start(tmp_path, f"{TINY} --learning-rate 1e30 --total-timesteps 6400"))
    assert code == 1 and "error: the gradient was not finite after update 0" in err and "--learning-rate" in err, err
    assert {path.name for path in run_dir(tmp_path).iterdir()} == {"config.json", "checkpoint", "tensorboard"}
    assert not list(run_dir(tmp_path).glob("checkpoint/*"))


# ---- what it refuses
BAD = {
    "unknown flag": ("--num-envz 3", "--num-envz"),
    "not a number": ("--num-envs many", "--num-envs"),
    "unknown environment": ("--env-id CartPole-v7", "--env-id", "CartPole-v1"),
    "continuous actions": ("--env-id Pendulum-v1", "--env-id"),
    "observation not flat": ("--env-id Breakout-MinAtar", "--env-id"),
    "unknown field": ("--env-id CartPole-v1 --env-params gravitas 1", "--env-params", "gravity", "force_mag"),
    "field that is an array": ("--env-id Acrobot-v1 --env-params available_torque 5", "--env-params", "array"),
    "endless field": ("--env-id CartPole-v1 --env-params max_steps_in_episode inf", "--env-params", "500"),
    "field with a fraction": ("--env-id CartPole-v1 --env-params max_steps_in_episode 2.5", "--env-params", "500"),
    "minibatches of broken environments": ("--num-envs 10 --num-minibatches 4", "--num-minibatches"),
    "more minibatches than environments": ("--num-envs 2 --num-minibatches 4", "--num-minibatches"),
    "no such run": ("--resume runs/nowhere", "--resume"),
    "resume with other flags": ("--resume runs/nowhere --seed 3", "--resume"),
    "less than a rollout": ("--total-timesteps 100", "--total-timesteps"),
    "time steps swapped": ("--dt-min 0.1 --dt-max 0.01", "--dt-max"),
    "gamma above one": ("--gamma 1.5", "--gamma"),
    "lambda above one": ("--gae-lambda 1.5", "--gae-lambda"),
    "no steps": ("--num-steps 0", "--num-steps"),
    "no memory length": ("--memory-length 0", "--memory-length"),
    "no seeds": ("--num-seeds 0", "--num-seeds"),
    "negative step size": ("--learning-rate -1", "--learning-rate"),
    "no dt": ("--dt-min 0", "--dt-min"),
    "no number": ("--learning-rate nan", "--learning-rate"),
    "no final bonus": ("--final-ent-coef nan", "--final-ent-coef"),
    "endless": ("--learning-rate inf", "--learning-rate"),
    "more devices than there are": ("--num-devices 99", "--num-devices"),
    "no Weights & Biases": ("--track", "--track", "pip install wandb"),
    "a field with its own flag": ("--env-params memory_length 3", "--memory-length"),
    "no data": ("--env-id MNISTBandit-bsuite", "--env-id", "data"),
    "a run without a checkpoint": ("--resume .", "--resume"),
    "beyond 32 bits": ("--memory-length 3000000000", "--memory-length", "below 2147483648"),
}


def assert_refused(code, err, *named):
    assert code == 2
    assert len(err.strip().splitlines()) == 1 and all(name in err for name in named), err


@pytest.mark.parametrize("module", [s5_ppo_memory, lstm_ppo, transformer_ppo], ids=lambda module: module.__name__)
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_line_that_names_the_flag(monkeypatch, capsys, module, case):
    flags, *named = BAD[case]
    if "--dt-" in flags and module is not s5_ppo_memory:
        named = ["--dt-"]  # which is no flag there
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *flags.split()])
    with pytest.raises(SystemExit) as refusal:
        module.setup()
    assert_refused(refusal.value.code, capsys.readouterr().err, *named)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"args": []}'])
def test_a_damaged_run_is_refused(monkeypatch, capsys, tmp_path, text):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "config.json").write_text(text)
    monkeypatch.setattr(sys, "argv", ["s5_ppo_memory.py", "--resume", str(tmp_path)])
    with pytest.raises(SystemExit) as refusal:
        setup()
    assert_refused(refusal.value.code, capsys.readouterr().err, "--resume", "damaged")


def test_a_run_of_another_script_is_refused(monkeypatch, capsys, tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "config.json").write_text('{"args": {"seed": 0}}')
    monkeypatch.setattr(sys, "argv", ["s5_ppo_memory.py", "--resume", str(tmp_path)])
    with pytest.raises(SystemExit) as refusal:
        setup()
    assert_refused(refusal.value.code, capsys.readouterr().err, "another script")


@pytest.mark.parametrize("name", ["minibatches of broken environments", "unknown environment", "continuous actions"])
def test_a_refused_run_leaves_nothing_and_takes_no_time(tmp_path, name):
    flags, *named = BAD[name]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code, out, err = finish(start(tmp_path, flags))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert_refused(code, err, *named)
    assert not out and not list(tmp_path.iterdir())
    assert after.ru_utime - before.ru_utime < 10  # five seconds of an idle machine; compiling takes longer than this


@pytest.mark.parametrize("script", ["s5_ppo_memory", "lstm_ppo", "transformer_ppo", "s5_ppo_meta"])
def test_help_tells_what_every_flag_is_for(script):
    source = (ROOT / f"{script}.py").read_text()
    flags = re.findall(
        r"(?m)^    (\w+): [^#\n]+  # (.+)$", source[source.index("class Args") : source.index("# ==== Envir")]
    )
    code, out, err = finish(start(ROOT, "--help", f"{script}.py"))
    page = " ".join(re.sub("[╭╮╰╯│─]", " ", out).split())
    assert code == 0 and len(flags) > 25, err
    for flag, text in flags:
        assert f"--{flag.replace('_', '-')}" in page and text in page, flag


def test_a_copy_of_the_one_file_runs_anywhere(tmp_path):
    shutil.copy(ROOT / "s5_ppo_memory.py", tmp_path / "my_agent.py")
    code, _, err = finish(start(tmp_path, f"{TINY} --total-timesteps 64", tmp_path / "my_agent.py"))
    assert code == 0, err
    assert json.loads((run_dir(tmp_path) / "config.json").read_text())["git_commit"] is None


def test_another_task_with_two_seeds_stops_and_goes_on(tmp_path):
    """CartPole's episodes end at different steps, so that its curve has an interval and its evaluation returns."""
    flags = "--env-id CartPole-v1 --num-seeds 2 --num-envs 4 --num-steps 32 --num-minibatches 2 --log-interval 2"
    flags += " --num-layers 1 --d-model 8 --state-size 4 --encoder-size 8 --head-size 8 --eval-episodes 8"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for cwd, total in ((whole, 1024), (parts, 512)):
        cwd.mkdir()
        code, out, err = finish(start(cwd, f"{flags} --no-anneal-lr --total-timesteps {total}"))
        assert code == 0 and "mean return" in out, err
    code, _, err = finish(start(parts, f"--resume {run_dir(parts)} --total-timesteps 1024"))
    assert code == 0, err
    assert results(run_dir(parts)) == results(run_dir(whole))
    _, evaluation, chance = results(run_dir(whole))
    assert [result["seed"] for result in evaluation] == [0, 1] and 8 < chance < 60
    assert all(result["mean_return"] == result["mean_length"] > 5 for result in evaluation)
    assert not any("success_rate" in result for result in evaluation)


def test_metrics_go_to_tensorboard_and_to_weights_and_biases_under_the_same_names(monkeypatch, tmp_path):
    sent, written = [], []
    wandb = types.SimpleNamespace(log=sent.append, finish=lambda: sent.append("finished"))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: wandb))
    monkeypatch.setattr("tensorboardX.SummaryWriter.add_scalar", lambda _, *scalar: written.append(scalar))
    (tmp_path / "config.json").write_text("{}")
    log = s5_ppo_memory.MetricsLog(tmp_path, Args(track=True, anneal_lr=False, num_envs=4, num_steps=8), 0)
    metrics = {"charts/episodic_return": np.array([0.5]), "charts/episodic_length": np.array([np.nan])}
    log.write(10, metrics, 1000.0)
    log.close()
    step = 10 * 4 * 8
    names = {"charts/episodic_return": 0.5, "charts/learning_rate": 1e-3, "charts/SPS": 1000}
    assert {name: value for name, value, _ in written} == pytest.approx(names) and {s for *_, s in written} == {step}
    assert sent == [pytest.approx(names | {"global_step": step}), "finished"]


# ---- several seeds
@pytest.mark.parametrize("script", [s5_ppo_memory, lstm_ppo, transformer_ppo], ids=lambda script: script.__name__)
def test_seeds_side_by_side_give_what_they_give_alone(script):
    args = script.Args(num_seeds=3, memory_length=3, num_envs=4, num_steps=8, num_minibatches=2, log_interval=3)
    args = dataclasses.replace(args, num_layers=1, d_model=8, encoder_size=8, head_size=8)

    def first_call(args):
        init, train = script.make_train(args, script.Environment(args))
        init, train = jax.jit(partial(jax.lax.map, init)), jax.jit(script.over_seeds(train, args))

        def run(seeds):
            state, metrics = train(init(jnp.stack([jax.random.key(seed) for seed in seeds])))
            return state.params, metrics

        return run

    together, single = first_call(args)(range(3)), first_call(dataclasses.replace(args, num_seeds=1))
    alone = [single([seed]) for seed in range(3)]
    alone = jax.tree.map(lambda *x: np.concatenate(x), *alone)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), together, alone)
    assert len(set(together[1]["losses/policy_loss"].tolist())) == 3
