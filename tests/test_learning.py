"""It learns to remember, and only with a memory."""

from functools import partial

import jax
import pytest

from s5_ppo_memory import Args, Environment, evaluate, make_train

SMALL = {"memory_length": 8, "d_model": 16, "state_size": 8, "encoder_size": 16, "head_size": 16, "dt_min": 0.01}
SMALL |= {"num_envs": 16, "num_steps": 64, "num_minibatches": 2, "learning_rate": 3e-3, "total_timesteps": 60_000}


def success_rate(args, greedy=True):
    env = Environment(args)
    init, train = make_train(args, env)
    state, train = jax.jit(init)(jax.random.key(args.seed)), jax.jit(train)
    for _ in range(args.num_updates // args.log_interval):
        state, _ = train(state)
    returns, lengths = jax.jit(partial(evaluate, args=args, env=env))(
        state.params, jax.random.key(100), env.params, greedy
    )
    assert (lengths == args.memory_length + 1).all()
    return float((returns > 0).mean())


def test_a_short_memory_is_learnt():
    assert success_rate(Args(**SMALL, num_layers=1)) >= 0.95


def test_without_memory_the_answer_is_chance():
    # Sampled actions: a greedy policy can hand the cue on in its previous action, which it observes.
    assert success_rate(Args(**SMALL, num_layers=0, eval_episodes=512), greedy=False) <= 0.75


@pytest.mark.slow
def test_the_default_memory_length_is_learnt():
    assert success_rate(Args()) >= 0.99
