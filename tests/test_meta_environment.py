"""Trials of several tasks: when they end, what the matrices do, what the agent is told, and that the tasks are real."""

from types import SimpleNamespace
from typing import get_args, get_type_hints

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brax import envs

from s5_ppo_meta import SUITES, TASKS, Args, CopiesOf, Environment, make_train, random_orthonormal

N, O, A, T = 6, 6, 2, 160  # environments, projected sizes, steps
SPREAD = (2.0, 5.0)
SIZES = {"held_out_tasks": (), "projected_obs_size": O, "projected_action_size": A}
STEPS, EPISODES = {"trial_length": 23, "trial_episodes": 0}, {"trial_length": 0, "trial_episodes": 3}


@pytest.fixture(autouse=True, scope="module")
def more_tasks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "short-cartpole", TASKS["cartpole"]._replace(episode_length=15))
        patch.setitem(TASKS, "short-pendulum", TASKS["pendulum"]._replace(episode_length=7))
        patch.setitem(TASKS, "short-heavy", TASKS["pendulum-heavy"]._replace(episode_length=7))
        patch.setitem(TASKS, "short-bodies", TASKS["point-robot-bodies"]._replace(episode_length=7))
        patch.setitem(TASKS, "twin", TASKS["pendulum"])
        yield


def play(env, args, num_steps, spread, num_envs=N, redraw=True, also=lambda states, action: None):
    """Random actions, some out of range. States are those before each step, without their pools; arrays (T, n, ...).

    `also` is computed at every step as well, in the same program, since to compile a second one takes seconds.
    """
    reset_key, action_key, step_key, redraw_key = jax.random.split(jax.random.key(0), 4)
    shape = (num_steps, num_envs, args.projected_action_size)
    actions = jax.random.uniform(action_key, shape, minval=-1.5, maxval=1.5)

    def step(states, inputs):
        step_key, redraw_key, action = inputs
        if redraw:
            states = env.redraw(redraw_key, states)
        next_states, timestep = env.step(step_key, states, action, jnp.asarray(spread))
        return next_states, (tuple(state._replace(pool=None) for state in states), timestep, also(states, action))

    @jax.jit
    def run():
        states, first = env.reset(reset_key, num_envs)
        keys = (jax.random.split(key, num_steps) for key in (step_key, redraw_key))
        return first, jax.lax.scan(step, states, (*keys, actions))[1]

    first, (states, now, other) = jax.tree.map(np.asarray, run())
    return SimpleNamespace(
        args=args, first=first, states=states, now=now, other=other, actions=np.asarray(actions), began=began(now.done)
    )


def began(done):
    """Where the state before the step is the first of an episode."""
    return np.concatenate([np.ones_like(done[:1]), done[:-1]])


@pytest.fixture(scope="module", params=[STEPS, EPISODES], ids=["steps", "episodes"])
def played(request):
    """Two tasks, whose matrices and start states are drawn anew at every step."""
    args = Args(**SIZES, **request.param, train_tasks=("short-cartpole", "short-pendulum"))
    return play(Environment(args.train_tasks, args), args, T, SPREAD)


@pytest.fixture(scope="module")
def endless():
    """One task as an evaluation plays it, whose start states are drawn once."""
    args = Args(**SIZES, **EPISODES, train_tasks=("short-pendulum",))
    return play(Environment(args.train_tasks, args, trials_end=False), args, 70, (1.0,), num_envs=16, redraw=False)


def together(states, name):
    return np.concatenate([getattr(state, name) for state in states], axis=1)


def nothing(n):
    """No previous action, reward or flag."""
    return jnp.zeros((n, A)), jnp.zeros(n), jnp.zeros(n), jnp.zeros(n, bool)


def squash(x):
    """What the agent sees of a task's entries before they are mixed, whichever function of each entry it is."""
    n, copies = np.size(x), CopiesOf("pendulum", Args(**SIZES))
    seen = copies.agent_obs(jnp.reshape(x, (n, 1)), jnp.ones((n, 1, 1)), *nothing(n))
    return np.asarray(seen[:, 0]).reshape(np.shape(x))


# ---- trials and episodes
def test_the_memory_is_reset_where_a_trial_ends_and_nowhere_else(played):
    now, args = played.now, played.args
    if args.trial_length:
        step = together(played.states, "trial_step")[0] + 1 + np.arange(T)[:, None]
        ends = step % args.trial_length == 0
    else:
        ended = together(played.states, "episode")[0] + now.done.cumsum(0)
        ends = now.done & (ended % args.trial_episodes == 0)
    np.testing.assert_array_equal(now.reset, ends)
    assert now.reset.any(0).all()
    assert (now.done & ~now.reset).any(0).all()  # episodes end inside a trial
    assert now.done[now.reset].all()  # and the last one with it
    assert played.first.reset.all() and not played.first.done.any()


def test_trials_start_staggered(played):
    args = played.args
    counter, length = ("trial_step", args.trial_length) if args.trial_length else ("episode", args.trial_episodes)
    begun = together(played.states, counter)[0]
    assert begun.min() >= 0 and begun.max() < length and len(np.unique(begun)) > 1
    assert not played.now.reset.all(1).any()
    many = jax.jit(lambda key: CopiesOf("short-pendulum", args).reset(key, 1000, True)[0])(jax.random.key(0))
    counts = np.bincount(getattr(many, counter), minlength=length)
    assert len(counts) == length and counts.min() > 0.4 * 1000 / length  # no place in the trial is rare


def test_trials_of_an_evaluation_start_together_and_never_end(endless):
    (state,) = endless.states
    assert not endless.now.reset.any()
    np.testing.assert_array_equal(endless.now.done, np.tile(np.arange(1, 71)[:, None] % 7 == 0, 16))
    np.testing.assert_array_equal(state.episode[0], 0)
    np.testing.assert_array_equal(state.trial_step, np.tile(np.arange(70)[:, None], 16))
    for matrix in (state.obs_matrix, state.action_matrix):
        np.testing.assert_array_equal(matrix, np.broadcast_to(matrix[0], matrix.shape))


def test_agent_is_told_its_last_action_and_reward_across_episodes_but_not_across_trials(played):
    now = played.now
    previous = np.concatenate([played.actions, now.reward[..., None]], axis=-1)
    np.testing.assert_array_equal(played.first.obs[:, O:], [[0] * (A + 1) + [1, 1]] * N)
    np.testing.assert_array_equal(now.obs[..., O:-2], previous * ~now.reset[..., None])
    np.testing.assert_array_equal(now.obs[..., -2], now.done)
    np.testing.assert_array_equal(now.obs[..., -1], now.reset)
    np.testing.assert_array_equal(now.final_obs[..., O:-2], previous)
    np.testing.assert_array_equal(now.final_obs[..., -2:], 0)
    assert now.obs[now.done & ~now.reset, O:-2].all()  # none of them is zero


def test_rewards_are_divided_by_the_spread_of_their_task(played):
    now = played.now
    np.testing.assert_allclose(now.reward * np.repeat(SPREAD, N // 2), now.raw_reward, rtol=1e-6)
    assert (now.raw_reward[:, : N // 2] == 1).all() and (now.raw_reward[:, N // 2 :] < 0).all()


def test_returns_and_lengths_count_one_episode(played):
    now = played.now
    total, discounted, length = np.zeros((3, N))
    for t in range(T):
        total, discounted = total + now.raw_reward[t], played.args.gamma * discounted + now.raw_reward[t]
        length = length + 1
        np.testing.assert_allclose(now.episode_return[t], total, rtol=1e-5)
        np.testing.assert_allclose(now.discounted_return[t], discounted, rtol=1e-5)
        np.testing.assert_array_equal(together(played.states, "episode_length")[t] + 1, length)
        total, discounted, length = (x * ~now.done[t] for x in (total, discounted, length))


def test_an_end_is_a_truncation_unless_the_task_terminated(played):
    now, n = played.now, N // 2
    matrix = played.states[0].obs_matrix  # (T, n, 4, O)
    obs = np.abs(np.einsum("tnO,tnoO->tno", now.final_obs[:, :n, :O], matrix) * 4 / O)
    fallen = (obs[..., 2] > squash(12 * 2 * np.pi / 360)) | (obs[..., 0] > squash(2.4))
    fallen = np.concatenate([fallen, np.zeros_like(fallen)], axis=1)  # the pendulum never terminates
    limit = together(played.states, "episode_length") + 1 == np.repeat((15, 7), n)
    np.testing.assert_array_equal(now.done, fallen | limit | now.reset)
    np.testing.assert_array_equal(now.truncated, now.done & ~fallen)
    assert fallen.any() and (limit & ~fallen)[:, :n].any()
    assert (now.reset & ~fallen & ~limit).any() == bool(played.args.trial_length)


# ---- start states
def test_every_episode_starts_from_a_fresh_state(played):
    for state, starts in zip(played.states, np.split(played.began, 2, axis=1), strict=True):
        assert starts.sum(0).min() > 5
        for theta, start in zip(state.inner.theta.T, starts.T, strict=True):
            assert len(np.unique(theta[start])) == start.sum()


def test_between_two_draws_too_the_episodes_of_a_trial_start_differently(endless):
    theta, began = endless.states[0].inner.theta, endless.began
    assert all(len(np.unique(theta[began[:, i], i])) > 0.5 * began[:, i].sum() for i in range(16))
    assert set(theta[began]) <= set(theta[0])  # nothing else is there to start from


def test_a_redraw_renews_what_may_come_and_leaves_what_is():
    args = Args(**SIZES, **STEPS, train_tasks=("pendulum-bodies",))
    env = Environment(args.train_tasks, args)

    @jax.jit
    def run(key):
        states, _ = env.reset(key, N)
        return states, env.redraw(jax.random.fold_in(key, 1), states)

    ((old,), (new,)) = run(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, old._replace(pool=None), new._replace(pool=None))
    assert set(old.pool.body) == {"g", "m"}
    for x, y in zip(jax.tree.leaves(old.pool[1:]), jax.tree.leaves(new.pool[1:]), strict=True):
        assert not np.isclose(x, y, atol=1e-6).all(tuple(range(1, x.ndim))).any()
    assert not np.isin(old.pool.inner.theta, new.pool.inner.theta).any()


# ---- matrices
def test_squashing_keeps_every_difference_and_shortens_the_large_ones():
    x = np.concatenate([np.linspace(0, 1, 1001)[:-1], np.geomspace(1, 1000, 1000)])
    y = squash(x)
    assert y[0] == 0 and (np.diff(y) > 0).all() and y[-1] < 10
    np.testing.assert_array_equal(squash(-x), -y)


def test_a_trial_has_matrices_of_its_own_and_keeps_them(played):
    for state, reset in zip(played.states, np.split(played.now.reset, 2, axis=1), strict=True):
        for matrix in (state.obs_matrix, state.action_matrix):
            changed = (matrix[1:] != matrix[:-1]).any((2, 3))
            np.testing.assert_array_equal(changed, reset[:-1])
            drawn = matrix[began(reset)]
            assert len(np.unique(drawn.reshape(len(drawn), -1), axis=0)) == len(drawn)


@pytest.mark.parametrize(("name", "o", "a"), [("cartpole-positions", 2, 1), ("point-robot", 6, 2)])
def test_a_projection_keeps_the_distances_of_squashed_observations(name, o, a):
    copies = CopiesOf(name, Args(**SIZES))
    one, other = 10 * np.random.default_rng(0).normal(size=(2, 50, o))

    @jax.jit
    def run(key):
        trial = copies.draw(key, 50)
        return trial, *(copies.agent_obs(obs, trial.obs_matrix, *nothing(50))[:, :O] for obs in (one, other))

    trial, seen, also_seen = jax.tree.map(np.asarray, run(jax.random.key(0)))
    assert (trial.obs.shape, trial.obs_matrix.shape, trial.action_matrix.shape) == ((50, o), (50, o, O), (50, A, a))
    gram = trial.obs_matrix @ trial.obs_matrix.mT
    np.testing.assert_allclose(gram, np.tile(O / o * np.eye(o), (50, 1, 1)), atol=1e-5)
    gram = trial.action_matrix.mT @ trial.action_matrix
    np.testing.assert_allclose(gram, np.tile(np.eye(a), (50, 1, 1)), atol=1e-5)
    distance = np.linalg.norm(squash(one) - squash(other), axis=1)
    np.testing.assert_allclose(np.linalg.norm(seen - also_seen, axis=1), np.sqrt(O / o) * distance, rtol=1e-4)


def test_every_action_of_the_task_is_reached_and_none_beyond_its_range():
    copies, n = CopiesOf("point-robot", Args(**SIZES | {"projected_action_size": 5}, **EPISODES)), 100
    copies.physics = lambda key, state, action, body: (state, jnp.zeros(6), 10 * action[0] + action[1], False)
    wanted = np.random.default_rng(0).uniform(-1, 1, (n, 2)).astype(np.float32)
    wanted[:4] = [[1, 1], [1, -1], [-1, 1], [-1, -1]]

    @jax.jit
    def run(key, scale):
        state, _ = copies.reset(key, n, False)
        action = scale * jnp.einsum("nAa,na->nA", state.action_matrix, wanted)
        return action, copies.step(key, state, action, 1.0, False)[1].raw_reward

    for scale in (1.0, 3.0):
        action, reward = run(jax.random.key(0), scale)
        np.testing.assert_allclose(np.linalg.norm(action, axis=1), scale * np.linalg.norm(wanted, axis=1), rtol=1e-5)
        np.testing.assert_allclose(reward, np.clip(scale * wanted, -1, 1) @ [10, 1], atol=1e-4)


def test_matrices_are_uniform_among_those_with_orthonormal_columns():
    q = np.asarray(random_orthonormal(jax.random.key(0), 20_000, 4, 2), np.float64)
    np.testing.assert_allclose(q.mean(0), 0, atol=0.02)
    np.testing.assert_allclose((q**2).mean(0), 1 / 4, atol=0.01)
    np.testing.assert_allclose((q**4).mean(0), 3 / (4 * 6), atol=0.01)
    np.testing.assert_allclose((q[:, 0] ** 2 * q[:, 1] ** 2).mean(0), 1 / (4 * 6), atol=0.005)
    np.testing.assert_allclose((q[:, 0, 0] ** 2 * q[:, 1, 1] ** 2).mean(), 5 / (3 * 4 * 6), atol=0.005)
    np.testing.assert_allclose(np.prod(q[:, :2], axis=(1, 2)).mean(), -1 / (3 * 4 * 6), atol=0.005)
    square = np.asarray(random_orthonormal(jax.random.key(1), 20_000, 3, 3), np.float64)
    np.testing.assert_allclose((square**4).mean(0), 3 / (3 * 5), atol=0.01)
    assert np.linalg.det(square).mean() == pytest.approx(0, abs=0.03)  # reflections as often as rotations
    assert np.trace(square, axis1=1, axis2=2).mean() == pytest.approx(0, abs=0.03)
    assert (np.trace(square, axis1=1, axis2=2) ** 2).mean() == pytest.approx(1, abs=0.04)
    sign = random_orthonormal(jax.random.key(2), 4000, 1, 1)
    assert (np.abs(sign) == 1).all() and sign.mean() == pytest.approx(0, abs=0.06)


# ---- nothing names the task
@pytest.mark.parametrize(("name", "o"), [("cartpole-positions", 2), ("pendulum", 3), ("gymnax-reacher", 8)])
def test_padding_and_scale_tell_nothing_of_the_task(name, o):
    n, copies = 20_000, CopiesOf(name, Args(**SIZES | {"projected_obs_size": 12}))
    white, x = np.random.default_rng(0).normal(size=(n, o)), np.geomspace(1e-4, 1e4, 10_000)
    obs = np.sign(white) * np.interp(np.abs(white), squash(x), x)
    np.testing.assert_allclose(squash(obs), white, atol=0.01)
    seen = jax.jit(lambda key: copies.agent_obs(obs, copies.draw(key, n).obs_matrix, *nothing(n)))
    seen = np.asarray(seen(jax.random.key(0)))[:, :12]
    np.testing.assert_allclose(seen.mean(0), 0, atol=0.05)
    np.testing.assert_allclose(np.cov(seen.T), np.eye(12), atol=0.06)


def test_two_tasks_of_the_same_physics_look_the_same():
    args = Args(**SIZES, **STEPS, train_tasks=("pendulum", "twin"))
    env = Environment(args.train_tasks, args)
    action = np.tile(np.random.default_rng(0).normal(size=(4, A)), (2, 1))

    @jax.jit
    def run(key):
        state, first = env.tasks[0].reset(key, 4, True)
        return first, env.step(key, (state, state), action, jnp.ones(2))[1]

    first, timestep = run(jax.random.key(0))
    np.testing.assert_array_equal(timestep.final_obs[:4], timestep.final_obs[4:])
    assert (timestep.final_obs[:4, :O] != first.obs[:, :O]).all()


def test_all_tasks_show_as_many_entries():
    names = SUITES["classic"].train_tasks + SUITES["classic"].held_out_tasks
    args = Args(suite="classic")
    env = Environment(tuple(name for name in names if TASKS[name].env_id in gymnax.registered_envs), args)
    _, first = jax.eval_shape(lambda key: env.reset(key, 14), jax.random.key(0))
    assert len(env.names) == 6 and first.obs.shape == (12, 12 + 2 + 3)


@pytest.mark.slow
@pytest.mark.parametrize("suite", SUITES)
def test_every_task_of_a_suite_fits_into_its_sizes(suite):
    args = Args(suite=suite)
    for name in args.train_tasks + args.held_out_tasks:
        task = CopiesOf(name, args)
        state, first = jax.eval_shape(lambda key, task=task: task.reset(key, 3, True), jax.random.key(0))
        action = jnp.zeros((3, args.projected_action_size))
        _, timestep = jax.eval_shape(lambda *x, task=task: task.step(*x, 1.0, True), jax.random.key(0), state, action)
        size = args.projected_obs_size + args.projected_action_size + 3
        assert first.obs.shape == timestep.obs.shape == (3, size)


# ---- the tasks themselves
def unprojected(name, raw_step, num_envs=N, num_steps=T):
    """Plays a task without projection, and steps the raw one beside it from the same states with the same actions."""
    args = Args(**SIZES | {"projected_obs_size": 11}, **EPISODES, train_tasks=(name,), projection=False)
    env = Environment(args.train_tasks, args, trials_end=False)
    return play(
        env,
        args,
        num_steps,
        (1.0,),
        num_envs,
        redraw=False,
        also=lambda states, action: jax.vmap(raw_step)(states[0].inner, jnp.clip(action, -1, 1)),
    )


def assert_shown(obs, shown):
    """That the agent sees these entries of the task, and zeros up to the projected size."""
    assert_close(obs[..., : shown.shape[-1]], squash(shown))
    np.testing.assert_array_equal(obs[..., shown.shape[-1] : 11], 0)


def assert_close(x, y):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


GYMNAX = {  # the action that the task should get for an action in [-1, 1], and the entries that are seen
    "cartpole-positions": (lambda a: jnp.int32(a[0] > 0), [0, 2]),
    "short-heavy": (lambda a: 2 * a[:1], [0, 1, 2]),
    "point-robot": (lambda a: 0.1 * a, [0, 1, 2, 3, 4, 5]),
    "mountain-car": (lambda a: a[:1], [0, 1]),
    "gymnax-reacher": (lambda a: a, list(range(8))),
}


def test_a_trial_has_a_body_of_its_own_which_moves_as_the_raw_task_with_its_parameters():
    raw, params = gymnax.make("PointRobot-misc")

    def by_hand(state, action, body):
        params_here = params.replace(dense_reward=True, **body)
        obs, after, reward, *_ = raw.step_env(jax.random.key(0), state, body["max_force"] * action, params_here)
        return obs, after.goals_reached, reward

    def also(states, action):
        return jax.vmap(by_hand)(states[0].inner, jnp.clip(action, -1, 1), states[0].body)

    args = Args(**SIZES | {"projection": False}, **STEPS, train_tasks=("short-bodies",))
    bodies = play(Environment(args.train_tasks, args), args, 60, (1.0,), also=also)
    (obs, goals_reached, reward), (state,) = bodies.other, bodies.states
    here = state.inner.goals_reached == goals_reached  # from its goal it is moved to a place that the key decides
    assert here.mean() > 0.8
    assert_close(bodies.now.final_obs[here][:, :O], squash(obs)[here])
    assert_close(bodies.now.raw_reward, reward)
    force, reset, (low, high) = state.body["max_force"], bodies.now.reset, TASKS["short-bodies"].params["max_force"]
    assert low <= force.min() < 0.8 * low + 0.2 * high and 0.2 * low + 0.8 * high < force.max() < high
    np.testing.assert_array_equal(force[1:] != force[:-1], reset[:-1])
    assert reset.any(0).all() and len(np.unique(force[began(reset)])) == began(reset).sum()


@pytest.mark.parametrize("name", GYMNAX)
def test_without_projection_a_task_of_gymnax_is_the_raw_one_step_by_step(name):
    (scale, seen), task = GYMNAX[name], TASKS[name]
    raw, params = gymnax.make(task.env_id)
    params = params.replace(**(task.params or {}))
    played = unprojected(name, lambda state, a: raw.step_env(jax.random.key(0), state, scale(a), params))
    now, inner = played.now, played.states[0].inner
    obs, after, reward, terminated, _ = played.other
    here = np.ones((T, N), bool)
    if name == "point-robot":  # from its goal it is moved to a place that the key decides
        here = inner.goals_reached == after.goals_reached
        assert here.mean() > 0.8
    assert_shown(now.final_obs[here], obs[..., seen][here])
    assert_close(now.raw_reward, reward / (200 if name == "cartpole-positions" else 1))
    limit = played.states[0].episode_length + 1 == task.episode_length
    np.testing.assert_array_equal(now.done, terminated | limit)
    assert now.done.any() == (name != "mountain-car")
    # Every step goes on from the last, or from a new start, and the agent sees which.
    goes_on = (here & ~now.done)[:-1]
    jax.tree.map(lambda x, y: assert_close(x[1:][goes_on], y[:-1][goes_on]), inner, after)
    new = now.done[:-1]
    shown = jax.vmap(lambda state: raw.get_obs(state, params))(jax.tree.map(lambda x: x[1:][new], inner))
    assert_shown(now.obs[:-1][new], shown[:, seen])


BRAX = [
    ("inverted-pendulum", 60),
    pytest.param("reacher", 120, marks=pytest.mark.slow),
]  # whose reward and sizes differ


@pytest.mark.parametrize(("name", "steps"), BRAX)
def test_without_projection_a_task_of_brax_is_the_raw_one_step_by_step(name, steps):
    raw = envs.get_environment(TASKS[name].env_id, backend="spring")
    step = lambda state, a: raw.step(state, a[: raw.action_size])  # noqa: E731
    played = unprojected(name, step, num_envs=2, num_steps=steps)
    now, inner, after = played.now, played.states[0].inner, played.other
    assert_shown(now.final_obs, after.obs)
    np.testing.assert_allclose(now.raw_reward, np.broadcast_to(after.reward, (steps, 2)), rtol=1e-5)
    limit = played.states[0].episode_length + 1 == TASKS[name].episode_length
    np.testing.assert_array_equal(now.done, (after.done > 0.5) | limit)
    np.testing.assert_array_equal(now.truncated, limit & (after.done < 0.5))
    assert now.done.any(0).all() and now.truncated.any() == (name == "reacher")
    goes_on, new = ~now.done[:-1], now.done[:-1]
    assert_close(inner.pipeline_state.q[1:][goes_on], after.pipeline_state.q[:-1][goes_on])
    assert_close(inner.pipeline_state.qd[1:][goes_on], after.pipeline_state.qd[:-1][goes_on])
    assert_shown(now.obs[:-1][new], inner.obs[1:][new])
    if name == "inverted-pendulum":
        assert (np.abs(inner.pipeline_state.q[1:][new]) <= 0.01 + 1e-6).all()


# ---- held-out tasks
def test_a_task_whose_actions_no_sign_can_pick_is_refused(monkeypatch):
    monkeypatch.setitem(TASKS, "acrobot", TASKS["cartpole"]._replace(env_id="Acrobot-v1"))
    with pytest.raises(ValueError, match="acrobot has 3 discrete actions"):
        CopiesOf("acrobot", Args())


def test_the_tables_name_known_tasks_and_hold_some_out():
    for suite in SUITES.values():
        names = suite.train_tasks + suite.held_out_tasks
        assert set(names) <= set(TASKS)
        assert not set(suite.train_tasks) & set(suite.held_out_tasks)
        assert bool(suite.trial_length) != bool(suite.trial_episodes)
        physics = [(TASKS[name].env_id, str(TASKS[name].params)) for name in names]
        assert len(set(physics)) == len(physics)  # nor is one task held out under another name
    assert SUITES["classic"].held_out_tasks and SUITES["locomotion"].held_out_tasks
    assert get_args(get_type_hints(Args)["suite"]) == tuple(SUITES)


def test_the_pendulum_held_out_is_outside_of_the_drawn_ones():
    """All that moves Pendulum-v1 is g / l and 1 / (m l^2), and its reward knows neither."""
    g, m = (TASKS["pendulum-bodies"].params[name] for name in ("g", "m"))
    length = TASKS["pendulum-long"].params["l"]
    assert 10 / length < g[0] and 1 / length**2 < 1 / m[1]  # g is 10 and m is 1 by default
    heavy = TASKS["pendulum-heavy"].params  # inside, and so not held out there
    assert g[0] < 10 / heavy["l"] < g[1] and 1 / m[1] < 1 / (heavy["m"] * heavy["l"] ** 2) < 1 / m[0]
    assert "pendulum-long" in SUITES["bodies"].held_out_tasks
    assert "pendulum-heavy" not in SUITES["bodies"].held_out_tasks


def test_a_row_of_brax_with_fields_for_gymnax_is_refused(monkeypatch):
    monkeypatch.setitem(TASKS, "light", TASKS["inverted-pendulum"]._replace(params={"mass": 1.0}))
    with pytest.raises(ValueError, match="light is of brax"):
        CopiesOf("light", Args(suite="classic"))


def test_held_out_tasks_never_reach_training(monkeypatch):
    stepped = []
    physics, start = CopiesOf.physics, CopiesOf.start
    monkeypatch.setattr(CopiesOf, "physics", lambda self, *x: stepped.append(self.task) or physics(self, *x))
    monkeypatch.setattr(CopiesOf, "start", lambda self, *x: stepped.append(self.task) or start(self, *x))
    train_tasks, held_out_tasks = ("cartpole", "point-robot"), ("pendulum-heavy", "gymnax-reacher")
    sizes = {"projected_obs_size": 12, "projected_action_size": 2}
    args = Args(**sizes, **STEPS, train_tasks=train_tasks, held_out_tasks=held_out_tasks, num_layers=0, num_envs=32)
    init, train = make_train(args, Environment(args.train_tasks, args))
    state, metrics = jax.eval_shape(lambda key: train(init(key)), jax.random.key(0))
    assert {str(task) for task in stepped} == {str(TASKS[name]) for name in train_tasks}
    assert {x.rpartition("/")[2] for x in metrics if x.startswith("charts/episodes/")} == set(train_tasks)
    assert len(state.env_state) == len(state.return_var) == 2
