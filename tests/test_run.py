"""The program as a user runs it: what it leaves, how it stops and goes on, and what it refuses.

`main` runs in this process where that shows the same: a process takes seconds to start.
"""

import contextlib
import errno
import gzip
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import gymnax
import jax
import pytest
from flax.serialization import msgpack_restore
from tensorboardX.proto.event_pb2 import Event
from tqdm import tqdm

import lstm_ppo
import s5_ppo_memory
import transformer_ppo

ROOT = Path(__file__).resolve().parent.parent
TINY = """--num-envs 4 --num-steps 8 --num-minibatches 2 --d-model 8 --num-layers 1 --encoder-size 8
          --head-size 8 --eval-episodes 8 --log-interval 2 --num-seeds 2 --seed 5"""
MEMORY, STEPS, CALLS = "--memory-length 3 --min-memory-length 1", 2 * 4 * 8, 8
OWN = {
    s5_ppo_memory: "--state-size 4",
    lstm_ppo: "--hidden-size 4",
    transformer_ppo: "--context-length 5 --num-heads 1 --key-size 4 --mlp-size 4",
}
FLAGS = {module: f"{TINY} {MEMORY} {own} --total-timesteps 512" for module, own in OWN.items()}
S5 = FLAGS[s5_ppo_memory]
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
WANDB = """
import json, os, sys
def record(*x):
    with open(os.path.join(os.path.dirname(__file__), "sent.jsonl"), "a") as f:
        print(json.dumps(x), file=f)
def init(**settings):
    if os.environ.get("WANDB_FAILS"):
        raise RuntimeError("api_key not configured")
    record("init", settings["id"], settings["resume"])
    return sys.modules["wandb"]
def log(scalars, step):
    record(step, sorted(scalars))
    if os.environ.get("KILL_AT") == f"{step} {sorted(scalars)[0]}":
        os.kill(os.getpid(), 9)
"""


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def run(cwd, flags, script=s5_ppo_memory, after=None, err=None):
    """What `python SCRIPT FLAGS` does in folder cwd. after: {i: called after training call i}."""
    out, err, code = io.StringIO(), err or io.StringIO(), 0

    class Bar(tqdm):
        calls = 0

        def update(self, n=1):
            super().update(n)
            Bar.calls += 1
            (after or {}).get(Bar.calls, lambda: None)()

    handlers = {number: signal.getsignal(number) for number in (*STOPS, signal.SIGPIPE)}
    cwd.mkdir(parents=True, exist_ok=True)
    words = flags if isinstance(flags, list) else flags.split()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(cwd))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *words])
        patch.setattr(script, "tqdm", Bar)
        patch.setenv("MPLBACKEND", "agg")
        try:
            script.main()
        except SystemExit as error:
            code = error.code
            if isinstance(code, str):  # as Python itself does
                with contextlib.suppress(BrokenPipeError):
                    print(code, file=err)
                code = 1
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return Ended(code, out.getvalue(), err.getvalue())


def start(cwd, command, **variables):
    environment = os.environ | {"COLUMNS": "80"} | variables
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *command], cwd=cwd, env=environment, **pipes)


def assert_refused(ended, *named):
    """In one line on stderr."""
    assert ended.code == 1 and not ended.out, ended
    assert len(ended.err.splitlines()) == 1 and ended.err.startswith("error: "), ended.err
    assert all(name in ended.err for name in named), ended.err


def run_dir(cwd):
    (path,) = (cwd / "runs").iterdir()
    return path


def csv_rows(path):
    header, *rows = (path / "metrics.csv").read_text().splitlines()
    return [dict(zip(header.split(","), row.split(","), strict=True)) for row in rows]


def saved(path):
    return msgpack_restore(gzip.decompress(path.read_bytes()))


def results(path):
    """All numbers of a run that its flags and seeds decide."""
    rows = [{name: x for name, x in row.items() if name != "charts/SPS"} for row in csv_rows(path)]
    content = saved(path / "checkpoint.gz")
    leaves = [(x.dtype, x.shape, x.tobytes()) for x in content["leaves"].values()]
    kept = [(row["global_step"], row["seed"]) for row in json.loads(content["rows"])]
    assert kept == [(int(row["global_step"]), int(row["seed"])) for row in rows]
    return rows, leaves, json.loads((path / "eval.json").read_text())["mean_return"]


def tensorboard(path):
    """{(seed, step, name): value}; fails if something is there twice."""
    scalars = {}
    for file in (path / "tensorboard").rglob("events.*"):
        content, at = file.read_bytes(), 0
        while at < len(content):  # length, its checksum, event, its checksum
            size = struct.unpack("<Q", content[at : at + 8])[0]
            event = Event.FromString(content[at + 12 : at + 12 + size])
            at += 12 + size + 4
            for value in event.summary.value:
                name = f"{file.parent.relative_to(path)}/{value.tag}"
                seed, name = re.search(r"seed_(\d+)", name)[1], re.search(r"[a-z]+/\w+$", name)[0]
                assert (seed, event.step, name) not in scalars
                scalars[seed, event.step, name] = value.simple_value
    return scalars


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two seeds that nothing stopped."""
    cwd = tmp_path_factory.mktemp("whole")
    ended = run(cwd, S5)
    assert ended.code == 0, ended.err
    return run_dir(cwd), ended


# ---- what a run leaves
def test_a_run_leaves_its_flags_numbers_and_parameters(whole):
    path, ended = whole
    assert path.name.startswith("s5_ppo_memory__MemoryChain-bsuite__5__")
    assert {x.name for x in path.iterdir()} == {
        *("config.json", "metrics.csv", "tensorboard", "eval.json"),
        *("checkpoint.gz", "previous_checkpoint.gz"),
    }
    config = json.loads((path / "config.json").read_text())
    assert config["flags"] == S5.split() and config["versions"]["jax"] == jax.__version__
    assert config["args"].keys() == {f.name for f in fields(s5_ppo_memory.Args)}
    assert config["args"]["memory_length"] == 3 and re.fullmatch(
        "[0-9a-f]{40}", config["git_commit"]
    )
    table = csv_rows(path)
    assert [*table[0]][:2] == ["global_step", "seed"]
    expected = [(i * STEPS, seed) for i in range(1, CALLS + 1) for seed in (5, 6)]
    assert [(int(row["global_step"]), int(row["seed"])) for row in table] == expected
    assert all(6 * 2 <= float(row["charts/episodes"]) <= 8 * 4 for row in table)
    scalars = tensorboard(path)
    for row in table:
        for name in row.keys() - {"global_step", "seed"}:
            there = scalars.pop((row["seed"], int(row["global_step"]), name))
            assert there == pytest.approx(float(row[name]), rel=1e-6, nan_ok=True)
    assert not scalars
    evaluation = json.loads((path / "eval.json").read_text())["mean_return"]
    assert [*evaluation] == ["1", "3", "6", "12", "24"]
    assert all(len(x) == 2 and -1 <= min(x) <= max(x) <= 1 for x in evaluation.values())
    printed = [f"{x:.2f}" for x in (evaluation["1"][1], evaluation["24"][1])]
    last = ended.out.splitlines()[-1].split()
    assert [last[0], last[1], last[-1]] == ["6", *printed]


def test_the_second_of_two_seeds_is_what_it_is_alone(tmp_path, whole):
    code, _, err = run(tmp_path, f"{S5} --seed 6 --num-seeds 1", after={1: interrupt})
    assert code == 1, err
    (alone,), together = csv_rows(run_dir(tmp_path)), csv_rows(whole[0])[1]
    for name in alone.keys() - {"charts/SPS"}:
        assert float(alone[name]) == pytest.approx(float(together[name]), rel=1e-3, abs=1e-5)
    assert alone["losses/entropy"] != csv_rows(whole[0])[0]["losses/entropy"]


# ---- stopping and going on
def interrupt(number=signal.SIGINT):
    signal.raise_signal(number)


class ClosedPipe(io.StringIO):
    def __init__(self):
        super().__init__()
        self.saved = []  # checkpoints there are at each attempt to write

    def write(self, text):
        self.saved.append(len([*Path("runs").glob("*/checkpoint.gz")]))
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_however_it_is_stopped_the_resumed_run_is_the_one_that_was_not(
    tmp_path, whole, monkeypatch
):
    """Below a folder whose name is a pattern. The first two are stopped before their first call."""
    cwd = tmp_path / "[exp1]"
    closed = ClosedPipe()
    ended = run(cwd, S5, err=closed)
    path = run_dir(cwd)
    assert closed.saved[0] == 1  # before the first call
    resume = f"--resume runs/{path.name}"
    assert ended.code == 1 and saved(path / "checkpoint.gz")["rows"] == "[]"
    assert not (path / "metrics.csv").exists()
    for i, number in enumerate(STOPS, 1):
        ended = run(cwd, resume, after={1: lambda number=number: interrupt(number)})
        assert ended.code == 1 and not (path / "eval.json").exists()
        last = ended.err.splitlines()[-1]
        assert last == f"stopped by {number.name}; go on with: python s5_ppo_memory.py {resume}"
        assert len(csv_rows(path)) == 2 * i == len({(s, t) for s, t, _ in tensorboard(path)})

    def full_disk(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    patch = pytest.MonkeyPatch()
    ended = run(cwd, resume, after={1: lambda: patch.setattr(s5_ppo_memory, "write", full_disk)})
    patch.undo()
    last = ended.err.splitlines()[-1]
    assert ended.code == 1 and last.startswith("error: runs/") and "No space left" in last
    # What a kill may leave of the other files does not matter.
    with (path / "metrics.csv").open("a") as f:
        f.write("\n\n192,5,\x00\n")
    shutil.rmtree(path / "tensorboard")
    (path / "unfinished").write_text("{")
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        ended = run(cwd, resume, after={1: lambda: interrupt(signal.SIGHUP)})
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    assert ended.code == 0, ended.err
    assert results(path) == results(whole[0])
    assert tensorboard(path).keys() == tensorboard(whole[0]).keys()


def test_after_a_kill_both_checkpoints_lead_to_the_run_that_was_not_killed(tmp_path, whole):
    """Killed when a step's rows are sent but not saved. A damaged checkpoint is refused, the one
    before goes on. W&B is sent each row."""
    (tmp_path / "wandb.py").write_text(WANDB)
    flags = f"{S5} --track --checkpoint-interval 0".split()
    kill_at = f"{5 * STEPS} seed_5/charts/SPS"
    process = start(
        tmp_path, [ROOT / "s5_ppo_memory.py", *flags], PYTHONPATH=str(tmp_path), KILL_AT=kill_at
    )
    _, err = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, err
    killed = run_dir(tmp_path)
    copy = shutil.copytree(killed, tmp_path / "copies" / "runs" / killed.name)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        ended = run(tmp_path, f"--resume runs/{killed.name}")
        sys.modules.pop("wandb")
    assert ended.code == 0, ended.err
    assert results(killed) == results(whole[0])
    assert tensorboard(killed).keys() == tensorboard(whole[0]).keys()
    sent = [json.loads(line) for line in (tmp_path / "sent.jsonl").read_text().splitlines()]
    starts = [i for i, x in enumerate(sent) if x[0] == "init"]
    assert [sent[i] for i in starts] == [["init", killed.name, "allow"]] * 2
    assert sent[starts[1] + 1][0] == 5 * STEPS  # it did not begin anew
    sent = {(x[0], seed) for x in sent for seed in re.findall(r"seed_(\d)", str(x[1]))}
    assert sent == {(int(row["global_step"]), row["seed"]) for row in csv_rows(killed)}

    checkpoint, previous = copy / "checkpoint.gz", copy / "previous_checkpoint.gz"
    content, kept = checkpoint.read_bytes(), previous.read_bytes()
    flipped = bytearray(content)  # several bits: of single ones 3 in 1,000 mean nothing to gzip
    for i in range(len(content) // 2, len(content) // 2 + 8):
        flipped[i] ^= 255
    resume = f"--resume runs/{killed.name} --no-track"
    for damage in (flipped, content[: len(content) // 2], b"", None):
        checkpoint.unlink() if damage is None else checkpoint.write_bytes(damage)
        assert_refused(run(tmp_path / "copies", resume), "--resume", killed.name, "checkpoint.gz")
        assert previous.read_bytes() == kept
    os.replace(previous, checkpoint)
    refused = run(tmp_path / "copies", f"{resume} --d-model 16")
    assert_refused(refused, "--resume", killed.name, "other sizes")
    assert checkpoint.read_bytes() == kept
    ended = run(tmp_path / "copies", resume)
    assert ended.code == 0, ended.err
    assert results(copy) == results(whole[0])


def test_any_flag_may_be_replaced_also_the_numbers_of_devices_and_of_steps(tmp_path):
    stop = {1: interrupt}
    assert run(tmp_path, f"{S5} --num-devices 2", after=stop).code == 1
    path = run_dir(tmp_path)
    longer = f"--resume {path} --num-devices 1 --num-steps 16"  # of a rollout: twice as long
    assert run(tmp_path, longer, after=stop).code == 1
    flags = "--num-devices 2 --total-timesteps 200 --eval-episodes 3"
    ended = run(tmp_path, f"--resume {path} {flags} --env-params max_steps_in_episode 100")
    assert ended.code == 0, ended.err
    steps = [int(row["global_step"]) for row in csv_rows(path)[::2]]
    assert steps == [STEPS, 3 * STEPS, 5 * STEPS]  # 200 or more
    args = json.loads((path / "config.json").read_text())["args"]
    assert [args[name] for name in ("num_devices", "total_timesteps", "seed")] == [2, 200, 5]
    before, previous = results(path), (path / "previous_checkpoint.gz").read_bytes()
    ended = run(tmp_path, f"--resume {path} --total-timesteps 640 --learning-rate 1e30")
    assert ended.code == 1 and results(path) == before  # nothing of it is logged or saved
    assert (path / "previous_checkpoint.gz").read_bytes() == previous
    assert f"error: the gradient was not finite after step {5 * STEPS}" in ended.err
    assert "--learning-rate" in ended.err


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Folder with copies of the programs, each run there in an unfriendly environment."""
    cwd = tmp_path_factory.mktemp("elsewhere")
    program, folders = "import runpy, sys, os\n", {}
    for module, flags in FLAGS.items():
        folders[module] = cwd / module.__name__
        folders[module].mkdir()
        shutil.copy(ROOT / f"{module.__name__}.py", folders[module] / "my_agent.py")
        program += f"os.chdir({str(folders[module])!r})\n"
        program += f"sys.argv = ['my_agent.py', *{flags.split()}]\n"
        program += "runpy.run_path('my_agent.py', run_name='__main__')\n"
    variables = {"JAX_ENABLE_X64": "1", "PYTHONIOENCODING": "cp1252"}
    variables |= {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    process = start(cwd, ["-c", program], **variables)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and out.isascii(), err
    return folders


@pytest.mark.parametrize("module", OWN, ids=lambda module: module.__name__)
def test_a_copy_runs_anywhere_and_each_model_goes_on_as_if_never_stopped(
    tmp_path, elsewhere, whole, module
):
    """Numbers are the same under JAX_ENABLE_X64; MPLBACKEND need not be there."""
    path = run_dir(elsewhere[module])
    assert path.name.startswith("my_agent__")
    assert not json.loads((path / "config.json").read_text())["git_commit"]
    parts = whole[0]
    if module is not s5_ppo_memory:
        assert run(tmp_path, FLAGS[module], module, after={3: interrupt}).code == 1
        parts = run_dir(tmp_path)
        ended = run(tmp_path, f"--resume {parts}", module)
        assert ended.code == 0, ended.err
    assert results(parts) == results(path)


@pytest.mark.slow
def test_learning_in_context_runs_under_x64_too(tmp_path):
    flags = f"{TINY.replace('--eval-episodes 8', '--eval-trials 2')} --state-size 4".split()
    flags += ["--total-timesteps", "128"]
    variables = {"JAX_ENABLE_X64": "1", "PYTHONIOENCODING": "cp1252"}
    variables |= {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    process = start(tmp_path, [ROOT / "s5_ppo_meta.py", *flags], **variables)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert len(csv_rows(run_dir(tmp_path))) == 4


def test_another_task_a_closed_pipe_and_rows_without_an_episode(tmp_path, monkeypatch):
    """`python -u s5_ppo_memory.py | head -1`: nothing is lost."""
    flags = f"{TINY} {OWN[s5_ppo_memory]} --env-id CartPole-v1 --log-interval 1 --num-seeds 1"
    command = ["-u", ROOT / "s5_ppo_memory.py", *flags.split(), "--total-timesteps", "192"]
    process = start(tmp_path, command)
    assert " parameters, 192 steps" in process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=300) == -signal.SIGPIPE, err
    path = run_dir(tmp_path)
    rows, _, mean_return = results(path)
    assert float(rows[0]["charts/episodes"]) == 0 and len(rows) == 6
    assert rows[0]["charts/episodic_return"] == "nan"  # no pole falls within eight steps
    assert 8 < float(rows[-1]["charts/episodic_return"]) < 60
    assert mean_return.keys() == {"0"} and 8 < mean_return["0"][0] <= 500
    monkeypatch.setenv("PATH", "")  # nor need git be there
    ended = run(tmp_path, f"--resume {path}")  # which has nothing left to do but to evaluate
    assert ended.code == 0 and "mean return" in ended.out, ended.err
    assert results(path)[2] == mean_return
    assert not json.loads((path / "config.json").read_text())["git_commit"]


# ---- what it refuses
BAD_FLAGS = {
    "unknown flag": ("--num-envz 3", "--num-envz"),
    "not a number": ("--num-envs many", "--num-envs"),
    "half a pair": ("--env-params gravity", "--env-params"),
    "minibatches of broken environments": (
        "--num-envs 10 --num-minibatches 4",
        "--num-minibatches",
    ),
    "fewer environments than minibatches": ("--num-envs 2 --num-minibatches 4", "--num-envs"),
    "devices": ("--num-envs 12 --num-minibatches 2 --num-devices 4", "--num-devices"),
    "no steps": ("--num-steps 0", "--num-steps"),
    "no memory length": ("--memory-length 0", "--memory-length"),
    "no seeds": ("--num-seeds 0", "--num-seeds"),
    "no training": ("--total-timesteps -5", "--total-timesteps"),
    "no width": ("--d-model 0", "--d-model"),
    "beyond 32 bits": (f"--total-timesteps {2**40}", "--total-timesteps"),
}
OWN_FLAGS = {
    s5_ppo_memory: ("--dt-min 0.5", "--dt-max 0.1"),
    lstm_ppo: ("--max-timescale 1.5", "--max-timescale"),
    transformer_ppo: ("--key-size 7", "--key-size"),
}
CASES = [(s5_ppo_memory, *case) for case in BAD_FLAGS.values()]
CASES += [(module, *case) for module, case in OWN_FLAGS.items()]


@pytest.mark.parametrize(("module", "flags", "named"), CASES)
def test_impossible_flags_are_refused_by_name(tmp_path, module, flags, named):
    ended = run(tmp_path, flags, module)
    assert ended.code == 2 and named in ended.err and not ended.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--env-id CartPole-v7", "CartPole-v7"),
        ("--env-id Pendulum-v1", "Pendulum-v1"),
        ("--env-id Breakout-MinAtar", "Breakout-MinAtar"),
        ("--env-id CartPole-v1 --env-params gravitas 1", "gravitas"),
        ("--env-id Acrobot-v1 --env-params available_torque 5", "--env-params"),
        ("--env-id CartPole-v1 --env-params max_steps_in_episode inf", "--env-params"),
        ("--num-devices 4", "--num-devices"),
    ],
)
def test_what_no_environment_can_be_made_of_is_refused_in_one_line(tmp_path, flags, named):
    assert_refused(run(tmp_path, flags), named)
    assert not list(tmp_path.iterdir())


def test_data_that_cannot_be_had_is_refused_in_one_line(tmp_path, monkeypatch):
    def make(_):  # as MNISTBandit-bsuite does without a network
        raise OSError("urlopen error")

    monkeypatch.setattr(gymnax, "make", make)
    assert_refused(run(tmp_path, "--env-id MNISTBandit-bsuite"), "--env-id", "urlopen error")


def test_flags_beside_resume_are_read_with_those_of_the_run_not_with_the_defaults(
    tmp_path, monkeypatch
):
    """Two environments do for the run's two minibatches; they would not for four, the default."""
    (tmp_path / "config.json").write_text('{"flags": ["--num-minibatches", "2"]}')
    for resume in (["--resume", str(tmp_path)], [f"--resume={tmp_path}"]):
        monkeypatch.setattr(sys, "argv", ["s5_ppo_memory.py", "--num-envs", "2", *resume])
        args, flags = s5_ppo_memory.parse_flags()
        assert (args.num_envs, args.num_minibatches, args.resume) == (2, 2, tmp_path)
        assert flags == ["--num-minibatches", "2", "--num-envs", "2", *resume]


CONFIGS = ["{", "{}", "[]", "null", '{"flags": 3}', '{"flags": null}', "\x00"]


def test_a_run_that_is_none_is_refused_in_one_line(tmp_path):
    for text in CONFIGS:
        (tmp_path / "config.json").write_text(text)
        assert_refused(run(tmp_path, "--resume ."), "--resume .")
    assert_refused(run(tmp_path, "--resume runs/nowhere"), "--resume runs/nowhere")
    assert_refused(run(tmp_path, f"--resume {300 * 'x'}"), "--resume xxx")
    assert not (tmp_path / "runs").exists()


def test_no_key_for_weights_and_biases_and_no_place_for_runs_are_refused_in_one_line(
    tmp_path, monkeypatch
):
    (tmp_path / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("WANDB_FAILS", "1")
    with pytest.MonkeyPatch.context() as patch:

        def compiles(*_, **__):
            pytest.fail("compiled first")

        patch.setattr(jax.lax, "map", compiles)
        refused = run(tmp_path / "empty", f"{S5} --track")
    sys.modules.pop("wandb")
    assert_refused(refused, "--track", "api_key not configured")
    assert not list((tmp_path / "empty").iterdir())
    (tmp_path / "runs").write_text("")
    assert_refused(run(tmp_path, S5), "runs/s5_ppo_memory__")


@pytest.mark.parametrize("script", ["s5_ppo_memory", "lstm_ppo", "transformer_ppo", "s5_ppo_meta"])
def test_help_tells_what_every_flag_is_for_in_any_encoding(script):
    source = (ROOT / f"{script}.py").read_text()
    source = source[source.index("class Args") : source.index("# ==== Envir")]
    flags = re.findall(r"(?m)^    (\w+): [^#\n]+  # (.+)$", source)
    process = start(ROOT, [f"{script}.py", "--help"], PYTHONIOENCODING="cp1252")
    out, err = process.communicate(timeout=60)
    page = " ".join(out.split())
    assert process.returncode == 0 and len(flags) > 25, err
    for flag, text in flags:
        assert text.isascii()
        assert f"--{flag.replace('_', '-')}" in page and " ".join(text.split()) in page, flag
