"""Before a gradient step, the learner computes what the actor did, in rollouts 1 and 2; S5's turn is in test_ppo.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lstm_ppo
import transformer_ppo

TINY = {"num_envs": 4, "num_minibatches": 2, "d_model": 8, "encoder_size": 8, "head_size": 8}
TINY |= {"log_interval": 1, "update_epochs": 2, "learning_rate": 0.0, "num_steps": 13}
OWN = {
    "lstm": (lstm_ppo, {"hidden_size": 6}),
    "transformer-5": (transformer_ppo, {"context_length": 5, "key_size": 4, "mlp_size": 8}),
    "transformer-64": (transformer_ppo, {"context_length": 64, "key_size": 4, "mlp_size": 8}),
}
TASKS = {"memory": {"memory_length": 3}, "limit": {"env_id": "CartPole-v1", "env_params": {"max_steps_in_episode": 9}}}


def rollouts(model, task, num_rollouts=2):
    ppo, own = OWN[model]
    args, seen = ppo.Args(**TINY, **own, **TASKS[task]), []
    ppo_loss = ppo.ppo_loss

    def spy(params, network, carry, batch, *rest):
        jax.debug.callback(lambda *x: seen.append(jax.tree.map(np.array, x)), params, carry, batch)
        return ppo_loss(params, network, carry, batch, *rest)

    env = ppo.Environment(args)
    init, train = ppo.make_train(args, env)
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
    return ppo, args, env, result


@pytest.mark.parametrize(
    ("model", "task"), [("lstm", "memory"), ("lstm", "limit"), ("transformer-5", "limit"), ("transformer-64", "memory")]
)
def test_before_a_gradient_step_the_learner_computes_what_the_actor_did(model, task, monkeypatch):
    monkeypatch.setattr(transformer_ppo, "QUERY_BLOCK", 4)
    ppo, args, env, (first, second) = rollouts(model, task)
    apply = jax.jit(ppo.ActorCritic(args, env.num_actions).apply)
    assert len(first) == len(second) == 4
    for params, carry, batch in first + second:
        _, logits, value = apply(params, carry, batch.obs, batch.reset)
        log_prob, _ = ppo.categorical(logits, batch.action)
        np.testing.assert_allclose(np.exp(log_prob - batch.log_prob), 1, atol=1e-5)
        np.testing.assert_allclose(value, batch.value, atol=1e-5, rtol=1e-5)
        assert batch.reset[1:-1].any()
    assert all((leaf == 0).all() for x in first for leaf in jax.tree.leaves(x[1]))
    assert not all(x[2].reset[0].all() for x in second)
    params, carry, batch = second[0]
    _, _, value = apply(params, jax.tree.map(jnp.zeros_like, carry), batch.obs, batch.reset)
    assert np.abs(value - batch.value).max() > 1e-2
