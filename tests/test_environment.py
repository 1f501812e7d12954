"""The environment: the task is the one it claims to be, and the agent is told what it did and when it starts anew."""

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bsuite.environments.memory_chain import MemoryChain

from s5_ppo_memory import Args, Environment

N = 4


def play(env, num_steps, num_envs=N, seed=0):
    """Random actions: the first Timestep and the state before each step, then all actions and Timesteps (T, N, ...)."""
    key, action_key = jax.random.split(jax.random.key(seed))
    actions = jax.random.randint(action_key, (num_steps, num_envs), 0, env.num_actions)

    def step(state, inputs):
        key, action = inputs
        next_state, timestep = env.step(key, state, action, env.params)
        return next_state, (state, timestep)

    @jax.jit
    def run(key, actions):
        key, reset_key = jax.random.split(key)
        state, first = env.reset(reset_key, env.params, num_envs)
        return first, jax.lax.scan(step, state, (jax.random.split(key, num_steps), actions))[1]

    first, (states, timesteps) = run(key, actions)
    return jax.tree.map(np.asarray, (first, states, actions, timesteps))


@pytest.mark.parametrize("memory_length", [1, 2, 6])
def test_memory_chain_is_the_original_of_bsuite(memory_length):
    first, states, actions, timesteps = play(Environment(Args(memory_length=memory_length)), 60, num_envs=1)
    original = MemoryChain(memory_length)

    def reset(t):
        original.reset()
        original._context = states.inner.context[t, 0]  # the one thing that chance decides
        return original._get_observation()[0]

    np.testing.assert_array_equal(first.obs[0, :3], reset(0))
    episodes = 0
    for t in range(59):
        expected = original.step(actions[t, 0])
        np.testing.assert_allclose(timesteps.final_obs[t, 0, :3], expected.observation[0], atol=1e-6)
        assert timesteps.reward[t, 0] == expected.reward
        assert timesteps.done[t, 0] == expected.last()
        assert not timesteps.truncated[t, 0]
        seen = reset(t + 1) if expected.last() else expected.observation[0]
        np.testing.assert_allclose(timesteps.obs[t, 0, :3], seen, atol=1e-6)
        episodes += expected.last()
    assert episodes >= 5


@pytest.mark.parametrize("args", [Args(memory_length=3), Args(env_id="CartPole-v1", env_params={"gravity": 40})])
def test_agent_sees_its_last_action_and_reward_or_a_reset_flag(args):
    env = Environment(args)
    first, _, actions, timesteps = play(env, 60)
    previous = np.concatenate([np.eye(2)[actions], timesteps.reward[..., None]], axis=-1)
    started = timesteps.done[..., None]
    assert started.any(0).all()
    raw = env.obs_size - 4
    np.testing.assert_array_equal(first.obs[:, raw:], [[0, 0, 0, 1]] * N)
    np.testing.assert_array_equal(timesteps.obs[..., raw:], np.concatenate([previous * ~started, started], axis=-1))
    np.testing.assert_array_equal(timesteps.final_obs[..., raw:], np.concatenate([previous, 0 * started], axis=-1))
    np.testing.assert_array_equal(timesteps.reset, timesteps.done)
    assert first.reset.all() and not first.done.any()


def test_returns_and_lengths_count_one_episode():
    first, _, _, timesteps = play(Environment(Args(env_id="CartPole-v1")), 100)
    total, length = first.reward, np.zeros(N)
    for t in range(100):
        total, length = total + timesteps.reward[t], length + 1
        np.testing.assert_array_equal(timesteps.episode_return[t], total)
        np.testing.assert_array_equal(timesteps.episode_length[t], length)
        total, length = total * ~timesteps.done[t], length * ~timesteps.done[t]
    assert timesteps.done.sum() > N


def test_every_episode_starts_from_a_fresh_state():
    first, _, _, timesteps = play(Environment(Args(env_id="CartPole-v1", env_params={"max_steps_in_episode": 3})), 30)
    starts = np.concatenate([first.obs, timesteps.obs[timesteps.done]])
    assert len(starts) == N * 11
    assert len(np.unique(starts, axis=0)) == len(starts)
    _, states, _, _ = play(Environment(Args(memory_length=1)), 60)
    assert (np.ptp(states.inner.context[..., 0], axis=0) == 1).all()  # both cues come up in each environment


def test_a_long_memory_is_asked_at_its_end():
    _, _, _, timesteps = play(Environment(Args(memory_length=1500)), 1600)
    (ends,) = np.nonzero(timesteps.done[:, 0])
    assert list(ends) == [1500]
    assert (np.abs(timesteps.reward[1500]) == 1).all()
    assert not timesteps.truncated.any()


def test_another_environment_steps_as_gymnax_does():
    env = Environment(Args(env_id="CartPole-v1"))
    raw, params = gymnax.make("CartPole-v1")
    state, timestep = env.reset(jax.random.key(0), env.params, N)
    obs, raw_state = jax.vmap(raw.reset, (0, None))(jax.random.split(jax.random.key(0), N), params)
    np.testing.assert_array_equal(timestep.obs[:, :4], obs)
    step, raw_step = jax.jit(env.step), jax.vmap(raw.step, (0, 0, 0, None))
    ended = 0
    for t in range(40):
        key, action = jax.random.key(t), jnp.full(N, t % 3 > 0, jnp.int32)
        state, timestep = step(key, state, action, env.params)
        obs, raw_state, reward, terminated, truncated, info = raw_step(
            jax.random.split(key, N), raw_state, action, params
        )
        np.testing.assert_allclose(timestep.obs[:, :4], obs, atol=1e-6)
        np.testing.assert_allclose(timestep.final_obs[:, :4], info["final_observation"], atol=1e-6)
        np.testing.assert_array_equal(timestep.reward, reward)
        np.testing.assert_array_equal(timestep.done, terminated | truncated)
        ended += int(timestep.done.sum())
    assert ended


def test_env_params_override_the_defaults():
    env = Environment(Args(env_id="CartPole-v1", env_params={"max_steps_in_episode": 7.0, "gravity": 1}))
    assert (env.params.max_steps_in_episode, env.params.gravity) == (7, 1.0)
    assert isinstance(env.params.max_steps_in_episode, int) and isinstance(env.params.gravity, float)
    _, _, _, timesteps = play(env, 28)
    assert timesteps.truncated[6::7].all() and timesteps.truncated.sum() == 4 * N


def test_a_time_limit_that_meets_a_termination_is_no_truncation():
    _, states, _, timesteps = play(
        Environment(Args(env_id="CartPole-v1", env_params={"max_steps_in_episode": 10})), 200
    )
    at_limit = states.inner.time == 9
    fallen = np.abs(timesteps.final_obs[..., 2]) > 12 * 2 * np.pi / 360
    assert (at_limit & fallen).any()
    np.testing.assert_array_equal(timesteps.truncated, at_limit & ~fallen)
    np.testing.assert_array_equal(timesteps.done, at_limit | fallen)


@pytest.mark.parametrize("name", gymnax.registered_envs)
def test_any_environment_of_gymnax_is_taken_as_it_is_or_refused(name):
    """What the agent sees is as long as obs_size says; shapes only, since some of them take long to compile."""
    try:
        env = Environment(Args(env_id=name))
    except ValueError as error:
        assert name in str(error) and ("choose" in str(error) or "data" in str(error))
        return
    state, first = jax.eval_shape(lambda key: env.reset(key, env.params, N), jax.random.key(0))
    _, timestep = jax.eval_shape(env.step, jax.random.key(0), state, jnp.zeros(N, jnp.int32), env.params)
    assert first.obs.shape == timestep.obs.shape == timestep.final_obs.shape == (N, env.obs_size)
    assert timestep.reward.shape == timestep.done.shape == (N,)
