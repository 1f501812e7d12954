"""PPO over trials: the borders of episodes and of trials, what is predicted, what an evaluation does and shows."""

import math
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import s5_ppo_meta as meta
from s5_ppo_meta import (
    MEMORIES,
    TASKS,
    ActorCritic,
    Args,
    Environment,
    Transition,
    adaptation,
    episodes_of,
    evaluate,
    gaussian,
    make_train,
    ppo_loss,
    reward_spread,
)

N, O, A, T, LIMITS, TRIAL = 4, 5, 2, 13, (12, 5), 9
TINY = {"num_envs": N, "num_minibatches": 2, "d_model": 8, "state_size": 4, "encoder_size": 8, "head_size": 8}
TINY |= {"log_interval": 1, "update_epochs": 2, "learning_rate": 0.0, "num_layers": 1, "num_steps": T}
TINY |= {"projected_obs_size": O, "projected_action_size": A, "trial_length": TRIAL, "trial_episodes": 0}
TINY |= {"train_tasks": ("short-cartpole", "short-pendulum"), "held_out_tasks": (), "projection": False}


@pytest.fixture(autouse=True, scope="module")
def short_tasks():
    """A pole that falls within a few steps, and a pendulum that cannot."""
    with pytest.MonkeyPatch.context() as patch:
        cartpole = TASKS["cartpole"]._replace(episode_length=LIMITS[0], params={"gravity": 1000.0})
        patch.setitem(TASKS, "short-cartpole", cartpole)
        patch.setitem(TASKS, "short-pendulum", TASKS["pendulum"]._replace(episode_length=LIMITS[1]))
        yield


def shaken(params):
    """A fresh policy hardly depends on its memory: this one does."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: np.asarray(x) + 0.1 * rng.normal(size=x.shape).astype(np.float32), params)


NO_RESET_AND_RESET = np.zeros((1, N), bool), np.ones((1, N), bool)


def columns(tree, order, axis):
    return jax.tree.map(lambda x: np.take(x, order, axis), tree)


@pytest.fixture(scope="module")
def rollouts():
    """Three rollouts from shaken parameters. Of each: the states before and after it, its metrics, the Timesteps that
    the environments gave, and each (carry, batch, advantage, target) learnt from, its environments put in order."""
    args, learnt, stepped, result = Args(**TINY), [], [], []
    env = Environment(args.train_tasks, args)
    env_step = env.step

    def record(where, *what):
        jax.debug.callback(lambda *x: where.append(jax.tree.map(np.array, x)), *what)

    def step(*inputs):
        states, timestep = env_step(*inputs)
        record(stepped, timestep)
        return states, timestep

    def loss(params, network, carry, batch, advantage, target, ent_coef, args):
        record(learnt, carry, batch, advantage, target)
        return ppo_loss(params, network, carry, batch, advantage, target, ent_coef, args)

    init, train = make_train(args, env)
    state, train = jax.jit(init)(jax.random.key(0)), jax.jit(train)
    state = state._replace(params=shaken(state.params))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(env, "step", step)
        patch.setattr(meta, "ppo_loss", loss)
        train = train.lower(state).compile()
        for _ in range(3):
            before, (state, metrics) = state, train(state)
            jax.effects_barrier()
            epochs = []
            for one, other in zip(learnt[::2], learnt[1::2], strict=True):  # the two minibatches of an epoch
                carry = jax.tree.map(lambda x, y: np.concatenate([x, y]), one[0], other[0])
                rest = jax.tree.map(lambda x, y: np.concatenate([x, y], axis=1), one[1:], other[1:])
                order = [int(np.flatnonzero((rest[0].obs[0] == obs).all(1))[0]) for obs in np.asarray(before.obs)]
                assert sorted(order) == list(range(N))  # every environment once
                batch, advantage, target = columns(rest, order, 1)
                epochs.append(SimpleNamespace(carry=columns(carry, order, 0), batch=batch, advantage=advantage))
                epochs[-1].target = target
            # Callbacks come in no certain order: a step is known by the observation that it gave.
            following = [*epochs[0].batch.obs[1:], np.asarray(state.obs)]
            times = [next(now for (now,) in stepped if np.array_equal(now.obs, obs)) for obs in following]
            now = jax.tree.map(lambda *x: np.stack(x), *times)
            result.append(SimpleNamespace(before=before, after=state, metrics=metrics, epochs=epochs, now=now))
            learnt.clear()
            stepped.clear()
    return result


@pytest.fixture(scope="module")
def apply():
    return jax.jit(ActorCritic(Args(**TINY)).apply)


def joined(rollouts):
    """Batch and Timesteps of all rollouts, one after the other: arrays (3 T, N, ...)."""
    parts = [(r.epochs[0].batch, r.now) for r in rollouts]
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


# ---- the learner and the actor
def test_before_a_gradient_step_the_learner_computes_what_the_actor_did(rollouts, apply):
    for r in rollouts:
        assert len(r.epochs) == 2
        for epoch in r.epochs:
            batch = epoch.batch
            jax.tree.map(np.testing.assert_array_equal, epoch.carry, r.before.carry)
            _, policy, value, _ = apply(r.before.params, epoch.carry, batch.obs, batch.reset, batch.action)
            # Shaken means are large, and what rounding leaves of them is divided by deviations as small as 0.1.
            np.testing.assert_allclose(np.exp(gaussian(policy, batch.action)[0] - batch.log_prob), 1, atol=5e-4)
            np.testing.assert_allclose(value, batch.value, atol=1e-4, rtol=1e-4)
            assert batch.reset[1:-1].any(0).all()
        assert r.metrics["losses/clipfrac"] == 0 and abs(r.metrics["losses/approx_kl"]) < 1e-6
    first, second, _ = (r.epochs[0] for r in rollouts)
    assert first.batch.reset[0].all() and not any(x.any() for x in jax.tree.leaves(first.carry))
    assert not second.batch.reset[0].all() and all((x != 0).any(-1).all() for x in jax.tree.leaves(second.carry))
    # It takes memory to get these numbers: without it they are others.
    batch, no_carry = second.batch, jax.tree.map(np.zeros_like, second.carry)
    _, _, value, _ = apply(rollouts[0].before.params, no_carry, batch.obs, batch.reset, batch.action)
    assert np.abs(value - batch.value).max() > 1e-2


def test_the_deviation_is_an_output_of_the_network_within_its_bounds(rollouts, apply):
    r = rollouts[1]
    batch = r.epochs[0].batch
    _, (mean, log_std), _, _ = apply(r.before.params, r.epochs[0].carry, batch.obs, batch.reset, batch.action)
    assert (log_std.std((0, 1)) > 0.01).all()  # it depends on what is seen and remembered
    assert (np.log(0.1) <= log_std).all() and (log_std <= np.log(2) + 1e-6).all() and (np.abs(mean) <= 3).all()


def test_held_out_rewards_are_shown_in_units_of_random_returns_and_others_as_training_left_them():
    args = Args(**TINY, num_seeds=2)
    names = ("mountain-car", *reversed(TINY["train_tasks"]))
    spread = reward_spread(jnp.array([[1.0, 4.0], [9.0, 16.0]]), names, args)
    held_out = TASKS["mountain-car"].spread
    np.testing.assert_allclose(spread, [[held_out, 2.001, 1.001], [held_out, 4.001, 3.001]], rtol=1e-6)


def test_rollouts_go_on_where_the_last_one_stopped(rollouts):
    for one, following in pairwise(rollouts):
        batch = following.epochs[0].batch
        np.testing.assert_array_equal(one.after.obs, batch.obs[0])
        np.testing.assert_array_equal(one.after.reset, batch.reset[0])
        assert not np.array_equal(one.after.env_state[0].pool.obs, following.after.env_state[0].pool.obs)


# ---- borders of episodes and of trials
def test_episodes_end_by_a_fall_a_limit_or_their_trial_and_only_the_trial_resets_the_memory(rollouts):
    batch, now = joined(rollouts)
    fallen = now.done & ~now.truncated
    begun = np.concatenate([state.trial_step for state in rollouts[0].before.env_state])
    trial_end = (begun + 1 + np.arange(3 * T)[:, None]) % TRIAL == 0
    step, began = np.arange(3 * T)[:, None], np.concatenate([np.ones((1, N), bool), now.done[:-1]])
    length = step - np.maximum.accumulate(np.where(began, step, 0)) + 1
    limit = length == np.repeat(LIMITS, N // 2)
    np.testing.assert_array_equal(batch.done, now.done)
    np.testing.assert_array_equal(batch.done, fallen | limit | trial_end)
    np.testing.assert_array_equal(batch.reset[1:], trial_end[:-1])
    np.testing.assert_array_equal(batch.obs[1:, :, -1], trial_end[:-1])
    np.testing.assert_array_equal(batch.obs[1:, :, -2], batch.done[:-1])
    assert (fallen & ~limit & ~trial_end).any() and (limit & ~fallen & ~trial_end).any()
    assert (trial_end & ~fallen & ~limit).any()


def test_a_fall_costs_the_future_and_a_limit_adds_its_value_in_the_memory_of_before_the_reset(rollouts, apply):
    args, by_memory = Args(**TINY), 0.0
    for r in rollouts:
        epoch, batch, now, carry, params = r.epochs[0], r.epochs[0].batch, r.now, r.before.carry, r.before.params
        value, reward = np.zeros((2, T, N))
        for t in range(T):
            row, no_reset = slice(t, t + 1), np.zeros((1, N), bool)
            carry, _, v, _ = apply(params, carry, batch.obs[row], batch.reset[row], batch.action[row])
            _, _, final_value, _ = apply(params, carry, now.final_obs[row], no_reset, batch.action[row])
            _, _, forgetful, _ = apply(params, carry, now.final_obs[row], ~no_reset, batch.action[row])
            value[t], reward[t] = v[0], now.reward[t] + args.gamma * now.truncated[t] * final_value[0]
            by_memory = max(by_memory, np.abs(now.reset[t] * (final_value - forgetful)).max())
        np.testing.assert_allclose(batch.reward, reward, atol=1e-4)
        _, _, following, _ = apply(params, carry, r.after.obs[None], r.after.reset[None], batch.action[:1])
        advantage, next_value, later = np.zeros((T, N)), following[0], np.zeros(N)
        for t in reversed(range(T)):
            delta = reward[t] + args.gamma * ~now.done[t] * next_value - value[t]
            advantage[t] = later = delta + args.gamma * args.gae_lambda * ~now.done[t] * later
            next_value = value[t]
        np.testing.assert_allclose(epoch.advantage, advantage, atol=1e-4)
        np.testing.assert_allclose(epoch.target, advantage + value, atol=1e-4)
        # Of what comes after a fall nothing counts, though the trial goes on.
        fallen = now.done & ~now.truncated & ~now.reset
        assert fallen[:-1].any()
        np.testing.assert_allclose(epoch.advantage[fallen], (now.reward - value)[fallen], atol=1e-4)
    assert by_memory > 1e-2  # it mattered with which memory the last observation of a trial was judged


def test_memory_goes_on_into_the_next_trial_if_asked(apply):
    flags = TINY | {"train_tasks": ("short-pendulum",), "num_minibatches": 1, "update_epochs": 1}
    args = Args(**flags | {"num_steps": 1}, reset_memory=False)
    init, train = make_train(args, Environment(args.train_tasks, args))
    state = jax.jit(init)(jax.random.key(0))
    state = state._replace(params=shaken(state.params))
    train = jax.jit(train).lower(state).compile()
    assert state.reset.all()
    told = []
    for _ in range(TRIAL + 1):
        before, (state, _) = state, train(state)
        told.append(np.array(before.obs[:, -1]) == 1)
        assert not state.reset.any()
        if len(told) > 1:  # the S5 state after a step is that of no reset, and with one it would be another
            memories = [apply(before.params, before.carry, before.obs[None], x)[0][1][0] for x in NO_RESET_AND_RESET]
            np.testing.assert_allclose(state.carry[1][0], memories[0], atol=1e-5)
            assert (jnp.abs(state.carry[1][0] - memories[1]).max(1) > 1e-3).all()
    assert (np.sum(told[1:], axis=0) == 1).all()  # the agent hears of every new trial


# ---- predictions
def test_what_is_to_be_predicted_is_where_the_action_led_not_where_the_next_episode_starts(rollouts):
    for r in rollouts:
        batch, now = r.epochs[0].batch, r.now
        going_on = ~now.done
        np.testing.assert_array_equal(now.final_obs[going_on][:, :O], now.obs[going_on][:, :O])
        assert (now.final_obs[now.done][:, :O] != now.obs[now.done][:, :O]).any(-1).all()
        change = np.concatenate([now.final_obs[..., :O], now.reward[..., None]], axis=-1)
        change -= np.concatenate([batch.obs[..., :O], batch.obs[..., [O + A]]], axis=-1)
        per_task = change.reshape(T, 2, N // 2, O + 1)
        usual = np.abs(per_task).mean((0, 2), keepdims=True) + 1e-4
        per_task = np.clip(per_task / usual, -3, 3)
        assert (np.abs(per_task) == 3).any()
        np.testing.assert_allclose(batch.change, per_task.reshape(T, N, O + 1), rtol=1e-3, atol=1e-4)


# ---- what the network sees
@pytest.mark.parametrize("at", [0, 1, 5])
def test_nothing_before_a_trial_reaches_the_agent_in_it_and_all_before_an_episode_does(at):
    rng, steps = np.random.default_rng(0), 6
    args = Args(**TINY)
    network = ActorCritic(args)
    obs = rng.normal(size=(steps, N, O + A + 3)).astype(np.float32)
    obs[..., -2:] = 0
    obs[at, :, -2] = 1  # an episode begins in all environments,
    reset = (np.arange(steps)[:, None] == at) & (np.arange(N) < 2)  # a trial in two of them
    carry = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), network.initial_carry(N))
    params = shaken(jax.jit(network.init)(jax.random.key(0), carry, obs, reset))

    def later(memory, obs):
        (_, memory), policy, value, _ = network.apply(params, (carry[0], memory), obs, reset)
        seen = *(x[at:] for x in (*policy, value)), *(jnp.abs(x) for x in memory)
        return sum(jnp.square(x).sum() for x in seen)

    of_memory, of_obs = jax.jit(jax.grad(later, (0, 1)))(carry[1], obs)
    assert all((x[:2] == 0).all() and (x[2:] != 0).all() for x in of_memory)
    assert (of_obs[:at, :2] == 0).all() and (of_obs[:at, 2:] != 0).any(-1).all()
    assert (of_obs[at:] != 0).any((0, 2)).all()


@pytest.mark.parametrize("num_layers", [0, 1])
def test_the_encoder_sees_the_change_of_observation_and_reward_within_an_episode_if_there_is_a_memory(num_layers):
    rng = np.random.default_rng(0)
    T, M = 6, 3
    args = Args(**TINY | {"num_layers": num_layers})
    network = ActorCritic(args)
    obs = rng.normal(size=(T, M, O + A + 3)).astype(np.float32)
    obs[2, 0, :O] = obs[1, 0, :O]  # nothing moved
    obs[..., -2:] = 0
    reset = np.zeros((T, M), bool)
    obs[3, 1, -2], reset[4, 2] = 1, True  # an episode's and a trial's first observation
    last = rng.normal(size=(M, O + 1)).astype(np.float32)
    carry = (last, network.initial_carry(M)[1])
    params = network.init(jax.random.key(0), carry, obs, reset)
    seen = []

    def spy(call, inputs, kwargs, context):
        if isinstance(context.module, nn.Dense):
            seen.append(np.asarray(inputs[0]).reshape(T, M, -1))
        return call(*inputs, **kwargs)

    with nn.intercept_methods(spy):
        (next_last, _), *_ = network.apply(params, carry, obs, reset)
    outcome = np.concatenate([last[None], np.concatenate([obs[..., :O], obs[..., [O + A]]], axis=-1)])
    np.testing.assert_array_equal(next_last, outcome[-1])
    change = np.diff(outcome, axis=0)
    change[3, 1] = change[4, 2] = 0
    if not num_layers:
        change[:] = 0
    assert not (change[2, 0, :-1]).any()
    expected = [obs]
    for x in (change[..., :-1], change[..., -1:]):
        size = np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-8)
        expected += [x / size, np.log(size) / 3 + 1]
    np.testing.assert_allclose(seen[0], np.concatenate(expected, axis=-1), rtol=1e-4, atol=1e-6)


# ---- rewards are scaled by the spread of returns
def test_the_running_spread_is_that_of_all_returns_so_far_and_divides_the_rewards_of_the_next_rollout(rollouts):
    np.testing.assert_allclose(rollouts[0].before.return_var, [TASKS[name].spread ** 2 for name in TINY["train_tasks"]])
    for i, r in enumerate(rollouts):
        spread = np.sqrt(r.before.return_var) + 1e-3
        np.testing.assert_allclose(r.now.reward, r.now.raw_reward / np.repeat(spread, N // 2), rtol=1e-4)
        returns = joined(rollouts[: i + 1])[1].discounted_return
        returns = returns.reshape(-1, 2, N // 2).transpose(1, 0, 2).reshape(2, -1)
        np.testing.assert_allclose(r.after.return_mean, returns.mean(1), rtol=1e-4)
        np.testing.assert_allclose(r.after.return_var, returns.var(1), rtol=1e-3)


def test_metrics_are_means_over_the_episodes_that_ended(rollouts):
    for r in rollouts:
        scores = []
        for i, name in enumerate(TINY["train_tasks"]):
            mine = slice(i * N // 2, (i + 1) * N // 2)
            returns = r.now.episode_return[:, mine][r.now.done[:, mine]]
            assert r.metrics[f"charts/episodes/{name}"] == len(returns) > 0
            assert r.metrics[f"charts/episodic_return/{name}"] == pytest.approx(returns.mean(), rel=1e-4)
            scores.append((returns.mean() - TASKS[name].zero) / (TASKS[name].one - TASKS[name].zero))
        assert r.metrics["charts/score"] == pytest.approx(np.mean(scores), rel=1e-4)


# ---- the loss
def test_log_probability_and_entropy_are_those_of_independent_normals():
    rng = np.random.default_rng(0)
    mean, log_std, action = rng.normal(size=(3, 7, 5, 3))
    log_prob, entropy = gaussian((mean, log_std), action)
    normal = stats.norm(mean, np.exp(log_std))
    np.testing.assert_allclose(log_prob, normal.logpdf(action).sum(-1), rtol=1e-4)
    np.testing.assert_allclose(entropy, normal.entropy().sum(-1), rtol=1e-4)


def test_loss_is_the_clipped_objective_and_the_squared_errors_of_value_and_prediction():
    rng = np.random.default_rng(0)
    T, M = 5, 3
    args = Args(clip_coef=0.2, vf_coef=0.7, prediction_coef=2.5)
    mean, log_std, action = rng.normal(size=(3, T, M, A))
    value, target, advantage = rng.normal(size=(3, T, M))
    prediction, change = rng.normal(size=(2, T, M, O + 1))
    advantage = 5 + 3 * advantage
    log_prob = stats.norm(mean, np.exp(log_std)).logpdf(action).sum(-1)
    old_log_prob = log_prob - rng.normal(size=(T, M)) * 0.4

    def network(params, carry, obs, reset, asked):
        assert asked is action  # the prediction is of what this action leads to
        return carry, (mean, log_std), value, prediction

    fields = {"action": action, "log_prob": old_log_prob, "change": change}
    batch = Transition(**{name: fields.get(name) for name in Transition._fields})
    loss, metrics = ppo_loss({}, SimpleNamespace(apply=network), (), batch, jnp.asarray(advantage), target, 0.03, args)
    ratio = np.exp(log_prob - old_log_prob)
    assert (ratio > 1.2).any() and (ratio < 0.8).any() and (np.abs(ratio - 1) < 0.2).any()
    normal = (advantage - advantage.mean()) / advantage.std()
    policy_loss = -np.where(normal > 0, np.minimum(ratio, 1.2) * normal, np.maximum(ratio, 0.8) * normal).mean()
    entropy = stats.norm(mean, np.exp(log_std)).entropy().sum(-1).mean()
    value_loss, prediction_loss = np.square(value - target).mean() / 2, np.square(prediction - change).mean()
    total = policy_loss + 0.7 * value_loss - 0.03 * entropy + 2.5 * prediction_loss
    assert float(loss) == pytest.approx(total, rel=1e-4)
    assert float(metrics["losses/prediction_loss"]) == pytest.approx(prediction_loss, rel=1e-4)
    assert float(metrics["losses/approx_kl"]) == pytest.approx((ratio - 1 - np.log(ratio)).mean(), rel=1e-4)


def test_however_far_the_policy_has_moved_the_loss_and_its_gradient_are_finite(rollouts):
    """`learn` skips such a step, and the run goes on; a gradient that is not finite would end it."""
    epoch = rollouts[0].epochs[0]
    batch = epoch.batch._replace(log_prob=epoch.batch.log_prob - 200)
    args = Args(**TINY)
    loss = jax.jit(
        jax.value_and_grad(partial(ppo_loss, network=ActorCritic(args), ent_coef=0.0, args=args), has_aux=True)
    )
    (_, losses), grads = loss(
        rollouts[0].before.params, carry=epoch.carry, batch=batch, advantage=epoch.advantage, target=epoch.target
    )
    assert losses["losses/approx_kl"] > 1e6
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((losses, grads)))


def test_the_entropy_bonus_falls_from_its_weight_to_the_final_one(monkeypatch):
    seen = []

    def spy(params, network, carry, batch, advantage, target, ent_coef, args):
        jax.debug.callback(lambda x: seen.append(float(x)), ent_coef)
        return ppo_loss(params, network, carry, batch, advantage, target, ent_coef, args)

    monkeypatch.setattr(meta, "ppo_loss", spy)
    flags = {"train_tasks": ("short-pendulum",), "num_layers": 0, "num_minibatches": 1, "update_epochs": 1}
    args = Args(**TINY | flags, ent_coef=0.5, final_ent_coef=-0.5, total_timesteps=4 * N * T)
    init, train = make_train(args, Environment(args.train_tasks, args))
    state, train = jax.jit(init)(jax.random.key(0)), jax.jit(train)
    for _ in range(4):
        state, _ = train(state)
    jax.effects_barrier()
    assert seen == pytest.approx([0.5, 0.0625, -0.25, -0.4375])


@pytest.mark.parametrize(("target_kl", "steps", "scales"), [(1e-6, 1, (1, 1 / 1.5, 1 / 1.5**2)), (1e6, 4, (1, 1, 1))])
def test_a_policy_that_has_left_its_rollout_waits_for_the_next_which_has_smaller_steps(target_kl, steps, scales):
    flags = {"train_tasks": ("short-pendulum",), "num_layers": 0, "learning_rate": 0.01, "target_kl": target_kl}
    args = Args(**TINY | flags)
    init, train = make_train(args, Environment(args.train_tasks, args))
    before = jax.jit(init)(jax.random.key(0))
    train = jax.jit(train)
    after, metrics = train(before)
    last, later = train(after)
    assert float(metrics["losses/skipped"]) == pytest.approx(1 - steps / 4)
    found = (metrics["losses/lr_scale"], later["losses/lr_scale"], last.lr_scale)
    assert tuple(map(float, found)) == pytest.approx(scales)
    params = zip(*map(jax.tree.leaves, (before.params, after.params)), strict=True)
    moved = max(float(jnp.abs(x - y).max()) for x, y in params)
    assert 0.9 * args.learning_rate < moved < 1.1 * args.learning_rate * steps  # Adam's first step is that long
    if steps == 1:
        shorter, _ = train(before._replace(lr_scale=before.lr_scale / 4))
        for old, new, less in zip(*map(jax.tree.leaves, (before.params, after.params, shorter.params)), strict=True):
            np.testing.assert_allclose(less - old, (new - old) / 4, rtol=1e-3, atol=1e-7)
    else:
        assert float(train(before._replace(lr_scale=before.lr_scale / 4))[0].lr_scale) == pytest.approx(1.05 / 4)
    (count,) = {int(x) for x in jax.tree.leaves(after.opt_state) if x.dtype == jnp.int32}
    assert count == 4  # the schedule of the step size goes on


# ---- evaluation
EVAL = TINY | {"train_tasks": ("short-pendulum",), "eval_trials": 3, "eval_trial_length": 12}


def test_an_evaluation_shows_a_wiped_memory_the_start_of_a_trial_and_no_trial_ends(monkeypatch):
    seen = []

    class Network:
        def __init__(self, args):
            pass

        def initial_carry(self, num_envs):
            return ()

        def apply(self, params, carry, obs, reset):
            jax.debug.callback(lambda *x: seen.append([np.array(y[0]) for y in x]), obs, reset, ordered=True)
            action = jnp.full((*reset.shape, A), 0.5)
            return carry, (action, 0 * action), jnp.zeros(reset.shape), None

    monkeypatch.setattr(meta, "ActorCritic", Network)
    args = Args(**EVAL)
    play = jax.jit(partial(evaluate, args=args, env=Environment(("short-pendulum",), args, trials_end=False)))
    steps = 12 + LIMITS[1]
    begun = np.arange(steps)[:, None] == 0
    ends = np.tile(np.arange(1, steps + 1)[:, None] % LIMITS[1] == 0, 3)
    ended = np.concatenate([np.ones((1, 3), bool), ends[:-1]])
    assert len(MEMORIES) == 3
    for memory, expected in enumerate([begun, ended, np.True_]):
        rewards, dones, _ = jax.tree.map(np.array, play({}, jnp.ones(1), jax.random.key(0), memory))
        jax.effects_barrier()
        obs, resets = (np.stack(x)[:steps] for x in zip(*seen, strict=True))  # the last rollout is cut off
        seen.clear()
        assert rewards.shape == resets.shape == (steps, 3)
        np.testing.assert_array_equal(dones, ends)
        np.testing.assert_array_equal(resets, np.broadcast_to(expected, (steps, 3)))
        np.testing.assert_array_equal(obs[..., -1], resets)  # told of a new trial where the memory is empty, not else
        np.testing.assert_array_equal(obs[..., -2], ended | resets)
        previous = obs[..., O:-2]  # action and reward
        assert not previous[resets].any() and (previous[~resets] != 0).all()


def test_episodes_of_an_evaluation_start_anew_though_there_is_one_start_at_a_time():
    args = Args(**EVAL | {"eval_trials": 1, "eval_trial_length": 40, "num_steps": LIMITS[1]})
    env = Environment(("short-pendulum",), args, trials_end=False)
    network = ActorCritic(args)
    inputs = jnp.zeros((1, 1, O + A + 3)), jnp.ones((1, 1), bool)
    params = jax.jit(network.init)(jax.random.key(0), network.initial_carry(1), *inputs)
    rewards, dones, _ = jax.jit(partial(evaluate, args=args, env=env))(params, jnp.ones(1), jax.random.key(0), 0)
    assert dones.sum() == 9
    first = np.sort(np.asarray(rewards)[:: LIMITS[1], 0])  # angle and velocity squared, the action at most 0.004
    assert (np.diff(first) > 0.004).sum() >= 6  # of 8


@pytest.mark.parametrize("reset_memory", [True, False])
def test_kinds_of_memory_differ_and_see_the_same_trials(reset_memory):
    args = Args(**EVAL | {"projection": True}, reset_memory=reset_memory)
    env = Environment(("short-pendulum",), args, trials_end=False)
    network = ActorCritic(args)
    inputs = jnp.zeros((1, 1, O + A + 3)), jnp.ones((1, 1), bool)
    shapes = jax.eval_shape(network.init, jax.random.key(0), network.initial_carry(1), *inputs)
    params = shaken(jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes))
    over_memories = jax.vmap(partial(evaluate, args=args, env=env), (None, None, None, 0))
    run = jax.jit(lambda key: over_memories(params, jnp.ones(1), key, jnp.arange(3))[0])
    kept, by_episode, by_step = np.asarray(run(jax.random.key(0)))
    np.testing.assert_array_equal(by_episode[0], by_step[0])  # the same start, where both have nothing to remember
    if reset_memory:
        np.testing.assert_array_equal(kept[:5], by_episode[:5])  # until the first episode ends
    else:  # what is kept comes from the trial before
        assert (kept != by_episode)[:5].any(0).all()
    for one, other in ((kept, by_episode), (kept, by_step), (by_episode, by_step)):
        assert (np.abs(one - other)[6:].max(0) > 1e-5).all()  # and 0, were they the same


def test_episodes_by_hand():
    rewards = np.array([[1, 2, 3, 4, 5, 6, 7], [1, 1, 1, 1, 1, 1, 1]], float).T  # of two trials
    dones = np.array([[0, 1, 0, 0, 1, 0, 1], [0, 0, 0, 0, 0, 1, 0]], bool).T
    by_steps = episodes_of(rewards, dones, Args(trial_length=3, trial_episodes=0, eval_trial_length=5))
    # Trial, index, first step, return. The third episode of the first trial begins at step 5: too late.
    np.testing.assert_array_equal(by_steps, [[0, 0, 0, 3], [0, 1, 2, 12], [1, 0, 0, 6]])
    by_episodes = episodes_of(rewards, dones, Args(trial_length=0, trial_episodes=1, eval_trial_length=2))
    np.testing.assert_array_equal(by_episodes, [[0, 0, 0, 3], [0, 1, 2, 12], [1, 0, 0, 6]])
    by_episodes = episodes_of(rewards, dones, Args(trial_length=0, trial_episodes=1, eval_trial_length=4))
    np.testing.assert_array_equal(by_episodes, [[0, 0, 0, 3], [0, 1, 2, 12], [0, 2, 5, 13], [1, 0, 0, 6]])


def test_adaptation_by_hand(monkeypatch):
    monkeypatch.setitem(TASKS, "made up", TASKS["pendulum"]._replace(zero=2.0, one=4.0))
    monkeypatch.setitem(TASKS, "other", TASKS["pendulum"]._replace(zero=0.0, one=1.0))
    args = Args(**TINY | {"trial_length": 4}, eval_trial_length=8)
    # Two trials of the made-up task, then two of the other; episodes of 4 steps, of which the third begins too late.
    dones = np.tile(np.arange(1, 13)[:, None] % 4 == 0, 4)
    per_step = {"kept": ([1, 2], [2, 4]), "wiped every episode": ([1, 1], [1, 2]), "wiped every step": ([1, 1], [1, 1])}
    rewards = np.zeros((1, 3, 12, 4))
    for m, memory in enumerate(MEMORIES):
        for trial, (first, second) in enumerate(per_step[memory]):
            rewards[0, m, :, trial] = np.repeat([first, second, 100], 4)
    rows = adaptation(rewards, np.tile(dones, (1, 3, 1, 1)), SimpleNamespace(names=("made up", "other")), args)

    def pick(**wanted):
        return [row for row in rows if wanted.items() <= row.items()]

    mine = partial(pick, task="made up")
    assert {row["memory"] for row in rows} == set(MEMORIES) and {row["task"] for row in rows} == {"made up", "other"}
    # Returns of 4 and 8, then of 8 and 16: scores of (return - 2) / 2.
    first, second = mine(memory="kept", against="episode")
    assert (first["x"], first["mean"], first["trials"]) == (0, 2, 2)
    assert (second["x"], second["mean"], second["trials"]) == (1, 5, 2)
    assert second["interval"] == pytest.approx(12.706 * 4 / math.sqrt(2) / math.sqrt(2), rel=1e-4)  # of 3 and 7
    (half,) = mine(memory="kept", against="second half")
    assert (half["mean"], half["raw_return"], half["trials"]) == (5, 12, 2)
    assert [row["mean"] for row in mine(memory="wiped every step", against="second half")] == [1]
    # What the memory is worth, trial by trial: 3 and 7, less 1 and 3 or less 1 and 1.
    worth = {row["memory"]: row["mean"] for row in mine(against="kept minus this")}
    assert worth == {"wiped every episode": 3, "wiped every step": 4}
    steps = mine(memory="kept", against="step")
    assert [row["mean"] for row in steps] == [1.5] * 4 + [3] * 4  # a part is one step, where there are so few
    assert [row["x"] for row in steps] == [i + 0.5 for i in range(8)]
    (ends,) = {tuple(row["mean"] for row in mine(memory=memory, against="ends")) for memory in MEMORIES}
    assert ends == (0, 0, 0, 1) * 2
    assert all(row["mean"] == 0 for row in pick(task="other", against="episode"))


def test_steps_after_the_last_episode_of_a_trial_do_not_count(monkeypatch):
    """Two trials of two episodes each: of 1 and 2 steps, and of 3 steps."""
    args = Args(**TINY | {"trial_length": 0, "trial_episodes": 1}, eval_trial_length=2)
    dones = np.array([[1, 0, 1, 1, 1, 1, 1], [0, 0, 1, 0, 0, 1, 1]], bool).T
    rewards = np.array([[1, 2, 3, 9, 9, 9, 9], [3, 4, 5, 6, 7, 8, 9]], float).T
    env = SimpleNamespace(names=("pendulum",))
    rows = adaptation(*(np.tile(x, (1, 3, 1, 1)) for x in (rewards, dones)), env, args)
    for against, means, trials in (
        ("step", [2, 3, 4, 6, 7, 8], [2, 2, 2, 1, 1, 1]),
        ("ends", [0.5, 0, 1, 0, 0, 1], [2, 2, 2, 1, 1, 1]),
    ):
        mine = [row for row in rows if (row["memory"], row["against"]) == ("kept", against)]
        assert ([row["mean"] for row in mine], [row["trials"] for row in mine]) == (means, trials)


# ---- learning
def test_what_an_action_does_is_found_out_within_a_trial_and_kept_in_memory(monkeypatch):
    """The action that pushes the cart to the left in half of the trials pushes it to the right in the others."""
    monkeypatch.setitem(TASKS, "cart", TASKS["cartpole-positions"]._replace(episode_length=100))

    def random_sign(key, n, rows, columns):  # of the action only: the two positions are shown as they are
        return jax.random.rademacher(key, (n, 1, 1), float) if columns == 1 else jnp.tile(jnp.eye(2), (n, 1, 1))

    monkeypatch.setattr(meta, "random_orthonormal", random_sign)
    task = {"train_tasks": ("cart",), "held_out_tasks": (), "projected_obs_size": 2, "projected_action_size": 1}
    sizes = {"num_layers": 1, "d_model": 32, "state_size": 16, "encoder_size": 32, "head_size": 32, "dt_max": 2.0}
    ppo = {"num_envs": 32, "num_steps": 64, "num_minibatches": 4, "update_epochs": 4}
    ppo |= {"learning_rate": 2e-3, "anneal_lr": True, "ent_coef": 0.005}
    args = Args(**task, **sizes, **ppo, trial_episodes=3, eval_trial_length=3, log_interval=98, total_timesteps=600_000)
    init, train = make_train(args, Environment(args.train_tasks, args))
    state = jax.jit(init)(jax.random.key(0))
    train = jax.jit(train).lower(state).compile()
    for _ in range(args.num_updates // args.log_interval):
        state, _ = train(state)

    env = Environment(args.train_tasks, args, trials_end=False)
    play = jax.jit(jax.vmap(partial(evaluate, args=args, env=env), (None, None, None, 0)))
    spread = jnp.sqrt(state.return_var) + 1e-3
    rewards, dones, _ = jax.tree.map(np.asarray, play(state.params, spread, jax.random.key(1), jnp.array([0, 2])))
    last = []
    for reward, done in zip(rewards, dones, strict=True):
        _, index, _, returns = episodes_of(reward, done, args).T
        last.append(returns[index == 2].mean())
    kept, wiped = last
    assert kept >= 0.4 and wiped <= 0.22  # of 0.5, the whole 100 steps; random actions get 0.11
