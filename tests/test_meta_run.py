"""The program as a user runs it: what it leaves, how it goes on, how it is evaluated again, and what it refuses."""

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from s5_ppo_meta import MEMORIES, SUITES, Args, setup

SCRIPT = Path(__file__).resolve().parent.parent / "s5_ppo_meta.py"
TINY = """--train-tasks cartpole-positions --held-out-tasks mountain-car --trial-episodes 2
          --num-envs 4 --num-steps 8 --num-minibatches 2 --update-epochs 1 --d-model 8 --state-size 4 --num-layers 1
          --encoder-size 8 --head-size 8 --eval-trials 2 --log-interval 2"""
CALLS = 12
LONG = f"{TINY} --anneal-lr --checkpoint-interval 0 --total-timesteps {CALLS * 2 * 32}"


def start(cwd, *command, **variables):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "COLUMNS": "200"} | variables
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *command], cwd=cwd, env=environment, **pipes)


def finish(process):
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def run(cwd, flags):
    return finish(start(cwd, SCRIPT, *flags.split()))


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
    code, out, err = run(cwd, f"{LONG} --eval-interval 10")
    assert code == 0, err
    return run_dir(cwd), out


# ---- what a run leaves
def test_a_run_leaves_its_flags_numbers_plots_and_parameters(uninterrupted):
    path, out = uninterrupted
    config = json.loads((path / "config.json").read_text())
    assert config["args"].keys() == {f.name for f in dataclasses.fields(Args)}
    assert config["args"]["train_tasks"] == ["cartpole-positions"]
    assert config["versions"]["jax"] == jax.__version__
    for name in ("learning_curve.png", "adaptation.png"):
        assert (path / name).read_bytes().startswith(b"\x89PNG")
    assert list(path.glob("tensorboard/**/events.*"))
    assert list((path / "checkpoint").iterdir())
    table = rows(path)
    assert [int(row["update"]) for row in table] == list(range(2, 2 * CALLS + 1, 2))
    assert [int(row["global_step"]) for row in table] == list(range(64, 64 * CALLS + 1, 64))
    assert CALLS * 64 / 60 < sum(float(row["charts/episodes/cartpole-positions"]) for row in table) < CALLS * 64 / 9
    assert "charts/episodes/mountain-car" not in table[0]
    assert not any("nan" in row.values() for row in table)
    evaluation = json.loads((path / "eval.json").read_text())
    assert evaluation["steps_per_second"] > 0
    assert {row["task"] for row in evaluation["results"]} == {"cartpole-positions", "mountain-car"}
    assert "cartpole-positions" in out and "mountain-car (held out)" in out and "kept - wiped" in out
    (difference,) = (
        f"{float(row['mean']):.2f} ± {float(row['interval']):.2f}"
        for row in rows(path, "evaluations.csv")
        if (row["update"], row["task"], row["memory"], row["against"])
        == (str(2 * CALLS), "cartpole-positions", "wiped every step", "kept minus this")
    )
    assert difference in out  # what was learned in context is printed


def test_evaluations_are_of_all_tasks_and_kinds_of_memory(uninterrupted):
    path, _ = uninterrupted
    adaptation = rows(path, "adaptation.csv")
    assert {(row["task"], row["memory"]) for row in adaptation} == {
        (task, memory) for task in ("cartpole-positions", "mountain-car") for memory in MEMORIES
    }
    assert {"episode", "step", "second half"} <= {row["against"] for row in adaptation}
    index = [float(row["x"]) for row in adaptation if row["against"] == "episode" and row["memory"] == MEMORIES[0]]
    assert index == [0, 1, 2, 3] * 2  # trials twice as long as in training
    assert all(float(row["mean"]) < 1 for row in adaptation if row["against"] == "second half")
    table = rows(path, "evaluations.csv")
    assert sorted({int(row["update"]) for row in table}) == [10, 20, 24]
    assert {row["eval_trial_length"] for row in table} == {"4"}


# ---- going on
def test_after_a_kill_the_resumed_run_is_the_uninterrupted_one_with_or_without_evaluations(tmp_path, uninterrupted):
    process = start(tmp_path, SCRIPT, *LONG.split())
    while process.poll() is None and not (
        list(tmp_path.glob("runs/*/metrics.csv")) and len(rows(run_dir(tmp_path))) >= 3
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    code, _, err = finish(process)
    path = run_dir(tmp_path)
    assert code == -signal.SIGKILL, err
    assert 3 <= len(rows(path)) < CALLS, "the run was over before the signal came"
    code, _, err = run(tmp_path, f"--resume runs/{path.name}")
    assert code == 0, err
    assert results(run_dir(tmp_path)) == results(uninterrupted[0])


@pytest.mark.slow
def test_a_run_is_evaluated_again_on_longer_trials_and_changes_in_nothing_else(tmp_path, uninterrupted):
    path, _ = uninterrupted
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    evaluations = len(rows(path, "evaluations.csv"))
    for _ in range(2):  # the second replaces the first
        code, out, err = run(tmp_path, f"--eval-only {path} --eval-trial-length 6 --eval-trials 3")
        assert code == 0, err
    assert "mountain-car (held out)" in out and not list(tmp_path.iterdir())
    lengths = [row["eval_trial_length"] for row in rows(path, "evaluations.csv")]
    assert lengths.count("4") == evaluations and lengths.count("6") == evaluations / 3  # of three, while it was trained
    written = {p.name for p, content in before.items() if p.read_bytes() != content}
    assert written == {"adaptation.csv", "adaptation.png", "evaluations.csv"}
    episodes = [row for row in rows(path, "adaptation.csv") if row["against"] == "episode"]
    assert max(float(row["x"]) for row in episodes) == 5 and {row["trials"] for row in episodes} == {"3"}
    for name in written:
        (path / name).write_bytes(before[path / name])


@pytest.mark.slow
def test_seeds_side_by_side_and_dashes_for_what_was_not_measured(tmp_path):
    """Few episodes end within the two steps of training, and none of mountain-car begins late in a short trial."""
    flags = (
        f"{TINY} --trial-length 40 --trial-episodes 0 --num-steps 2 --log-interval 1 --total-timesteps 8 --num-seeds 2"
    )
    code, out, err = run(tmp_path, flags)
    assert code == 0, err
    path = run_dir(tmp_path)
    table = rows(path)
    assert [row["seed"] for row in table] == ["0", "1"]
    assert table[0]["losses/policy_loss"] != table[1]["losses/policy_loss"]
    assert any(float(row["charts/episodes/cartpole-positions"]) == 0 and row["charts/score"] == "" for row in table)
    trials = {row["trials"] for row in rows(path, "adaptation.csv") if row["against"] == "step"}
    assert trials == {"4"}  # two of each seed
    for name in ("metrics.csv", "adaptation.csv", "evaluations.csv"):
        assert not any("nan" in row.values() for row in rows(path, name)), name
    assert "nan" not in out and "Warning" not in err


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_its_flags_is_refused_by_both_uses(tmp_path, uninterrupted):
    copy = shutil.copytree(uninterrupted[0], tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["args"]["d_model"] *= 2
    (copy / "config.json").write_text(json.dumps(config))
    for flag in ("--eval-only", "--resume"):
        code, _, err = run(tmp_path, f"{flag} {copy}")
        assert_refused(code, err, flag, "git_commit")


@pytest.mark.slow
def test_an_evaluation_in_which_no_episode_begins_late_keeps_the_earlier_ones(tmp_path):
    """An episode of mountain-car takes a thousand steps of an agent that cannot climb, far more than these trials."""
    code, _, err = run(tmp_path, f"{TINY.replace('cartpole-positions', 'pendulum')} --total-timesteps 64")
    assert code == 0, err
    before = rows(run_dir(tmp_path), "evaluations.csv")
    assert before
    config = json.loads((run_dir(tmp_path) / "config.json").read_text())
    config["args"] |= {"trial_length": 40, "trial_episodes": 0}  # as if it had been trained on steps
    (run_dir(tmp_path) / "config.json").write_text(json.dumps(config))
    code, out, err = run(tmp_path, f"--eval-only {run_dir(tmp_path)} --eval-trial-length 40")
    assert code == 0, err
    assert "–" in out and rows(run_dir(tmp_path), "evaluations.csv") == before


@pytest.mark.slow
def test_a_finished_run_goes_on_for_longer_as_if_it_had_been_asked_to_at_once(tmp_path):
    short, long = (f"{TINY} --total-timesteps {calls * 2 * 32}" for calls in (2, 4))
    folders = [tmp_path / name for name in ("at once", "in two parts")]
    for folder, flags in zip(folders, (long, short), strict=True):
        folder.mkdir()
        code, _, err = run(folder, flags)
        assert code == 0, err
    at_once, in_two_parts = map(run_dir, folders)
    assert len(rows(in_two_parts)) == 2
    code, _, err = run(folders[1], f"--resume runs/{in_two_parts.name} --total-timesteps {4 * 2 * 32}")
    assert code == 0, err
    assert results(in_two_parts) == results(at_once)


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_ends_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    code, _, err = run(tmp_path, f"{TINY} --total-timesteps 640 --log-interval 1 --checkpoint-interval 0")
    assert code == 0, err
    path = run_dir(tmp_path)
    before = rows(path)
    config = json.loads((path / "config.json").read_text())
    config["args"]["learning_rate"] = 1e30  # as a run gone astray
    (path / "config.json").write_text(json.dumps(config))
    code, _, err = run(tmp_path, f"--resume runs/{path.name} --total-timesteps 6400")
    assert code == 1 and "error: the gradient was not finite after update" in err and "--learning-rate" in err, err
    table = rows(path)
    assert table[: len(before)] == before and not any("nan" in row.values() for row in table)
    (kept,) = (int(p.name) for p in (path / "checkpoint").iterdir() if p.name.isdigit())
    assert kept == int(table[-1]["update"])


@pytest.mark.slow
def test_first_and_last_episode_of_a_trial_become_pages(tmp_path):
    sizes = TINY.split("--num-envs")[1]
    flags = "--train-tasks inverted-pendulum --held-out-tasks --projected-obs-size 4 --trial-length 400"
    code, _, err = run(tmp_path, f"{flags} --num-envs {sizes} --total-timesteps 64")
    assert code == 0, err
    path = run_dir(tmp_path)
    code, out, err = run(tmp_path, f"--eval-only runs/{path.name} --eval-trials 1 --render inverted-pendulum")
    assert code == 0, err
    first, last = (path / f"inverted-pendulum_{which}_episode.html" for which in ("first", "last"))
    assert first.name in out and last.name in out
    assert "<html" in first.read_text() and first.read_text() != last.read_text()


# ---- several devices
SEVERAL_DEVICES = """
import json, sys
import jax, numpy as np
from s5_ppo_meta import Args, Environment, make_train

flags = json.loads(sys.argv[1])
args = Args(**flags | {"train_tasks": tuple(flags["train_tasks"])})
init, train = make_train(args, Environment(args.train_tasks, args))
state = jax.jit(init)(jax.random.key(0))
train = jax.jit(train).lower(state).compile()
states, metrics = [state], []
for _ in range(2):
    state, m = train(state)
    states, metrics = states + [state], metrics + [{name: float(x) for name, x in m.items()}]
copies = [np.array([x.sum() for x in jax.tree.leaves(jax.tree.map(lambda x: x.addressable_shards[i].data, s.params))])
          for s in states for i in range(2)]
same = all(np.array_equal(*(np.asarray(shard.data) for shard in x.addressable_shards)) for x in
           jax.tree.leaves((state.params, state.opt_state, state.return_mean, state.return_var)))
obs = np.asarray(state.obs)
print(json.dumps({"devices": len(jax.devices()), "same": same, "metrics": metrics, "obs": obs.tolist(),
                  "moved": [not np.array_equal(copies[0], copies[2]), not np.array_equal(copies[2], copies[4])]}))
"""


@pytest.mark.slow
def test_two_devices_have_environments_of_their_own_and_one_set_of_parameters(tmp_path):
    flags = {"num_devices": 2, "num_envs": 8, "num_minibatches": 2, "d_model": 8, "state_size": 4, "num_layers": 1}
    flags |= {"encoder_size": 8, "head_size": 8, "num_steps": 30, "log_interval": 1, "update_epochs": 1}
    flags |= {"train_tasks": ["cartpole-positions"], "held_out_tasks": [], "total_timesteps": 1}
    process = start(
        tmp_path,
        *("-c", SEVERAL_DEVICES, json.dumps(flags)),
        PYTHONPATH=str(SCRIPT.parent),
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
    )
    code, out, err = finish(process)
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["devices"] == 2
    assert result["same"] and result["moved"] == [True, True]
    for metrics in result["metrics"]:
        assert all(x == x and abs(x) < 1e6 for x in metrics.values()), metrics
        assert metrics["charts/episodes/cartpole-positions"] > 4  # of both devices
    assert len({tuple(obs) for obs in result["obs"]}) == 8


# ---- what it refuses
BAD = {
    "unknown flag": ("--num-envz 3", "--num-envz", "error"),
    "not a number": ("--num-envs many", "--num-envs", "many"),
    "unknown suite": ("--suite jumping", "--suite", "jumping"),
    "unknown task": ("--train-tasks cartpool", "--train-tasks", "cartpool"),
    "unknown held-out task": ("--held-out-tasks cartpool", "--held-out-tasks", "cartpool"),
    "trained on and held out": ("--train-tasks pendulum --held-out-tasks pendulum", "--train-tasks", "pendulum"),
    "trained on twice": ("--train-tasks pendulum pendulum", "--train-tasks", "pendulum"),
    "observation too large": ("--projected-obs-size 1", "--projected-obs-size", "cartpole-positions"),
    "action too large": ("--suite classic --projected-action-size 1", "--projected-action-size", "point-robot"),
    "held-out task too large": ("--held-out-tasks gymnax-reacher", "--projected-obs-size", "gymnax-reacher"),
    "unequal shares of tasks": (
        "--train-tasks pendulum cartpole mountain-car --num-envs 128",
        "--num-envs",
        "--train-tasks",
    ),
    "broken minibatches": ("--num-envs 10 --num-minibatches 4", "--num-envs", "--num-minibatches"),
    "more devices than there are": ("--num-devices 999 --num-envs 3996", "--num-devices", "999"),
    "steps and episodes": ("--trial-length 100 --trial-episodes 3", "--trial-length", "--trial-episodes"),
    "neither steps nor episodes": ("--trial-length 0 --trial-episodes 0", "--trial-length", "--trial-episodes"),
    "no such run": ("--resume runs/nowhere", "--resume", "runs/nowhere"),
    "resume with other flags": ("--resume runs/nowhere --seed 3", "--resume", "flags"),
    "nothing to evaluate": ("--eval-only runs/nowhere", "--eval-only", "runs/nowhere"),
    "evaluation with other flags": ("--eval-only runs/nowhere --seed 3", "--eval-only", "flags"),
    "evaluation of another suite": ("--eval-only runs/nowhere --suite classic", "--eval-only", "flags"),
    "evaluation and training": ("--eval-only runs/nowhere --resume runs/nowhere", "--resume", "flags"),
    "nothing to render": ("--render reacher", "--render", "--eval-only"),
    "less than a rollout": ("--total-timesteps 100", "--total-timesteps", "100"),
    "time steps swapped": ("--dt-min 0.1 --dt-max 0.01", "--dt-max", "0.01"),
    "gamma above one": ("--gamma 1.5", "--gamma", "1.5"),
    "no number": ("--gamma nan", "--gamma", "nan"),
    "no final bonus": ("--final-ent-coef nan", "--final-ent-coef", "nan"),
    "beyond 32 bits": ("--trial-episodes 3000000000", "--trial-episodes", "below 2147483648"),
    "no trials": ("--eval-trials 0", "--eval-trials", "0"),
    "trials of negative length": ("--eval-trial-length -3", "--eval-trial-length", "-3"),
}


def assert_refused(code, err, *named):
    assert code == 2
    assert len(err.strip().splitlines()) == 1 and all(name in err for name in named), err


@pytest.mark.parametrize(("flags", "flag", "named"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_in_one_line_that_names_the_flag(monkeypatch, capsys, flags, flag, named):
    monkeypatch.setattr(sys, "argv", ["s5_ppo_meta.py", *flags.split()])
    with pytest.raises(SystemExit) as refusal:
        setup()
    assert_refused(refusal.value.code, capsys.readouterr().err, flag, named)


def test_a_refused_run_leaves_nothing(tmp_path):
    code, out, err = run(tmp_path, BAD["observation too large"][0])
    assert_refused(code, err, *BAD["observation too large"][1:])
    assert not out and not list(tmp_path.iterdir())


# ---- flags
def test_a_run_without_a_checkpoint_or_of_another_version_is_refused(monkeypatch, capsys, tmp_path):
    (tmp_path / "checkpoint").mkdir()
    for stored, flag, named in (
        (dataclasses.asdict(Args()), "--eval-only", "no checkpoint yet"),
        ({"seed": 0}, "--resume", "another script, or version"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"args": stored}))
        monkeypatch.setattr(sys, "argv", ["s5_ppo_meta.py", flag, str(tmp_path)])
        with pytest.raises(SystemExit) as refusal:
            setup()
        assert_refused(refusal.value.code, capsys.readouterr().err, flag, named)


def test_training_has_the_tasks_to_train_on_and_evaluation_the_held_out_ones_too(monkeypatch):
    flags = "--train-tasks pendulum cartpole --held-out-tasks mountain-car"
    monkeypatch.setattr(sys, "argv", ["s5_ppo_meta.py", *flags.split()])
    args, env, eval_env = setup()
    assert args.train_tasks == env.names == ("pendulum", "cartpole")
    assert [copies.task.env_id for copies in env.tasks] == ["Pendulum-v1", "CartPole-v1"]
    assert eval_env.names == ("pendulum", "cartpole", "mountain-car")
    assert env.trials_end and not eval_env.trials_end


@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_gives_what_no_flag_overrides(suite):
    args = Args(suite=suite)
    args.check()
    assert SUITES[suite]._asdict().items() <= dataclasses.asdict(args).items()
    assert Args(suite=suite, trial_length=70).trial_episodes == Args(suite=suite, trial_episodes=5).trial_length == 0
    args = Args(suite=suite, projected_obs_size=99)
    assert args.projected_obs_size == 99
    assert (args.train_tasks, args.held_out_tasks) == (SUITES[suite].train_tasks, SUITES[suite].held_out_tasks)
    assert args.eval_trial_length == 2 * (args.trial_length or args.trial_episodes)


def test_an_evaluation_alone_keeps_what_the_run_had_unless_told_otherwise(monkeypatch, tmp_path):
    flags = {"train_tasks": ("pendulum",), "trial_length": 70, "trial_episodes": 0, "eval_trials": 5, "d_model": 24}
    stored = Args(**flags, num_envs=64, num_devices=2, track=True)  # of which an evaluation needs neither
    (tmp_path / "checkpoint" / "1").mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps({"args": dataclasses.asdict(stored)}))
    given = (("", 5, 140), ("--eval-trials 7", 7, 140), ("--eval-trial-length 90", 5, 90))
    defaults = Args().eval_trials, Args().eval_trial_length  # given, they count as any other value does
    given += ((f"--eval-trials {defaults[0]} --eval-trial-length {defaults[1]}", *defaults),)
    for flags, trials, length in given:
        monkeypatch.setattr(sys, "argv", ["s5_ppo_meta.py", "--eval-only", str(tmp_path), *flags.split()])
        args, _, _ = setup()
        assert (args.train_tasks, args.trial_length, args.d_model) == (("pendulum",), 70, 24)
        assert (args.eval_trials, args.eval_trial_length) == (trials, length)
        assert args.num_devices == 1 and not args.track
        assert args.held_out_tasks == ()
    monkeypatch.setattr(sys, "argv", ["s5_ppo_meta.py", "--eval-only", str(tmp_path), "--held-out-tasks", "cartpole"])
    args, env, eval_env = setup()
    assert env.names == ("pendulum",) and eval_env.names == ("pendulum", "cartpole")
