"""Tasks of DMControl are those of dm_control itself: what is seen, what is paid, starts, motion."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmcontrol import ACTION_REPEAT, DMControl, DMState
from s5_ppo_meta import DMC, OURS, PAPER_HELD_OUT, PAPER_TRAIN, TASKS, Args, Environment

pytest.importorskip("mujoco_playground", reason='needs pip install -e ".[dmc]"')
suite = pytest.importorskip("dm_control.suite", reason='needs pip install -e ".[dmc]"')

mujoco = pytest.importorskip("mujoco")
sizes = pytest.importorskip("dm_control.mujoco.wrapper.mjbindings.sizes")

for struct in (mujoco.MjModel, mujoco.MjData):  # dm_control 1.0.50 wants more than mujoco 4 has
    fields = sizes.array_sizes[struct.__name__.lower()]
    for field in [field for field in fields if not hasattr(struct, field)]:
        del fields[field]

PAPERS = PAPER_TRAIN + PAPER_HELD_OUT
CONTACTS = ("ball-in-cup", "finger")  # of which Playground solves fewer, in fewer iterations
ACTIONS, N = 5, 12


def original(name):
    """dm_control's environment, and its observation in our order: (obs (o,), reward)."""
    domain, task = name.replace("-", "_").rsplit("_", 1)
    if domain.startswith("finger_turn"):
        domain, task = "finger", name.replace("-", "_").removeprefix("finger_")
    env = suite.load(domain, task, task_kwargs={"random": 0})
    env.reset()  # which sets the target's size

    def seen():
        obs = env.task.get_observation(env.physics)
        if domain == "pendulum":
            obs["orientation"] = obs["orientation"][::-1]
        return np.concatenate([np.ravel(x) for x in obs.values()]), env.task.get_reward(env.physics)

    return env, seen


def place(env, state, action):
    """Puts dm_control's physics where ours is: arrays of one copy."""
    physics = env.physics
    with physics.reset_context():
        physics.data.qpos[:], physics.data.qvel[:] = state.qpos, state.qvel
        if "mocap_pos" in state.kept:  # there the target is a part of the model
            what = physics.named.model
            where = what.site_pos if "distal" in what.jnt_range.axes.row.names else what.geom_pos
            where["target"] = state.kept["mocap_pos"][0]
        if "gains" in state.kept:
            physics.model.wrap_prm[:] = state.kept["gains"].ravel()
    physics.set_control(action)


@cache
def ours(name):
    task = DMControl(DMC[name].env_id)
    reset = jax.jit(jax.vmap(task.reset))
    return task, lambda n, seed=0: reset(jax.random.split(jax.random.key(seed), n))


def copies(state, n):
    return [jax.tree.map(lambda x, i=i: np.asarray(x[i], np.float64), state) for i in range(n)]


def near_the_goal(name, task, state):
    """Starts, every third of which is where the task pays, or nearly so."""
    rng = np.random.default_rng(0)
    n, near = len(state.qpos), np.arange(len(state.qpos)) % 3 == 0
    qpos = np.array(state.qpos)
    qvel = rng.normal(size=state.qvel.shape) * (20 if name == "finger-spin" else 1)
    goal = rng.normal(size=qpos.shape) * 0.01
    if name == "ball-in-cup-catch":
        goal[:, 3] += 0.36
    if name.startswith("point-mass"):
        goal *= 2
    if not name.startswith(("finger", "reacher")):
        qpos[near] = goal[near]
    state = state._replace(qpos=jnp.float32(qpos), qvel=jnp.float32(qvel))
    if "mocap_pos" in state.kept:  # the target goes where the finger or the spinner's tip is

        def tip(qpos):
            data = task.mjx.kinematics(task.model, task.blank.replace(qpos=qpos))
            model = task.env.mj_model
            if name.startswith("finger"):
                return data.site_xpos[model.site("tip").id]
            return data.geom_xpos[model.geom("finger").id]

        target = jax.vmap(tip)(state.qpos) + 0.015 * rng.normal(size=(n, 3)) * [1, 0, 0]
        target = target.at[:, 1 if name.startswith("finger") else 2].set(
            state.kept["mocap_pos"][:, 0, 1 if name.startswith("finger") else 2]
        )
        kept = jnp.where(near[:, None], target, state.kept["mocap_pos"][:, 0])[:, None]
        state = state._replace(kept={"mocap_pos": jnp.float32(kept)})
    return state


@pytest.mark.parametrize("name", PAPERS)
def test_from_equal_positions_and_velocities_all_that_is_seen_and_paid_is_equal(name):
    (task, reset), (env, seen) = ours(name), original(name)
    state = near_the_goal(name, task, reset(N))
    actions = np.random.default_rng(1).uniform(-1, 1, (N, task.action_size)).astype(np.float32)

    @jax.jit
    @jax.vmap
    def look(state, action):
        data = task.place(state.qpos, state.qvel, state.kept)
        return task.observe(data, state.kept, action)

    now = look(state, actions)
    rewards = []
    for one, action in zip(copies(now, N), actions, strict=True):
        place(env, one, action)
        obs, reward = seen()
        np.testing.assert_allclose(one.obs, obs, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(one.reward, reward, rtol=1e-3, atol=1e-5)
        rewards.append(reward)
    assert max(rewards) > 0.1 and min(rewards) < 0.9 * max(rewards)
    assert env.task.action_spec(env.physics).shape == (task.action_size,)


@pytest.mark.parametrize("name", [name for name in PAPERS if not name.startswith(CONTACTS)])
def test_the_motion_is_that_of_dm_control_where_both_integrate_alike(name):
    (task, reset), (env, seen) = ours(name), original(name)
    theirs, here = env.physics.model.opt, task.env.mj_model.opt
    for field in ("timestep", "integrator", "disableflags"):  # Playground's differ
        setattr(theirs, field, getattr(here, field))
    rng = np.random.default_rng(2)
    actions = rng.uniform(-1, 1, (ACTIONS, N, task.action_size)).astype(np.float32)
    start = reset(N)
    # Away from the joints' limits, where Playground's solver takes one iteration.
    start = start._replace(qpos=start.qpos / 2)

    @jax.jit
    def play(state):
        def step(state, action):
            return (jax.vmap(task.step)(state, action),) * 2

        return jax.lax.scan(step, state, actions)[1]

    path = jax.tree.map(np.asarray, play(start))
    assert np.ptp(path.qpos, axis=0).max() > 0.003
    for i, one in enumerate(copies(start, N)):
        place(env, one, np.zeros(task.action_size))
        for t in range(ACTIONS):
            env.physics.set_control(actions[t, i])
            paid = 0
            for _ in range(ACTION_REPEAT):
                env.physics.step(task.env.n_substeps)
                obs, reward = seen()
                paid += reward
            np.testing.assert_allclose(path.obs[t, i], obs, rtol=1e-3, atol=1e-3)
            if paid == path.reward[t, i] == 0 or name.startswith(("cartpole", "point-mass")):
                np.testing.assert_allclose(path.reward[t, i], paid, atol=3e-3 * ACTION_REPEAT)


@pytest.mark.parametrize("name", PAPERS)
def test_starts_and_targets_are_drawn_as_dm_control_draws_them(name):
    """Means, deviations and correlations of what is seen first, and of the actuators' gains."""
    (_, reset), (env, seen), n = ours(name), original(name), 1000
    state = jax.tree.map(np.asarray, reset(n, 1))

    def theirs():
        env.reset()
        gains = env.physics.model.wrap_prm[:4] if name == "point-mass-hard" else []
        return np.concatenate([seen()[0], gains])

    gains = state.kept["gains"].reshape(n, 4) if name == "point-mass-hard" else np.zeros((n, 0))
    x = np.concatenate([state.obs, gains], axis=1).astype(float)
    y = np.stack([theirs() for _ in range(n)])
    moves = y.std(0) > 1e-6
    np.testing.assert_allclose(x[:, ~moves], y[:, ~moves], atol=1e-5)
    x, y = x[:, moves], y[:, moves]
    error = 5 * np.sqrt(2 / n)
    np.testing.assert_array_less(np.abs(x.mean(0) - y.mean(0)), error * y.std(0))
    np.testing.assert_allclose(x.std(0), y.std(0), rtol=error)
    for power in (1, 2):  # of two gains the squares are correlated
        differ = np.corrcoef(x.T**power) - np.corrcoef(y.T**power)
        np.testing.assert_array_less(np.abs(np.atleast_2d(differ)), error)
    for low, high in ((x.min(0), y.min(0)), (x.max(0), y.max(0))):
        np.testing.assert_array_less(np.abs(low - high), 0.1 * np.ptp(y, axis=0) + y.std(0))
    if name == "point-mass-hard":
        one, other = gains[:, :2], gains[:, 2:]
        np.testing.assert_allclose(np.linalg.norm(gains.reshape(n, 2, 2), axis=2), 1, rtol=1e-5)
        assert 0.85 < np.abs((one * other).sum(1)).max() <= 0.9 + 1e-6


def test_a_wide_target_pays_by_the_logarithm_of_the_distance():
    wide, reset = ours("point-mass-wide")
    state = reset(1000)
    reach, action = np.array(state.kept["reach"]), jnp.ones(2)
    assert 1 < reach.min() < 2 and 30 < reach.max() <= 32
    assert abs((np.log2(reach) / 5).mean() - 2 / 3) < 0.03  # the mean of a root

    def paid(radii, reach):  # the target is at 0
        qpos = radii * wide.env._target_size * jnp.array([0.6, -0.8])
        kept = {"reach": jnp.float32(reach)}
        return wide.observe(wide.place(qpos, jnp.zeros(2), kept), kept, action).reward

    radii = jnp.array([0.5, 1.001, 2.0, 4.0, 8.0, 15.9, 17.0])
    found = jax.vmap(lambda r: paid(r, 16.0))(radii)
    np.testing.assert_allclose(found, [1, 1, 0.75, 0.5, 0.25, 0, 0], atol=3e-3)
    # The least that is drawn pays within the target alone, as the paper's does.
    np.testing.assert_allclose([paid(r, 1.01) for r in (0.5, 0.99, 1.02)], [1, 1, 0])


def test_a_swing_up_starts_anywhere_but_where_the_held_out_balance_starts():
    state = ours("cartpole-anywhere")[1](1000)
    position, angle = np.array(state.qpos).T
    assert -1 <= position.min() < -0.9 and 0.9 < position.max() <= 1
    assert 0.5 <= angle.min() < 0.55 and 0.5 <= 2 * np.pi - angle.max() < 0.55
    assert abs(angle.mean() - np.pi) < 0.2 and abs(position.mean()) < 0.1
    assert 0 < np.abs(state.qvel).max() < 0.1
    held_out, rewards = ours("cartpole-balance")[1](1000), []
    assert np.abs(held_out.qpos[:, 1]).max() < 0.04
    for name in ("cartpole-anywhere", "cartpole-swingup"):  # the same is seen, and paid
        task, _ = ours(name)
        data = task.place(state.qpos[0], state.qvel[0], {})
        rewards.append(task.observe(data, {}, jnp.ones(1)))
    np.testing.assert_array_equal(*(x.obs for x in rewards))
    np.testing.assert_array_equal(*(x.reward for x in rewards))


def test_the_small_suite_trains_on_three_of_the_papers_training_tasks_and_on_both_of_ours():
    args = Args(suite="dmc-small")
    assert {*args.train_tasks} - {*OURS} < {*PAPERS[:6]} and {*OURS} < {*args.train_tasks}
    assert not {*args.held_out_tasks} & ({*PAPERS[:6]} | {*OURS})


def test_suites_fit_have_trials_of_one_episode_and_scores_of_a_thousandth():
    for name in ("dmc", "dmc-small"):
        args = Args(suite=name)
        assert args.trial_length == 1
        for task in map(TASKS.get, args.train_tasks + args.held_out_tasks):
            assert (task.baseline_return, task.specialist_return) == (0, 1000)
            assert task.episode_length * ACTION_REPEAT == 1000 and task.return_std == 10


def test_a_state_holds_no_array_of_size_zero_and_goes_on_as_an_environment():
    args = Args(suite="dmc-small", held_out_tasks=())
    env, n = Environment(args.train_tasks, args), 2 * len(args.train_tasks)
    key, action = jax.random.key(0), jnp.zeros((n, 2))
    states, obs = jax.eval_shape(lambda key: env.reset(key, n), key)
    after, now = jax.eval_shape(env.step, key, states, action)
    assert obs.shape == now.obs.shape == (n, 12 + 2 + 3)
    for state, later in zip(states, after, strict=True):
        assert isinstance(state.inner, DMState) and all(x.size for x in jax.tree.leaves(state))
        shapes = (jax.tree.map(lambda x: (x.shape, x.dtype), x) for x in (state, later))
        assert next(shapes) == next(shapes)
