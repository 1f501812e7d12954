"""A sliding-window Transformer and PPO on bsuite's memory length, beside resettable S5 (Lu et al.).

All is as in s5_ppo_memory.py, which explains the task, but that Transformer blocks, which attend to
the last --context-length steps, take the place of S5's: `diff s5_ppo_memory.py transformer_ppo.py`
shows this text, the flags and checks of the sequence model, and the sequence model.

    python transformer_ppo.py                          # remember 128 steps
    python transformer_ppo.py --env-id CartPole-v1     # any gymnax task, flat Box, Discrete actions
    python transformer_ppo.py --resume runs/RUN        # goes on after Ctrl-C or a kill

Departures from the paper are those of s5_ppo_memory.py that are not S5's own, and:
- Attention is over a window, and to steps of the same episode only. Keys and values of steps before
  a rollout are those that acting left, constants made by older parameters (Dai et al. 2019).
- jax.nn.dot_product_attention is left to choose its kernel, which in jax 0.10 is always XLA's:
  cuDNN's fused one has to be asked for, and computes in half precision only.
- --num-heads 2 of --key-size 16 and --mlp-size 48 give the network as many parameters as S5's,
  within 10 %, at the same width. Usual would be heads of 64 in all and 256 hidden units.
"""

import argparse
import contextlib
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import partial
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import tyro
from flax import serialization
from jax.flatten_util import ravel_pytree
from tensorboardX import SummaryWriter
from tqdm import tqdm


# ==== Arguments ===================================================================================
@dataclass
class Args:
    # ---- run
    seed: int = 0  # first seed; the others follow, SEED + 1 ...
    num_seeds: int = 1  # independent seeds, trained side by side
    num_devices: int = 1  # GPUs, or other devices of JAX, that share each seed's environments
    total_timesteps: int | None = None  # steps of a seed, at least; None: 4,000 x MEMORY_LENGTH
    log_interval: int = 10  # updates in one jitted call, and in one row of metrics.csv
    checkpoint_interval: int = 60  # seconds between saves, of metrics too; it also saves as it ends
    resume: Path | None = None  # run directory to go on with; flags given beside it replace its own
    track: bool = False  # send the metrics to Weights & Biases too, to project WANDB_PROJECT
    tf32: bool = False  # let NVIDIA GPUs use TF32; acting and learning then differ by about 1e-3

    # ---- task
    env_id: str = "MemoryChain-bsuite"  # gymnax's, with Discrete actions, or else RepeatPrevious
    memory_length: int = 128  # longest memory trained: the step, from 0, that asks for the cue
    min_memory_length: int = 4  # shortest; every episode draws its own, between the two
    observe_action: bool = False  # show the last action: in MemoryChain it can carry the cue on
    seen: tuple[int, ...] = ()  # entries of the observation that the agent sees; none named: all
    noise_std: float = 0.0  # of Gaussian noise on these, which are then clipped to their bounds
    env_params: dict[str, float] = field(default_factory=dict)  # other EnvParams: NAME VALUE ...
    eval_episodes: int = 128  # greedy episodes of each seed and length, at the end

    # ---- sequence model
    num_layers: int = 2  # Transformer blocks; 0 is the network without memory
    d_model: int = 64  # D, width of the blocks
    context_length: int | None = None  # W, steps that attention covers; None: 2 x MEMORY_LENGTH
    num_heads: int = 2  # H, attention heads of a block
    key_size: int = 16  # K, size of a head's queries, keys and values
    mlp_size: int = 48  # hidden units between dense layers; 48: as many parameters as S5's

    # ---- actor and critic
    encoder_size: int = 128  # hidden units of the observation encoder
    head_size: int = 128  # hidden units in each of the two layers of the actor and of the critic

    # ---- PPO
    num_envs: int = 32  # N, parallel environments
    num_steps: int | None = None  # T, of a rollout, and for gradients; None: 2 MEMORY_LENGTH
    num_minibatches: int | None = None  # of a pass; None: 4, or 16 if MEMORY_LENGTH is 2048 or more
    update_epochs: int = 4  # passes over each rollout
    learning_rate: float = 1e-3  # step size of Adam
    anneal_lr: bool = True  # lower the step size linearly to zero over the run
    gamma: float = 0.99  # discount of a step
    gae_lambda: float = 0.95  # lambda of the generalised advantage estimate
    clip_coef: float = 0.2  # epsilon of the clipped objective
    ent_coef: float = 0.0  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # global norm the gradient is clipped to

    def __post_init__(self):  # tyro prints what it raises
        if self.total_timesteps is None:
            self.total_timesteps = 4_000 * self.memory_length
        if self.num_steps is None:
            self.num_steps = 2 * self.memory_length
        if self.num_minibatches is None:  # long rollouts are few, so each has to serve more steps
            self.num_minibatches = 4 if self.memory_length < 2048 else 16
        sizes = "memory_length min_memory_length eval_episodes num_seeds num_devices log_interval "
        sizes += "num_envs num_steps total_timesteps num_minibatches update_epochs d_model "
        for name in (sizes + "encoder_size head_size").split():
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} is below 1")
        if not 0 <= self.noise_std < np.inf:
            raise ValueError(f"--noise-std {self.noise_std} is no standard deviation")
        if self.num_envs % (self.num_minibatches * self.num_devices):
            raise ValueError("--num-envs is no multiple of --num-minibatches x --num-devices")
        if self.num_updates * self.update_epochs * self.num_minibatches >= 2**31:
            raise ValueError(f"--total-timesteps {self.total_timesteps} needs 2^31 gradient steps")
        if self.context_length is None:
            self.context_length = 2 * self.memory_length
        if self.key_size % 2:
            raise ValueError(f"--key-size {self.key_size} is odd, and positions turn pairs")

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        """Updates that really run: total_timesteps, rounded up to whole log intervals."""
        return -(-self.total_timesteps // (self.batch_size * self.log_interval)) * self.log_interval


# ==== Environment: N copies of one task behind `reset` and `step` =================================
class RepeatPrevious:
    """POPGym's task (Morad et al. 2023) behind gymnax's interface: which suit came k - 1 steps ago?

    Each step shows the suit of the next of 52 x (k // 32 + 1) shuffled cards. From the k-th on, an
    answer counts 1 / (cards - k), a wrong one minus that. k is memory_length, which the agent is
    not told: 4, 32 and 64 are POPGym's Easy, Medium and Hard. A state: the suits shown, card t at t
    mod `longest`, how many cards of each suit these are (4,), and t of the last.
    """

    longest = 2048

    def __init__(self):
        from gymnax.environments.bsuite.memory_chain import EnvParams  # the same two serve here
        from gymnax.environments.spaces import Box, Discrete

        self.default_params = EnvParams()
        self.observation_space, self.action_space = lambda _: Box(0, 1, (4,)), lambda _: Discrete(4)

    def deal(self, key, shown, dealt, t, params):
        """Observation (4,) and state as card t is shown: one of those that are left."""
        left = 13 * (params.memory_length // 32 + 1) - dealt
        suit = jax.random.categorical(key, jnp.log(left))
        shown = shown.at[t % self.longest].set(suit)
        return jax.nn.one_hot(suit, 4), (shown, dealt.at[suit].add(1), t)

    def reset(self, key, params):
        shown, dealt = jnp.zeros(self.longest, jnp.int32), jnp.zeros(4, jnp.int32)
        return self.deal(key, shown, dealt, jnp.int32(0), params)

    def step(self, key, state, action, params):
        (shown, dealt, t), k, (key, reset_key) = state, params.memory_length, jax.random.split(key)
        cards = 52 * (k // 32 + 1)
        right = action == shown[(t + 1 - k) % self.longest]
        reward = jnp.where(t + 1 < k, 0.0, jnp.where(right, 1.0, -1.0) / (cards - k))
        obs, state = self.deal(key, shown, dealt, t + 1, params)
        terminated, truncated = t + 2 == cards, t + 1 >= params.max_steps_in_episode
        choose = partial(jnp.where, terminated | truncated)
        after = jax.tree.map(choose, self.reset(reset_key, params), (obs, state))
        return *after, reward, terminated, truncated, {"final_observation": obs}


class Timestep(NamedTuple):
    """What a step of N environments returns."""

    obs: jax.Array  # (N, O) what the agent sees next
    reward: jax.Array  # (N,)
    done: jax.Array  # (N,) bool: the action ended the episode; obs is the first of the next one
    truncated: jax.Array  # (N,) bool: by a time limit alone
    final_obs: jax.Array  # (N, O) what the agent would have seen next, had there been no reset
    episode_return: jax.Array  # (N,) undiscounted, of the last episode that ended


class Environment:
    """A gymnax environment whose observation also tells the agent what it did and what came of it.

    The agent sees observation, previous reward and reset flag, and with --observe-action its
    previous action, one-hot: (O,) in all. As an episode starts, action and reward are zero and the
    flag is one. A state is the pair of gymnax's state and its EnvParams, with leading axis N each.
    """

    def __init__(self, args: Args):
        import gymnax  # here, since it takes three seconds: --help need not wait for it
        from gymnax.wrappers import LogWrapper

        if "RepeatPrevious" not in gymnax.registered_envs:
            gymnax.register("RepeatPrevious", RepeatPrevious)
        env, params = gymnax.make(args.env_id)
        self.env, self.args = LogWrapper(env), args
        self.has_memory_length = hasattr(params, "memory_length")
        if self.has_memory_length:  # MemoryChain's limit of 1,000 steps would end longer memories
            params = params.replace(max_steps_in_episode=2**30)
        for name, value in args.env_params.items():
            params = params.replace(**{name: type(getattr(params, name))(value)})
        self.params, self.has_time_limit = params, params.max_steps_in_episode < 2**30
        observation, action = env.observation_space(params), env.action_space(params)
        if len(observation.shape) != 1 or not hasattr(action, "n"):
            raise ValueError(f"{args.env_id} has no flat Box to observe or no Discrete actions")
        if 8 * args.memory_length > getattr(env, "longest", np.inf):  # the evaluation's longest
            raise ValueError(f"--memory-length {args.memory_length}: at most {env.longest // 8}")
        self.num_actions, self.bounds = action.n, (observation.low, observation.high)
        self.seen = np.arange(observation.shape[0])[[*args.seen] or slice(None)]

    def agent_obs(self, key, obs, action, reward, reset):
        """What the agent sees, (N, O), from gymnax's observation and what led to it, (N, ...)."""
        if self.args.noise_std:
            noise = self.args.noise_std * jax.random.normal(key, obs.shape)
            obs = jnp.clip(obs + noise, *self.bounds)
        obs, previous = obs[:, self.seen], reward[:, None]
        if self.args.observe_action:
            action = jax.nn.one_hot(action, self.num_actions)
            previous = jnp.concatenate([action, previous], axis=1)
        previous = jnp.where(reset[:, None], 0.0, previous)
        return jnp.concatenate([obs, previous, reset[:, None]], axis=1).astype(jnp.float32)

    def draw_lengths(self, key, num_envs):
        """Memory lengths (N,) of episodes, spread by their logarithm: the short teach the long."""
        longest = self.args.memory_length
        shortest = min(self.args.min_memory_length, longest)
        share = jnp.sqrt(jax.random.uniform(key, (num_envs,)))  # the root: long rather than short
        return (shortest * (longest / shortest) ** share).round().astype(jnp.int32)

    def reset(self, key, num_envs, memory_length=None):
        """State and obs (N, O). memory_length: that of the first episodes; None draws them."""
        length_key, key, noise_key = jax.random.split(key, 3)
        params = jax.tree.map(lambda x: jnp.broadcast_to(x, (num_envs, *jnp.shape(x))), self.params)
        if self.has_memory_length:
            drawn = self.draw_lengths(length_key, num_envs)
            length = drawn if memory_length is None else jnp.full(num_envs, memory_length)
            params = params.replace(memory_length=length)
        obs, inner = jax.vmap(self.env.reset)(jax.random.split(key, num_envs), params)
        none, true = jnp.zeros(num_envs, jnp.int32), jnp.ones(num_envs, bool)
        return (inner, params), self.agent_obs(noise_key, obs, none, none, true)

    def step(self, key, state, action):
        """Steps all N environments with action (N,) int32; those that end start anew."""
        (inner, params), (length_key, key, noise_key) = state, jax.random.split(key, 3)
        keys = jax.random.split(key, len(action))
        step = jax.vmap(self.env.step)
        obs, inner, reward, terminated, truncated, info = step(keys, inner, action, params)
        reward, done = reward.astype(jnp.float32), terminated | truncated
        if self.has_memory_length:
            drawn = self.draw_lengths(length_key, len(done))
            length = jnp.where(done, drawn, params.memory_length)
            params = params.replace(memory_length=length)
        final_obs = info["final_observation"]
        return (inner, params), Timestep(
            obs=self.agent_obs(noise_key, obs, action, reward, done),
            reward=reward,
            done=done,
            truncated=truncated & ~terminated,
            final_obs=self.agent_obs(noise_key, final_obs, action, reward, jnp.zeros_like(done)),
            episode_return=info["returned_episode_returns"],
        )


# ==== Sequence model: Transformer with a sliding window ===========================================
QUERY_BLOCK = 64  # queries whose scores exist at once; 256 took about twice as long on a CPU


class Cache(NamedTuple):
    """What a layer remembers of the current episode, as a ring: step p of it is in slot p mod W."""

    keys: jax.Array  # (N, W, H, K), rotated to their step's position
    values: jax.Array  # (N, W, H, K)
    steps: jax.Array  # (N,) int32, steps of the episode so far; slots beyond these are masked


def rotate(x, position):
    """Rotary embedding (Su et al. 2021) of x (N, T, H, K); position (N, T) is the episode's step.

    Turns each pair (x[..., i], x[..., i + K/2]) by an angle proportional to position. The product
    of a rotated query and key depends on how far apart they are: a key is rotated once and kept.
    """
    half = x.shape[-1] // 2
    angle = position[..., None, None] * 10_000.0 ** (-jnp.arange(half) / half)  # (N, T, 1, K / 2)
    a, b, cos, sin = x[..., :half], x[..., half:], jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def banded_attention(query, keys, values, first_visible):
    """Attention (N, T, H, K) of query (N, T, H, K) at times 0 to T-1 to the keys from time
    first_visible[:, t] to t.

    keys and values (N, W + T, H, K) are those of times -W to T-1; first_visible (N, T) is t - W +
    1, the window, or later where the episode began later. Queries are taken in blocks of B =
    QUERY_BLOCK. A block meets only the W + B keys that end with its last query's, and its scores
    (N, H, B, W + B) are computed again for the gradient, not kept: matrix products grow as T W, not
    T^2, and memory as T + W and one block's scores.
    """
    (N, T, H, K), W = query.shape, keys.shape[1] - query.shape[1]
    B = min(T, QUERY_BLOCK)
    C = -(-T // B)  # blocks; the last is filled up with queries that nobody reads
    fill = ((0, 0), (0, C * B - T), (0, 0), (0, 0))
    query, keys, values = (jnp.pad(x, fill) for x in (query, keys, values))
    first_visible = jnp.pad(first_visible, fill[:2])

    @jax.checkpoint
    def attend(start):
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=start, axis=1)
        q, first = (cut(x, slice_size=B) for x in (query, first_visible))
        k, v = (cut(x, slice_size=W + B) for x in (keys, values))
        q_time, k_time = start + jnp.arange(B)[:, None], start - W + jnp.arange(W + B)
        mask = (first[..., None] <= k_time) & (k_time <= q_time)  # (N, B, W + B); each sees itself
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])  # (N, B, H, K)

    y = jax.lax.map(attend, B * jnp.arange(C))  # (C, N, B, H, K)
    return jnp.moveaxis(y, 0, 1).reshape(N, C * B, H, K)[:, :T]


class Attention(nn.Module):
    """Attention of H heads (Vaswani et al. 2017) to the last W steps of the same episode.

    Call with a Cache, u (T, N, D), reset (T, N) bool; returns the next Cache and y (T, N, D).
    """

    args: Args

    @nn.compact
    def __call__(self, cache, u, reset):
        (T, N, D), (_, W, H, K) = u.shape, cache.keys.shape
        cache = jax.lax.stop_gradient(cache)  # also for those who differentiate through two calls
        t = jnp.arange(T)  # 0 is this call's first step; cached steps are at -1, -2, ...
        # When a step's episode began: at the last reset or else where the cached one did.
        start = jax.lax.cummax(jnp.where(reset.T, t, -cache.steps[:, None]), axis=1)  # (N, T)
        position = t - start  # (N, T), which step of its episode
        qkv = nn.Dense(3 * H * K)(u.reshape(T * N, D)).reshape(T, N, 3, H, K)
        query, keys, values = qkv.transpose(2, 1, 0, 3, 4)  # (N, T, H, K) each
        query, keys = rotate(query, position), rotate(keys, position)

        first_visible = jnp.maximum(start, t - W + 1)  # (N, T), the oldest time each query sees
        # Into the ring goes what the last query sees, at most W steps of one episode: no two share
        # a slot, where JAX would leave open which is written. "drop" skips W, which is no slot.
        env, slot = jnp.arange(N)[:, None], jnp.where(t >= first_visible[:, -1:], position % W, W)
        next_cache = Cache(
            keys=cache.keys.at[env, slot].set(keys, mode="drop"),
            values=cache.values.at[env, slot].set(values, mode="drop"),
            steps=position[:, -1] + 1,
        )
        if T == 1:  # acting: all that this step sees is in the ring, and nothing need be moved
            mask = jnp.arange(W) <= position  # (N, W): slots the episode has filled
            ring = next_cache.keys, next_cache.values
            y = jax.nn.dot_product_attention(query, *ring, mask=mask[:, None, None])
        else:  # learning: the ring, cut open to hold times -W to -1, then this call's steps

            def after_ring(ring, now):  # (N, W + T, H, K)
                ring = jax.vmap(partial(jnp.roll, axis=0))(ring, -cache.steps)
                return jnp.concatenate([ring, now], axis=1)

            keys, values = after_ring(cache.keys, keys), after_ring(cache.values, values)
            y = banded_attention(query, keys, values, first_visible)
        y = nn.Dense(D)(jnp.swapaxes(y, 0, 1).reshape(T * N, H * K))
        return next_cache, y.reshape(T, N, D)


class SequenceModel(nn.Module):
    """Pre-norm residual blocks: LayerNorm and attention, then LayerNorm and two dense layers.

    carry: a tuple of Caches, one a block. Call with x (T, N, D), reset (T, N); returns carry and y
    (T, N, D). T is 1 when acting and num_steps when learning; both give the same y.
    """

    args: Args

    @nn.compact
    def __call__(self, carry, x, reset):
        T, N, D = x.shape
        next_carry = []
        for cache in carry:  # one a block
            cache, y = Attention(self.args)(cache, nn.LayerNorm()(x), reset)
            x = x + y
            y = nn.gelu(nn.Dense(self.args.mlp_size)(nn.LayerNorm()(x).reshape(T * N, D)))
            x = x + nn.Dense(D)(y).reshape(T, N, D)
            next_carry.append(cache)
        return tuple(next_carry), x

    def initial_carry(self, num_envs):
        args = self.args
        zeros = jnp.zeros((num_envs, args.context_length, args.num_heads, args.key_size))
        return (Cache(zeros, zeros, jnp.zeros(num_envs, jnp.int32)),) * args.num_layers


# ==== Actor-critic ================================================================================
class ActorCritic(nn.Module):
    """Encoder, sequence model, and a head each for the logits (T, N, A) and the value (T, N)."""

    args: Args
    num_actions: int

    @nn.compact
    def __call__(self, carry, obs, reset):
        T, N, O = obs.shape

        def dense(x, size, scale=np.sqrt(2), use_bias=True):
            return nn.Dense(size, use_bias, kernel_init=nn.initializers.orthogonal(scale))(x)

        # Without biases: a constant would add up in a memory that does not forget.
        x = nn.relu(dense(obs.reshape(T * N, O), self.args.encoder_size, use_bias=False))
        x = nn.relu(dense(x, self.args.d_model, use_bias=False)).reshape(T, N, -1)
        carry, x = SequenceModel(self.args)(carry, x, reset)
        x = x.reshape(T * N, self.args.d_model)

        def head(size):
            hidden = nn.relu(dense(x, self.args.head_size))
            hidden = nn.relu(dense(hidden, self.args.head_size))
            # Near zero at first: a random value function would look like advantages, which
            # normalisation blows up where rewards are rare, until the policy is deterministic.
            return dense(hidden, size, 0.01).reshape(T, N, size)

        return carry, head(self.num_actions), head(1)[..., 0]


# ==== PPO =========================================================================================
class Transition(NamedTuple):
    """A step of N environments; over a rollout, every field has leading axes (T, N)."""

    obs: jax.Array
    reset: jax.Array  # obs[t] is the first of an episode: what the memory goes by
    action: jax.Array
    log_prob: jax.Array
    value: jax.Array
    reward: jax.Array  # plus gamma times the value of the final observation where truncated
    done: jax.Array  # action[t] ended an episode: what the advantage goes by


class TrainState(NamedTuple):
    """All that training needs to go on."""

    params: dict
    opt_state: tuple
    actor: tuple  # env_state, obs (N, O), reset (N,) and the memory before it has seen obs
    key: jax.Array


def gae(batch, last_value, gamma, gae_lambda):
    """Generalised advantage estimates (T, N) of a Transition (T, N) (Schulman et al. 2016).

    last_value (N,) is the value of the observation after the last step. `done` stops both the
    bootstrap and the trace. Where a time limit is no real end, its value is in reward already.
    """

    def step(later, now):
        advantage, next_value = later
        delta = now.reward + gamma * jnp.where(now.done, 0.0, next_value) - now.value
        advantage = delta + gamma * gae_lambda * jnp.where(now.done, 0.0, advantage)
        return (advantage, now.value), advantage

    later = jnp.zeros_like(last_value), last_value
    return jax.lax.scan(step, later, batch, reverse=True)[1]


def ppo_loss(params, network, carry, batch, advantage, target, args):
    """Clipped objective, value loss, entropy bonus (Schulman et al. 2017) of M whole environments.

    batch: Transition (T, M); carry: the memory, leading axis M, that the rollout began with;
    advantage, target (T, M). Returns the scalar loss, penalties added, and scalars to log.
    """
    inputs = params, carry, batch.obs, batch.reset
    (_, logits, value), sown = network.apply(*inputs, mutable="intermediates")
    log_p = jax.nn.log_softmax(logits)
    log_prob = jnp.take_along_axis(log_p, batch.action[..., None], axis=-1)[..., 0]
    entropy = -(jnp.exp(log_p) * log_p).sum(-1).mean()
    log_ratio = log_prob - batch.log_prob
    ratio = jnp.exp(log_ratio)
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    clipped = jnp.clip(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -jnp.minimum(ratio * advantage, clipped * advantage).mean()
    value_loss = 0.5 * jnp.square(value - target).mean()
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
    return loss + sum(jax.tree.leaves(sown)), {  # sown: the sequence model's penalties
        "losses/policy_loss": policy_loss,
        "losses/value_loss": value_loss,
        "losses/entropy": entropy,
        "losses/approx_kl": (ratio - 1 - log_ratio).mean(),  # k3 of Schulman's note: never negative
        "losses/clipfrac": (jnp.abs(ratio - 1) > args.clip_coef).mean(),
    }


def learn(params_and_opt_state, env_ids, carry, rollout, network, optimizer, args):
    """One gradient step on the environments env_ids (M,), over the whole length of the rollout.

    carry: the memory that the rollout began with; rollout: batch, advantage and target (T, N).
    """
    params, opt_state = params_and_opt_state
    carry = jax.tree.map(lambda x: x[env_ids], carry)
    minibatch = jax.tree.map(lambda x: x[:, env_ids], rollout)
    grads, losses = jax.grad(ppo_loss, has_aux=True)(params, network, carry, *minibatch, args)
    flat, unflatten = ravel_pytree(grads)  # one all-reduce, not one for each array
    flat = jax.lax.pmean(flat, "devices")
    losses["losses/grad_norm"] = jnp.linalg.norm(flat)
    updates, opt_state = optimizer.update(unflatten(flat), opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), losses


def make_train(args, env):
    """Two pure functions: init(key) -> TrainState, and train(TrainState) -> TrainState, metrics.

    Both are one program for all devices (SPMD): each device steps and learns from its own share of
    the environments and averages its gradients with the others'.
    """
    num_envs, network = args.num_envs // args.num_devices, ActorCritic(args, env.num_actions)
    steps = args.num_updates * args.update_epochs * args.num_minibatches
    last = 0.0 if args.anneal_lr else args.learning_rate
    adam = optax.adam(optax.linear_schedule(args.learning_rate, last, steps), eps=1e-5)
    optimizer = optax.chain(optax.clip_by_global_norm(args.max_grad_norm), adam)

    def init(key):
        key, env_key, params_key = jax.random.split(key, 3)
        env_key = jax.random.fold_in(env_key, jax.lax.axis_index("devices"))
        env_state, obs = env.reset(env_key, num_envs)
        reset, carry = jnp.ones(num_envs, bool), SequenceModel(args).initial_carry(num_envs)
        params = network.init(params_key, carry, obs[None], reset[None])
        actor = env_state, obs, reset, carry
        return TrainState(params=params, opt_state=optimizer.init(params), actor=actor, key=key)

    def act(params, actor, key):
        """One step; the next actor, a Transition, and returns of episodes that ended, else 0."""
        env_state, obs, reset, carry = actor
        action_key, env_key = jax.random.split(key)
        forward = partial(network.apply, params)
        carry, logits, value = forward(carry, obs[None], reset[None])
        action = jax.random.categorical(action_key, logits[0])
        log_prob = jax.nn.log_softmax(logits[0])[jnp.arange(num_envs), action]
        env_state, timestep = env.step(env_key, env_state, action)
        reward = timestep.reward
        if env.has_time_limit:
            # The episode would have gone on: add what it was still worth, with the memory it had.
            final_obs, no_reset = timestep.final_obs[None], jnp.zeros_like(reset)[None]
            final_value = forward(carry, final_obs, no_reset)[2][0]
            reward += args.gamma * jnp.where(timestep.truncated, final_value, 0.0)
        transition = Transition(
            obs=obs,
            reset=reset,
            action=action,
            log_prob=log_prob,
            value=value[0],
            reward=reward,
            done=timestep.done,
        )
        actor = env_state, timestep.obs, timestep.done, carry
        return actor, (transition, jnp.where(timestep.done, timestep.episode_return, 0.0))

    def update(state, _):
        """One rollout, and update_epochs passes over it."""
        key, device_key = jax.random.split(state.key)
        device_key = jax.random.fold_in(device_key, jax.lax.axis_index("devices"))
        act_key, *epoch_keys = jax.random.split(device_key, 1 + args.update_epochs)
        act_keys = jax.random.split(act_key, args.num_steps)
        actor, (batch, returns) = jax.lax.scan(partial(act, state.params), state.actor, act_keys)
        _, obs, reset, carry = actor
        last_value = network.apply(state.params, carry, obs[None], reset[None])[2][0]
        advantage = gae(batch, last_value, args.gamma, args.gae_lambda)
        target = advantage + batch.value

        order = jnp.concatenate([jax.random.permutation(k, num_envs) for k in epoch_keys])
        order = order.reshape(args.update_epochs * args.num_minibatches, -1)  # (gradient steps, M)
        start = state.actor[-1]  # the memory before the rollout; every pass over it starts there
        fixed = {"network": network, "optimizer": optimizer, "args": args}
        step = partial(learn, carry=start, rollout=(batch, advantage, target), **fixed)
        (params, opt_state), losses = jax.lax.scan(step, (state.params, state.opt_state), order)
        losses["losses/explained_variance"] = 1 - advantage.var() / (target.var() + 1e-8)
        state = state._replace(params=params, opt_state=opt_state, actor=actor, key=key)
        episodes = jnp.stack([batch.done.sum(), returns.sum()])
        return state, (losses, episodes)

    def train(state):
        """log_interval updates. Losses are means over them, the return one over whole episodes."""
        state, (losses, episodes) = jax.lax.scan(update, state, length=args.log_interval)
        metrics = jax.lax.pmean(jax.tree.map(jnp.mean, losses), "devices")
        count, returns = jax.lax.psum(episodes.sum(0), "devices")
        metrics |= {"charts/episodic_return": returns / count, "charts/episodes": count}
        return state, metrics  # the return is NaN where no episode ended

    copied, split = jax.P(), jax.P("devices")
    specs = TrainState(params=copied, opt_state=copied, actor=split, key=copied)
    spmd = partial(jax.shard_map, mesh=jax.make_mesh((args.num_devices,), ("devices",)))
    spmd = partial(spmd, out_specs=specs, check_vma=False)  # JAX cannot see that copies agree
    return spmd(init, in_specs=copied), spmd(train, in_specs=(specs,), out_specs=(specs, copied))


# ==== Evaluation ==================================================================================
def evaluate(params, key, memory_length, args, env):
    """What one whole greedy episode returns in each of E = eval_episodes environments, (E,).

    One episode in each, not the first E to end: those would be the short ones.
    """
    network, E = ActorCritic(args, env.num_actions), args.eval_episodes
    reset_key, key = jax.random.split(key)
    env_state, obs = env.reset(reset_key, E, memory_length)

    def step(loop):
        (env_state, obs, reset, carry), key, finished, returns = loop
        key, env_key = jax.random.split(key)
        carry, logits, _ = network.apply(params, carry, obs[None], reset[None])
        env_state, timestep = env.step(env_key, env_state, logits[0].argmax(-1))
        returns = jnp.where(finished, returns, timestep.episode_return)
        actor = env_state, timestep.obs, timestep.done, carry
        return actor, key, finished | timestep.done, returns

    actor = env_state, obs, jnp.ones(E, bool), SequenceModel(args).initial_carry(E)
    loop = actor, key, jnp.zeros(E, bool), jnp.zeros(E)
    return jax.lax.while_loop(lambda loop: ~loop[2].all(), step, loop)[-1]


def report(run_dir, state, keys, timing, args, env):
    """Writes and prints mean returns, of all seeds, also at lengths not trained on: eval.json."""
    of_seeds = jax.jit(jax.vmap(partial(evaluate, args=args, env=env), (0, 0, None)))
    factors = (0.5, 1, 2, 4, 8) if env.has_memory_length else ()
    lengths = [max(1, int(args.memory_length * factor)) for factor in factors] or [0]  # 0: none
    means = {length: of_seeds(state.params, keys, length).mean(1).tolist() for length in lengths}
    write(run_dir / "eval.json", json.dumps({"mean_return": means} | timing, indent=2).encode())
    print("mean return of greedy episodes" + ", by memory length" * env.has_memory_length)
    table = pd.DataFrame({"seed": range(args.seed, args.seed + args.num_seeds)} | means)
    print(table.to_string(index=False, float_format="%.2f", col_space=6))


# ==== Run directory ===============================================================================
@contextlib.contextmanager
def refuse(what, kinds=Exception):
    """Says an error of these kinds in one line: the input or the disk is wrong, not the program."""
    try:
        yield
    except kinds as error:
        sys.exit(f"error: {what}: {' '.join(str(error).split())}")


def parse_flags() -> tuple[Args, list[str]]:
    """Args, and the flags they come from: with --resume, the run's before the command line's."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", type=Path)
    run_dir, flags = parser.parse_known_args()[0].resume, sys.argv[1:]
    if run_dir:
        with refuse(f"--resume {run_dir}"):
            config = json.loads((run_dir / "config.json").read_text())
            flags = [*map(str, config["flags"]), *flags]  # of a flag given twice the last counts
    return tyro.cli(Args, args=flags, description=__doc__), flags


def write(path, content: bytes):
    """Whole or not at all: written beside, then renamed."""
    beside = path.with_name("unfinished")
    beside.write_bytes(content)
    os.replace(beside, path)


def write_config(run_dir, args, flags):
    here = Path(__file__).resolve().parent
    config = {"args": asdict(args), "flags": flags, "device": jax.devices()[0].device_kind}
    config["versions"] = {package.name: package.version for package in distributions()}
    config["git_commit"] = subprocess.getoutput(f'git -C "{here}" rev-parse HEAD 2>/dev/null')
    write(run_dir / "config.json", json.dumps(config, indent=2, default=str).encode())


def save(run_dir, state, rows):
    """One moment of the run: checkpoint.gz, and its rows as metrics.csv and for TensorBoard.

    The checkpoint ends with a checksum (gzip's), and the one before is kept. All else is written
    anew, so that each row is there once, whatever a kill cut off.
    """
    checkpoint = run_dir / "checkpoint.gz"
    if checkpoint.exists():
        shutil.copy(checkpoint, run_dir / "previous_checkpoint.gz")
    content = {"leaves": jax.tree.leaves(jax.device_get(state)), "rows": json.dumps(rows)}
    write(checkpoint, gzip.compress(serialization.to_bytes(content), 1))
    if not rows:  # stopped before the first update
        return

    table = pd.DataFrame(rows)
    write(run_dir / "metrics.csv", table.to_csv(index=False, na_rep="nan").encode())
    shutil.rmtree(run_dir / "tensorboard", ignore_errors=True)
    scalars = table.melt(["seed", "global_step"])
    for seed, mine in scalars[np.isfinite(scalars.value)].groupby("seed"):
        with SummaryWriter(str(run_dir / "tensorboard" / f"seed_{seed}")) as tensorboard:
            for row in mine.itertuples():
                tensorboard.add_scalar(row.variable, row.value, row.global_step)


def load_checkpoint(run_dir, like):
    """State, on the devices that `like` is on, and rows; ValueError if its shapes are others."""
    saved = serialization.msgpack_restore(gzip.decompress((run_dir / "checkpoint.gz").read_bytes()))
    stored, (leaves, structure) = saved["leaves"].values(), jax.tree.flatten(like)
    if [(x.shape, x.dtype) for x in stored] != [(x.shape, x.dtype) for x in leaves]:
        raise ValueError("its network or its environments are of other sizes")
    stored = [jax.device_put(x, y.sharding) for x, y in zip(stored, leaves, strict=True)]
    return jax.tree.unflatten(structure, stored), json.loads(saved["rows"])


# ==== Main ========================================================================================
def main():
    start_time = time.time()
    os.environ["MPLBACKEND"] = "agg"  # for gymnax's matplotlib; a notebook's may be missing
    args, flags = parse_flags()
    jax.config.update("jax_enable_x64", False)
    jax.config.update("jax_default_matmul_precision", "default" if args.tf32 else "highest")
    # `refuse` hides tracebacks: while you edit the environment, go without it.
    with refuse("--env-id, --env-params, --seen, --memory-length or --num-devices"):
        env = Environment(args)
        init, train = make_train(args, env)
    name = f"{Path(__file__).stem}__{args.env_id}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    run_dir = args.resume or Path("runs", name)
    if args.track:
        with refuse("--track"):
            import wandb

            wandb.init(id=run_dir.resolve().name, resume="allow", config=asdict(args))

    # One seed after another: batched QR, of the orthogonal weights, can hang on a few CPU cores.
    seeds = range(args.seed, args.seed + args.num_seeds)
    keys = jnp.stack([jax.random.PRNGKey(seed) for seed in seeds])
    state = jax.jit(partial(jax.lax.map, init))(keys)
    with refuse(f"--resume {run_dir}: checkpoint.gz (see also previous_checkpoint.gz)"):
        state, rows = load_checkpoint(run_dir, state) if args.resume else (state, [])
    with refuse(run_dir, OSError):
        run_dir.mkdir(parents=True, exist_ok=True)
        write_config(run_dir, args, flags)
        if not args.resume:
            save(run_dir, state, rows)  # so that --resume works from here on
    step, total = rows[-1]["global_step"] if rows else 0, args.num_updates * args.batch_size
    steps_a_call = args.log_interval * args.batch_size
    size = sum(x[0].size for x in jax.tree.leaves(state.params))
    print(f"{run_dir}: {size:,} parameters, {total:,} steps, {jax.devices()[0].device_kind}")

    # A vmap over a single seed would run half as fast.
    train = jax.vmap(train) if args.num_seeds > 1 else partial(jax.lax.map, train)
    train = jax.jit(train, donate_argnums=0).lower(state).compile()
    timing, last_save, stopped_by = {"compiled_after": time.time() - start_time}, time.time(), []
    stopping = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    stopping = {x for x in stopping if signal.getsignal(x) != signal.SIG_IGN}  # as nohup sets it
    for number in stopping:
        signal.signal(number, lambda number, _: stopped_by.append(signal.Signals(number).name))
    try:
        bar = tqdm(total=total, initial=step, unit="step", unit_scale=True)
        while step < total and not stopped_by:
            call_start = time.time()
            state, metrics = train(state)
            metrics = jax.device_get(metrics)  # waits for the device
            if not np.isfinite(metrics["losses/grad_norm"]).all():
                bar.close()
                how = f"a smaller --learning-rate, anew or with --resume {run_dir}"
                sys.exit(f"error: the gradient was not finite after step {step:,}; try {how}")
            step += steps_a_call
            metrics["charts/SPS"] = steps_a_call / (time.time() - call_start)
            new = pd.DataFrame({"global_step": step, "seed": seeds} | metrics).to_dict("records")
            rows += new
            if args.track:
                sent = {f"seed_{row['seed']}/{name}": row[name] for row in new for name in metrics}
                wandb.log(sent, step=step)
            bar.set_postfix_str(f"return {metrics['charts/episodic_return'].mean():.2f}")
            bar.update(steps_a_call)
            if time.time() - last_save > args.checkpoint_interval:
                save(run_dir, state, rows)
                last_save = time.time()
        bar.close()
    except OSError as error:  # a closed pipe, a full disk
        stopped_by.append(error)
    with refuse(run_dir, OSError):
        save(run_dir, state, rows)
    if stopped_by:
        sys.exit(f"stopped by {stopped_by[0]}; go on with: python {sys.argv[0]} --resume {run_dir}")
    for number in stopping | {signal.SIGPIPE}:
        signal.signal(number, signal.SIG_DFL)  # nothing is left to lose
    timing["trained_after"] = time.time() - start_time  # seconds, as the other
    report(run_dir, state, keys, timing, args, env)


if __name__ == "__main__":
    main()
