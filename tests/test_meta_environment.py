"""Trials of several tasks: when they end, what the matrices do, what the agent is told, and that
the tasks are real."""

import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brax import envs

from s5_ppo_meta import SUITES, TASKS, Args, Environment, ProjectedTask, random_orthonormal

KEY = jax.random.PRNGKey(0)
O, A, STEPS = 6, 2, 320  # projected sizes; steps played
SIZES = {"held_out_tasks": (), "projected_obs_size": O, "projected_action_size": A}
TRIALS = {"one copy": {"trial_length": 3}, "two copies": {"trial_length": 2}}
SHORT = ("short-cartpole", "short-bodies")
LIMITS = (15, 7)
GYMNAX = {  # the action that the task gets for one in [-1, 1], and the entries that are seen
    "cartpole-positions": (lambda a: jnp.int32(a[0] > 0), (0, 2)),
    "cartpole": (lambda a: jnp.int32(a[0] > 0), (0, 1, 2, 3)),
    "pendulum": (lambda a: 2 * a[:1], (0, 1, 2)),
    "point-robot": (lambda a: 0.1 * a, (0, 1, 2, 3, 4, 5)),
    "mountain-car": (lambda a: a[:1], (0, 1)),
    "gymnax-reacher": (lambda a: a, tuple(range(8))),
}
BASE = {"short-cartpole": "cartpole", "short-bodies": "pendulum", "short-heavy": "pendulum"}


@pytest.fixture(autouse=True, scope="module")
def short_tasks():
    with pytest.MonkeyPatch.context() as patch:
        drawn = {"g": (6.7, 15.0), "m": (0.67, 1.5)}
        for name, of, changes in (
            ("short-cartpole", "cartpole", {"episode_length": 15}),
            ("short-bodies", "pendulum", {"episode_length": 7, "ranges": drawn}),
            ("short-heavy", "pendulum-heavy", {"episode_length": 7}),
        ):
            patch.setitem(TASKS, name, TASKS[of]._replace(**changes))
        yield


def raw_step(name):
    """The library's own step: (state, action in [-1, 1], body) -> obs, state, reward, end."""
    task = TASKS[name]
    if task.env_id not in gymnax.registered_envs:
        raw = envs.get_environment(task.env_id, backend="spring")

        def brax_step(state, action, body):
            state = raw.step(state, action[: raw.action_size])
            return state.obs, state, state.reward, state.done > 0.5

        return brax_step
    raw, params = gymnax.make(task.env_id)
    scale, seen = GYMNAX[BASE.get(name, name)]

    def gymnax_step(state, action, body):
        here = params.replace(**task.params, **body)
        obs, state, reward, end, _ = raw.step_env(KEY, state, scale(action), here)
        return obs[jnp.array(seen)], state, reward, end

    return gymnax_step


def poisoned(where, inner):
    """NaN in every real number of the marked copies' states."""

    def poison(x):
        marked = where.reshape(-1, *[1] * (x.ndim - 1))
        return jnp.where(marked, jnp.nan, x) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(poison, inner)


def player(args, names, num_envs, trials_end=True, redraw=True):
    """play(poison): random actions, some out of range, and the library's steps beside them.

    poison (STEPS, num_envs) marks whose physics is to fail. Returns a namespace per task, with
    arrays (STEPS, n, ...); states are those before each step, without their start states.
    """
    env, raws = Environment(names, args, trials_end), [raw_step(name) for name in names]
    reset_key, action_key, *keys = jax.random.split(KEY, 4)
    shape = (STEPS, num_envs, args.projected_action_size)
    actions = jax.random.uniform(action_key, shape, minval=-1.5, maxval=1.5)

    def beside(raw, state, action):
        true_action = jnp.einsum("nA,nAa->na", action, state.trial.action_matrix)
        return jax.vmap(raw)(state.inner, jnp.clip(true_action, -1, 1), state.trial.body)

    def step(states, inputs):
        step_key, redraw_key, action, poison = inputs
        states = env.redraw(redraw_key, states) if redraw else states
        marks, parts = jnp.split(poison, len(raws)), jnp.split(action, len(raws))
        states = tuple(
            state._replace(inner=poisoned(mark, state.inner))
            for mark, state in zip(marks, states, strict=True)
        )
        after, now = env.step(step_key, states, action)
        own = [beside(*x) for x in zip(raws, states, parts, strict=True)]
        return after, (tuple(state._replace(starts=()) for state in states), now, own)

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # little to run
    def run(poison):
        states, obs = env.reset(reset_key, num_envs)
        per_step = (jax.random.split(key, STEPS) for key in keys)
        return states, obs, jax.lax.scan(step, states, (*per_step, actions, poison))[1]

    def play(poison):
        first, first_obs, (states, now, own) = jax.tree.map(np.asarray, run(poison))
        tasks, n = [], num_envs // len(names)
        for k, name in enumerate(names):
            mine = slice(k * n, (k + 1) * n)
            obs, after, reward, end = own[k]
            task = SimpleNamespace(name=name, args=args, state=states[k], first=first[k])
            task.now = jax.tree.map(lambda x, mine=mine: x[:, mine], now)
            task.raw = SimpleNamespace(obs=obs, after=after, reward=reward, end=end)
            task.first_obs, task.actions = first_obs[mine], actions[:, mine]
            task.began, task.trial_began = (  # where the state before the step is the first
                np.concatenate([np.ones_like(x[:1]), x[:-1]])
                for x in (task.now.done, task.now.reset)
            )
            tasks.append(task)
        return tasks

    return play


POISONED_AT = 50


@pytest.fixture(scope="module", params=TRIALS)
def both(request):
    """Two tasks played twice; the second time the physics of one copy of the first task fails."""
    args = Args(**SIZES, **TRIALS[request.param], train_tasks=SHORT)
    num_envs = 2 if request.param == "one copy" else 4
    poison = np.zeros((STEPS, num_envs), bool)
    poison[POISONED_AT, 0] = True
    play = player(args, SHORT, num_envs)
    return play(np.zeros_like(poison)), play(poison)


@pytest.fixture(scope="module")
def played(both):
    return both[0]


RAW = ("cartpole-positions", "short-heavy", "point-robot", "mountain-car", "gymnax-reacher")


@pytest.fixture(scope="module")
def unprojected():
    """The other tasks of gymnax and one of brax, as an evaluation plays them: no trial ends."""
    sizes = SIZES | {"projected_obs_size": 11}
    names = (*RAW, "inverted-pendulum")
    args = Args(**sizes, **TRIALS["one copy"], train_tasks=names, projection=False)
    num_envs = 3 * len(names)
    play = player(args, names, num_envs, trials_end=False, redraw=False)
    return play(np.zeros((STEPS, num_envs), bool))


def assert_close(x, y):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def shown(obs, trial):
    return np.einsum("...o,...oO->...O", np.arcsinh(obs), trial.obs_matrix)


def physics_is_decided(task):
    """Where the raw step is the same whatever its key: a point robot is moved from its goal."""
    if not task.name.startswith("point-robot"):
        return np.ones(task.now.done.shape, bool)
    same = task.state.inner.goals_reached == task.raw.after.goals_reached
    assert same.mean() > 0.8
    return same


# ---- trials and episodes
def test_episodes_end_with_the_task_or_a_limit_and_only_a_trials_last_resets(played):
    for task, limit in zip(played, LIMITS, strict=True):
        now, args = task.now, task.args
        step = np.arange(STEPS)[:, None] + 1
        length = step - np.maximum.accumulate(np.where(task.began, step, 0)) + 1
        length += np.where(task.began.cumsum(0) == 1, task.state.episode_length[0], 0)
        episodes = task.state.trial_episodes[0] + now.done.cumsum(0)
        np.testing.assert_array_equal(now.reset, now.done & (episodes % args.trial_length == 0))
        np.testing.assert_array_equal(now.done, task.raw.end | (length == limit))
        np.testing.assert_array_equal(now.truncated, now.done & ~task.raw.end)
        assert not now.failed.any()
        assert now.reset.any(0).all() and (now.done & ~now.reset).any(0).all()
        assert task.raw.end.any() == (task.name == "short-cartpole")
        np.testing.assert_array_equal(task.state.episode_length + 1, length)
        # What the agent is told: flags, and its last action and reward but not of another trial.
        previous = np.concatenate([task.actions, now.reward[..., None]], axis=-1)
        np.testing.assert_array_equal(
            task.first_obs[:, O:], [[0] * (A + 1) + [1, 1]] * len(length[0])
        )
        shown = previous * ~now.reset[..., None]
        np.testing.assert_allclose(now.obs[..., O:-2], shown, rtol=1e-6, atol=1e-7)
        np.testing.assert_array_equal(now.obs[..., -2], now.done)
        np.testing.assert_array_equal(now.obs[..., -1], now.reset)
        np.testing.assert_array_equal(now.final_obs[..., O:-2], previous)
        np.testing.assert_array_equal(now.final_obs[..., -2:], 0)
        assert now.obs[now.done & ~now.reset, O:-2].all()  # none of them is zero


def test_trials_start_staggered_if_asked_and_a_redraw_renews_the_start_states_only():
    args = Args(**SIZES, **TRIALS["two copies"], train_tasks=("pendulum",), projection=False)
    env, key, n = Environment(args.train_tasks, args), KEY, 1000
    at_once = ProjectedTask("pendulum", args, trials_end=False)

    @jax.jit
    def run():
        (old,), _ = env.reset(key, n)
        return at_once.reset(key, n)[0], old, env.redraw(key, (old,))[0]

    together, old, new = run()
    assert not together.trial_episodes.any() and not together.episode_length.any()
    limits = args.trial_length, TASKS["pendulum"].episode_length // 10
    for x, limit in zip((old.trial_episodes, old.episode_length // 10), limits, strict=True):
        counts = np.bincount(x)
        assert len(counts) == limit and counts.min() > 0.4 * n / limit
    jax.tree.map(np.testing.assert_array_equal, old._replace(starts=()), new._replace(starts=()))
    theta = np.concatenate([old.starts[0].theta, new.starts[0].theta])
    assert len(np.unique(theta)) > 2 * n - 5


def test_rewards_are_divided_by_the_spread_of_their_task(played):
    for task in played:
        assert_close(task.now.reward * TASKS[task.name].return_std, task.now.raw_reward)


def test_returns_are_of_one_whole_episode(played):
    for task in played:
        total = np.where(task.state.episode_length[0] > 0, np.nan, 0.0)  # began part-way
        assert np.isnan(total).any() and np.isfinite(task.now.episode_return).any()
        for t, (reward, done) in enumerate(zip(task.now.raw_reward, task.now.done, strict=True)):
            total += reward
            assert_close(task.now.episode_return[t], total)
            total = np.where(done, 0.0, total)


def test_discrete_actions_have_equal_parts_of_the_range(monkeypatch):
    monkeypatch.setitem(TASKS, "car", TASKS["cartpole"]._replace(env_id="MountainCar-v0"))
    args = Args(**SIZES, train_tasks=("car",))
    task, (raw, params) = ProjectedTask("car", args), gymnax.make("MountainCar-v0")
    state = task.start(KEY)[0]
    step = jax.jit(lambda action: task.physics(KEY, state, action, {})[0].velocity)
    asked = {-1.0: 0, -0.4: 0, -0.3: 1, 0.3: 1, 0.4: 2, 1.0: 2}
    found = [step(jnp.array([action])) for action in asked]
    want = [raw.step_env(KEY, state, action, params)[1].velocity for action in asked.values()]
    np.testing.assert_allclose(found, want, rtol=1e-5)
    assert len({*map(float, want)}) == 3


def test_episodes_of_a_trial_begin_alike_where_the_goal_is_hidden_and_trials_do_not():
    patch = {"point-goal": TASKS["point-goal"]._replace(episode_length=3)}
    args = Args(**SIZES, train_tasks=("point-goal",), trial_length=3)
    with pytest.MonkeyPatch.context() as context:
        context.setitem(TASKS, *patch.popitem())
        env = Environment(args.train_tasks, args)
    n, steps = 5, 40
    keys = jax.random.split(KEY, steps)
    actions = jax.random.uniform(KEY, (steps, n, A), minval=-1, maxval=1)

    def step(states, inputs):
        key, action = inputs
        states, now = env.step(key, env.redraw(key, states), action)
        return states, (states[0].inner, states[0].trial.obs_matrix, now)

    @jax.jit
    def run():
        return jax.lax.scan(step, env.reset(KEY, n)[0], (keys, actions))[1]

    inner, matrix, now = jax.tree.map(np.asarray, run())
    goals = 0
    for i in range(n):
        starts = np.flatnonzero(now.done[:, i])
        for one, following in pairwise(starts):
            pos, goal = inner.pos[[one, following], i], inner.goal[[one, following], i]
            same = not now.reset[following, i]
            assert (pos[0] == pos[1]).all() == (goal[0] == goal[1]).all() == same
            assert (matrix[one, i] == matrix[following, i]).all() == same
            between = slice(one, following)
            assert (inner.goal[between, i] == goal[0]).all()
            goals += not same
    assert goals > n


@pytest.mark.parametrize("name", SUITES["goals"].train_tasks)
def test_a_hidden_goal_is_not_seen_and_the_rest_of_the_state_is(name):
    task = ProjectedTask(name, Args())
    state, obs = task.start(KEY)
    hidden = [field for field in ("goal", "goal_xy", "urchin_xys") if hasattr(state, field)]
    fields = {field: 0.5 + getattr(state, field) for field in hidden}
    elsewhere = task.env.get_obs(state.replace(**fields), task.params)
    shown = task.env.get_obs(state, task.params)
    assert (elsewhere != shown).any() or name == "point-goal"  # which never shows it
    np.testing.assert_array_equal(elsewhere[task.task.seen], obs)
    moved = jax.tree.map(lambda x: x + 0.5, state.replace(**{x: 0 for x in hidden}))
    moved = moved.replace(**{x: getattr(state, x) for x in hidden})
    assert (task.env.get_obs(moved, task.params)[task.task.seen] != obs).all()


# ---- matrices and bodies
def test_every_trial_of_every_copy_has_its_own_matrices_and_body_and_keeps_them(played):
    for task in played:
        trial, reset = task.state.trial, task.now.reset
        if len(reset[0]) > 1 and task.name == SHORT[0]:  # where one's trial ends, another's goes on
            assert (task.now.done & ~reset & reset.any(1, keepdims=True)).any()
        fields = [trial.obs_matrix, trial.action_matrix, *trial.body.values()]
        assert len(trial.body) == (2 if task.name == "short-bodies" else 0)
        for x in fields:
            changed = (x[1:] != x[:-1]).reshape(*reset[1:].shape, -1)
            np.testing.assert_array_equal(changed.any(-1), reset[:-1])
            drawn = x[task.trial_began].reshape(task.trial_began.sum(), -1)
            assert len(np.unique(drawn.round(5), axis=0)) == len(drawn) > 5
        for field, x in trial.body.items():
            low, high = TASKS[task.name].ranges[field]
            assert low <= x.min() < 0.7 * low + 0.3 * high < 0.3 * low + 0.7 * high < x.max() < high
        o, a = trial.obs_matrix.shape[2], trial.action_matrix.shape[3]
        assert_close(
            trial.obs_matrix @ trial.obs_matrix.mT,
            np.broadcast_to(O / o * np.eye(o), (*reset.shape, o, o)),
        )
        assert_close(
            trial.action_matrix.mT @ trial.action_matrix,
            np.broadcast_to(np.eye(a), (*reset.shape, a, a)),
        )


def test_matrices_are_uniform_among_those_with_orthonormal_columns():
    q = np.asarray(random_orthonormal(KEY, 20_000, 4, 2), np.float64)
    np.testing.assert_allclose(q.mean(0), 0, atol=0.02)
    np.testing.assert_allclose((q**2).mean(0), 1 / 4, atol=0.01)
    np.testing.assert_allclose((q**4).mean(0), 3 / (4 * 6), atol=0.01)
    np.testing.assert_allclose((q[:, 0] ** 2 * q[:, 1] ** 2).mean(0), 1 / (4 * 6), atol=0.005)
    assert (q[:, 0, 0] ** 2 * q[:, 1, 1] ** 2).mean() == pytest.approx(5 / 72, abs=0.005)
    assert np.prod(q[:, :2], axis=(1, 2)).mean() == pytest.approx(-1 / 72, abs=0.005)
    square = np.asarray(random_orthonormal(jax.random.PRNGKey(1), 20_000, 3, 3), np.float64)
    np.testing.assert_allclose((square**4).mean(0), 3 / (3 * 5), atol=0.01)
    trace = np.trace(square, axis1=1, axis2=2)
    assert np.linalg.det(square).mean() == pytest.approx(0, abs=0.03)  # reflections too
    assert trace.mean() == pytest.approx(0, abs=0.03)
    assert (trace**2).mean() == pytest.approx(1, abs=0.04)
    sign = random_orthonormal(jax.random.PRNGKey(2), 4000, 1, 1)
    np.testing.assert_allclose(np.abs(sign), 1, rtol=1e-6)
    assert sign.mean() == pytest.approx(0, abs=0.06)


@pytest.mark.parametrize(("name", "o"), [("cartpole-positions", 2), ("gymnax-reacher", 8)])
def test_padding_and_scale_tell_nothing_of_the_task_and_distances_are_kept(name, o):
    n, O = 20_000, 12
    task = ProjectedTask(name, Args(**SIZES | {"projected_obs_size": O}))
    white = np.random.default_rng(0).normal(size=(2, n, o)).astype(np.float32)
    trial = task.draw_trials(KEY, n)
    nothing = jnp.zeros((n, A)), jnp.zeros(n), jnp.zeros(n, bool), jnp.zeros(n, bool)
    one, other = (np.asarray(task.agent_obs(np.sinh(x), trial, *nothing))[:, :O] for x in white)
    np.testing.assert_allclose(one.mean(0), 0, atol=0.05)
    np.testing.assert_allclose(np.cov(one.T), np.eye(O), atol=0.06)
    distance = np.sqrt(O / o) * np.linalg.norm(white[0] - white[1], axis=1)
    np.testing.assert_allclose(np.linalg.norm(one - other, axis=1), distance, rtol=1e-3)


MANY_DRAWS = """
import jax
from s5_ppo_meta import random_orthonormal
draw = jax.jit(lambda key: [random_orthonormal(k, 96, 32, 27) for k in jax.random.split(key, 10)])
for i in range(100):
    jax.block_until_ready(draw(jax.random.PRNGKey(i)))
"""


@pytest.mark.slow
def test_as_many_matrices_as_a_suite_needs_are_drawn_at_once_on_few_cores():
    """jaxlib's QR of a batch waited for threads that others, side by side with it, held."""
    root = Path(__file__).resolve().parent.parent
    ended = subprocess.run([sys.executable, "-c", MANY_DRAWS], cwd=root, timeout=60, check=False)
    assert ended.returncode == 0


@pytest.fixture(scope="module")
def made_up():
    """A step of a task whose observation is the action that it got; the physics of three fails."""
    task = ProjectedTask(
        "point-robot", Args(**SIZES | {"projected_action_size": 5}), trials_end=False
    )
    rng, n = np.random.default_rng(0), 100
    wanted = rng.uniform(-3, 3, (n, 2)).astype(np.float32)
    wanted[:4] = [[1, 1], [1, -1], [-1, 1], [-1, -1]]

    def physics(key, i, action, body):
        obs = jnp.zeros(6).at[:2].set(action)
        obs = obs.at[5].set(jnp.select([i == 10, i == 11, i == 13], [jnp.nan, jnp.inf, 1e30], 0.0))
        return i, obs, jnp.select([i == 12, i == 13], [-jnp.inf, 1e9], 1.0), False

    task.start = lambda key: (jnp.zeros((), jnp.int32), jnp.zeros(6))
    task.physics = physics

    @jax.jit
    def run(key):
        state, _ = task.reset(key, n)
        action = jnp.einsum("nAa,na->nA", state.trial.action_matrix, wanted)
        state = state._replace(inner=jnp.arange(n))
        return state.trial, action, task.step(key, state, action)[1]

    return wanted, *jax.tree.map(np.asarray, run(KEY))


def test_every_action_of_the_task_is_reached_and_none_beyond_its_range(made_up):
    wanted, trial, action, now = made_up
    norm = np.linalg.norm(wanted, axis=1)
    np.testing.assert_allclose(np.linalg.norm(action, axis=1), norm, rtol=1e-5)
    got = np.einsum("nO,noO->no", now.final_obs[:, :O], trial.obs_matrix)[:, :2]
    whole = ~now.failed & (np.arange(100) != 13)
    assert_close(got[whole], np.arcsinh(np.clip(wanted, -1, 1))[whole])
    assert (np.abs(wanted) < 1).all(1).any() and (np.abs(wanted) > 2).any()


def test_a_failure_is_an_observation_or_reward_that_is_not_finite(made_up):
    *_, now = made_up
    assert np.flatnonzero(now.failed).tolist() == np.flatnonzero(now.done).tolist() == [10, 11, 12]
    assert not now.truncated.any()
    np.testing.assert_array_equal(
        now.raw_reward, np.where(now.failed, 0, np.where(np.arange(100) == 13, 1e9, 1))
    )
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(now))


# ---- start states
def test_every_episode_starts_from_a_fresh_state_which_the_agent_sees(played):
    for task in played:
        for theta, began in zip(task.state.inner.theta.T, task.began.T, strict=True):
            assert len(np.unique(theta[began])) == began.sum() > 5
        done = task.now.done[:-1]
        after = jax.tree.map(lambda x, done=done: x[1:][done], (task.state.inner, task.state.trial))
        raw, params = gymnax.make(TASKS[task.name].env_id)
        obs = jax.vmap(lambda x, raw=raw, params=params: raw.get_obs(x, params))(after[0])
        assert_close(task.now.obs[:-1][done][:, :O], shown(obs, after[1]))


def test_between_two_draws_episodes_start_from_one_of_as_many_states_as_copies(unprojected):
    task = unprojected[RAW.index("short-heavy")]
    theta, pool = task.state.inner.theta, task.first.starts[0].theta
    assert len(set(pool)) == 3 and set(theta[task.began]) == set(pool)
    assert all(len(set(theta[task.began[:, i], i])) == 3 for i in range(3))


# ---- physics
def test_a_projected_task_moves_as_the_library_does_with_the_body_of_its_trial(played):
    for task in played:
        assert_close(task.now.final_obs[..., :O], shown(task.raw.obs, task.state.trial))
        assert_close(task.now.raw_reward, task.raw.reward)
        goes_on = ~task.now.done[:-1]
        pairs = zip(*map(jax.tree.leaves, (task.state.inner, task.raw.after)), strict=True)
        for x, y in pairs:
            assert_close(x[1:][goes_on], y[:-1][goes_on])


def test_without_projection_a_task_is_the_library_s_own_step_by_step(unprojected):
    assert_the_library_s_own(unprojected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reacher", "inverted-double-pendulum"])
def test_other_tasks_of_brax_are_the_library_s_own_too(name):
    sizes = SIZES | {"projected_obs_size": 11, "projected_action_size": 3}
    args = Args(**sizes, **TRIALS["one copy"], train_tasks=(name,), projection=False)
    play = player(args, (name,), 2, trials_end=False, redraw=False)
    assert_the_library_s_own(play(np.zeros((STEPS, 2), bool)))


def assert_the_library_s_own(tasks):
    for task in tasks:
        now, raw, here, row = task.now, task.raw, physics_is_decided(task), TASKS[task.name]
        o = raw.obs.shape[-1]
        assert_close(now.final_obs[here][:, :o], np.arcsinh(raw.obs)[here])
        np.testing.assert_array_equal(now.final_obs[..., o:11], 0)
        assert_close(now.raw_reward, raw.reward)
        limit = task.state.episode_length + 1 == row.episode_length
        np.testing.assert_array_equal(now.done, (raw.end > 0.5) | limit)
        np.testing.assert_array_equal(now.truncated, now.done & ~raw.end)
        assert now.done.any(0).all()
        # Every step goes on from the last.
        goes_on, inner, after = (here & ~now.done)[:-1], task.state.inner, raw.after
        if row.env_id not in gymnax.registered_envs:
            inner, after = (
                (s.pipeline_state.q, s.pipeline_state.qd, s.obs) for s in (inner, after)
            )
        for x, y in zip(*map(jax.tree.leaves, (inner, after)), strict=True):
            assert_close(x[1:][goes_on], y[:-1][goes_on])


def test_trials_of_an_evaluation_start_together_and_never_end(unprojected):
    for task in unprojected:
        state, n = task.state, task.now.done.shape[1]
        assert not task.now.reset.any()
        ended = np.concatenate([np.zeros((1, n)), task.now.done[:-1].cumsum(0)])
        np.testing.assert_array_equal(state.trial_episodes, ended)


# ---- physics that fails
def test_a_copy_whose_physics_fails_starts_anew_and_no_other_notices(both):
    (good, good_other), (bad, bad_other) = both
    t, now = POISONED_AT, bad.now
    for kept in (lambda x: x[:, 1:], lambda x: x[:t]):
        jax.tree.map(np.testing.assert_array_equal, *jax.tree.map(kept, (good.now, now)))
    jax.tree.map(np.testing.assert_array_equal, good_other.now, bad_other.now)
    assert np.argwhere(now.failed).tolist() == [[t, 0]]
    assert now.done[t, 0] and not now.truncated[t, 0]
    assert now.raw_reward[t, 0] == now.reward[t, 0] == 0
    whole = now._replace(episode_return=now.episode_return[t:])  # the first began part-way
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(whole))
    restarted = jax.tree.map(lambda x: x[t + 1, 0], bad.state)
    assert restarted.episode_length == 0
    obs = np.array(
        [getattr(restarted.inner, name) for name in ("x", "x_dot", "theta", "theta_dot")]
    )
    assert (np.abs(obs) > 0).all() and (np.abs(obs) <= 0.05).all()  # a start
    assert_close(now.obs[t, 0, :O], shown(obs, restarted.trial))


# ---- tables
def test_the_tables_name_known_tasks_and_hold_some_out():
    for suite in SUITES.values():
        names = suite.train_tasks + suite.held_out_tasks
        assert set(names) <= set(TASKS)
        physics = [(x.env_id, str(x.params | x.ranges)) for x in map(TASKS.get, names)]
        assert len(set(physics)) == len(physics)  # nor is one held out under another name
    assert all(SUITES[name].held_out_tasks for name in SUITES.keys() - {"cartpole"})


def test_bodies_held_out_are_outside_of_the_drawn_ones_and_else_the_same():
    usual = {"point": ("max_force", 0.2), "swimmer": ("dt", 0.3), "reacher": ("torque_scale", 2.0)}
    suite = SUITES["goals"]
    for name in suite.held_out_tasks:
        kind = name.split("-")[0]
        task, drawn, (field, default) = TASKS[name], TASKS[f"{kind}-goal"], usual[kind]
        strength = 2 if field == "dt" else 1  # an action moves the swimmer by its square
        ends = ((x / default) ** strength for x in (*drawn.ranges[field], task.params[field]))
        assert [*ends] == pytest.approx([1 / 2, 2, 3 if name.endswith("strong") else 1 / 3], 0.01)
        assert drawn.params == task.params | {field: default} and [*drawn.ranges] == [field]
        assert (drawn.env_id, drawn.episode_length) == (task.env_id, task.episode_length)
        assert (drawn.seen, drawn.same_start) == (task.seen, True) and not task.ranges
    assert len(suite.held_out_tasks) == 2 * len(suite.train_tasks) == 6


def test_hidden_goals_stay_for_the_episodes_of_the_readme_whose_few_steps_are_all_that_counts():
    for suite in SUITES.values():
        hidden = any(TASKS[name].same_start for name in suite.train_tasks)
        assert suite.bootstrap_truncated is not hidden
        if hidden:
            assert suite.trial_length == 16


def test_without_playground_one_line_says_what_the_tasks_of_dm_control_need(monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco_playground", None)
    with pytest.raises(ValueError, match=r"pip install -e \"\.\[dmc\]\""):
        ProjectedTask("reacher-easy", Args(suite="dmc-small"))


def test_every_task_of_a_suite_fits_into_its_sizes():
    seen = set()
    for suite in ("goals", "cartpole", "classic"):
        args = Args(suite=suite)
        sizes = args.projected_obs_size, args.projected_action_size
        for name in args.train_tasks + args.held_out_tasks:
            task = ProjectedTask(name, args)
            assert task.obs_size <= sizes[0] and task.action_size <= sizes[1]
            if task.task.env_id in seen:
                continue
            seen.add(task.task.env_id)
            for flag, size in (("obs", task.obs_size), ("action", task.action_size)):
                small = Args(suite=suite, projected_obs_size=50, projected_action_size=50)
                setattr(small, f"projected_{flag}_size", size - 1)
                with pytest.raises(
                    ValueError, match=f"{name} .*{task.obs_size}.*{task.action_size}"
                ):
                    ProjectedTask(name, small)
            if task.is_gymnax:  # to trace those of brax takes long
                state, obs = jax.eval_shape(lambda key, t=task: t.reset(key, 3), KEY)
                action = jnp.zeros((3, sizes[1]))
                _, now = jax.eval_shape(lambda *x, t=task: t.step(*x), KEY, state, action)
                assert obs.shape == now.obs.shape == (3, sum(sizes) + 3)
    assert len(seen) >= 7
