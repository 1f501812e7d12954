"""Whether an agent that sees its previous action remembers, or hands the cue on in its actions.

    python benchmarks/relay.py                # five seeds with --observe-action and five without
    python benchmarks/relay.py --memory-length 1024 --total-timesteps 1000000

Each is asked at 1/2 to 16 times the memory length it was trained to, once with its own greedy
actions, and once with random actions in the place of all but the answer, on which nothing in the
task depends. What the sequence model remembers survives that; a relay through actions does not.
Any flag of s5_ppo_memory.py may be given. Appends a row a case to relay.csv beside this file.
"""

import sys
import tempfile
from functools import partial

import jax
import jax.numpy as jnp
from common import HERE, append, load, made_by, train

import s5_ppo_memory as script

FACTORS = (0.5, 1, 2, 4, 8, 16)


def answers(params, key, memory_length, random, args, env):
    """Mean return, -1 to 1, of eval_episodes; random: actions before the answer are random."""
    network, E = script.ActorCritic(args, env.num_actions), args.eval_episodes
    reset_key, key = jax.random.split(key)
    env_state, obs = env.reset(reset_key, E, memory_length)
    carry = script.SequenceModel(args).initial_carry(E)

    def step(loop):
        t, env_state, obs, reset, carry, key, _ = loop
        key, env_key, action_key = jax.random.split(key, 3)
        carry, logits, _ = network.apply(params, carry, obs[None], reset[None])
        any_action = jax.random.randint(action_key, (E,), 0, env.num_actions)
        action = jnp.where(random & (t < memory_length), any_action, logits[0].argmax(-1))
        env_state, now = env.step(env_key, env_state, action)
        return t + 1, env_state, now.obs, now.done, carry, key, now.episode_return

    loop = 0, env_state, obs, jnp.ones(E, bool), carry, key, jnp.zeros(E)
    return jax.lax.while_loop(lambda loop: loop[0] <= memory_length, step, loop)[-1].mean()


def main():
    for observed in (["--observe-action"], []):
        flags = ["--num-seeds", "5", *observed, *sys.argv[1:]]
        with tempfile.TemporaryDirectory() as folder:
            args, state, keys = load(script, train("s5_ppo_memory.py", flags, folder))
        ask = partial(answers, args=args, env=script.Environment(args))
        ask = jax.jit(jax.vmap(ask, (0, 0, None, None)))
        for random in (False, True):
            case = {"observe_action": args.observe_action, "random_actions": random}
            case |= {"trained_to": args.memory_length, "flags": " ".join(flags)}
            for factor in FACTORS:
                length = int(factor * args.memory_length)
                returns = ask(state.params, keys, length, random)
                row = {"asked_at": length, "mean_returns": " ".join(f"{x:.2f}" for x in returns)}
                append(HERE / "relay.csv", case | row | made_by())


if __name__ == "__main__":
    main()
