"""The environment: the task is the one it claims to be, and the agent is told when it starts anew,
what came of its last action and, only if asked, which that was."""

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bsuite.environments.memory_chain import MemoryChain

from s5_ppo_memory import Args, Environment

N = 4
PARAMS = {"max_steps_in_episode": 15.0, "gravity": 60}
CART_POLE = Args(env_id="CartPole-v1", env_params=PARAMS, observe_action=True)


def play(args, num_steps, num_envs=N):
    """Random actions: env, the first obs, and the state before each step, actions and Timesteps."""
    env = Environment(args)
    keys = jax.random.split(jax.random.PRNGKey(0), num_steps)
    actions = jax.random.randint(keys[0], (num_steps, num_envs), 0, env.num_actions)

    def step(state, inputs):
        next_state, timestep = env.step(inputs[0], state, inputs[1])
        return next_state, (state, timestep)

    @jax.jit
    def run(actions):
        state, obs = env.reset(keys[0], num_envs)
        return obs, jax.lax.scan(step, state, (keys, actions))[1]

    obs, (states, timesteps) = run(actions)
    return env, *jax.tree.map(np.asarray, (obs, states, actions, timesteps))


@pytest.fixture(scope="module")
def memory():
    return play(Args(memory_length=6, min_memory_length=1), 60, num_envs=3)


@pytest.fixture(scope="module")
def cart_pole():
    return play(CART_POLE, 100)


def test_memory_chain_is_the_original_of_bsuite(memory):
    """Episodes of all lengths; also that both cues come up, and what happens as one starts."""
    _, first, (inner, params), actions, timesteps = memory
    seen_lengths = set()
    for i in range(3):

        def reset(t, i=i):
            original = MemoryChain(int(params.memory_length[t, i]))
            original.reset()
            original._context = inner.env_state.context[t, i]  # what chance decides
            return original, original._get_observation()[0]

        original, expected = reset(0)
        np.testing.assert_array_equal(first[i, :3], expected)
        for t in range(59):
            expected = original.step(actions[t, i])
            seen = timesteps.final_obs[t, i, :3]
            np.testing.assert_allclose(seen, expected.observation[0], atol=1e-6)
            assert timesteps.reward[t, i] == expected.reward
            assert timesteps.done[t, i] == expected.last()
            after = expected.observation[0]
            if expected.last():
                seen_lengths.add(original._memory_length)
                original, after = reset(t + 1)
            np.testing.assert_allclose(timesteps.obs[t, i, :3], after, atol=1e-6)
        assert set(inner.env_state.context[:, i, 0]) == {0, 1}
    assert seen_lengths == {1, 2, 3, 4, 5, 6}
    assert not timesteps.truncated.any()


def test_every_episode_draws_a_memory_length_or_has_the_given_one():
    env = Environment(Args(memory_length=64, min_memory_length=1))
    drawn = jax.jit(env.draw_lengths, static_argnums=1)(jax.random.PRNGKey(0), 40_000)
    assert drawn.min() == 1 and drawn.max() == 64
    # The root of a uniform number: a quarter is below the half, on a log scale.
    for share in (0.5, 0.75):
        assert (drawn <= 64**share).mean() == pytest.approx(share**2, abs=0.02)
    (_, params), _ = jax.jit(env.reset, static_argnums=1)(jax.random.PRNGKey(0), 7, 1500)
    assert params.memory_length.tolist() == [1500] * 7
    args = Args(memory_length=1500, min_memory_length=1500)  # as in the paper
    _, _, (_, params), _, timesteps = play(args, 1501, num_envs=2)
    assert (params.memory_length == 1500).all()
    assert np.nonzero(timesteps.done[:, 0])[0].tolist() == [1500]
    assert not timesteps.truncated.any() and (np.abs(timesteps.reward[1500]) == 1).all()


@pytest.mark.parametrize("task", ["memory", "cart_pole"])
def test_agent_sees_its_last_reward_or_a_reset_flag_and_its_action_if_asked(task, request):
    """In MemoryChain an action that is seen could carry the cue on without any memory."""
    _, first, _, actions, timesteps = request.getfixturevalue(task)
    previous = timesteps.reward[..., None]
    if task == "cart_pole":
        previous = np.concatenate([np.eye(2)[actions], previous], axis=-1)
    started, raw = timesteps.done[..., None], {"memory": 3, "cart_pole": 4}[task]
    assert started.any(0).all() and first.shape[1] == raw + previous.shape[-1] + 1
    np.testing.assert_array_equal(first[:, raw:-1], 0 * previous[0])
    np.testing.assert_array_equal(first[:, -1], 1)
    expected = np.concatenate([previous * ~started, started], axis=-1)
    np.testing.assert_array_equal(timesteps.obs[..., raw:], expected)
    expected = np.concatenate([previous, 0 * started], axis=-1)
    np.testing.assert_array_equal(timesteps.final_obs[..., raw:], expected)


def test_another_environment_steps_as_gymnax_does_with_its_params_and_starts_afresh(cart_pole):
    env, first, (inner, params), actions, timesteps = cart_pole
    _, raw_params = gymnax.make("CartPole-v1")
    raw_params = raw_params.replace(max_steps_in_episode=15, gravity=60.0)
    assert isinstance(env.params.max_steps_in_episode, int) and isinstance(
        env.params.gravity, float
    )
    assert (params.gravity == 60).all() and (params.force_mag == raw_params.force_mag).all()

    state = jax.tree.map(lambda x: x.reshape(100 * N, *x.shape[2:]), inner.env_state)
    raw, key = gymnax.make("CartPole-v1")[0], jax.random.PRNGKey(0)
    step = jax.jit(jax.vmap(raw.step_env, (None, 0, 0, None)))
    obs, _, reward, terminated, _ = step(key, state, actions.reshape(-1), raw_params)
    terminated = np.asarray(terminated.reshape(100, N))
    at_limit = inner.env_state.time == 14
    np.testing.assert_allclose(timesteps.final_obs[..., :4].reshape(-1, 4), obs, atol=1e-6)
    np.testing.assert_array_equal(timesteps.reward.reshape(-1), reward)
    np.testing.assert_array_equal(timesteps.done, terminated | at_limit)
    # A limit that meets a termination is no truncation.
    np.testing.assert_array_equal(timesteps.truncated, at_limit & ~terminated)
    assert (at_limit & ~terminated).any() and (terminated & ~at_limit).any()
    # What the next step starts from is a fresh state, each time another, or else the last one.
    started = timesteps.done[:-1]
    np.testing.assert_allclose(timesteps.obs[:-1, :, 0], inner.env_state.x[1:], atol=1e-6)
    goes_on = timesteps.final_obs[:-1, :, :4][~started]
    np.testing.assert_array_equal(timesteps.obs[:-1, :, :4][~started], goes_on)
    starts = np.concatenate([first, timesteps.obs[timesteps.done]])[:, :4]
    assert len(np.unique(starts, axis=0)) == len(starts) > 5 * N
    assert (np.abs(starts) <= 0.05).all()


def test_returns_are_those_of_the_last_episode_that_ended(cart_pole):
    *_, timesteps = cart_pole
    total, last = np.zeros(N), np.zeros(N)
    for t in range(100):
        total += timesteps.reward[t]
        last = np.where(timesteps.done[t], total, last)
        np.testing.assert_array_equal(timesteps.episode_return[t], last)
        total *= ~timesteps.done[t]
    assert len(set(timesteps.episode_return[timesteps.done])) > 1


def test_a_time_limit_that_meets_a_termination_is_no_truncation():
    env = Environment(CART_POLE)
    (inner, params), _ = env.reset(jax.random.PRNGKey(0), 2)
    state = inner.env_state.replace(time=jnp.full(2, 14), theta=jnp.array([0.0, 1.0]))
    _, timestep = env.step(
        jax.random.PRNGKey(0), (inner.replace(env_state=state), params), jnp.zeros(2, jnp.int32)
    )
    assert timestep.done.tolist() == [True, True] and timestep.truncated.tolist() == [True, False]


def test_any_environment_of_gymnax_is_taken_as_it_is_or_refused():
    """Shapes only, since some take long to compile."""
    taken, key = [], jax.random.PRNGKey(0)
    for name in sorted({*gymnax.registered_envs} - {"MNISTBandit-bsuite"}):  # asks for a download
        try:
            env = Environment(Args(env_id=name))
        except ValueError as error:
            assert name in str(error) and "no flat Box to observe or no Discrete" in str(error)
            continue
        state, obs = jax.eval_shape(lambda env=env: env.reset(key, N))
        actions = jnp.zeros(N, jnp.int32)
        next_state, timestep = jax.eval_shape(env.step, key, state, actions)
        assert obs.shape == timestep.obs.shape == timestep.final_obs.shape
        assert timestep.reward.shape == timestep.done.shape == (N,)
        assert jax.tree.map(jnp.shape, next_state) == jax.tree.map(jnp.shape, state)
        taken.append(name)
    assert {"CartPole-v1", "Acrobot-v1", "UmbrellaChain-bsuite", "MetaMaze-misc"} <= {*taken}
