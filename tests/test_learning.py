"""It learns to remember, and only with a memory."""

from functools import partial

import jax
import numpy as np
import pytest

import lstm_ppo
import s5_ppo_memory
import transformer_ppo

SMALL = {"memory_length": 8, "d_model": 16, "encoder_size": 16, "head_size": 16, "num_layers": 1}
SMALL |= {"num_envs": 16, "num_steps": 64, "num_minibatches": 2, "learning_rate": 3e-3}
SMALL |= {"total_timesteps": 40_000, "eval_episodes": 256}
MODELS = {
    s5_ppo_memory: {"state_size": 8},
    lstm_ppo: {"hidden_size": 16, "max_timescale": 20.0},
    transformer_ppo: {"context_length": 10, "num_heads": 1, "mlp_size": 16},
}


def mean_returns(args, script=s5_ppo_memory):
    """After training, at half, all and twice the memory length: 1 is all answers right."""
    env, keys = script.Environment(args), jax.random.PRNGKey(args.seed)[None]
    evaluate = jax.jit(partial(script.evaluate, args=args, env=env))
    init, train = (jax.jit(partial(jax.lax.map, x)) for x in script.make_train(args, env))
    state = init(keys)
    for _ in range(args.num_updates // args.log_interval):
        state, _ = train(state)
    params = jax.tree.map(lambda x: x[0], state.params)
    lengths = args.memory_length // 2, args.memory_length, 2 * args.memory_length
    return [float(evaluate(params, keys[0], length).mean()) for length in lengths]


@pytest.mark.parametrize("script", MODELS, ids=lambda script: script.__name__)
def test_a_short_memory_is_learnt(script):
    half, whole, _ = mean_returns(script.Args(**SMALL, **MODELS[script]), script)
    assert half >= 0.95 and whole >= 0.95


def test_without_memory_the_answer_is_chance():
    returns = mean_returns(s5_ppo_memory.Args(**SMALL | {"num_layers": 0}))
    assert np.abs(returns).max() < 0.3  # 5 standard deviations


@pytest.mark.slow
def test_the_default_memory_length_is_learnt():
    assert mean_returns(s5_ppo_memory.Args())[1] >= 0.99
