"""It learns to remember, and only with a memory."""

from functools import partial

import jax
import pytest

import lstm_ppo
import s5_ppo_memory
import transformer_ppo
from s5_ppo_memory import Args

SMALL = {"memory_length": 8, "d_model": 16, "encoder_size": 16, "head_size": 16}
SMALL |= {"num_envs": 16, "num_steps": 64, "num_minibatches": 2, "learning_rate": 3e-3, "total_timesteps": 60_000}


def success_rate(args, greedy=True, script=s5_ppo_memory):
    env = script.Environment(args)
    init, train = script.make_train(args, env)
    state, train = jax.jit(init)(jax.random.key(args.seed)), jax.jit(train)
    for _ in range(args.num_updates // args.log_interval):
        state, _ = train(state)
    returns, lengths = jax.jit(partial(script.evaluate, args=args, env=env))(
        state.params, jax.random.key(100), env.params, greedy
    )
    assert (lengths == args.memory_length + 1).all()
    return float((returns > 0).mean())


MODELS = {
    s5_ppo_memory: {"state_size": 8, "dt_min": 0.01},
    lstm_ppo: {"hidden_size": 16, "max_timescale": 20.0},
    transformer_ppo: {"context_length": 10, "num_heads": 1, "mlp_size": 16},
}


@pytest.mark.parametrize("script", MODELS, ids=lambda script: script.__name__)
def test_a_short_memory_is_learnt(script):
    assert success_rate(script.Args(**SMALL, **MODELS[script], num_layers=1), script=script) >= 0.95


def test_without_memory_the_answer_is_chance():
    # Sampled actions: a greedy policy can hand the cue on in its previous action, which it observes.
    assert success_rate(Args(**SMALL, num_layers=0, eval_episodes=512), greedy=False) <= 0.75


@pytest.mark.slow
def test_the_default_memory_length_is_learnt():
    assert success_rate(Args()) >= 0.99
