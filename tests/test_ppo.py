"""The learner sees what the actor saw, and PPO computes what its papers say."""

import re
from collections import Counter
from functools import partial
from types import SimpleNamespace

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lstm_ppo
import s5_ppo_memory
import transformer_ppo
from s5_ppo_memory import Args, Environment, Transition, gae, ppo_loss

TINY = {"num_envs": 8, "num_minibatches": 2, "update_epochs": 2, "num_steps": 23, "log_interval": 1}
TINY |= {"num_layers": 2, "d_model": 8, "encoder_size": 8, "head_size": 8, "learning_rate": 0.0}
MEMORY = {"memory_length": 5, "min_memory_length": 3}
LIMIT = {"env_id": "CartPole-v1", "env_params": {"max_steps_in_episode": 9, "gravity": 60}}
FREE = {"env_id": "CartPole-v1", "env_params": {"max_steps_in_episode": 12, "gravity": 30}}
S5 = {"state_size": 4}
ARGS = {
    "s5": s5_ppo_memory.Args(**TINY, **S5, **LIMIT),
    "lstm": lstm_ppo.Args(**TINY, **MEMORY, hidden_size=6),
    "transformer": transformer_ppo.Args(**TINY, **LIMIT, context_length=5, key_size=4, mlp_size=8),
    "s5, whole rollouts": s5_ppo_memory.Args(
        **TINY | {"num_layers": 0, "num_minibatches": 1}, **FREE
    ),
}
SCRIPTS = {"lstm": lstm_ppo, "transformer": transformer_ppo}


def shaken(params, scale=0.5, seed=1):
    """A fresh policy is so close to uniform that it hardly depends on its memory."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + scale * rng.normal(size=x.shape).astype(x.dtype), params)


@pytest.fixture(scope="module")
def rollouts():
    """Args, env, and, of each of two rollouts, its metrics and a list of what each gradient step
    is computed from: (params, carry, batch, advantage, target)."""
    results = {}

    def record(name):
        script, args, seen = SCRIPTS.get(name, s5_ppo_memory), ARGS[name], []
        loss, env, recorded = script.ppo_loss, script.Environment(args), []

        def spy(params, network, *rest):
            jax.debug.callback(
                lambda *x: seen.append(jax.tree.map(np.array, x)), params, *rest[:-1]
            )
            return loss(params, network, *rest)

        init, train = script.make_train(args, env)
        state = jax.jit(init)(jax.random.PRNGKey(0))
        state, train = state._replace(params=shaken(state.params)), jax.jit(train)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(script, "ppo_loss", spy)
            patch.setattr(transformer_ppo, "QUERY_BLOCK", 4)
            for _ in range(2):
                state, metrics = train(state)
                jax.effects_barrier()
                recorded.append((metrics, tuple(seen)))
                seen.clear()
        return args, env, recorded

    def run(name):
        if name not in results:
            results[name] = record(name)
        return results[name]

    return run


# ---- acting and learning
@pytest.mark.parametrize("name", ["s5", "lstm", "transformer"])
def test_before_a_gradient_step_the_learner_computes_what_the_actor_did(rollouts, name):
    script = SCRIPTS.get(name, s5_ppo_memory)
    args, env, ((_, first), (_, second)) = rollouts(name)
    apply = jax.jit(script.ActorCritic(args, env.num_actions).apply)
    assert len(first) == len(second) == 4  # two epochs of two minibatches
    for params, carry, batch, _, _ in first + second:
        _, logits, value = apply(params, carry, batch.obs, batch.reset)
        log_p = jax.nn.log_softmax(logits)
        log_prob = np.take_along_axis(log_p, batch.action[..., None], axis=-1)[..., 0]
        np.testing.assert_allclose(np.exp(log_prob - batch.log_prob), 1, atol=1e-5)
        np.testing.assert_allclose(value, batch.value, atol=1e-5, rtol=1e-5)
        assert batch.reset[1:-1].any()
        np.testing.assert_array_equal(batch.reset[1:], batch.done[:-1])
        np.testing.assert_array_equal(batch.obs[..., -1], batch.reset)
    assert all((leaf == 0).all() for x in first for leaf in jax.tree.leaves(x[1]))
    assert all(x[2].reset[0].all() for x in first)
    assert all((leaf != 0).any() for x in second for leaf in jax.tree.leaves(x[1]))
    assert not all(x[2].reset[0].all() for x in second)  # some go on with an episode
    # It takes memory to get these numbers: without it they are others.
    params, carry, batch, _, _ = second[0]
    _, _, value = apply(params, jax.tree.map(jnp.zeros_like, carry), batch.obs, batch.reset)
    assert np.abs(value - batch.value).max() > 1e-2


def test_an_epoch_learns_from_every_environment_once_and_epochs_differ_in_order(rollouts):
    args, _, recorded = rollouts("s5")
    orders = set()
    for _, minibatches in recorded:
        obs = np.concatenate([batch.obs for _, _, batch, _, _ in minibatches], axis=1)
        epochs = np.split(obs, args.update_epochs, axis=1)  # (T, N, O) each
        orders |= {tuple(epoch[0, :, 0].argsort()) for epoch in epochs}
        first, second = (epoch[:, epoch[0, :, 0].argsort()] for epoch in epochs)
        np.testing.assert_array_equal(first, second)
        assert len(np.unique(first[0], axis=0)) == args.num_envs
    assert len(orders) > 1


# ---- advantages
NOTHING = dict.fromkeys(Transition._fields)


def advantages(gamma, gae_lambda, last_value, **columns):
    columns = {name: jnp.asarray(x) for name, x in columns.items()}
    return gae(Transition(**NOTHING | columns), jnp.asarray(last_value), gamma, gae_lambda)


@pytest.mark.parametrize(
    ("reward", "value", "done", "last_value", "expected"),
    [
        # t=2: 3 + 8/2 - 6 = 1.  t=1, the end: 2 - 5 = -3.  t=0: 1 + 5/2 - 4 = -1/2, -3/4 on top.
        ([1, 2, 3], [4, 5, 6], [False, True, False], 8, [-1.25, -3, 1]),
        # The end at t=1 was a time limit, what came next was worth 4: a reward of 2 + 4/2 = 4.
        # t=1: 4 - 5 = -1.  t=0: -1/2, and a quarter of -1.  Nothing of t=2 comes through.
        ([1, 4, 3], [4, 5, 6], [False, True, False], 8, [-0.75, -1, 1]),
        # The end of the rollout is the end of an episode, and is not.
        ([1, 1], [2, 2], [False, True], 100, [-0.25, -1]),
        ([1, 1], [2, 2], [False, False], 100, [12.25, 49]),
    ],
)
def test_advantages_by_hand(reward, value, done, last_value, expected):
    columns = {"reward": reward, "value": value, "done": done}
    columns = {name: np.array(x, float)[:, None] for name, x in columns.items()}
    result = advantages(0.5, 0.5, [float(last_value)], **columns)
    np.testing.assert_allclose(result[:, 0], expected)


def test_with_lambda_one_the_advantage_is_the_discounted_return_minus_the_value():
    rng = np.random.default_rng(0)
    reward, value = rng.normal(size=(2, 50, 3))
    done, last_value = rng.random((50, 3)) < 0.1, rng.normal(size=3)
    expected, following = np.zeros((50, 3)), last_value
    for t in reversed(range(50)):
        following = reward[t] + 0.9 * ~done[t] * following
        expected[t] = following - value[t]
    result = advantages(0.9, 1.0, last_value, reward=reward, value=value, done=done)
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_explained_variance_is_the_share_of_the_targets_that_the_values_foresaw(rollouts):
    args, _, recorded = rollouts("s5")
    for metrics, minibatches in recorded:
        epoch = minibatches[: args.num_minibatches]
        batch, _, target = (
            jax.tree.map(lambda *x: np.concatenate(x, axis=1), *parts)
            for parts in zip(*(minibatch[2:] for minibatch in epoch), strict=True)
        )
        expected = 1 - (target - batch.value).var() / target.var()
        assert metrics["losses/explained_variance"] == pytest.approx(expected, abs=1e-4)


def test_a_time_limit_adds_the_value_of_what_it_cut_off_and_targets_are_not_normalised(rollouts):
    args, env, ((_, minibatches), _) = rollouts("s5")
    raw = gymnax.make("CartPole-v1")[0]
    apply = jax.jit(s5_ppo_memory.ActorCritic(args, env.num_actions).apply)
    physics = jax.jit(jax.vmap(raw.step_env, (None, 0, 0, None)))
    _, start = raw.reset(jax.random.PRNGKey(0), env.params)
    num_terminated = num_truncated = 0
    for params, carry, batch, advantage, target in minibatches[:2]:
        np.testing.assert_allclose(target, advantage + batch.value, atol=1e-6)
        assert advantage.std() != pytest.approx(1, abs=0.01)
        for t in range(args.num_steps):
            carry, _, _ = apply(params, carry, batch.obs[t : t + 1], batch.reset[t : t + 1])
            x, x_dot, theta, theta_dot = batch.obs[t, :, :4].T
            state = start.replace(x=x, x_dot=x_dot, theta=theta, theta_dot=theta_dot)
            state = state.replace(time=jnp.zeros(4, jnp.int32))
            key = jax.random.PRNGKey(0)
            final, _, _, terminated, _ = physics(key, state, batch.action[t], env.params)
            final = np.concatenate([final, np.ones((4, 1)), np.zeros((4, 1))], axis=1)
            final = final[None].astype(np.float32)  # the reward of 1, and no flag
            _, _, value = apply(params, carry, final, jnp.zeros((1, 4), bool))
            truncated = batch.done[t] & ~terminated
            expected = 1 + truncated * args.gamma * value[0]
            np.testing.assert_allclose(batch.reward[t], expected, atol=1e-4)
            assert batch.done[t][terminated].all()
            num_terminated += terminated.sum()
            num_truncated += truncated.sum()
    assert num_terminated and num_truncated


def test_returns_that_are_logged_are_means_over_whole_episodes(rollouts):
    _, _, ((metrics, ((_, _, batch, _, _), _)), _) = rollouts("s5, whole rollouts")
    ends = [np.flatnonzero(column) + 1 for column in batch.done.T]
    lengths = np.concatenate([np.diff([0, *end]) for end in ends])  # and returns
    assert metrics["charts/episodes"] == batch.done.sum() == len(lengths) > 8
    assert metrics["charts/episodic_return"] == pytest.approx(lengths.mean(), rel=1e-5)


# ---- the loss
def test_loss_is_the_clipped_objective_on_normalised_advantages():
    rng = np.random.default_rng(0)
    T, M, A = 5, 2, 3
    args = Args(clip_coef=0.2, vf_coef=0.7, ent_coef=0.03)
    logits, action = rng.normal(size=(T, M, A)), rng.integers(A, size=(T, M))
    value, target, advantage = rng.normal(size=(3, T, M))
    advantage = 5 + 3 * advantage
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    log_prob = np.log(np.take_along_axis(p, action[..., None], -1)[..., 0])
    old_log_prob = log_prob - rng.normal(size=(T, M)) * 0.4

    def network(params, carry, obs, reset, mutable):
        return (carry, logits, value), {mutable: {"block_0": {"penalty": (5.0,)}}}

    batch = Transition(None, None, action, old_log_prob, None, None, None)
    rest = jnp.asarray(advantage), target, args
    loss, metrics = ppo_loss({}, SimpleNamespace(apply=network), (), batch, *rest)

    ratio = np.exp(log_prob - old_log_prob)
    assert (ratio > 1.2).any() and (ratio < 0.8).any() and (np.abs(ratio - 1) < 0.2).any()
    normal = (advantage - advantage.mean()) / advantage.std()
    high, low = np.minimum(ratio, 1.2) * normal, np.maximum(ratio, 0.8) * normal
    expected = {
        "losses/policy_loss": -np.where(normal > 0, high, low).mean(),
        "losses/value_loss": np.square(value - target).mean() / 2,
        "losses/entropy": -(p * np.log(p)).sum(-1).mean(),
        "losses/approx_kl": (ratio - 1 - np.log(ratio)).mean(),
        "losses/clipfrac": (np.abs(ratio - 1) > 0.2).mean(),
    }
    assert {name: float(x) for name, x in metrics.items()} == pytest.approx(expected, rel=1e-4)
    parts = [expected[f"losses/{name}"] for name in ("policy_loss", "value_loss", "entropy")]
    assert float(loss) == pytest.approx(np.dot(parts, [1, 0.7, -0.03]) + 5, rel=1e-4)


# ---- the gradient step
def collectives(text):
    """Counts of (kind, depth) in the text of a compiled program, depth being that of loops."""
    parts = dict(re.findall(r"(?ms)^(?:ENTRY )?%([\w.-]+) \(.*?\{$(.*?)^\}", text))
    callers = {name: [] for name in parts}
    for caller, part in parts.items():
        for body, name in set(re.findall(r"(body=)?%([\w.-]+)", part)):
            callers.get(name, []).append((caller, bool(body)))

    def depth(name):
        return max((depth(caller) + in_loop for caller, in_loop in callers[name]), default=0)

    kinds = (
        "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
    )
    kinds = {name: re.findall(rf" ({kinds})(?:-start)?\(", part) for name, part in parts.items()}
    return Counter((kind, depth(name)) for name, found in kinds.items() for kind in found)


def test_step_size_falls_to_zero_gradients_are_clipped_and_no_episode_is_no_number(monkeypatch):
    """Of one program: six updates of two steps each, in which every second ends all episodes."""
    limit, flags = 1e-2, TINY | S5 | {"memory_length": 3, "min_memory_length": 3, "num_steps": 2}
    flags |= {"num_layers": 1, "learning_rate": 0.1, "total_timesteps": 5 * 16 + 1}
    args = Args(**flags, anneal_lr=True, max_grad_norm=limit)
    assert args.num_updates == 6
    steps, schedules, linear = 6 * 2 * 2, [], optax.linear_schedule
    monkeypatch.setattr(
        optax, "linear_schedule", lambda *x: schedules.append(linear(*x)) or schedules[-1]
    )
    s5_ppo_memory.make_train(Args(**flags, anneal_lr=False), Environment(args))
    init, train = s5_ppo_memory.make_train(args, Environment(args))
    constant, falling = schedules
    found = [float(x) for x in map(falling, (0, steps // 4, steps - 1, steps))]
    assert found == pytest.approx([0.1, 0.075, 0.1 / steps, 0], rel=1e-4)
    assert float(constant(10**6)) == pytest.approx(0.1)
    state, train = jax.jit(init)(jax.random.PRNGKey(0)), jax.jit(train)
    for update in range(args.num_updates):
        before, (state, metrics) = state, train(state)
        assert metrics["charts/episodes"] == (0, 8)[update % 2]
        assert np.isnan(metrics.pop("charts/episodic_return")) == (update % 2 == 0)
        assert all(np.isfinite(x).all() for x in metrics.values())
        assert (state.key != before.key).any()
        # As logged, before it is clipped; Adam's mean is one of clipped gradients.
        assert metrics["losses/grad_norm"] > 3 * limit
        leaves = jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu"))
        (adam,) = (x for x in leaves if hasattr(x, "mu"))
        assert 0.01 * limit < optax.tree.norm(adam.mu) < limit
    counts = [int(x) for x in jax.tree.leaves(state.opt_state) if x.dtype == jnp.int32]
    assert counts and set(counts) == {steps}
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, state.params, before.params))
    assert moved > 0
    frozen, _ = train(state)  # one call too many: the step size is zero by now
    change = optax.tree.norm(jax.tree.map(jnp.subtract, frozen.params, state.params))
    assert change < 1e-3 * moved


def test_two_devices_share_the_environments_and_keep_the_same_parameters():
    """And talk once a gradient step, to average the gradient."""
    flags = TINY | S5 | MEMORY | {"learning_rate": 1e-3, "num_layers": 1, "num_devices": 2}
    args = Args(**flags | {"log_interval": 2})
    init, train = s5_ppo_memory.make_train(args, Environment(args))
    before = jax.jit(init)(jax.random.PRNGKey(0))
    train = jax.jit(train).lower(before).compile()
    found = collectives(train.as_text())
    assert found.pop(("all-reduce", 2)) == 1  # the loop over gradient steps in that over updates
    assert {*found} == {("all-reduce", 0)}  # of the metrics

    after, metrics = train(before)
    for new in jax.tree.leaves((after.params, after.opt_state)):
        one, other = (np.asarray(shard.data) for shard in new.addressable_shards)
        np.testing.assert_array_equal(one, other)
    pairs = zip(*map(jax.tree.leaves, (before.params, after.params)), strict=True)
    assert any((old != new).any() for old, new in pairs)
    one, other = (np.asarray(shard.data) for shard in after.actor[1].addressable_shards)
    assert one.shape == other.shape == (4, 5) and (one != other).any()
    assert 2 * 23 * 8 // 6 - 8 <= metrics["charts/episodes"] <= 2 * 23 * 8 // 4  # 3 to 5 steps each


# ---- evaluation
def test_an_evaluation_counts_the_first_episode_of_each_environment_and_no_other():
    """CartPole's end at different steps; a loop by hand goes on until the last has ended."""
    tiny = TINY | {"num_layers": 1, "dt_min": 0.1 / 128}
    args = Args(**tiny, **S5, env_id="CartPole-v1", eval_episodes=16)
    env, network, key = Environment(args), s5_ppo_memory.ActorCritic(args, 2), jax.random.PRNGKey(3)
    carry, reset = s5_ppo_memory.SequenceModel(args).initial_carry(16), jnp.ones(16, bool)
    params = jax.jit(network.init)(jax.random.PRNGKey(0), carry, jnp.zeros((1, 16, 6)), reset[None])
    evaluate = jax.jit(partial(s5_ppo_memory.evaluate, args=args, env=env))
    start, step = jax.jit(env.reset, static_argnums=1), jax.jit(env.step)
    apply, tells = jax.jit(network.apply), False
    for seed in range(50):  # of the policies, many always push one way
        policy = shaken(params, scale=1.0, seed=seed)
        env_key, now = jax.random.split(key)
        state, obs = start(env_key, 16, 0)
        loop, ends, actions, steps = (carry, reset), [[] for _ in range(16)], set(), 0
        while not all(ends):
            now, env_key = jax.random.split(now)
            memory, logits, _ = apply(policy, loop[0], obs[None], loop[1][None])
            action = logits[0].argmax(-1)
            state, timestep = step(env_key, state, action)
            obs, loop, steps = timestep.obs, (memory, timestep.done), steps + 1
            actions |= {*action.tolist()}
            for i in np.flatnonzero(timestep.done):
                ends[i].append(steps)
        returns = evaluate(policy, key, 0)  # a reward of 1 each step
        np.testing.assert_array_equal(returns, [end[0] for end in ends])
        tells = actions == {0, 1} and any(2 * end[0] != end[1] for end in ends if len(end) > 1)
        if tells:
            break
    assert tells
