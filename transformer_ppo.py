# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "brax>=0.14.2,<0.15", "flax>=0.12,<0.13", "gymnax>=1.0.1,<1.1", "jax>=0.10,<0.12", "matplotlib>=3.9,<4",
#     "numpy>=2,<3", "optax>=0.2.5,<0.3", "orbax-checkpoint>=0.11,<0.13", "rich>=13,<16", "scipy>=1.13,<2",
#     "six>=1.16", "tensorboardX>=2.6,<3", "tyro>=1,<2",
# ]
# ///
"""A sliding-window Transformer and PPO on bsuite's memory length, beside resettable S5 (Lu et al. 2023, 2303.03982).

The agent sees a cue, +1 or -1, in the first two observations of an episode, then only a countdown, and at step
--memory-length, counted from 0, must answer with the cue. All is as in s5_ppo_memory.py, the width, the encoder, the
heads and the PPO, but that Transformer blocks, which attend to the last --context-length steps, take the place of S5's:
`diff s5_ppo_memory.py transformer_ppo.py` shows this text, the flags and checks of the sequence model, and the sequence
model.

    python transformer_ppo.py                          # length 128
    python benchmarks/memory_length.py --models Transformer --lengths 512    # other lengths need other flags
    python transformer_ppo.py --env-id CartPole-v1     # any gymnax environment with a flat Box and Discrete actions
    python transformer_ppo.py --resume runs/RUN        # goes on after Ctrl-C or a kill

What to expect, on one core of a cloud machine's CPU (benchmarks/first_minute.py, 2026-11-25): the defaults take 65 to
66 seconds from process start, 12 of them for compiling, at 15,600 to 16,100 steps per second, and answer 128 of 128
questions right for each of seeds 0 to 4; at memories of 64, 256 and 512 steps, on which they were not trained, they are
at chance in 12 of 15 cases. An acting step reads --context-length keys in every block, where S5 and the LSTM read one
state, and the products of an update grow as --num-steps times --context-length. A step further back is out of sight,
except through a step in between, if training finds such a relay.

Where this departs from the paper, and why:
- PPO on many environments, not A2C on one: it fills the machine, and is what people use.
- Attention is over a window, and to steps of the same episode only. Within a rollout the learner computes keys and
  values anew; those of earlier steps it takes from the cache that acting left, as constants, made by older parameters
  (as Transformer-XL does, Dai et al. 2019).
- jax.nn.dot_product_attention is left to choose its kernel, which in jax 0.10 is always XLA's: cuDNN's fused one has
  to be asked for and computes in half precision only, where all else here is float32.
- --num-heads 2 of --key-size 16 and --mlp-size 48 give the network as many parameters as the S5 one, within 10 %, at
  the same width and number of blocks; the blocks alone have 18 % more. Usual for a width of 64 would be heads of 64 in
  all, not 32, and 256 hidden units.
- The agent also sees its previous action and reward, both zero at the start of each episode, and a reset flag.
- The critic's last layer starts near zero: see ActorCritic.
"""

import contextlib
import csv
import dataclasses
import importlib.metadata
import importlib.util
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.flatten_util import ravel_pytree
from rich.console import Console
from rich.progress import Progress
from rich.table import Table


# ==== Arguments =======================================================================================================
@dataclass
class Args:
    # ---- run
    seed: int = 0  # first seed; the others follow, SEED + 1 ...
    num_seeds: int = 1  # number of independent seeds trained side by side
    num_devices: int = 1  # GPUs, or other devices of JAX, over which each seed's environments are split
    total_timesteps: int = 500_000  # environment steps of each seed, rounded up to whole log intervals
    log_interval: int = 10  # updates in one jitted call, and in one row of metrics.csv
    checkpoint_interval: int = 60  # seconds between checkpoints; the last update is always saved
    resume: Path | None = None  # run directory to continue with its own flags; only --total-timesteps may be raised
    track: bool = False  # send the metrics to Weights & Biases as well
    wandb_project_name: str = "s5-in-context-rl"  # Weights & Biases project of --track
    tf32: bool = False  # let NVIDIA GPUs use TF32; acting and learning then differ by about 1e-3

    # ---- task
    env_id: str = "MemoryChain-bsuite"  # any gymnax environment with a flat Box observation and Discrete actions
    memory_length: int = 128  # step, from 0, that asks for the cue; for more than 200: see benchmarks/memory_length.py
    env_params: dict[str, float] = field(default_factory=dict)  # numbers of its EnvParams to override: NAME VALUE ...
    truncation_is_terminal: bool = False  # a time limit is a real end: no value of what would have come after it
    eval_episodes: int = 128  # greedy episodes of each seed in the evaluation at the end

    # ---- sequence model
    num_layers: int = 2  # Transformer blocks; 0 is the network without memory
    d_model: int = 64  # D, width of the blocks
    context_length: int = 256  # W, steps that attention covers; with less than MEMORY_LENGTH the cue is out of sight
    num_heads: int = 2  # H, attention heads of a block
    key_size: int = 16  # K, size of a head's queries, keys and values
    mlp_size: int = 48  # hidden units between dense layers; 48 gives as many parameters as S5 has, within 10 %

    # ---- actor and critic
    encoder_size: int = 128  # hidden units of the observation encoder
    head_size: int = 128  # hidden units in each of the two layers of the actor and of the critic

    # ---- PPO
    num_envs: int = 32  # N, parallel environments
    num_steps: int = 256  # T, steps of a rollout in each environment; gradients reach back this far and no further
    num_minibatches: int = 4  # minibatches of a pass over the rollout, each of whole environments
    update_epochs: int = 4  # passes over each rollout
    learning_rate: float = 1e-3  # step size of Adam
    anneal_lr: bool = True  # lower the step size linearly to zero over the run
    gamma: float = 0.99  # discount of a step
    gae_lambda: float = 0.95  # lambda of the generalised advantage estimate
    clip_coef: float = 0.2  # epsilon of the clipped objective
    ent_coef: float = 0.0  # weight of the entropy bonus
    final_ent_coef: float | None = None  # its weight at the end, where (1 - progress)^2 is 0; None: it stays the same
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # global norm the gradient is clipped to

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        """Updates that really run: total_timesteps, rounded up to whole log intervals."""
        return -(-self.total_timesteps // (self.batch_size * self.log_interval)) * self.log_interval

    @property
    def cache_bytes(self) -> int:
        """Keys and values on one device at least: as they are, and as a rollout began or those of the evaluation."""
        num_envs = self.num_envs // self.num_devices
        envs = self.num_seeds * (num_envs + max(num_envs, self.eval_episodes))
        return 4 * 2 * self.num_layers * envs * self.context_length * self.num_heads * self.key_size

    def check(self) -> None:
        """Raises ValueError, in one line, for values that cannot work."""
        may_be_zero = ("seed", "checkpoint_interval", "num_layers", "gamma", "gae_lambda", "ent_coef", "vf_coef")
        for f in dataclasses.fields(self):
            flag, value = "--" + f.name.replace("_", "-"), getattr(self, f.name)
            zero_is_fine = f.name in may_be_zero
            limit = np.inf if type(value) is float or f.name == "total_timesteps" else 2**31  # arrays count in 32 bits
            # Written so that NaN is refused too.
            if f.type in (int, float) and not (0 < value < limit or (value == 0 and zero_is_fine)):
                use = "of 0 or more" if zero_is_fine else "above 0"
                raise ValueError(f"{flag} {value}: use a number {use}, and below {limit}")
            if f.name in ("gamma", "gae_lambda") and value > 1:
                raise ValueError(f"{flag} {value} is too large: use 1 or less")
        if self.final_ent_coef is not None and not np.isfinite(self.final_ent_coef):
            raise ValueError(f"--final-ent-coef {self.final_ent_coef} is not finite: use a number, or leave it out")
        if self.key_size % 2:
            raise ValueError(f"--key-size {self.key_size} is odd, and positions turn pairs: use {self.key_size + 1}")
        if self.cache_bytes > 64e9:  # a guard against typing errors, no promise that less will fit
            raise ValueError(
                f"--context-length {self.context_length} needs {self.cache_bytes / 1e9:,.0f} GB or more for keys and "
                f"values, and 64 is the limit: use {int(self.context_length * 64e9 / self.cache_bytes)} or less, or a "
                "smaller --num-envs and --eval-episodes"
            )
        shares = self.num_minibatches * self.num_devices
        if self.num_envs % shares:
            raise ValueError(
                f"--num-envs {self.num_envs} is not divisible by --num-minibatches {self.num_minibatches} times "
                f"--num-devices {self.num_devices}, and a minibatch holds whole environments: use --num-envs "
                f"{-(-self.num_envs // shares) * shares}"
            )
        if self.total_timesteps < self.batch_size:
            rollout = f"a rollout, --num-envs {self.num_envs} x --num-steps {self.num_steps}"
            raise ValueError(f"--total-timesteps {self.total_timesteps} is less than {rollout}: use {self.batch_size}")


# ==== Environment: N copies of one task behind `reset` and `step` =====================================================
class Timestep(NamedTuple):
    """What N environments return: `Environment.reset` with reset True, rewards zero; `step` with reset = done."""

    obs: jax.Array  # (N, O) what the agent sees next
    reset: jax.Array  # (N,) bool: obs is the first of an episode, so the memory must not look back past it
    reward: jax.Array  # (N,)
    done: jax.Array  # (N,) bool: the action ended the episode, by a termination or a time limit
    truncated: jax.Array  # (N,) bool: by a time limit alone
    final_obs: jax.Array  # (N, O) what the agent would have seen next, had the environment not been reset
    episode_return: jax.Array  # (N,) sum of rewards of the episode up to this step, undiscounted
    episode_length: jax.Array  # (N,) int32, its steps


class EnvState(NamedTuple):
    inner: tuple  # gymnax's own state, every leaf with leading axis N
    episode_return: jax.Array  # (N,)
    episode_length: jax.Array  # (N,) int32


class Environment:
    """A gymnax environment whose observation also tells the agent what it did and what came of it.

    The agent sees observation, one-hot previous action, previous reward and reset flag, (O,) in all. At the start
    of every episode, not only of the first, the action and reward are zero and the flag is one. The action lets the
    agent tell its own effect from noise; the flag marks where one episode ends and the next begins.

    Raises ValueError if gymnax has no such environment, or one whose observation or action does not fit.
    """

    def __init__(self, args: Args):
        import gymnax  # here, since it takes three seconds: the flags have been checked by now

        if args.env_id not in gymnax.registered_envs:
            raise ValueError(f"--env-id {args.env_id} is unknown: use one of {', '.join(gymnax.registered_envs)}")
        try:
            self.env, params = gymnax.make(args.env_id)
        except OSError as error:
            raise ValueError(f"--env-id {args.env_id} needs data that could not be loaded: {error}") from None
        fields = [f.name for f in dataclasses.fields(params)]
        overrides = args.env_params
        if args.env_id == "MemoryChain-bsuite":
            if "memory_length" in overrides:
                raise ValueError("--env-params memory_length has a flag of its own: use --memory-length")
            # The default limit of 1,000 steps would end longer memories before their question.
            overrides = {"memory_length": args.memory_length, "max_steps_in_episode": 2**30} | overrides
        for name, value in overrides.items():
            if name not in fields:
                raise ValueError(f"--env-params {name} is no field of {args.env_id}: use {', '.join(fields)}")
            default = getattr(params, name)
            if not isinstance(default, int | float):
                raise ValueError(f"--env-params {name} is an array, which no flag can set: leave it out")
            if not np.isfinite(value) or type(default)(value) != value:
                raise ValueError(f"--env-params {name} {value}: use a number of the kind of its default, {default}")
            params = params.replace(**{name: type(default)(value)})
        self.params = params
        self.has_time_limit = self.params.max_steps_in_episode < 2**30

        observation, action = self.env.observation_space(self.params), self.env.action_space(self.params)
        if len(observation.shape) != 1:
            raise ValueError(f"--env-id {args.env_id} observes shape {observation.shape}: choose one with a flat Box")
        if not hasattr(action, "n"):
            raise ValueError(f"--env-id {args.env_id} has continuous actions: choose one with Discrete actions")
        self.num_actions = action.n
        self.obs_size = observation.shape[0] + self.num_actions + 2  # O

    def agent_obs(self, obs, action, reward, reset):
        """What the agent sees, (N, O), from gymnax's observation and what led to it, each with leading axis N."""
        previous = jnp.concatenate([jax.nn.one_hot(action, self.num_actions), reward[:, None]], axis=1)
        previous = jnp.where(reset[:, None], 0.0, previous)
        return jnp.concatenate([obs, previous, reset[:, None]], axis=1).astype(jnp.float32)

    def reset(self, key, params, num_envs) -> tuple[EnvState, Timestep]:
        obs, inner = jax.vmap(self.env.reset, (0, None))(jax.random.split(key, num_envs), params)
        zeros, none, true = jnp.zeros(num_envs), jnp.zeros(num_envs, jnp.int32), jnp.ones(num_envs, bool)
        obs = self.agent_obs(obs, none, zeros, true)  # whatever the action: it is hidden at a reset
        return EnvState(inner, zeros, none), Timestep(obs, true, zeros, ~true, ~true, obs, zeros, none)

    def step(self, key, state, action, params) -> tuple[EnvState, Timestep]:
        """Steps all N environments with action (N,) int32; those that end start anew, each from a fresh state."""
        keys = jax.random.split(key, action.shape[0])
        step = jax.vmap(self.env.step, (0, 0, 0, None))
        obs, inner, reward, terminated, truncated, info = step(keys, state.inner, action, params)
        reward, done = reward.astype(jnp.float32), terminated | truncated
        timestep = Timestep(
            obs=self.agent_obs(obs, action, reward, done),
            reset=done,
            reward=reward,
            done=done,
            truncated=truncated & ~terminated,
            final_obs=self.agent_obs(info["final_observation"], action, reward, jnp.zeros_like(done)),
            episode_return=state.episode_return + reward,
            episode_length=state.episode_length + 1,
        )
        episode_return = jnp.where(done, 0.0, timestep.episode_return)
        return EnvState(inner, episode_return, jnp.where(done, 0, timestep.episode_length)), timestep


# ==== Sequence model: Transformer with a sliding window ===============================================================
QUERY_BLOCK = 64  # queries whose scores exist at once; on a CPU, blocks of 256 took about twice as long


class Cache(NamedTuple):
    """What one layer remembers of the current episode, as a ring: step p of the episode is in slot p mod W."""

    keys: jax.Array  # (N, W, H, K), rotated to their step's position
    values: jax.Array  # (N, W, H, K)
    steps: jax.Array  # (N,) int32, steps of the episode so far; what slots hold beyond these is masked


def rotate(x, position):
    """Rotary embedding (Su et al. 2021) of x (N, T, H, K); position (N, T) is the step of the episode.

    Turns each pair (x[..., i], x[..., i + K/2]) by an angle proportional to position. The dot product of a rotated
    query and a rotated key depends on how far apart they are, not on where, so that a key is rotated once and kept.
    """
    half = x.shape[-1] // 2
    angle = position[..., None, None] * 10_000.0 ** (-jnp.arange(half) / half)  # (N, T, 1, K / 2)
    a, b, cos, sin = x[..., :half], x[..., half:], jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def banded_attention(query, keys, values, first_visible):
    """Attention (N, T, H, K) of queries (N, T, H, K) at times t = 0..T-1 to the keys of times first_visible[:, t] to t.

    keys and values (N, W + T, H, K) are those of times -W to T-1; first_visible (N, T) is t - W + 1, the window, or
    later where the episode began later. Queries are taken in blocks of B = QUERY_BLOCK. A block meets only the W + B
    keys that end with its last query's, and its scores (N, H, B, W + B) are computed again for the gradient, not kept:
    matrix products grow as T W, not T^2, and memory as T + W and one block's scores.
    """
    (N, T, H, K), W = query.shape, keys.shape[1] - query.shape[1]
    B = min(T, QUERY_BLOCK)
    C = -(-T // B)  # blocks; the last is filled up with queries that nobody reads
    query, keys, values = (jnp.pad(x, ((0, 0), (0, C * B - T), (0, 0), (0, 0))) for x in (query, keys, values))
    first_visible = jnp.pad(first_visible, ((0, 0), (0, C * B - T)))

    @jax.checkpoint
    def attend(block_start):
        q, q_first = (jax.lax.dynamic_slice_in_dim(x, block_start, B, axis=1) for x in (query, first_visible))
        k, v = (jax.lax.dynamic_slice_in_dim(x, block_start, W + B, axis=1) for x in (keys, values))
        q_time, key_time = block_start + jnp.arange(B)[:, None], block_start - W + jnp.arange(W + B)
        mask = (q_first[..., None] <= key_time) & (key_time <= q_time)  # (N, B, W + B); not empty: a query sees itself
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])  # (N, B, H, K)

    y = jax.lax.map(attend, B * jnp.arange(C))  # (C, N, B, H, K)
    return jnp.moveaxis(y, 0, 1).reshape(N, C * B, H, K)[:, :T]


class Attention(nn.Module):
    """Attention of H heads (Vaswani et al. 2017) to the last W steps of the same episode, this one included.

    Call with a Cache, u (T, N, D), reset (T, N) bool; returns the next Cache and y (T, N, D).
    """

    args: Args

    @nn.compact
    def __call__(self, cache, u, reset):
        (T, N, D), (_, W, H, K) = u.shape, cache.keys.shape
        cache = jax.lax.stop_gradient(cache)  # constants also for those who differentiate through two calls
        t = jnp.arange(T)  # 0 is this call's first step; cached steps are at -1, -2, ...
        # When each step's episode began: at the last reset up to it or, if there was none, where the cached one did.
        episode_start = jax.lax.cummax(jnp.where(reset.T, t, -cache.steps[:, None]), axis=1)  # (N, T)
        position = t - episode_start  # (N, T), which step of its episode
        qkv = nn.Dense(3 * H * K)(u.reshape(T * N, D)).reshape(T, N, 3, H, K)
        query, keys, values = qkv.transpose(2, 1, 0, 3, 4)  # (N, T, H, K) each
        query, keys = rotate(query, position), rotate(keys, position)

        first_visible = jnp.maximum(episode_start, t - W + 1)  # (N, T), the oldest time that each query sees
        # Into the ring goes what the last query sees, at most W steps of one episode: no two of them share a slot,
        # where JAX would leave open which is written. Index W is out of range, and "drop" skips it.
        env, slot = jnp.arange(N)[:, None], jnp.where(t >= first_visible[:, -1:], position % W, W)
        next_cache = Cache(
            cache.keys.at[env, slot].set(keys, mode="drop"),
            cache.values.at[env, slot].set(values, mode="drop"),
            position[:, -1] + 1,
        )
        if T == 1:  # acting: all that this step sees is in the ring, and nothing needs to be moved
            mask = jnp.arange(W) <= position  # (N, W), since position is (N, 1): slots the episode has not filled yet
            y = jax.nn.dot_product_attention(query, next_cache.keys, next_cache.values, mask=mask[:, None, None])
        else:  # learning: the ring cut open at its oldest slot, so that it holds times -W to -1, then this call's steps

            def after_ring(ring, now):  # (N, W + T, H, K)
                return jnp.concatenate([jax.vmap(partial(jnp.roll, axis=0))(ring, -cache.steps), now], axis=1)

            y = banded_attention(query, after_ring(cache.keys, keys), after_ring(cache.values, values), first_visible)
        y = nn.Dense(D)(jnp.swapaxes(y, 0, 1).reshape(T * N, H * K))
        return next_cache, y.reshape(T, N, D)


class SequenceModel(nn.Module):
    """Pre-norm residual blocks: LayerNorm and attention, then LayerNorm and two dense layers with GELU between them.

    carry: a tuple of Caches, one a block. Call with x (T, N, D), reset (T, N); returns carry and y (T, N, D).
    T is 1 when acting and num_steps when learning; both give the same y up to rounding.
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


# ==== Actor-critic ====================================================================================================
class ActorCritic(nn.Module):
    """Encoder, sequence model, and one head each for the policy's logits (T, N, A) and the value (T, N)."""

    args: Args
    num_actions: int

    @nn.compact
    def __call__(self, carry, obs, reset):
        T, N, O = obs.shape

        def dense(x, size, scale=np.sqrt(2)):
            return nn.Dense(size, kernel_init=nn.initializers.orthogonal(scale))(x)

        x = nn.relu(dense(obs.reshape(T * N, O), self.args.encoder_size))
        x = nn.relu(dense(x, self.args.d_model)).reshape(T, N, self.args.d_model)
        carry, x = SequenceModel(self.args)(carry, x, reset)
        x = x.reshape(T * N, self.args.d_model)

        def head(size, scale):
            hidden = nn.relu(dense(nn.relu(dense(x, self.args.head_size)), self.args.head_size))
            return dense(hidden, size, scale)

        # Both last layers begin near zero. A random value function would look like advantages; where rewards are rare,
        # normalisation blows those up, and the policy is nearly deterministic before the first reward counts.
        logits = head(self.num_actions, 0.01).reshape(T, N, self.num_actions)
        return carry, logits, head(1, 0.01).reshape(T, N)


# ==== PPO =============================================================================================================
class Transition(NamedTuple):
    """A step of N environments; scanned over a rollout, every field has leading axes (T, N)."""

    obs: jax.Array
    reset: jax.Array  # obs[t] is the first of an episode: what the memory goes by
    action: jax.Array
    log_prob: jax.Array
    value: jax.Array
    reward: jax.Array
    done: jax.Array  # action[t] ended an episode: what the advantage goes by


class TrainState(NamedTuple):
    """All that training needs to go on: a checkpoint holds this and nothing else. Axis N is split over the devices."""

    params: dict
    opt_state: tuple
    env_state: EnvState
    obs: jax.Array  # (N, O)
    reset: jax.Array  # (N,)
    carry: tuple  # the sequence model's memory before it has seen obs
    key: jax.Array
    num_updates: jax.Array  # int32, updates done


def gae(reward, value, done, last_value, gamma, gae_lambda):
    """Generalised advantage estimates (Schulman et al. 2016), (T, N) as the first three arguments are.

    last_value (N,) is the value of the observation after the last step. `done` stops both the bootstrap and the trace.
    Where a time limit is no real end, its value is already in reward.
    """

    def step(later, inputs):
        advantage, next_value = later
        reward, value, done = inputs
        delta = reward + gamma * jnp.where(done, 0.0, next_value) - value
        advantage = delta + gamma * gae_lambda * jnp.where(done, 0.0, advantage)
        return (advantage, value), advantage

    return jax.lax.scan(step, (jnp.zeros_like(last_value), last_value), (reward, value, done), reverse=True)[1]


def categorical(logits, action):
    """Log-probability of the action and entropy, both (...,), from logits (..., A) and action (...,)."""
    log_p = jax.nn.log_softmax(logits)
    log_prob = jnp.take_along_axis(log_p, action[..., None], axis=-1)[..., 0]
    return log_prob, -(jnp.exp(log_p) * log_p).sum(-1)


def ppo_loss(params, network, carry, batch, advantage, target, ent_coef, args):
    """Clipped objective, value loss and entropy bonus (Schulman et al. 2017) of a minibatch of whole environments.

    batch: Transition (T, M); carry: the memory, leading axis M, that the rollout began with; advantage, target (T, M).
    Returns the scalar loss and a dict of scalars to log.
    """
    _, logits, value = network.apply(params, carry, batch.obs, batch.reset)
    log_prob, entropy = categorical(logits, batch.action)
    log_ratio = log_prob - batch.log_prob
    ratio = jnp.exp(log_ratio)
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    clipped = jnp.clip(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -jnp.minimum(ratio * advantage, clipped * advantage).mean()
    value_loss = 0.5 * jnp.square(value - target).mean()
    loss = policy_loss + args.vf_coef * value_loss - ent_coef * entropy.mean()
    return loss, {
        "losses/policy_loss": policy_loss,
        "losses/value_loss": value_loss,
        "losses/entropy": entropy.mean(),
        "losses/approx_kl": (ratio - 1 - log_ratio).mean(),  # k3 of Schulman's note: unbiased, never negative
        "losses/clipfrac": (jnp.abs(ratio - 1) > args.clip_coef).mean(),
    }


def learning_rate_schedule(args):
    """The step size as a function of the number of optimiser steps taken."""
    steps = args.num_updates * args.update_epochs * args.num_minibatches
    return optax.linear_schedule(args.learning_rate, 0.0 if args.anneal_lr else args.learning_rate, steps)


def make_train(args, env):
    """Two pure functions: `init(key)` gives a TrainState; `train(state)` runs log_interval updates on it.

    Both are one program for all devices (SPMD): each device steps and learns from its own share of the environments,
    normalises the advantages of its share of a minibatch, and averages its gradients with the others', so that all have
    the same parameters.
    """
    num_envs = args.num_envs // args.num_devices
    network = ActorCritic(args, env.num_actions)
    adam = optax.adam(learning_rate_schedule(args), eps=1e-5)
    optimizer = optax.chain(optax.clip_by_global_norm(args.max_grad_norm), adam)

    def init(key) -> TrainState:
        key, env_key, params_key = jax.random.split(key, 3)
        env_key = jax.random.fold_in(env_key, jax.lax.axis_index("devices"))
        env_state, first = env.reset(env_key, env.params, num_envs)
        carry = SequenceModel(args).initial_carry(num_envs)
        params = network.init(params_key, carry, first.obs[None], first.reset[None])
        opt_state, num_updates = optimizer.init(params), jnp.zeros((), jnp.int32)
        return TrainState(params, opt_state, env_state, first.obs, first.reset, carry, key, num_updates)

    def act(state: TrainState, key):
        """One step of the rollout."""
        action_key, env_key = jax.random.split(key)
        carry, logits, value = network.apply(state.params, state.carry, state.obs[None], state.reset[None])
        action = jax.random.categorical(action_key, logits[0])
        env_state, timestep = env.step(env_key, state.env_state, action, env.params)
        reward = timestep.reward
        if env.has_time_limit and not args.truncation_is_terminal:
            # The episode would have gone on: add what it was still worth, judged with the memory of before the reset.
            final_obs, no_reset = timestep.final_obs[None], jnp.zeros_like(state.reset)[None]
            _, _, final_value = network.apply(state.params, carry, final_obs, no_reset)
            reward += args.gamma * jnp.where(timestep.truncated, final_value[0], 0.0)
        log_prob, _ = categorical(logits[0], action)
        transition = Transition(state.obs, state.reset, action, log_prob, value[0], reward, timestep.done)
        ended = {"charts/episodes": 1, "charts/episodic_return": timestep.episode_return}
        ended |= {"charts/episodic_length": timestep.episode_length}
        state = state._replace(env_state=env_state, obs=timestep.obs, reset=timestep.reset, carry=carry)
        return state, (transition, jax.tree.map(lambda x: jnp.where(timestep.done, x, 0).sum(), ended))

    def update(state: TrainState, _):
        """One rollout, and update_epochs passes over it."""
        key, device_key = jax.random.split(state.key)
        device_key = jax.random.fold_in(device_key, jax.lax.axis_index("devices"))
        act_key, *epoch_keys = jax.random.split(device_key, 1 + args.update_epochs)
        # Squared, so that the bonus fades well before the step size does: as actions become regular, the network has to
        # learn anew to read its memory among them. A bonus below zero makes them regular (benchmarks/LOG.md, item 22).
        final = args.ent_coef if args.final_ent_coef is None else args.final_ent_coef
        ent_coef = final + (args.ent_coef - final) * (1 - state.num_updates / args.num_updates) ** 2
        first_carry = state.carry  # as acting left it; each pass over the rollout starts from it again
        state, (batch, episodes) = jax.lax.scan(act, state, jax.random.split(act_key, args.num_steps))
        _, _, last_value = network.apply(state.params, state.carry, state.obs[None], state.reset[None])
        advantage = gae(batch.reward, batch.value, batch.done, last_value[0], args.gamma, args.gae_lambda)
        target = advantage + batch.value

        def learn(params_and_opt_state, env_ids):
            """One gradient step on the environments env_ids (M,), over the whole length of the rollout."""
            params, opt_state = params_and_opt_state
            carry = jax.tree.map(lambda x: x[env_ids], first_carry)
            minibatch = jax.tree.map(lambda x: x[:, env_ids], (batch, advantage, target))
            grads, losses = jax.grad(ppo_loss, has_aux=True)(params, network, carry, *minibatch, ent_coef, args)
            flat, unflatten = ravel_pytree(grads)  # one all-reduce, not one an array
            flat = jax.lax.pmean(flat, "devices")
            losses["losses/grad_norm"] = jnp.linalg.norm(flat)
            updates, opt_state = optimizer.update(unflatten(flat), opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), losses

        order = jnp.concatenate([jax.random.permutation(k, num_envs) for k in epoch_keys])
        order = order.reshape(args.update_epochs * args.num_minibatches, -1)  # (gradient steps, M)
        (params, opt_state), losses = jax.lax.scan(learn, (state.params, state.opt_state), order)
        losses["losses/explained_variance"] = 1 - (target - batch.value).var() / (target.var() + 1e-8)
        state = state._replace(params=params, opt_state=opt_state, key=key, num_updates=state.num_updates + 1)
        return state, (jax.tree.map(jnp.mean, losses), jax.tree.map(jnp.sum, episodes))

    def train(state: TrainState) -> tuple[TrainState, dict]:
        """Metrics are means over updates, or over the episodes that ended, NaN if none did, and their number."""
        state, (losses, episodes) = jax.lax.scan(update, state, length=args.log_interval)
        metrics = jax.lax.pmean(jax.tree.map(jnp.mean, losses), "devices")
        sums = jax.lax.psum(jax.tree.map(jnp.sum, episodes), "devices")
        count = sums.pop("charts/episodes")
        return state, metrics | {"charts/episodes": count} | {name: total / count for name, total in sums.items()}

    split, copied = jax.P("devices"), jax.P()
    specs = TrainState(copied, copied, split, split, split, split, copied, copied)
    mesh = jax.make_mesh((args.num_devices,), ("devices",), devices=jax.devices()[: args.num_devices])
    init = jax.shard_map(init, mesh=mesh, in_specs=copied, out_specs=specs, check_vma=False)
    return init, jax.shard_map(train, mesh=mesh, in_specs=(specs,), out_specs=(specs, copied), check_vma=False)


# ==== Evaluation ======================================================================================================
def evaluate(params, key, env_params, greedy, args, env):
    """Returns and lengths, (E,) each, of one whole episode in each of E = eval_episodes environments.

    One episode in each, not the first E to end: those would be the short ones. Actions are the most likely ones if
    `greedy`, else sampled.
    """
    network = ActorCritic(args, env.num_actions)
    key, env_key = jax.random.split(key)
    env_state, timestep = env.reset(env_key, env_params, args.eval_episodes)
    carry = SequenceModel(args).initial_carry(args.eval_episodes)

    def step(state):
        env_state, last, carry, key = state
        key, action_key, env_key = jax.random.split(key, 3)
        carry, logits, _ = network.apply(params, carry, last.obs[None], last.reset[None])
        action = jnp.where(greedy, logits[0].argmax(-1), jax.random.categorical(action_key, logits[0]))
        env_state, timestep = env.step(env_key, env_state, action, env_params)

        # Where the episode has ended its last Timestep stays, whatever comes of the next one.
        stay = jax.vmap(lambda done, old, new: jax.tree.map(partial(jnp.where, done), old, new))
        return env_state, stay(last.done, last, timestep), carry, key

    def unfinished(state):
        _, last, _, _ = state
        return ~last.done.all()

    _, last, _, _ = jax.lax.while_loop(unfinished, step, (env_state, timestep, carry, key))
    return last.episode_return, last.episode_length


# ==== Run directory ===================================================================================================
def new_run_dir(args, task) -> Path:
    now = datetime.now().strftime("%Y%m%d-%H%M%S-%f")  # several may start in one second
    run_dir = Path("runs") / f"{Path(__file__).stem}__{task}__{args.seed}__{now}"
    run_dir.mkdir(parents=True)
    failed, commit = subprocess.getstatusoutput(f'git -C "{Path(__file__).resolve().parent}" rev-parse HEAD')
    packages = [name for name in ("jax", "flax", "optax", "gymnax", "brax") if name in sys.modules]
    config = {
        "args": dataclasses.asdict(args) | {"resume": None},
        "command": " ".join(sys.argv),
        "device": jax.devices()[0].device_kind,
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "git_commit": None if failed else commit,
    }
    (run_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return run_dir


class MetricsLog:
    """Appends a row per call of `train` and seed to metrics.csv, TensorBoard and, with --track, Weights & Biases."""

    def __init__(self, run_dir, args, last_update):
        from tensorboardX import SummaryWriter

        self.path, self.args = run_dir / "metrics.csv", args
        if self.path.exists() and self.path.stat().st_size:  # resumed: forget what was logged after the checkpoint
            head, *rows = self.path.read_text().splitlines(keepends=True)
            self.path.write_text(head + "".join(row for row in rows if int(row.split(",")[0]) <= last_update))
        first_step = last_update * args.batch_size + 1
        folders = [run_dir / "tensorboard" / f"seed_{args.seed + i}" for i in range(args.num_seeds)]
        self.writers = [SummaryWriter(str(folder), purge_step=first_step) for folder in folders]
        if args.track:
            import wandb

            config = json.loads((run_dir / "config.json").read_text())
            self.wandb = wandb.init(
                project=args.wandb_project_name, id=run_dir.absolute().name, resume="allow", config=config
            )

    def write(self, update, metrics, steps_per_second):
        """metrics: what `train` returns, with a leading axis of seeds."""
        args, step = self.args, update * self.args.batch_size
        gradient_steps = update * args.update_epochs * args.num_minibatches
        for i, writer in enumerate(self.writers):
            # NaN, where no episode ended, becomes an empty cell.
            row = {name: None if np.isnan(x[i]) else float(x[i]) for name, x in metrics.items()}
            row["charts/learning_rate"] = float(learning_rate_schedule(args)(gradient_steps - 1))
            row["charts/SPS"] = round(steps_per_second)  # of all seeds together
            line = {"update": update, "global_step": step, "seed": args.seed + i} | row
            with self.path.open("a", newline="") as f:
                table = csv.DictWriter(f, line, lineterminator="\n")
                if f.tell() == 0:
                    table.writeheader()
                table.writerow(line)
            scalars = {name: value for name, value in row.items() if value is not None}
            for name, value in scalars.items():
                writer.add_scalar(name, value, step)
            if args.track:
                prefix = f"seed_{args.seed + i}/" if args.num_seeds > 1 else ""
                self.wandb.log({prefix + name: value for name, value in scalars.items()} | {"global_step": step})

    def close(self):
        for writer in self.writers:
            writer.close()
        if self.args.track:
            self.wandb.finish()


def plot_learning_curve(run_dir, args, metric, baseline, baseline_label):
    """learning_curve.png from metrics.csv: mean over seeds of a metric, its 95 % interval (Student's t), each seed."""
    from matplotlib.figure import Figure
    from scipy import stats

    with (run_dir / "metrics.csv").open(newline="") as f:
        rows = [(float(row["global_step"]), float(row[metric] or "nan")) for row in csv.DictReader(f)]
    curve = np.array(rows).reshape(-1, args.num_seeds, 2)  # (calls, seeds, step and return)
    curve = curve[~np.isnan(curve).any(axis=(1, 2))]  # leave out calls in which no episode of some seed ended
    steps, returns, mean = curve[:, 0, 0], curve[..., 1], curve[..., 1].mean(axis=1)
    fig = Figure(figsize=(6, 4), layout="constrained")
    ax = fig.subplots()
    if args.num_seeds > 1:
        half = stats.sem(returns, axis=1) * stats.t.ppf(0.975, args.num_seeds - 1)
        ax.plot(steps, returns, color="C0", alpha=0.3, linewidth=0.8)
        ax.fill_between(steps, mean - half, mean + half, color="C0", alpha=0.2, linewidth=0, label="95 % interval")
    ax.plot(steps, mean, color="C0", marker=".", label=f"mean of {args.num_seeds} seed(s)")
    ax.axhline(baseline, color="grey", linestyle="--", linewidth=1, label=baseline_label)
    label = metric.removeprefix("charts/").replace("_", " ")
    ax.set(xlabel="environment steps", ylabel=label, title=run_dir.absolute().name.rsplit("__", 2)[0])
    ax.legend()
    fig.savefig(run_dir / "learning_curve.png", dpi=150)


# ==== Main ============================================================================================================
def over_seeds(function, args):
    """vmap over the leading axis of seeds; a single seed is unwrapped instead, which compiles and runs faster."""
    if args.num_seeds > 1:
        return jax.vmap(function)
    return lambda x: jax.tree.map(lambda y: y[None], function(jax.tree.map(lambda y: y[0], x)))


def parse_flags() -> Args:
    """tyro's parser, but what it prints of a wrong flag, a box of many lines, becomes one."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(Args, description=__doc__)
    except SystemExit as leaving:
        if leaving.code:
            print("error:", " ".join(re.sub("[╭╮╰╯│─]", " ", box.getvalue()).split()), file=sys.stderr)
        raise


def setup() -> tuple[Args, Environment]:
    """Flags and environment, or one line on stderr and exit code 2."""
    args = parse_flags()
    try:
        if args.resume:
            given = {word.split("=")[0].replace("_", "-") for word in sys.argv[1:] if word.startswith("--")}
            if foreign := sorted(given - {"--resume", "--total-timesteps"}):
                raise ValueError(f"--resume keeps the run's own flags: drop {' '.join(foreign)}")
            config = args.resume / "config.json"
            if not config.is_file() or not (args.resume / "checkpoint").is_dir():
                raise ValueError(f"--resume {args.resume} holds no config.json and checkpoint/: name a run in runs/")
            try:
                stored = json.loads(config.read_text())
                flags_of_run = stored["args"].keys()
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f"--resume {args.resume}/config.json is damaged: it cannot go on") from None
            if flags_of_run != dataclasses.asdict(args).keys():
                raise ValueError(f"--resume {args.resume} is of another script, or version (git_commit in config.json)")
            longer = {"total_timesteps": args.total_timesteps} if "--total-timesteps" in given else {}
            args = Args(**stored["args"] | {"resume": args.resume} | longer)
            if args.total_timesteps < (own := stored["args"]["total_timesteps"]):
                raise ValueError(f"--total-timesteps {args.total_timesteps} is below the run's own: use {own} or more")
        args.check()
        if args.track and not importlib.util.find_spec("wandb"):
            raise ValueError("--track needs Weights & Biases, which is not installed: pip install wandb")
        if args.num_devices > len(jax.devices()):
            raise ValueError(f"--num-devices {args.num_devices} is more than there are: use {len(jax.devices())}")
        return args, Environment(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def main():
    start_time = time.time()
    args, env = setup()
    import orbax.checkpoint as ocp

    console, signals = Console(), []
    for number in (signal.SIGINT, signal.SIGTERM):  # they end the loop after the call in flight, and nothing is lost
        signal.signal(number, lambda number, _: signals.append(number))
    jax.config.update("jax_default_matmul_precision", "default" if args.tf32 else "highest")
    task = f"{args.env_id}-{args.memory_length}" if args.env_id == "MemoryChain-bsuite" else args.env_id
    run_dir = args.resume or new_run_dir(args, task)
    seeds = range(args.seed, args.seed + args.num_seeds)
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])

    init, train = make_train(args, env)
    # One seed after another: batched QR, of the orthogonal weights, can hang in jaxlib 0.10 on a CPU of few cores.
    state = jax.jit(partial(jax.lax.map, init))(keys)
    options = ocp.CheckpointManagerOptions(max_to_keep=1)
    checkpoints = ocp.CheckpointManager((run_dir / "checkpoint").absolute(), options=options)
    update = checkpoints.latest_step() or 0
    if update:
        # Where names or shapes differ, orbax tells of it in many lines, some from threads that it leaves behind.
        logging.disable()
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                state = checkpoints.restore(update, args=ocp.args.StandardRestore(state))
            except (ValueError, KeyError):
                why = "has a checkpoint that does not fit this script: use its version, git_commit in config.json"
                print(f"error: --resume {run_dir} {why}", file=sys.__stderr__, flush=True)
                os._exit(2)
        logging.disable(logging.NOTSET)
    if args.resume:  # --total-timesteps may be new
        config = json.loads((run_dir / "config.json").read_text())
        config["args"]["total_timesteps"] = args.total_timesteps
        (run_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    size = sum(x.size for x in jax.tree.leaves(state.params)) // args.num_seeds
    console.print(
        f"{run_dir}: {size:,} parameters, {args.num_updates * args.batch_size:,} steps in {args.num_updates:,} updates "
        f"of {args.num_envs} x {args.num_steps}, {args.num_seeds} seed(s), {jax.devices()[0].device_kind}"
    )

    compile_start = time.time()
    train = jax.jit(over_seeds(train, args), donate_argnums=0).lower(state).compile()
    compile_seconds = time.time() - compile_start
    # env_params are arguments of the compiled program: one compilation serves every memory length.
    eval_fn = jax.jit(jax.vmap(partial(evaluate, args=args, env=env), (0, 0, None, None)))
    eval_keys = jax.vmap(lambda key: jax.random.fold_in(key, 2**31))(keys)  # no key that init splits off
    eval_fn = eval_fn.lower(state.params, eval_keys, env.params, False).compile()
    memory = [program.memory_analysis() for program in (train, eval_fn)]
    working = max(m.argument_size_in_bytes + m.temp_size_in_bytes for m in memory) / 2**20
    console.print(f"compiled in {compile_seconds:.0f} s; needs {working:,.0f} MiB of memory, the train state included")
    zero_params = jax.tree.map(jnp.zeros_like, state.params)  # all logits equal: uniformly random actions
    chance_keys = [jax.vmap(lambda key, i=i: jax.random.fold_in(key, i))(eval_keys) for i in range(10)]
    chance = float(np.mean([eval_fn(zero_params, key, env.params, False)[0] for key in chance_keys]))

    log = MetricsLog(run_dir, args, update)
    with Progress(console=console) as progress:
        bar = progress.add_task("", total=args.num_updates, completed=update)
        last_save = loop_start = time.time()
        device_seconds, first_update = 0.0, update
        while update < args.num_updates and not signals:
            call_start = time.time()
            state, metrics = train(state)
            metrics = jax.tree.map(np.asarray, metrics)  # waits for the device
            call_seconds = time.time() - call_start
            device_seconds += call_seconds
            if not np.isfinite(metrics["losses/grad_norm"]).all():
                why = f"the gradient was not finite after update {update} of {run_dir}; no later one is saved"
                raise SystemExit(f"error: {why}: start a new run with a smaller --learning-rate")
            update += args.log_interval
            steps_per_second = args.log_interval * args.batch_size * args.num_seeds / call_seconds
            log.write(update, metrics, steps_per_second)
            score = metrics["charts/episodic_return"].mean()
            score = "–" if np.isnan(score) else f"{score:.2f}"
            status = f"return {score}  {steps_per_second:,.0f} steps/s"
            progress.update(bar, completed=update, description=status)
            if not console.is_terminal:  # where no bar can be drawn, as in the log of a batch job
                console.print(f"update {update:,} of {args.num_updates:,}: {status}")
            if time.time() - last_save > args.checkpoint_interval and update < args.num_updates:
                checkpoints.save(update, args=ocp.args.StandardSave(state))
                last_save = time.time()
    if checkpoints.latest_step() != update:
        checkpoints.save(update, args=ocp.args.StandardSave(state))
    checkpoints.wait_until_finished()
    log.close()
    loop_seconds = time.time() - loop_start
    if update:
        plot_learning_curve(run_dir, args, "charts/episodic_return", chance, "chance: uniformly random actions")

    def stop(number, _):  # what is saved can be evaluated later
        how = f"python {sys.argv[0]} --resume {run_dir}"
        console.print(f"stopped after update {update}; continue with: {how}", soft_wrap=True)
        raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    if signals:
        stop(signals[0], None)

    # The memory task is also asked at lengths it was not trained on.
    lengths = [env.params.memory_length] if args.env_id == "MemoryChain-bsuite" else []
    lengths = [max(1, length * factor // 2) for length in lengths for factor in (1, 2, 4, 8)]
    trained = {args.memory_length: " (trained)"}
    variants = {f"memory {n}{trained.get(n, '')}": env.params.replace(memory_length=n) for n in lengths}
    variants = variants or {"return": env.params}
    table = Table("seed", *variants, title="greedy episodes: " + ("success rate" if lengths else "mean return"))
    results = []
    for env_params in variants.values():
        returns, episode_lengths = jax.tree.map(np.asarray, eval_fn(state.params, eval_keys, env_params, True))
        for i, seed in enumerate(seeds):
            result = {"seed": seed, "episodes": args.eval_episodes, "mean_return": float(returns[i].mean())}
            result |= {"std_return": float(returns[i].std()), "mean_length": float(episode_lengths[i].mean())}
            if lengths:
                result |= {"memory_length": env_params.memory_length, "success_rate": float((returns[i] > 0).mean())}
            results.append(result)
    for i, seed in enumerate(seeds):
        cells = results[i :: args.num_seeds]
        table.add_row(str(seed), *(f"{cell.get('success_rate', cell['mean_return']):.2f}" for cell in cells))
    console.print(table)
    steps = (update - first_update) * args.batch_size * args.num_seeds
    timing = {"total_seconds": time.time() - start_time, "compile_seconds": compile_seconds}
    if steps:  # none if a finished run was resumed
        timing |= {"steps_per_second": steps / loop_seconds, "host_share": 1 - device_seconds / loop_seconds}
    shown = (f"{name} {value:,.0f}" if value > 9 else f"{name} {value:.3g}" for name, value in timing.items())
    console.print("  ".join(shown))
    evaluation = {"chance_return": chance, "results": results} | timing
    (run_dir / "eval.json").write_text(json.dumps(evaluation, indent=2) + "\n")


if __name__ == "__main__":
    main()
