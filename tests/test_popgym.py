"""POPGym's five Hard tasks are those of the package `popgym`, step by step: with the same actions,
observations without noise, rewards and ends are the same.

Poles that balance and pendulums are unstable, and popgym's are of double precision: they are set to
the state of ours before each step.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from popgym.envs import noisy_position_only_cartpole as noisy_cartpole
from popgym.envs import noisy_position_only_pendulum as noisy_pendulum
from popgym.envs import position_only_cartpole as cartpole
from popgym.envs import position_only_pendulum as pendulum
from popgym.envs import repeat_previous
from test_environment import play
from test_run import FLAGS, assert_refused, interrupt, results, run, run_dir

import s5_ppo_memory
from s5_ppo_meta import POPGYM, TASKS, ProjectedTask, score
from s5_ppo_meta import Args as MetaArgs

N = 3
KEY = jax.random.PRNGKey(0)


def cart_pole_args(noise_std, limit):
    params = {"max_steps_in_episode": limit}
    return s5_ppo_memory.Args(
        env_id="CartPole-v1", env_params=params, seen=(0, 2), noise_std=noise_std
    )


# ---- CartPole
CARTS = {  # the class of popgym, and its noise and time limit
    "stateless": (cartpole.PositionOnlyCartPoleHard, 0.0, 600),
    "noisy": (noisy_cartpole.NoisyPositionOnlyCartPoleHard, 0.3, 200),
}


def balance(args, num_steps):
    """States, actions and Timesteps, (T, N) in front, of a controller that holds the pole."""
    env = s5_ppo_memory.Environment(args)

    def step(state, key):
        cart = state[0].env_state
        lean = cart.theta + 0.3 * cart.theta_dot + 0.01 * cart.x + 0.05 * cart.x_dot
        action = (lean > 0).astype(jnp.int32)
        # One copy keeps to it, so that the time limit is met; another never does.
        action = jnp.where(jnp.arange(N) < 1, action, jax.random.randint(key, (N,), 0, 2))
        after, timestep = env.step(key, state, action)
        return after, (cart, action, timestep)

    state, obs = jax.jit(env.reset, static_argnums=1)(KEY, N)
    _, played = jax.jit(lambda x: jax.lax.scan(step, x, jax.random.split(KEY, num_steps)))(state)
    return env, np.asarray(obs), *jax.tree.map(np.asarray, played)


@pytest.mark.parametrize("name", CARTS)
def test_cart_pole_is_popgyms(name):
    make, std, limit = CARTS[name]
    original = make()
    assert original.max_episode_length == limit
    assert std == getattr(original, "noise_sigma", np.zeros(2))[0]
    _, first, states, actions, timesteps = balance(cart_pole_args(0.0, limit), 2 * limit)
    ends, silent = set(), cartpole.PositionOnlyCartPole(max_episode_length=limit)
    for i in range(N):
        silent.reset(seed=0)
        for t in range(2 * limit):
            cart = [getattr(states, name)[t, i] for name in ("x", "x_dot", "theta", "theta_dot")]
            silent.state = [*map(float, cart)]
            seen, reward, terminated, truncated, _ = silent.step(int(actions[t, i]))
            np.testing.assert_allclose(timesteps.final_obs[t, i, :2], seen, atol=1e-6)
            assert timesteps.reward[t, i] / limit == pytest.approx(reward)
            assert timesteps.done[t, i] == (terminated or truncated)
            assert timesteps.truncated[t, i] == (truncated and not terminated)
            if timesteps.done[t, i]:
                ends.add("limit" if truncated else "fall")
                silent.reset(seed=0)
    assert ends == {"limit", "fall"} and first.shape == (N, 2 + 1 + 1)
    assert timesteps.episode_return.max() / limit == 1


@pytest.mark.parametrize("name", CARTS)
def test_noise_on_the_positions_is_popgyms_and_clipped_to_the_same_bounds(name):
    """Without noise bounds do not matter; clipped, a pole that leans is seen at its bound."""
    make, std, limit = CARTS[name]
    space = make().observation_space
    _, first, states, _, timesteps = balance(cart_pole_args(std, limit), 400)
    obs = np.concatenate([first[None, :, :2], timesteps.obs[:-1, :, :2]])
    noise = obs - np.stack([states.x, states.theta], axis=-1)
    if not std:
        assert np.abs(noise).max() < 1e-6
        return
    assert noise[..., 0].std() == pytest.approx(std, rel=0.05)
    assert np.abs(noise.mean((0, 1))).max() < 0.05
    assert abs(np.corrcoef(noise[1:, :, 0].ravel(), noise[:-1, :, 0].ravel())[0, 1]) < 0.1
    assert abs(np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]) < 0.1
    high = np.float32(space.high)
    np.testing.assert_allclose(high, [4.8, 0.41887903], rtol=1e-6)
    assert (np.abs(obs) <= high + 1e-6).all()
    share = (np.abs(obs[..., 1]) >= high[1] - 1e-6).mean()
    assert 0.1 < share < 0.3  # of a Gaussian of 0.3, 0.16 is beyond 0.419
    _, quiet, _, _, still = balance(cart_pole_args(0.0, limit), 400)
    for x, y in ((first, quiet), (timesteps.obs, still.obs)):
        np.testing.assert_array_equal(x[..., 2:], y[..., 2:])  # reward and flag have none
    goes_on = ~timesteps.done
    np.testing.assert_array_equal(
        timesteps.final_obs[goes_on][:, :2], timesteps.obs[goes_on][:, :2]
    )


# ---- RepeatPrevious
def episodes_of(args, num_steps):
    """Suits (T + 1,), answers, Timesteps and k of each whole episode that random answers make."""
    _, first, (_, params), actions, timesteps = play(args, num_steps, num_envs=N)
    for i in range(N):
        last = [first[i, :4], *timesteps.obs[:, i, :4]]  # what is seen before each step
        ends = np.flatnonzero(timesteps.done[:, i])
        for start, end in zip([0, *ends + 1], ends, strict=False):
            obs = np.stack([*last[start : end + 1], timesteps.final_obs[end, i, :4]])
            now = jax.tree.map(lambda x, i=i, a=start, b=end + 1: x[a:b, i], timesteps)
            k = {*params.memory_length[start : end + 1, i].tolist()}
            yield obs, actions[start : end + 1, i], now, k


@pytest.mark.parametrize(
    ("make", "k"),
    [
        (repeat_previous.RepeatPreviousEasy, 4),
        (repeat_previous.RepeatPreviousMedium, 32),
        (repeat_previous.RepeatPreviousHard, 64),
    ],
)
def test_repeat_previous_is_popgyms(make, k):
    """popgym's deck is stacked so that it deals what was dealt here; all else is its own."""
    args = s5_ppo_memory.Args(env_id="RepeatPrevious", memory_length=k, min_memory_length=k)
    original, count = make(), 0
    assert original.k == k
    for obs, answers, now, ks in episodes_of(args, 330):
        suits = obs.argmax(1)
        assert (obs == np.eye(4)[suits]).all() and ks == {k}
        ids = [np.flatnonzero(original.deck.suits_idx == suit).tolist() for suit in range(4)]
        original.reset(seed=0)
        deck = [ids[suit].pop() for suit in suits]  # of which no suit has too many
        original.deck.idx[:] = deck[::-1]  # dealt from the end
        original.deck.hands["player"] = []
        original.deck.deck_len = len(deck)
        original.deck.deal("player", 1)
        for t, answer in enumerate(answers):
            seen, reward, terminated, truncated, _ = original.step(int(answer))
            assert seen == suits[t + 1] and now.reward[t] == pytest.approx(reward)
            assert now.done[t] == terminated and not truncated and not now.truncated[t]
        assert now.done[-1] and len(answers) == original.max_episode_length
        count += 1
    assert count >= 2 * N


def test_the_answers_of_repeat_previous_are_what_came_k_minus_1_steps_before():
    """Told them, an agent gets 1; and cards are drawn without being put back."""
    k = 4
    args = s5_ppo_memory.Args(env_id="RepeatPrevious", memory_length=k, min_memory_length=k)
    env, n = s5_ppo_memory.Environment(args), 4000
    state, obs = jax.jit(env.reset, static_argnums=1)(KEY, n)
    step, suits = jax.jit(env.step), [np.asarray(obs[:, :4].argmax(1))]
    for t in range(51):
        answer = suits[max(0, t - (k - 1))]
        state, timestep = step(jax.random.fold_in(KEY, t), state, jnp.asarray(answer))
        suits.append(np.asarray(timestep.final_obs[:, :4].argmax(1)))
        assert timestep.done.all() == (t == 50) and timestep.done.any() == (t == 50)
    np.testing.assert_allclose(timestep.episode_return, 1, rtol=1e-5)
    suits = np.stack(suits)
    for suit in range(4):
        assert ((suits == suit).sum(0) == 13).all()
        assert (suits[0] == suit).mean() == pytest.approx(0.25, abs=0.03)
    assert (suits[0] == suits[1]).mean() == pytest.approx(12 / 51, abs=0.025)
    assert (suits[25] == suits[26]).mean() == pytest.approx(12 / 51, abs=0.025)
    assert len(np.unique(suits.T, axis=0)) == n


def test_what_came_before_is_still_known_at_the_longest_delay_that_is_asked():
    args = s5_ppo_memory.Args(env_id="RepeatPrevious", memory_length=256)
    env, n, k = s5_ppo_memory.Environment(args), 2, 8 * 256
    cards = 52 * (k // 32 + 1)

    def step(loop, inputs):
        (state, suits), (t, key) = loop, inputs
        state, now = env.step(key, state, suits[jnp.maximum(0, t - (k - 1))])
        return (state, suits.at[t + 1].set(now.final_obs[:, :4].argmax(1))), now

    @jax.jit
    def run():
        state, obs = env.reset(KEY, n, k)
        suits = jnp.zeros((cards, n), jnp.int32).at[0].set(obs[:, :4].argmax(1))
        inputs = jnp.arange(cards - 1), jax.random.split(KEY, cards - 1)
        return jax.lax.scan(step, (state, suits), inputs)[1]

    now = run()
    assert now.done[-1].all() and not now.done[:-1].any()
    np.testing.assert_allclose(now.episode_return[-1], 1, rtol=1e-3)


def test_a_spread_of_delays_has_an_episode_of_each():
    args = s5_ppo_memory.Args(env_id="RepeatPrevious", memory_length=40, min_memory_length=1)
    delays = set()
    for obs, answers, now, ks in episodes_of(args, 1500):
        (k,) = ks
        delays.add(k)
        cards, suits = 52 * (k // 32 + 1), obs.argmax(1)
        assert len(suits) == cards
        right = np.concatenate(
            [np.zeros(k - 1), np.where(suits[: cards - k] == answers[k - 1 :], 1, -1)]
        )
        np.testing.assert_allclose(now.reward, right / (cards - k), rtol=1e-5)
    assert min(delays) < 5 and max(delays) > 31 and len(delays) > 10


# ---- Pendulum
PENDULUMS = {
    "pendulum-stateless": pendulum.PositionOnlyPendulumHard,
    "pendulum-noisy": noisy_pendulum.NoisyPositionOnlyPendulumHard,
}


def swing(name, n, num_steps):
    """States, starts, actions in [-1, 1] and Timesteps (T, n), the seen ones unsquashed."""
    args = MetaArgs(
        train_tasks=(name,),
        projection=False,
        trial_length=1,
        projected_obs_size=2,
        projected_action_size=1,
    )
    task, keys = ProjectedTask(name, args), jax.random.split(KEY, num_steps + 2)
    actions = jax.random.uniform(keys[0], (num_steps, n, 1), minval=-1.5, maxval=1.5)

    def step(state, inputs):
        after, timestep = task.step(inputs[0], state, inputs[1])
        return after, (state.inner, timestep)

    @jax.jit
    def run():
        state, obs = task.reset(keys[1], n)
        state = state._replace(episode_length=jnp.zeros(n, jnp.int32))  # not staggered
        return obs, jax.lax.scan(step, state, (keys[2:], actions))[1]

    first, (states, timesteps) = run()
    before = jnp.concatenate([first[None], timesteps.obs[:-1]])  # what is seen before each step
    seen, after = (jnp.sinh(x[..., :2]) for x in (before, timesteps.final_obs))
    return jax.tree.map(np.asarray, (states, actions, seen, after, timesteps))


@pytest.mark.parametrize("name", PENDULUMS)
def test_pendulum_is_popgyms(name, monkeypatch):
    original = PENDULUMS[name]()
    limit = original.max_episode_length
    assert POPGYM[name].noise_std == getattr(original, "noise_sigma", np.zeros(2))[0]
    assert POPGYM[name].episode_length == limit
    monkeypatch.setitem(TASKS, name, POPGYM[name]._replace(noise_std=0.0))
    states, actions, _, after, timesteps = swing(name, 2, 2 * limit)
    silent = pendulum.PositionOnlyPendulum(max_episode_length=limit)
    for i in range(2):
        for t in range(2 * limit):
            if t % limit == 0:
                silent.reset(seed=0)
                total = 0.0
            silent.state = [float(x[t, i]) for x in (states.theta, states.theta_dot)]
            seen, reward, terminated, truncated, _ = silent.step(2 * np.clip(actions[t, i], -1, 1))
            total += reward
            np.testing.assert_allclose(after[t, i], seen, atol=1e-5)
            half = 16.2736044 / 2
            here = (timesteps.raw_reward[t, i] + half) / half / limit
            assert here == pytest.approx(reward, abs=1e-5) and not terminated
            assert timesteps.done[t, i] == timesteps.truncated[t, i] == truncated
        assert truncated and score(timesteps.episode_return[t, i], name) == pytest.approx(
            total, abs=1e-3
        )
    space = PENDULUMS[name]().observation_space
    assert (space.high == 1).all() and (space.low == -1).all()


def test_noise_on_the_angle_is_popgyms():
    states, _, seen, after, timesteps = swing("pendulum-noisy", 40, 300)
    true = np.stack([np.cos(states.theta), np.sin(states.theta)], axis=-1)
    assert np.abs(seen).max() <= 1 + 1e-6 and np.abs(after).max() <= 1 + 1e-6
    clear = np.abs(true) < 0.1  # where three deviations are within the bounds
    noise = (seen - true)[clear]
    assert len(noise) > 500 and noise.std() == pytest.approx(0.3, rel=0.1)
    assert abs(noise.mean()) < 0.05
    assert (np.abs(seen[np.abs(true) > 0.99]) > 1 - 1e-6).mean() == pytest.approx(0.5, abs=0.06)
    goes_on = ~timesteps.done[:-1]
    np.testing.assert_array_equal(seen[1:][goes_on], after[:-1][goes_on])
    assert (seen[1:] != after[:-1]).any(-1)[~goes_on].all()


# ---- the flags
@pytest.mark.parametrize("module", FLAGS, ids=lambda module: module.__name__)
def test_what_cannot_be_seen_is_refused_by_name(tmp_path, module):
    for flags, named in (("--noise-std -0.1", "--noise-std -0.1"), ("--noise-std nan", "nan")):
        ended = run(tmp_path, flags, module)
        assert ended.code == 2 and named in ended.err and not ended.out
    refused = run(tmp_path, "--env-id CartPole-v1 --seen 0 4", module)
    assert_refused(refused, "--seen", "index 4")
    refused = run(tmp_path, "--env-id RepeatPrevious --memory-length 257", module)
    assert_refused(refused, "--memory-length 257", "256")
    assert not list(tmp_path.iterdir())


def test_a_noisy_task_resumes_as_if_never_stopped(tmp_path):
    flags = f"{FLAGS[s5_ppo_memory]} --env-id RepeatPrevious --seen 0 1 2 --noise-std 0.3"
    flags += " --total-timesteps 192 --num-seeds 1"
    assert run(tmp_path / "whole", flags).code == 0
    assert run(tmp_path / "parts", flags, after={2: interrupt}).code == 1
    parts = run_dir(tmp_path / "parts")
    ended = run(tmp_path / "parts", f"--resume {parts}")
    assert ended.code == 0, ended.err
    assert results(parts) == results(run_dir(tmp_path / "whole"))
    assert results(parts)[2].keys() == {"1", "3", "6", "12", "24"}  # delays, as memory lengths
