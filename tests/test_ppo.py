"""The learner sees what the actor saw, and PPO computes what its papers say."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import s5_ppo_memory as ppo
from s5_ppo_memory import ActorCritic, Args, Environment, Transition, categorical, gae, make_train, ppo_loss

ROOT = Path(__file__).resolve().parent.parent
TINY = {"num_envs": 4, "num_minibatches": 2, "d_model": 8, "state_size": 4, "encoder_size": 8, "head_size": 8}
TINY |= {"log_interval": 1, "update_epochs": 2, "learning_rate": 0.0}


CART_POLE = Args(**TINY, num_steps=13, env_id="CartPole-v1", env_params={"gravity": 60})


@pytest.fixture(scope="module")
def rollouts():
    """Trains for a number of rollouts; returns, of each, every (params, carry, batch, advantage, target) learnt from.

    The parameters are shaken first: a fresh policy is so close to uniform that it hardly depends on its memory.
    """
    results = {}

    def train_and_record(args, num_rollouts):
        seen = []

        def spy(params, network, carry, batch, advantage, target, ent_coef, args):
            jax.debug.callback(
                lambda *x: seen.append(jax.tree.map(np.array, x)), params, carry, batch, advantage, target
            )
            return ppo_loss(params, network, carry, batch, advantage, target, ent_coef, args)

        env = Environment(args)
        init, train = make_train(args, env)
        state = jax.jit(init)(jax.random.key(0))
        leaves, treedef = jax.tree.flatten(state.params)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        leaves = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
        state = state._replace(params=jax.tree.unflatten(treedef, leaves))
        train, result = jax.jit(train), []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ppo, "ppo_loss", spy)
            for _ in range(num_rollouts):
                state, _ = train(state)
                jax.effects_barrier()
                result.append(tuple(seen))
                seen.clear()
        return env, result

    def run(args, num_rollouts=2):
        if repr(args) not in results:
            results[repr(args)] = train_and_record(args, num_rollouts)
        return results[repr(args)]

    return run


@pytest.mark.parametrize("args", [Args(**TINY, num_steps=13, memory_length=3), CART_POLE], ids=lambda args: args.env_id)
def test_before_a_gradient_step_the_learner_computes_what_the_actor_did(rollouts, args):
    env, (first, second) = rollouts(args)
    apply = jax.jit(ActorCritic(args, env.num_actions).apply)
    assert len(first) == len(second) == 4  # two epochs of two minibatches
    for params, carry, batch, _, _ in first + second:
        _, logits, value = apply(params, carry, batch.obs, batch.reset)
        log_prob, _ = categorical(logits, batch.action)
        np.testing.assert_allclose(np.exp(log_prob - batch.log_prob), 1, atol=1e-5)
        np.testing.assert_allclose(value, batch.value, atol=1e-5, rtol=1e-5)
        assert batch.reset[1:-1].any()
        np.testing.assert_array_equal(batch.reset[1:], batch.done[:-1])
        np.testing.assert_array_equal(batch.obs[..., -1], batch.reset)
    assert all((carry == 0).all() for x in first for carry in x[1])
    assert all((carry != 0).any(-1).all() for x in second for carry in x[1])
    assert not all(x[2].reset[0].all() for x in second)  # some environments go on with an episode
    # It takes memory to get these numbers: without it they are others.
    params, carry, batch, _, _ = second[0]
    _, _, value = apply(params, jax.tree.map(jnp.zeros_like, carry), batch.obs, batch.reset)
    assert np.abs(value - batch.value).max() > 1e-2


def test_an_epoch_learns_from_every_environment_once_and_epochs_differ_in_order(rollouts):
    _, passes = rollouts(CART_POLE)
    orders = set()
    for minibatches in passes:
        obs = np.concatenate([batch.obs for _, _, batch, _, _ in minibatches], axis=1)  # (T, epochs * N, O)
        epochs = np.split(obs, CART_POLE.update_epochs, axis=1)
        orders |= {tuple(epoch[0, :, 0].argsort()) for epoch in epochs}
        first, second = (epoch[:, epoch[0, :, 0].argsort()] for epoch in epochs)
        np.testing.assert_array_equal(first, second)
        assert len(np.unique(first[0], axis=0)) == CART_POLE.num_envs
    assert len(orders) > 1


# ---- advantages
def advantages(reward, value, done, last_value, gamma, gae_lambda):
    columns = (jnp.asarray(x, jnp.float32)[:, None] for x in (reward, value))
    return gae(*columns, jnp.asarray(done)[:, None], jnp.array([last_value], jnp.float32), gamma, gae_lambda)[:, 0]


def test_advantages_by_hand_across_a_termination():
    # t=2: 3 + 8/2 - 6 = 1.  t=1, the end: 2 - 5 = -3.  t=0: 1 + 5/2 - 4 = -1/2, and a quarter of -3 on top.
    result = advantages([1, 2, 3], [4, 5, 6], [False, True, False], 8, 0.5, 0.5)
    np.testing.assert_allclose(result, [-1.25, -3, 1])


def test_advantages_by_hand_across_a_truncation():
    # The end at t=1 was a time limit, and what came next was worth 4: its reward of 2 has become 2 + 4/2 = 4.
    # t=1: 4 - 5 = -1.  t=0: -1/2, and a quarter of -1.  Nothing of t=2 comes through.
    result = advantages([1, 4, 3], [4, 5, 6], [False, True, False], 8, 0.5, 0.5)
    np.testing.assert_allclose(result, [-0.75, -1, 1])


def test_advantages_end_with_the_rollout_or_the_episode():
    np.testing.assert_allclose(advantages([1, 1], [2, 2], [False, True], 100, 0.5, 0.5), [-0.25, -1])
    np.testing.assert_allclose(advantages([1, 1], [2, 2], [False, False], 100, 0.5, 0.5), [12.25, 49])


def test_with_lambda_one_the_advantage_is_the_discounted_return_minus_the_value():
    rng = np.random.default_rng(0)
    reward, value = rng.normal(size=(2, 50, 3))
    done, last_value = rng.random((50, 3)) < 0.1, rng.normal(size=3)
    expected, following = np.zeros((50, 3)), last_value
    for t in reversed(range(50)):
        following = reward[t] + 0.9 * ~done[t] * following
        expected[t] = following - value[t]
    np.testing.assert_allclose(gae(reward, value, done, last_value, 0.9, 1.0), expected, atol=1e-5)


@pytest.mark.parametrize("truncation_is_terminal", [False, True])
def test_a_time_limit_adds_the_value_of_what_it_cut_off_unless_it_is_part_of_the_task(rollouts, truncation_is_terminal):
    one_minibatch = TINY | {"num_envs": 16, "num_minibatches": 1, "update_epochs": 1, "num_layers": 1}
    limit = {"env_id": "CartPole-v1", "env_params": {"max_steps_in_episode": 12}}
    args = Args(**one_minibatch, **limit, num_steps=48, truncation_is_terminal=truncation_is_terminal)
    env, (((params, carry, batch, _, _),),) = rollouts(args, 1)
    apply = jax.jit(ActorCritic(args, env.num_actions).apply)
    state = jax.vmap(env.env.reset, (0, None))(jax.random.split(jax.random.key(0), 16), env.params)[1]
    physics = jax.jit(jax.vmap(env.env.step_env, (0, 0, 0, None)))
    num_terminated = num_truncated = 0
    for t in range(args.num_steps):
        carry, _, _ = apply(params, carry, batch.obs[t : t + 1], batch.reset[t : t + 1])
        x, x_dot, theta, theta_dot = batch.obs[t, :, :4].T
        state = state.replace(x=x, x_dot=x_dot, theta=theta, theta_dot=theta_dot)
        keys = jax.random.split(jax.random.key(t), 16)
        final_obs, _, _, terminated, _ = physics(keys, state, batch.action[t], env.params)
        final_obs = np.concatenate([final_obs, np.eye(2)[batch.action[t]], np.ones((16, 1)), np.zeros((16, 1))], axis=1)
        _, _, value = apply(params, carry, final_obs[None].astype(np.float32), jnp.zeros((1, 16), bool))
        truncated = batch.done[t] & ~terminated
        bootstrap = 0.0 if truncation_is_terminal else args.gamma * value[0]
        np.testing.assert_allclose(batch.reward[t], 1 + truncated * bootstrap, atol=1e-4)
        assert batch.done[t][terminated].all()
        num_terminated, num_truncated = num_terminated + terminated.sum(), num_truncated + truncated.sum()
    assert num_terminated and num_truncated


# ---- the loss
def test_loss_is_the_clipped_objective_on_normalised_advantages():
    rng = np.random.default_rng(0)
    T, M, A = 5, 2, 3
    args = Args(clip_coef=0.2, vf_coef=0.7)
    logits, action = rng.normal(size=(T, M, A)), rng.integers(A, size=(T, M))
    value, target, advantage = rng.normal(size=(3, T, M))
    advantage = 5 + 3 * advantage
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    log_prob = np.log(np.take_along_axis(p, action[..., None], -1)[..., 0])
    old_log_prob = log_prob - rng.normal(size=(T, M)) * 0.4
    network = SimpleNamespace(apply=lambda params, carry, obs, reset: (carry, logits, value))
    batch = Transition(None, None, action, old_log_prob, None, None, None)
    loss, metrics = ppo_loss({}, network, (), batch, jnp.asarray(advantage), target, 0.03, args)

    ratio = np.exp(log_prob - old_log_prob)
    assert (ratio > 1.2).any() and (ratio < 0.8).any() and (np.abs(ratio - 1) < 0.2).any()
    normal = (advantage - advantage.mean()) / advantage.std()
    expected = {
        "losses/policy_loss": -np.where(
            normal > 0, np.minimum(ratio, 1.2) * normal, np.maximum(ratio, 0.8) * normal
        ).mean(),
        "losses/value_loss": np.square(value - target).mean() / 2,
        "losses/entropy": -(p * np.log(p)).sum(-1).mean(),
        "losses/approx_kl": (ratio - 1 - np.log(ratio)).mean(),
        "losses/clipfrac": (np.abs(ratio - 1) > 0.2).mean(),
    }
    assert expected.keys() <= metrics.keys()
    for name, number in expected.items():
        assert float(metrics[name]) == pytest.approx(number, rel=1e-4), name
    total = expected["losses/policy_loss"] + 0.7 * expected["losses/value_loss"] - 0.03 * expected["losses/entropy"]
    assert float(loss) == pytest.approx(total, rel=1e-4)


def test_targets_come_from_the_raw_advantages(rollouts):
    _, (_, minibatches) = rollouts(CART_POLE)
    _, _, batch, advantage, target = minibatches[0]
    np.testing.assert_allclose(target, advantage + batch.value, atol=1e-6)
    assert advantage.std() != pytest.approx(1, abs=0.01)


# ---- the step size
def test_step_size_falls_linearly_over_the_optimiser_steps_that_really_run():
    flags = TINY | {"learning_rate": 0.1, "log_interval": 2, "num_layers": 1}
    args = Args(**flags, anneal_lr=True, memory_length=3, num_steps=8, total_timesteps=5 * 32 + 1)
    assert args.num_updates == 6
    steps = 6 * 2 * 2
    schedule = ppo.learning_rate_schedule(args)
    assert float(schedule(0)) == pytest.approx(0.1)
    assert float(schedule(steps - 1)) == pytest.approx(0.1 / steps, rel=1e-4)
    assert float(schedule(steps)) == 0
    assert float(ppo.learning_rate_schedule(Args(learning_rate=0.1, anneal_lr=False))(10**6)) == pytest.approx(0.1)

    init, train = make_train(args, Environment(args))
    state, train = jax.jit(init)(jax.random.key(0)), jax.jit(train)
    for _ in range(args.num_updates // args.log_interval):
        before, (state, _) = state, train(state)
    counts = [int(x) for x in jax.tree.leaves(state.opt_state) if x.dtype == jnp.int32]
    assert counts and set(counts) == {steps}
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, state.params, before.params))
    assert moved > 0
    frozen, _ = train(state)  # one call too many: the step size is zero by now
    assert optax.tree.norm(jax.tree.map(jnp.subtract, frozen.params, state.params)) < 1e-3 * moved


def test_metrics_are_means_over_the_episodes_that_ended_and_not_a_number_where_none_did():
    args = Args(**TINY, num_layers=1, memory_length=3, num_steps=2)  # every episode ends with the second rollout
    init, train = make_train(args, Environment(args))
    state, train = jax.jit(init)(jax.random.key(0)), jax.jit(train)
    state, metrics = train(state)
    assert metrics["charts/episodes"] == 0
    assert np.isnan(metrics["charts/episodic_return"]) and np.isnan(metrics["charts/episodic_length"])
    state, metrics = train(state)
    assert (metrics["charts/episodes"], metrics["charts/episodic_length"]) == (4, 4)
    assert abs(metrics["charts/episodic_return"]) <= 1
    assert all(np.isfinite(x).all() for x in metrics.values())


def test_the_gradient_is_clipped_to_its_global_norm_before_adam_sees_it():
    limit = 1e-3
    args = Args(**TINY | {"update_epochs": 1, "num_minibatches": 1}, num_layers=1, num_steps=8, max_grad_norm=limit)
    init, train = make_train(args, Environment(args))
    state, metrics = jax.jit(train)(jax.jit(init)(jax.random.key(0)))
    (adam,) = (x for x in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(x, "mu"))
    assert metrics["losses/grad_norm"] > 10 * limit  # as logged, before it is clipped
    assert float(optax.tree.norm(adam.mu)) == pytest.approx(0.1 * limit, rel=1e-4)  # Adam's first mean


# ---- evaluation
@pytest.mark.parametrize("greedy", [True, False])
def test_an_evaluation_counts_the_first_episode_of_each_environment_and_no_other(greedy):
    """CartPole's episodes end at different steps; a loop by hand goes on until the last of them has ended."""
    args = Args(**TINY, num_layers=1, env_id="CartPole-v1", eval_episodes=6)
    env, network, key = Environment(args), ActorCritic(args, 2), jax.random.key(3)
    carry = ppo.SequenceModel(args).initial_carry(6)
    params = network.init(jax.random.key(0), carry, jnp.zeros((1, 6, env.obs_size)), jnp.zeros((1, 6), bool))
    params = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    returns, lengths = ppo.evaluate(params, key, env.params, greedy, args, env)

    key, env_key = jax.random.split(key)
    state, timestep = env.reset(env_key, env.params, 6)
    step, apply, expected = jax.jit(env.step), jax.jit(network.apply), {}
    while len(expected) < 6:
        key, action_key, env_key = jax.random.split(key, 3)
        carry, logits, _ = apply(params, carry, timestep.obs[None], timestep.reset[None])
        action = logits[0].argmax(-1) if greedy else jax.random.categorical(action_key, logits[0])
        state, timestep = step(env_key, state, action, env.params)
        for i in np.flatnonzero(timestep.done):
            expected.setdefault(i, float(timestep.episode_length[i]))
    assert len(set(expected.values())) > 1
    np.testing.assert_array_equal(lengths, [expected[i] for i in range(6)])
    np.testing.assert_array_equal(returns, lengths)  # a reward of 1 each step


# ---- several devices
TWO_DEVICES = """
import importlib, sys, jax, numpy as np
script = importlib.import_module(sys.argv[1])
small = dict(num_envs=8, num_minibatches=2, num_steps=8, d_model=8, encoder_size=8, head_size=8)
args = script.Args(**small, memory_length=3, num_devices=2, log_interval=1)
init, train = script.make_train(args, script.Environment(args))
before = jax.jit(init)(jax.random.key(0))
after, metrics = jax.jit(train)(before)
for new in jax.tree.leaves(after.params):
    one, other = (np.asarray(shard.data) for shard in new.addressable_shards)
    np.testing.assert_array_equal(one, other)
assert any((old != new).any() for old, new in zip(*map(jax.tree.leaves, (before.params, after.params))))
one, other = (np.asarray(shard.data) for shard in after.obs.addressable_shards)
assert one.shape == other.shape == (4, 7)
assert metrics["charts/episodes"] == 16, metrics
assert len(jax.devices()) == 2
print("same")
"""


@pytest.mark.parametrize("script", ["s5_ppo_memory", "lstm_ppo", "transformer_ppo"])
def test_two_devices_share_the_environments_and_keep_the_same_parameters(script):
    variables = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", TWO_DEVICES, script]
    result = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "same", result.stderr[-2000:]


@pytest.mark.parametrize(
    ("final", "weights"),
    [(0.0, [0.5, 0.28125, 0.125, 0.03125]), (-0.5, [0.5, 0.0625, -0.25, -0.4375]), (None, [0.5, 0.5, 0.5, 0.5])],
)
def test_the_entropy_bonus_falls_to_its_final_weight(monkeypatch, final, weights):
    """After k of K updates (1 - k / K)^2 of the way down to it is left; without one it stays."""
    seen = []

    def spy(params, network, carry, batch, advantage, target, ent_coef, args):
        jax.debug.callback(lambda x: seen.append(float(x)), ent_coef)
        return ppo_loss(params, network, carry, batch, advantage, target, ent_coef, args)

    monkeypatch.setattr(ppo, "ppo_loss", spy)
    flags = TINY | {"num_minibatches": 1, "update_epochs": 1, "num_layers": 0, "num_steps": 4, "memory_length": 3}
    args = Args(**flags, ent_coef=0.5, final_ent_coef=final, total_timesteps=4 * 16)
    init, train = make_train(args, Environment(args))
    state, train = jax.jit(init)(jax.random.key(0)), jax.jit(train)
    for _ in range(args.num_updates):
        state, _ = train(state)
    jax.effects_barrier()
    np.testing.assert_allclose(seen, weights)
