"""What the benchmarks make of their runs and measurements."""

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import ablations
import adaptation
import bodies
import common
import compose
import first_minute
import gpu
import memory_ablations
import memory_length
import meta
import pendulum_optimum
import popgym_hard
import reference_scores
import s5_layer
import scaling
import watch

import s5_ppo_memory
import s5_ppo_meta

SMALL = {"num_minibatches": 2, "update_epochs": 1, "d_model": 8, "state_size": 4}
SMALL |= {"num_envs": 4, "num_steps": 8, "encoder_size": 8, "head_size": 8, "log_interval": 1}


def module_of(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def leave_a_run(script, run_dir, **flags):
    """A run directory as an untrained run leaves it, and its state."""
    run_dir.mkdir()
    args = script.Args(**SMALL, **flags)
    tasks = [args.train_tasks] if script is s5_ppo_meta else []
    init, _ = script.make_train(args, script.Environment(*tasks, args))
    keys = jnp.stack([jax.random.PRNGKey(args.seed + i) for i in range(args.num_seeds)])
    state = jax.jit(partial(jax.lax.map, init))(keys)
    row = {"global_step": 0, "seed": 0, "charts/SPS": 5.0, "charts/score": 0.0}
    script.write_config(run_dir, args, [])
    script.save(run_dir, state, [row])
    return state


@pytest.fixture(scope="module")
def meta_run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("meta") / "run"
    tasks = {"train_tasks": ("cartpole-positions",), "trial_length": 2, "num_layers": 1}
    return run_dir, leave_a_run(s5_ppo_meta, run_dir, num_seeds=2, **tasks)


# ---- tables and runs
def test_a_table_keeps_all_columns_that_any_row_has(tmp_path):
    common.append(tmp_path / "t.csv", {"a": 1, "b": 2})
    common.append(tmp_path / "t.csv", {"b": 3, "c": None})
    rows = [{"a": "1", "b": "2", "c": ""}, {"a": "", "b": "3", "c": ""}]
    assert common.read(tmp_path / "t.csv") == rows and common.read(tmp_path / "none.csv") == []


def test_a_run_is_loaded_as_it_was_left(meta_run):
    run_dir, left = meta_run
    args, state, keys = common.load(s5_ppo_meta, run_dir)
    assert (args.train_tasks, args.trial_length, args.num_seeds) == (("cartpole-positions",), 2, 2)
    assert keys.tolist() == [[0, 0], [0, 1]]
    jax.tree.map(np.testing.assert_array_equal, state, left)


def test_a_run_without_a_checkpoint_is_an_error_of_one_line(meta_run, tmp_path):
    (tmp_path / "config.json").write_bytes((meta_run[0] / "config.json").read_bytes())
    for path, missing in ((tmp_path, "checkpoint.gz"), (tmp_path / "no", "config.json")):
        with pytest.raises(SystemExit) as error:
            common.load(s5_ppo_meta, path)
        assert missing in error.value.code and "\n" not in error.value.code


# ---- learning in context
def test_finished_runs_are_evaluated_anew_seed_by_seed_and_stay_as_they_are(
    meta_run, tmp_path, monkeypatch
):
    run_dir, left = meta_run
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    settings = {"eval_trials": 3, "trial_length": 3, "held_out_tasks": ("cartpole",)}
    report, seen = s5_ppo_meta.report, []

    def spy(folder, state, keys, *rest):
        seen.append((state, keys))
        report(folder, state, keys, *rest)

    monkeypatch.setattr(s5_ppo_meta, "report", spy)
    args, rows = adaptation.evaluate(run_dir, settings)
    assert len(seen) == 2
    for i, (state, keys) in enumerate(seen):
        jax.tree.map(
            np.testing.assert_array_equal, state, jax.tree.map(lambda x, i=i: x[i : i + 1], left)
        )
        assert keys.tolist() == [[0, i]]
    assert {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()} == before
    for task in ("cartpole-positions", "cartpole"):
        for memory in s5_ppo_meta.MEMORIES:
            scores = adaptation.pick(rows, task, memory, "mean")
            assert scores.shape == (2, 3) and len({*scores.ravel()}) > 3
            assert (adaptation.pick(rows, task, memory, "trials") == 3).all()
            assert adaptation.pick(rows, task, memory, "ci95", half=True).shape == (2, 1)
    tasks = ["cartpole-positions", "cartpole"]
    adaptation.plot(rows, tasks, args, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_columns_of_seeds_end_where_the_shortest_does(capsys):
    def row(run, memory, episode, mean):
        row = {"run": run, "seed": 0, "task": "pole", "memory": memory}
        return row | {"episode": episode, "mean": mean, "ci95": "0.1"}

    rows = [row("A", "kept", str(i), str(i)) for i in range(3)]
    rows += [row("B", "kept", str(i), str(10 * i)) for i in range(2)]
    rows += [row("A", "kept", "second half", "0.25"), row("B", "kept", "second half", "0.75")]
    picked = adaptation.pick(rows, "pole", "kept", "mean")
    np.testing.assert_array_equal(picked, [[0, 1], [0, 10]])
    assert adaptation.pick(rows, "pole", "trained without", "mean").shape == (0, 0)
    adaptation.print_table(rows, ["pole"], ())
    assert "| pole | 0.25 0.75 | – | – | – |" in capsys.readouterr().out


def test_without_a_run_there_is_nothing_to_evaluate(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["adaptation.py", "--out", "nowhere"])
    with pytest.raises(SystemExit, match="finished runs"):
        adaptation.main()


def test_a_film_shows_each_step_of_the_trial():
    args = s5_ppo_meta.Args(suite="classic", train_tasks=("reacher",), held_out_tasks=(), **SMALL)
    env = watch.Filmed(args.train_tasks, args, trials_end=False)
    args.eval_trials, args.trial_length = 1, 3

    def film(key):
        network, (_, obs) = s5_ppo_meta.ActorCritic(args), env.reset(key, 1)
        params = network.init(key, network.initial_carry(1), obs[None], jnp.ones((1, 1), bool))
        return s5_ppo_meta.run_trials(params, key, False, False, args, env)

    frames, done = jax.eval_shape(film, jax.random.key(0))
    assert done.shape == (3 * 100, 1)
    assert frames.x.pos.shape[:2] == (3 * 100, 1)  # of brax's bodies


def test_reference_returns_are_those_of_whole_episodes_from_new_starts():
    """A pole that is left alone falls after nine to ten steps, of which each is worth one."""
    idle, spread = reference_scores.fixed_policy("cartpole", reference_scores.no_actions, 64)
    assert 8.5 < idle < 10.5
    assert 2 < spread < 3.5  # near that of 1, 2 ... 9


@pytest.mark.parametrize("name", [x for x, y in s5_ppo_meta.TASKS.items() if y.same_start])
def test_a_rule_that_sees_the_goal_gets_there(name):
    returns = reference_scores.fixed_policy(name, reference_scores.to_the_goal(name), 2048)[0]
    assert s5_ppo_meta.score(returns, name) == pytest.approx(1, abs=0.15)


def test_the_rule_knows_what_moves_the_body_that_it_has():
    inner = Mock(goal=jnp.array([[1.0, 0.0]] * 2), pos=jnp.zeros((2, 2)))
    trial = Mock(body={"max_force": jnp.array([0.1, 0.4])})
    found = reference_scores.rule("point-goal", Mock(inner=inner, trial=trial), 1.0, 0.0)
    np.testing.assert_allclose(found, [[10.0, 0.0], [2.5, 0.0]])
    strong = {name: at(4.0) for of in bodies.BODIES.values() for name, at in of.items()}
    assert strong == pytest.approx({"max_force": 0.8, "dt": 0.6, "torque_scale": 8.0})


def test_bodies_are_drawn_in_their_range_and_asked_at_the_strengths_given(tmp_path):
    """Of the usual strength, from half to twice: two of them, or any."""
    for count in (0, 2):
        path = tmp_path / f"bodies_{count}.py"
        path.write_text(bodies.program(2.0, count))
        script = sys.modules[path.stem] = module_of(path)
        args = script.Args(suite="goals")
        env = script.Environment(args.train_tasks, args)
        for task, (field, at) in zip(
            env.tasks, map(dict.popitem, map(dict, bodies.BODIES.values())), strict=True
        ):
            draw = jax.jit(
                lambda key, task=task, field=field: task.draw_trials(key, 500).body[field]
            )
            drawn = np.asarray(draw(jax.random.key(0)))
            if count:
                np.testing.assert_allclose(np.unique(drawn), [at(0.5), at(2.0)], rtol=1e-5)
            else:
                assert at(0.5) <= drawn.min() < at(0.52) and at(1.9) < drawn.max() <= at(2.0)
                assert np.median(drawn) == pytest.approx(at(1.0), rel=0.1)
        (robot, *_) = bodies.with_bodies(env, np.array([0.25, 4.0])).tasks
        forces = jax.jit(lambda key, robot=robot: robot.draw_trials(key, 2).body)(jax.random.key(0))
        np.testing.assert_allclose(forces["max_force"], [0.05, 0.8], rtol=1e-6)


def test_an_agent_that_does_nothing_scores_0_with_every_body(monkeypatch):
    """Its returns, trial by trial, are the reference's: in both, trials start alike."""
    args = s5_ppo_meta.Args(suite="goals", trial_length=2)

    def idle(params, key, wipe_episode, wipe_step, args, env):
        num_envs = len(env.names) * args.eval_trials
        states, _ = env.reset(jax.random.split(key)[0], num_envs)

        def step(states, key):
            states, now = env.step(key, states, jnp.zeros((num_envs, 2)))
            return states, now.raw_reward

        return jax.lax.scan(step, states, jax.random.split(key, 20))[1], None

    script = Mock(run_trials=idle, Environment=s5_ppo_meta.Environment)
    loaded = args, Mock(params=None), [jax.random.PRNGKey(3)]
    monkeypatch.setattr(bodies, "load", lambda *_: loaded)
    names, means, widths = bodies.ask(script, None, 8)
    assert names == tuple(bodies.BODIES) and means.shape == widths.shape == (3, len(bodies.ASKED))
    np.testing.assert_allclose(means, 0, atol=1e-5)
    np.testing.assert_allclose(widths, 0, atol=1e-5)


def test_the_table_of_bodies_tells_near_from_beyond(capsys):
    rows = [
        {"range": 2.0, "count": 8, "seed": seed, "strength": at, "score": at / 4 + seed}
        for seed in (0, 1)
        for at in (0.25, 0.5, 1.0, 2.0, 4.0)
    ]
    bodies.print_table(pd.DataFrame(rows))
    assert capsys.readouterr().out.splitlines()[-1] == "|2|8|0.29 1.29|0.53 1.53|1.82 1.19|"


def test_every_patch_applies_and_makes_another_program(tmp_path):
    programs = {}
    for i, variant in enumerate(ablations.PATCHES):
        path = tmp_path / f"patched_{i}.py"
        path.write_text(ablations.patched(variant))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        script = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        args = script.Args(**SMALL, num_layers=1, train_tasks=("cartpole",))
        init, train = script.make_train(args, script.Environment(args.train_tasks, args))
        state = jax.eval_shape(init, jax.random.PRNGKey(0))
        programs[variant] = str(jax.make_jaxpr(train)(state))
    for variant in ablations.FLAGS:  # they differ by a flag
        if not ablations.PATCHES[variant]:
            assert programs.pop(variant) == programs["as it is"]
        changed = {suite: ablations.flagged(suite, variant) for suite in ablations.SUITES}
        assert any(args != s5_ppo_meta.Args(suite=suite) for suite, args in changed.items())
    assert len(set(programs.values())) == len(programs)


# ---- memory
def test_every_variant_of_the_memory_script_is_another_program(tmp_path):
    programs = []
    for i, variant in enumerate(memory_ablations.PATCHES):
        path = tmp_path / f"memory_{i}.py"
        path.write_text(memory_ablations.patched(variant))
        script = module_of(path)
        args = tyro.cli(script.Args, args=map(str, memory_ablations.FLAGS.get(variant, [])))
        carry = script.SequenceModel(args).initial_carry(1)
        inputs = jax.random.PRNGKey(0), carry, jnp.zeros((1, 1, 4)), jnp.ones((1, 1), bool)
        network = jax.make_jaxpr(script.ActorCritic(args, 2).init)(*inputs)
        programs.append((vars(args), str(network)))
    assert all(programs.count(program) == 1 for program in programs)


def test_a_variant_has_a_row_a_seed_and_the_table_counts_those_that_are_all_right(
    monkeypatch, tmp_path, capsys
):
    def run(command, cwd, check):
        run_dir = Path(cwd, "runs", "run")
        run_dir.mkdir(parents=True)
        returns = {128 * factor: [1.0, 1.0, 1.0, 0.5, -1.0] for factor in (1, 2, 4, 8, 16, 32)}
        returns |= {8192: [0.0, 1.0, 0.0, 0.0, 0.0]}
        results = {"mean_return": returns, "trained_after": 9.6}
        (run_dir / "eval.json").write_text(json.dumps(results))
        (run_dir / "config.json").write_text("{}")
        (run_dir / "metrics.csv").write_text("charts/SPS\n5.0\n")
        assert "(1, 2, 4, 8, 16, 32, 64) if" in Path(command[1]).read_text()

    monkeypatch.setattr(memory_ablations, "subprocess", Mock(run=run))
    monkeypatch.setattr(memory_ablations, "made_by", dict)
    monkeypatch.setattr(memory_ablations, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["memory_ablations.py", "--variants", "one block", "no ReLU"])
    memory_ablations.main()
    memory_ablations.main()  # again: its rows are replaced
    table = pd.read_csv(tmp_path / "memory_ablations.csv")
    assert table.seed.tolist() == 2 * [20, 21, 22, 23, 24]
    assert table["8192"].tolist() == 2 * [0, 1, 0, 0, 0]
    assert capsys.readouterr().out.splitlines()[-1].endswith("3     3     3     1")


@pytest.mark.parametrize("length", memory_length.LENGTHS)
def test_every_model_gets_as_many_steps_and_a_rollout_holds_an_episode(length):
    steps = set()
    for script in scaling.SCRIPTS.values():
        args = script.Args(memory_length=length, min_memory_length=length)
        assert length + 1 < args.num_steps == 2 * length
        assert 3_000 < args.num_updates * args.batch_size / (length + 1) < 10_000  # episodes
        steps.add((args.num_updates, args.batch_size))
    assert len(steps) == 1
    assert args.context_length >= length + 2  # the Transformer's


def test_the_first_minute_has_a_row_a_seed_and_a_column_for_each_length_asked(
    monkeypatch, tmp_path
):
    def train(script, flags, folder, **kwargs):
        assert (script, flags[0]) == ("s5_ppo_memory.py", "--seed")
        run_dir, flags = Path(folder, "run"), {"memory_length": 2, "eval_episodes": 4}
        state = leave_a_run(s5_ppo_memory, run_dir, **flags)
        args = s5_ppo_memory.Args(**SMALL, **flags)
        keys, timing = jax.random.PRNGKey(0)[None], {"compiled_after": 1.0}
        env = s5_ppo_memory.Environment(args)
        s5_ppo_memory.report(run_dir, state, keys, timing, args, env)
        return run_dir

    monkeypatch.setattr(first_minute, "train", train)
    monkeypatch.setattr(first_minute, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["first_minute.py"])
    first_minute.main()
    table = pd.read_csv(tmp_path / "first_minute.csv")
    assert table.seed.tolist() == [0, 1, 2, 3, 4]
    names = "_at_half", "", "_at_double", "_at_4_times", "_at_8_times"
    returns = table[[f"return{name}" for name in names]]
    assert returns.isin([-1, -0.5, 0, 0.5, 1]).all(axis=None)  # means of 4 answers


@pytest.mark.parametrize("one_length", [True, False])
def test_runs_are_asked_and_new_rows_replace_those_of_their_cell(monkeypatch, tmp_path, one_length):
    given = []

    def train(script, flags, folder):
        given.append((script, dict(zip(flags[::2], flags[1::2], strict=True))))
        run_dir, flags = Path(folder, "run"), {"memory_length": 2, "num_seeds": 2}
        leave_a_run(s5_ppo_memory, run_dir, eval_episodes=16, **flags)
        (run_dir / "eval.json").write_text('{"trained_after": 1.0}')
        return run_dir

    monkeypatch.setattr(memory_length, "train", train)
    monkeypatch.setattr(memory_length, "HERE", tmp_path)
    for name in ("ONE_LENGTH", "SPREAD"):
        monkeypatch.setattr(memory_length, name, tmp_path / f"{name}.csv")
    flags = ["--models", "S5", "--lengths", "2", "--num-seeds", "2"]
    monkeypatch.setattr(sys, "argv", ["memory_length.py", *flags, *["--one-length"] * one_length])
    old = {"greedy_return": 5.0, "model": "S5", "trained": 2, "asked": 2, "seed": 0}
    path = tmp_path / ("ONE_LENGTH.csv" if one_length else "SPREAD.csv")
    pd.DataFrame([old, old | {"model": "LSTM"}]).to_csv(path, index=False)
    memory_length.main()

    expected = {"--memory-length": 2, "--num-seeds": 2}
    expected |= {"--min-memory-length": 2} if one_length else {}
    assert given == [("s5_ppo_memory.py", expected)]
    table = pd.read_csv(path)
    lstm, s5 = (table[table.model == model] for model in ("LSTM", "S5"))
    assert lstm.greedy_return.tolist() == [5.0]
    lengths = [2] if one_length else [1, 2, 4, 8, 16, 32, 64, 128]
    asked = [(length, seed) for length in lengths for seed in (0, 1)]
    assert list(zip(s5.asked, s5.seed, strict=True)) == asked
    assert s5.greedy_return.between(-1, 1).all()  # of whole episodes: odd of 16
    assert (16 * s5.greedy_return / 2 % 1 == 0).all()
    assert (tmp_path / "memory_length.png").read_bytes().startswith(b"\x89PNG")


# ---- POPGym
@pytest.fixture
def popgym_folder(tmp_path, monkeypatch):
    """Small networks and rollouts, and results and runs in a folder of their own."""
    small = "--num-envs 4 --num-steps 64 --num-minibatches 2 --update-epochs 1 --log-interval 1"
    small += " --encoder-size 8 --head-size 8 --d-model 8"
    sizes = {"S5": "--num-layers 1 --state-size 4", "LSTM": "--num-layers 1 --hidden-size 4"}
    models = {name: (popgym_hard.MODELS[name][0], sizes[name]) for name in sizes}
    settings = {"HERE": tmp_path, "RUNS": tmp_path / "runs", "FLAGS": small}
    settings |= {"META": "--eval-trials 2", "MEMORY": "--eval-episodes 2"}
    for name, x in settings.items():
        monkeypatch.setattr(popgym_hard, name, x)
    for name, x in models.items():
        monkeypatch.setitem(popgym_hard.MODELS, name, x)
    return tmp_path


@pytest.mark.parametrize(
    ("task", "model"), [("StatelessCartPole", "S5"), ("StatelessPendulum", "LSTM")]
)
def test_popgyms_runs_are_recorded_once_and_gone_on_with(popgym_folder, monkeypatch, task, model):
    commands, run = [], subprocess.run

    def spy(command, **kwargs):
        commands.append(command)
        return run(command, **kwargs)

    def main(*more):
        flags = ["--tasks", task, "--models", model, "--num-seeds", "2", "--steps", "1280", *more]
        monkeypatch.setattr(sys, "argv", ["popgym_hard.py", *flags])
        popgym_hard.main()
        return [pd.read_csv(popgym_folder / f"{name}.csv") for name in ("popgym", "popgym_curves")]

    monkeypatch.setattr(popgym_hard.subprocess, "run", spy)
    rows, curves = main()
    assert len(commands) == 1 and rows.seed.tolist() == [0, 1] and len(curves) == 2 * 5
    (folder,) = (popgym_folder / "runs").iterdir()
    (metrics,) = folder.glob("runs/*/metrics.csv")
    metrics, pole = pd.read_csv(metrics), task == "StatelessCartPole"
    wanted = metrics["charts/episodic_return"] / 600 if pole else metrics["charts/score"]
    wanted = wanted.groupby(metrics.seed)
    np.testing.assert_allclose(rows.max_return, wanted.max(), atol=1e-4)
    np.testing.assert_allclose(rows.final_return, wanted.last(), atol=1e-4)
    low, high = (8 / 600, 60 / 600) if pole else (-1, 1)
    assert rows.max_return.between(low, high).all() and rows.parameters.between(200, 5000).all()
    assert (popgym_folder / "popgym.png").read_bytes().startswith(b"\x89PNG")

    if not pole:
        return
    main()  # has nothing left to run
    assert len(commands) == 1
    rows[rows.seed == 0].to_csv(popgym_folder / "popgym.csv", index=False)
    again, points = main()  # as if stopped before its end: goes on from its checkpoint
    assert commands[1][2:] == ["--resume", f"runs/{next(folder.glob('runs/*')).name}"]
    assert again.max_return.tolist() == rows.max_return.tolist() and len(points) == len(curves)
    stopped = Mock(side_effect=SystemExit)
    monkeypatch.setattr(popgym_hard.subprocess, "run", stopped)
    with pytest.raises(SystemExit):
        main("--again")
    assert "--resume" not in stopped.call_args[0][0] and not list(folder.glob("runs/*"))


def test_popgyms_returns_are_the_largest_and_the_last_of_each_seed(tmp_path, monkeypatch):
    steps, n = np.arange(1, 251) * 10, 250
    returns = np.stack([np.linspace(0, 600, n), np.linspace(300, 0, n)])
    returns[1, 0] = np.nan  # no episode ended
    seeds = [
        {"global_step": steps, "seed": i, "charts/episodic_return": x, "charts/SPS": 5.0}
        for i, x in enumerate(returns)
    ]
    pd.concat(map(pd.DataFrame, seeds)).to_csv(tmp_path / "metrics.csv", index=False)
    (tmp_path / "config.json").write_text('{"device": "cpu", "git_commit": "0123456789"}')
    (tmp_path / "eval.json").write_text("{}")
    rows, points = popgym_hard.rows_of("StatelessCartPole", "S5", 2500, tmp_path, 7)
    assert rows.max_return.tolist() == [1, round(returns[1, 1] / 600, 4)]
    np.testing.assert_allclose(rows.final_return, returns[:, -25:].mean(1) / 600, atol=1e-4)
    assert (rows.seconds_all_seeds == 2500 / 5).all() and (rows.parameters == 7).all()
    assert 50 <= len(points) / 2 <= 100 and (rows.commit == "0123456").all()


def test_popgyms_models_have_equally_many_parameters():
    for task in ("StatelessCartPole", "NoisyStatelessPendulum"):
        sizes = []
        for model in ("S5", "LSTM", "Transformer"):
            with tempfile.TemporaryDirectory() as folder:
                path, flags = popgym_hard.prepare(task, model, Path(folder))
                script = module_of(path)
            args = tyro.cli(script.Args, args=flags)
            tasks = [args.train_tasks] if task.endswith("Pendulum") else []
            init, _ = script.make_train(args, script.Environment(*tasks, args))
            params = jax.eval_shape(init, jax.random.PRNGKey(0)).params
            sizes.append(sum(x.size for x in jax.tree.leaves(params)))
        assert max(sizes) < 1.1 * min(sizes)


def test_popgyms_table_has_the_papers_numbers_and_a_dash_for_what_was_not_run(capsys):
    row = {"task": "RepeatPrevious", "model": "LSTM", "steps": 1}
    rows = [row | {"seed": seed, "max_return": x} for seed, x in ((1, 0.25), (0, -0.5))]
    popgym_hard.print_table(pd.DataFrame(rows))
    assert (
        "| RepeatPrevious | – | -0.50 0.25 | – | – | 0.91 -0.46 -0.48 |" in capsys.readouterr().out
    )


def test_the_pendulum_of_the_optimum_is_gymnax_s_and_its_policy_is_the_best(monkeypatch):
    from gymnax.environments.classic_control.pendulum import EnvState, Pendulum

    rng = np.random.default_rng(0)
    states = rng.uniform([-4, -8, -2], [4, 8, 2], (20, 3))
    env = Pendulum()
    for angle, speed, torque in states:
        state = {"theta": jnp.float32(angle), "theta_dot": jnp.float32(speed)}
        state = EnvState(**state, last_u=jnp.float32(0), time=0)
        inputs = state, jnp.float32(torque), env.default_params
        _, after, reward, *_ = env.step_env(jax.random.key(0), *inputs)
        expected = reward, after.theta, after.theta_dot
        assert np.allclose(pendulum_optimum.step(angle, speed, torque), expected, atol=1e-4)

    monkeypatch.setattr(pendulum_optimum, "TORQUES", 5)
    best = pendulum_optimum.policies(12)
    assert not best[0].any()  # a last torque only costs
    points = pendulum_optimum.scores(best, 12, 500).mean()
    others = [np.full_like(best, torque) for torque in (-2.0, 0.0, 2.0)]
    for other in (*others, best[::-1]):
        assert pendulum_optimum.scores(other, 12, 500).mean() < points

    worst = s5_ppo_meta.LOWEST
    monkeypatch.setattr(pendulum_optimum, "step", lambda angle, speed, _: (worst, angle, speed))
    assert np.allclose(pendulum_optimum.scores(best, 12, 5), -1)  # as POPGym counts


# ---- speed
def test_variants_on_a_gpu_are_other_programs():
    """JAX keeps what it has traced, and would time the first variant under every name."""
    first, other = (gpu.update("S5", 8, scan=scan)[0].as_text() for scan in ("as it is", "no scan"))
    assert first != other


def test_scaling_measures_the_three_models():
    args = scaling.Args(max_attention_length=16)
    assert scaling.models_to_run("layer", 16, args) == ["S5", "LSTM", "Transformer"]
    assert scaling.models_to_run("environments", 32, args) == ["S5", "LSTM", "Transformer"]
    models = scaling.models_to_run("layer", 32, args)
    compiled = {model: scaling.compile_part("layer", model, 32) for model in models}
    rows = scaling.measure("layer", 32, compiled)
    assert [row["model"] for row in rows] == ["S5", "LSTM", "Transformer"]
    assert all(row["ms"] > 0 and row["MiB"] > 0 for row in rows[:2])
    assert rows[2]["ms"] is None  # too long for it


@pytest.mark.parametrize("model", scaling.SCRIPTS)
def test_an_acting_step_computes_the_whole_network(model):
    """The compiler may leave out nothing that an agent needs: S5's products alone are 5 MFLOP."""
    function, inputs, _ = scaling.acting_step(model, 64)
    weights = sum(x.size for x in jax.tree.leaves(inputs[0]) if x.ndim == 2)
    flops = function.lower(*inputs).compile().cost_analysis()["flops"]
    assert flops > 2 * 32 * weights


def test_the_layers_that_are_compared_compute_the_same_by_other_programs():
    args, rng = s5_layer.ARGS, np.random.default_rng(0)
    u, reset = rng.normal(size=(9, 2, args.d_model)).astype(np.float32), rng.random((9, 2)) < 0.3
    state = jnp.ones((2, args.state_size), jnp.complex64)
    params = s5_layer.S5(args).init(jax.random.key(0), state, u, reset)

    def of(scan):  # new each time: jax keeps what it has traced
        apply = s5_layer.layer_with(scan)
        return lambda *inputs: apply(*inputs, reset)

    programs = [str(jax.make_jaxpr(of(scan))(params, state, u)) for scan in s5_layer.SCANS.values()]
    assert len(set(programs)) == len(s5_layer.SCANS)
    expected, *others = [of(scan)(params, state, u) for scan in s5_layer.SCANS.values()]
    for other in others:
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), other, expected)


def test_a_compared_layer_is_trained():
    function, inputs = s5_layer.compile_layer(s5_layer.SCANS["associative"], 8)
    moved = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), function(*inputs), inputs)
    assert max(jax.tree.leaves(moved)) > 1e-7


# ---- every model on every task
OF_MODEL = {"s5_ppo_memory": "state_size", "lstm_ppo": "hidden_size", "transformer_ppo": "key_size"}


@pytest.mark.parametrize("task", ["s5_ppo_meta", "s5_ppo_memory"])
@pytest.mark.parametrize("model", ["lstm_ppo", "transformer_ppo"])
def test_a_composed_script_has_the_model_and_the_task_and_acts_as_it_learns(tmp_path, model, task):
    """With one gradient step on each rollout the policy that learns is the one that acted."""
    path = tmp_path / f"{model}_of_{task}.py"
    path.write_text(
        compose.compose(*((common.ROOT / f"{x}.py").read_text() for x in (model, task)))
    )
    subprocess.run([sys.executable, "-m", "ruff", "check", "-q", path], check=True)
    subprocess.run([sys.executable, "-m", "ruff", "format", "--check", "-q", path], check=True)
    script = module_of(path)
    flags = {flag: SMALL[flag] for flag in SMALL if flag != "state_size"} | {"num_minibatches": 1}
    flags |= {"num_envs": 6, "log_interval": 2, "num_layers": 1, OF_MODEL[model]: 6}
    args = script.Args(**flags)
    assert not hasattr(args, "state_size")
    tasks = [args.train_tasks] if task == "s5_ppo_meta" else []
    init, train = script.make_train(args, script.Environment(*tasks, args))
    state = jax.jit(init)(jax.random.PRNGKey(0))
    assert len(jax.tree.leaves(state.params)) > 10
    state, metrics = jax.jit(train)(state)
    assert abs(float(metrics["losses/approx_kl"])) < 1e-6


def test_composing_a_script_with_its_own_model_changes_nothing():
    text = (common.ROOT / "s5_ppo_meta.py").read_text()
    assert compose.compose(text, text) == text
    lstm, ours = ((common.ROOT / f"{x}.py").read_text() for x in ("lstm_ppo", "s5_ppo_memory"))
    there = compose.compose(lstm, ours)
    assert compose.compose(ours, there) == ours


# ---- every model on every suite
@pytest.mark.parametrize("suite", meta.SUITES)
def test_models_have_as_many_parameters_within_a_tenth_and_s5_the_fewest(tmp_path, suite):
    counts, args = {}, {}
    for model in meta.MODELS:  # of initial shapes alone: no task is loaded
        script = meta.import_from(meta.write_program(tmp_path, model))
        args[model] = x = tyro.cli(script.Args, args=meta.flags_of(suite, model))
        network = script.ActorCritic(x)
        obs = jnp.zeros((1, 1, x.projected_obs_size + x.projected_action_size + 3))
        inputs = jax.random.key(0), network.initial_carry(1), obs, jnp.zeros((1, 1), bool)
        params = jax.eval_shape(network.init, *inputs)
        counts[model] = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert max(counts.values()) <= 1.1 * min(counts.values()), counts
    assert min(counts, key=counts.get) == "S5"
    assert len({x.num_updates * x.batch_size for x in args.values()}) == 1
    assert args["LSTM"].max_timescale == 2 / args["S5"].dt_min
    assert args["Transformer"].context_length >= args["S5"].num_steps


TINY = (
    "--num-envs 4 --num-steps 8 --num-minibatches 2 --update-epochs 1 --num-layers 1 --d-model 8 "
)
TINY += "--encoder-size 8 --head-size 8 --log-interval 1 --eval-trials 2 --trial-length 2 "
TINY += "--held-out-tasks cartpole"


def run_meta(monkeypatch, folder, *flags):
    monkeypatch.setattr(meta, "HERE", folder)
    monkeypatch.setitem(meta.SUITES, "cartpole", (512, 16, [*TINY.split(), "--num-steps", 64]))
    flags = ["--suites", "cartpole", "--seeds", "3", "--runs-dir", str(folder / "cells"), *flags]
    monkeypatch.setattr(sys, "argv", ["meta.py", *flags])
    meta.main()
    return list(map(meta.stored, meta.TABLES))


@pytest.fixture(scope="module")
def meta_cells(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meta_cells")
    with pytest.MonkeyPatch.context() as monkeypatch:
        tables = run_meta(monkeypatch, folder, "--models", "S5", "LSTM")
    return folder, tables


def test_runs_of_two_models_are_in_the_tables_as_they_report_themselves(meta_cells):
    folder, (scores, curves, places) = meta_cells
    head = subprocess.getoutput(f"git -C {common.ROOT} rev-parse HEAD")[:7]
    assert (scores["commit"] == head).all()
    assert (scores["steps"] == 512).all() and (scores["seed"] == 3).all()
    for model in ("S5", "LSTM"):
        (run_dir,) = (folder / "cells" / f"cartpole-{model}-3-512" / "runs").iterdir()
        mine, curve, place = (x[x["model"] == model] for x in (scores, curves, places))
        reported = pd.DataFrame(json.loads((run_dir / "eval.json").read_text())["second_half"])
        assert mine["task"].tolist() == reported["task"].tolist() and len(mine) == 6
        assert mine["memory"].tolist() == reported["memory"].tolist()
        np.testing.assert_allclose(mine[["mean", "ci95"]], reported[["mean", "ci95"]], rtol=1e-4)
        assert set(zip(mine["split"], mine["task"], strict=True)) == {
            ("training", "cartpole-positions"),
            ("held out", "cartpole"),
        }
        metrics = pd.read_csv(run_dir / "metrics.csv")
        assert curve["step"].tolist() == metrics["global_step"].tolist() == [256, 512]
        np.testing.assert_allclose(curve["score"], metrics["charts/score"], rtol=1e-4)
        assert curve["score"].notna().any()
        episodes = pd.read_csv(run_dir / "adaptation.csv")
        episodes = episodes[episodes["episode"] != "second half"]
        np.testing.assert_allclose(place["mean"], episodes["mean"], rtol=1e-4)
        assert place["place"].tolist() == episodes["episode"].astype(float).tolist()
        assert set(place["unit"]) == {"episode"} and len(place) == 2 * 3 * 2
    assert scores.groupby("model")["parameters"].first().nunique() == 2  # two networks
    for name in meta.TABLES[1:]:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_is_only_read_and_an_unfinished_one_goes_on(
    meta_cells, tmp_path, monkeypatch, capsys
):
    """Of the end of a run only its evaluation is missing: it is the same a second time."""
    folder, before = meta_cells
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (result,) = tmp_path.glob("cells/cartpole-S5-*/runs/*/eval.json")
    expected = json.loads(result.read_text())["second_half"]
    result.unlink()
    begun, run = [], subprocess.run

    def spy(command, **kwargs):
        begun.append(command[1:])
        return run(command, **kwargs)

    monkeypatch.setattr(meta.subprocess, "run", spy)
    (tmp_path / "meta.csv").unlink()
    after = run_meta(monkeypatch, tmp_path, "--models", "S5", "LSTM")
    assert begun == [["s5_ppo_meta.py", "--resume", f"runs/{result.parent.name}"]]
    assert json.loads(result.read_text())["second_half"] == expected
    for old, new in zip(before, after, strict=True):  # rows are replaced, not added
        pd.testing.assert_frame_equal(old, new)
    printed = capsys.readouterr().out
    assert "|cartpole|Transformer|||||||not run|" in printed
    line = next(x for x in printed.splitlines() if x.startswith("|cartpole|S5|"))
    score = after[0].query("model == 'S5' and split == 'training' and memory == 'kept'")["mean"]
    assert line.split("|")[3] == f"{score.item():.2f}"  # one seed has no interval
    assert line.split("|")[7] == "512" and line.endswith("|3|")


def test_a_table_gives_intervals_where_there_are_several_seeds(capsys):
    common = {"suite": "cartpole", "model": "S5", "split": "training", "memory": "kept"}
    common |= {"task": "a", "steps": 1, "parameters": 2, "seconds": 3}
    meta.print_table(pd.DataFrame([common | {"seed": i, "mean": i / 2} for i in range(3)]))
    assert "|cartpole|S5|0.50 [0.00, 1.00]||" in capsys.readouterr().out
    meta.print_table(pd.DataFrame([common | {"seed": 0, "mean": 0.25}]))
    assert "|cartpole|S5|0.25||" in capsys.readouterr().out


def test_a_run_that_left_no_checkpoint_begins_anew(tmp_path, monkeypatch):
    (tmp_path / "runs" / "killed").mkdir(parents=True)
    begun = []
    monkeypatch.setattr(meta, "made_by", lambda: {"commit": "0123456"})
    monkeypatch.setattr(meta.subprocess, "run", lambda command, **_: begun.append(command[1:]))
    meta.train(tmp_path, "none", meta.flags_of("cartpole", "none", 1, 100))
    expected = "--suite cartpole --seed 1 --total-timesteps 100 --log-interval 4 "
    expected += "--num-layers 0 --head-size 200"
    assert begun == [["s5_ppo_meta.py", *expected.split()]]


def test_trials_of_one_episode_give_rewards_by_step(tmp_path):
    run_dir = tmp_path / "runs" / "s5_ppo_meta__cartpole__0__20260102-030405-6"
    run_dir.parent.mkdir()
    (tmp_path / "commit").write_text("0123456")
    tasks = {"train_tasks": ("pendulum",), "held_out_tasks": ("cartpole-positions",)}
    trials = {"trial_length": 1, "eval_trials": 3, "num_layers": 1}
    leave_a_run(s5_ppo_meta, run_dir, **tasks, **trials)
    args, state, keys = common.load(s5_ppo_meta, run_dir)
    env = s5_ppo_meta.Environment(args.train_tasks + args.held_out_tasks, args, trials_end=False)
    s5_ppo_meta.report(run_dir, state, keys, {}, args, env)
    scores, _, places = meta.tables_of(s5_ppo_meta, run_dir, "S5")
    assert set(scores["date"].astype(str)) == {"2026-01-02"}
    assert set(scores["commit"]) == {"0123456"}
    assert set(scores["seconds"]) == {round(4 * 8 / 5.0)}
    kept = places[places["memory"] == "kept"]
    pendulum, pole = (kept[kept["task"] == name] for name in ("pendulum", "cartpole-positions"))
    assert pendulum["place"].tolist() == pole["place"].tolist() == [4 * i + 2 for i in range(50)]
    assert set(pendulum["split"]) == {"training"} and set(pole["split"]) == {"held out"}
    np.testing.assert_allclose(pole["mean"], 1, rtol=1e-5)
    # The trials are those of the report, whose episodes have 200 steps.
    for memory, rows in places[places["task"] == "pendulum"].groupby("memory"):
        (score,) = scores[(scores["task"] == "pendulum") & (scores["memory"] == memory)]["mean"]
        mine = s5_ppo_meta.score(200 * rows["mean"].mean(), "pendulum")
        assert mine == pytest.approx(score, rel=1e-3)
    assert set(places["memory"]) == {"kept", "wiped every step"}


def test_the_interquartile_mean_leaves_out_a_quarter_on_each_side():
    assert meta.interquartile_mean(np.array([[9.0, 1.0], [2.0, -50.0]])) == 1.5
    assert meta.interquartile_mean(np.array([[0.0, 1.0, 5.0]])) == 2.0  # three have no quarter
    eight = np.array([[7.0, 0.0, 100.0, 3.0], [-9.0, 4.0, 5.0, 8.0]])
    np.testing.assert_array_equal(meta.interquartile_mean(np.stack([eight, -eight])), [4.75, -4.75])


def test_the_bootstrap_draws_seeds_within_each_task():
    constant = np.repeat([[0.0], [4.0], [5.0], [100.0]], 3, axis=1)
    np.testing.assert_array_equal(meta.bootstrap(constant), [4.5, 4.5])  # tasks are not drawn
    # A mean of 1 has probability 1 / 27: between 2.5 and 5 %. That of 0 has 8 / 27.
    np.testing.assert_array_equal(meta.bootstrap(np.array([[0.0, 0.0, 1.0]])), [0, 1])
    np.testing.assert_array_equal(meta.bootstrap(np.array([[0.0, 1.0, 1.0]])), [0, 1])
    # Of five the middle three count: 0, 1 / 3, 2 / 3, 1 have 0.737, 0.205, 0.051 and 0.007.
    np.testing.assert_allclose(meta.bootstrap(np.array([[0.0, 0.0, 0.0, 0.0, 1.0]])), [0, 2 / 3])
