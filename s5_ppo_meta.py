# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "brax>=0.14.2,<0.15", "flax>=0.12,<0.13", "gymnax>=1.0.1,<1.1", "jax>=0.10,<0.12", "matplotlib>=3.9,<4",
#     "numpy>=2,<3", "optax>=0.2.5,<0.3", "orbax-checkpoint>=0.11,<0.13", "rich>=13,<16", "scipy>=1.13,<2",
#     "six>=1.16", "tensorboardX>=2.6,<3", "tyro>=1,<2",
# ]
# ///
"""Resettable S5 and PPO learn to control unknown bodies within a trial (Lu et al. 2023, arXiv 2303.03982, section 5).

Every trial is one task seen through a fresh pair of random matrices: one mixes what the task shows, the other what the
agent does. Nothing names the task or the matrices, so the agent has to find out within the trial what its actions do,
and keep it in its memory across the episodes of the trial. What it learned that way is measured against the same
network with its memory wiped, on new matrices and on tasks that were never trained on.

    python s5_ppo_meta.py                                # the paper's projected CartPole, positions only
    python s5_ppo_meta.py --suite classic --anneal-lr --total-timesteps 96000000    # five tasks, four more held out
    python s5_ppo_meta.py --eval-only runs/RUN --eval-trial-length 64    # longer trials than trained on
    python s5_ppo_meta.py --eval-only runs/CLASSIC --render reacher      # watch the first and last episode
    python s5_ppo_meta.py --resume runs/RUN              # goes on after Ctrl-C or a kill

What to expect, of the defaults with seeds 0 to 2, on one core of a cloud machine's CPU on 2026-11-25: 4 to 5 minutes,
at 44,000 to 46,000 steps per second (7 to 8 minutes on another day); a return (at most 1) of 0.45 to 0.54 after 2.5
million steps, 0.95 to 0.98 after 10. On fresh matrices, 64 trials of 32 episodes, it is at least 0.90 in the first
episode and 0.93 in the 32nd (rounded, seed 1); without memory 0.26 to 0.29. The paper's figure has 0.27 and 0.41. A
specialist reaches 1.0 in 1.5 million steps. The command for the classic suite above, with seeds 0 to 2, gave a mean
score of 0.84, 0.87 and 0.74 on its training tasks and of 0.16, 0.18 and 0.19 on the held-out ones, in 60 to 64 minutes
on one core; without memory 0.06 and -0.09 (benchmarks/adaptation.py, 2026-11-24). Locomotion: 9,800 steps per second;
up to 900,000 on an H100, where 162 million steps brought reacher alone clearly above 0. Of the paper's size, not run
here: --suite classic --total-timesteps 2000000000 --num-envs 1120 --num-steps 1000 --trial-length 1000 --num-layers 10
--d-model 256 --encoder-size 512 --gamma 0.995 --learning-rate 3e-4. benchmarks/foresight.py shows what the memory knows
of a body, benchmarks/META_LOG.md tells what was tried.

Where this departs from the paper, and why:
- PPO, not experiment 4's Muesli, and a head that predicts the change of the observation and the reward: PPO alone gives
  the memory little to learn a new body from.
- The largest initial time step of S5 is 2, not 0.1: with 0.1 even the fastest states average over 20 steps, and
  velocity is lost. Its input is scaled to unit variance, not by zero-order hold (--zoh).
- Rollouts are shorter than a trial, and gradients reach no further back: the memory is carried on, but nothing trains
  it to keep what only a later rollout needs. And advantages stop where an episode ends (at a time limit with the value
  of what was left), so that nothing pays for exploring for the sake of later episodes.
- An environment keeps its task, and only the matrices and starts (in suite bodies the body too) are redrawn; the paper
  redraws the task as well.
- The inner episode's end is a flag in the observation and no reset; only a trial's end resets the memory.
- The agent sees its own unprojected action and the scaled reward: without them it could not identify the action matrix.
- The rewards of a held-out task are divided by the spread of random actions' returns (`Task.spread`).
- Tasks are gymnax's and brax's, not DMControl's, which has no JAX version among this project's dependencies.
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
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

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


# ==== Tasks ===========================================================================================================
class Task(NamedTuple):
    """A row of TASKS: one environment, and what its returns are worth."""

    env_id: str  # of gymnax, or else of brax
    episode_length: int  # time limit, in steps
    zero: float  # return of one episode that scores 0: the better of random actions and no action at all
    one: float  # return that scores 1: a specialist, this script on the task alone, unprojected
    spread: float  # of random actions' discounted returns: divides rewards of the first rollout; held out, always
    params: dict | None = None  # EnvParams to set; (low, high): drawn for each trial. Gymnax only, as the next two
    seen: tuple = ()  # entries of the observation the agent sees; all, if empty
    reward_scale: float = 1.0


# From benchmarks/reference_scores.csv, made by benchmarks/reference_scores.py at the commits that it names. In
# mountain-car the specialist is no better than doing nothing, so `one` is what gym calls solved.
DENSE = {"dense_reward": True}
TASKS = {
    "cartpole-positions": Task("CartPole-v1", 200, 0.109, 0.999, 0.0461, seen=(0, 2), reward_scale=1 / 200),
    "cartpole": Task("CartPole-v1", 200, 21.8, 200.0, 9.22),
    "cartpole-bodies": Task("CartPole-v1", 200, 20.8, 200.0, 9.22, {"gravity": (6.5, 14.7), "force_mag": (6.7, 15.0)}),
    "cartpole-long": Task("CartPole-v1", 200, 32.9, 200.0, 12.1, {"length": 1.0, "polemass_length": 0.1}),
    "pendulum": Task("Pendulum-v1", 200, -1147.0, -160.0, 170.0),
    "pendulum-bodies": Task("Pendulum-v1", 200, -1192.0, -184.0, 172.0, {"g": (6.7, 15.0), "m": (0.67, 1.5)}),
    "pendulum-long": Task("Pendulum-v1", 200, -1060.0, -235.5, 170.0, {"l": 1.5}),
    "pendulum-heavy": Task("Pendulum-v1", 200, -1280.0, -179.0, 172.0, {"m": 1.5, "l": 0.8}),
    "point-robot": Task("PointRobot-misc", 100, -88.3, -35.4, 25.4, DENSE),
    "point-robot-bodies": Task("PointRobot-misc", 100, -88.3, -33.6, 25.9, DENSE | {"max_force": (0.067, 0.15)}),
    "point-robot-slow": Task("PointRobot-misc", 100, -88.3, -34.1, 22.2, DENSE | {"max_force": 0.05}),
    "gymnax-reacher": Task("Reacher-misc", 100, 14.3, 27.4, 7.76),
    "mountain-car": Task("MountainCarContinuous-v0", 200, 0.0, 90.0, 0.815),
    "inverted-pendulum": Task("inverted_pendulum", 200, 70.2, 200.0, 9.78),
    "inverted-double-pendulum": Task("inverted_double_pendulum", 200, 637.0, 1825.0, 82.3),
    "reacher": Task("reacher", 100, -23.2, -17.0, 15.6),
    "hopper": Task("hopper", 200, 199.7, 399.1, 34.9),
    "walker2d": Task("walker2d", 200, 198.4, 321.4, 29.6),
    "halfcheetah": Task("halfcheetah", 200, -0.58, 611.5, 16.5),
    "ant": Task("ant", 200, 200.0, 356.4, 16.0),
    "pusher": Task("pusher", 100, -52.7, -40.5, 27.3),
}


class Suite(NamedTuple):
    """What --suite stands for; flags of these names override it. A trial counts steps or episodes: the other is 0."""

    train_tasks: tuple
    held_out_tasks: tuple
    projected_obs_size: int
    projected_action_size: int
    trial_length: int = 0
    trial_episodes: int = 0


# In bodies, gravity, mass or force of the gymnax tasks is drawn for each trial; the three changed bodies held out lie
# outside of that (pendulum-heavy would not: its motion is that of a length of 1 with g 12.5 and m 0.96).
NEW_BODIES = ("pendulum-long", "cartpole-long", "point-robot-slow")
SUITES = {
    "cartpole": Suite(("cartpole-positions",), (), 4, 1, trial_episodes=16),
    "classic": Suite(
        ("pendulum", "point-robot", "cartpole", "inverted-pendulum", "reacher"),
        ("gymnax-reacher", "inverted-double-pendulum", "pendulum-heavy", "mountain-car"),
        projected_obs_size=12,
        projected_action_size=2,
        trial_length=400,
    ),
    "bodies": Suite(
        ("pendulum-bodies", "point-robot-bodies", "cartpole-bodies", "inverted-pendulum", "reacher"),
        ("gymnax-reacher", "inverted-double-pendulum", "mountain-car", *NEW_BODIES),
        projected_obs_size=12,
        projected_action_size=2,
        trial_length=400,
    ),
    "locomotion": Suite(
        ("ant", "halfcheetah", "hopper", "reacher", "inverted-double-pendulum"),
        ("walker2d", "pusher"),
        projected_obs_size=32,
        projected_action_size=8,
        trial_length=1000,
    ),
}


# ==== Arguments =======================================================================================================
@dataclass
class Args:
    # ---- run
    seed: int = 0  # first seed; the others follow, SEED + 1 ...
    num_seeds: int = 1  # number of independent seeds trained side by side
    num_devices: int = 1  # GPUs, or other devices of JAX, over which each seed's environments are split
    total_timesteps: int = 10_000_000  # environment steps of each seed, rounded up to whole log intervals
    log_interval: int = 10  # updates in one jitted call, and in one row of metrics.csv
    checkpoint_interval: int = 60  # seconds between checkpoints; the last update is always saved
    resume: Path | None = None  # run directory to continue with its own flags; only --total-timesteps may be raised
    track: bool = False  # send the metrics to Weights & Biases as well
    wandb_project_name: str = "s5-in-context-rl"  # Weights & Biases project of --track
    tf32: bool = False  # let NVIDIA GPUs use TF32; acting and learning then differ by about 1e-3

    # ---- tasks; what is None here comes from the suite
    suite: Literal[tuple(SUITES)] = "cartpole"  # tasks, sizes and trials
    train_tasks: tuple[str, ...] | None = None  # names of TASKS, each with an equal share of NUM_ENVS
    held_out_tasks: tuple[str, ...] | None = None  # tasks to evaluate on only
    projected_obs_size: int | None = None  # entries of the projected observation
    projected_action_size: int | None = None  # entries of the action before its projection
    projection: bool = True  # --no-projection: the task's own entries, squashed, padded with zeros
    trial_length: int | None = None  # steps of a trial; set either this or --trial-episodes
    trial_episodes: int | None = None  # episodes of a trial; set either this or --trial-length
    reset_memory: bool = True  # --no-reset-memory carries it into the next trial, of which the agent is told
    brax_backend: Literal["spring", "positional", "generalized", "mjx"] = "spring"  # scores are of spring

    # ---- evaluation
    eval_interval: int = 0  # updates between evaluations, each made as its log interval ends; 0: at the end only
    eval_trials: int = 64  # trials of each task and kind of memory in an evaluation
    eval_trial_length: int | None = None  # their steps, or episodes, as in training; None: twice as many as there
    eval_only: Path | None = None  # run to evaluate again; its trials and --held-out-tasks may be new
    render: str | None = None  # with --eval-only: a brax task; HTML of a trial's first and last episode

    # ---- sequence model
    num_layers: int = 4  # S5 blocks; 0 is the network without memory
    d_model: int = 64  # D, width of the blocks
    state_size: int = 32  # P, complex states of a block
    dt_min: float = 0.001  # smallest initial time step; the slowest states fall to 1/e in 2 / DT_MIN steps
    dt_max: float = 2.0  # largest initial time step; the fastest states, which see single steps, fall in 2 / DT_MAX
    zoh: bool = False  # scale the input by zero-order hold, as the paper does, not to unit variance

    # ---- actor and critic
    encoder_size: int = 128  # hidden units of the observation encoder, each a product of two sums
    head_size: int = 64  # hidden units in each of the two layers of the actor, of the critic and of the prediction

    # ---- PPO
    num_envs: int = 480  # N, parallel environments
    num_steps: int = 128  # T, steps of a rollout in each environment; gradients reach back this far and no further
    num_minibatches: int = 32  # minibatches of a pass over the rollout, each of whole environments
    update_epochs: int = 2  # passes over each rollout
    learning_rate: float = 1e-3  # step size of Adam
    anneal_lr: bool = False  # lower the step size linearly to zero over the run
    gamma: float = 0.99  # discount of a step
    gae_lambda: float = 0.95  # lambda of the generalised advantage estimate
    clip_coef: float = 0.2  # epsilon of the clipped objective
    ent_coef: float = 0.005  # weight of the entropy bonus
    final_ent_coef: float | None = None  # its weight at the end, where (1 - progress)^2 is 0; None: it stays the same
    vf_coef: float = 0.5  # weight of the value loss
    prediction_coef: float = 1.0  # weight of predicting the change of observation and reward; 0 switches that off
    target_kl: float = 0.04  # mean KL of an update above which steps shrink; single ones above 2.5 times it are skipped
    max_grad_norm: float = 0.5  # global norm the gradient is clipped to

    def __post_init__(self):
        if self.trial_length and self.trial_episodes is None:  # if only one is given, the other is 0
            self.trial_episodes = 0
        if self.trial_episodes and self.trial_length is None:
            self.trial_length = 0
        for name, value in SUITES[self.suite]._asdict().items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.eval_trial_length is None:
            self.eval_trial_length = 2 * (self.trial_length or self.trial_episodes or 1)

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        """Updates that really run: total_timesteps, rounded up to whole log intervals."""
        return -(-self.total_timesteps // (self.batch_size * self.log_interval)) * self.log_interval

    def check(self) -> None:
        """Raises ValueError, in one line, for values that cannot work."""
        may_be_zero = ("seed", "checkpoint_interval", "num_layers", "gamma", "gae_lambda", "ent_coef", "vf_coef")
        may_be_zero += ("trial_length", "trial_episodes", "eval_interval", "prediction_coef")
        for f in dataclasses.fields(self):
            flag, value = "--" + f.name.replace("_", "-"), getattr(self, f.name)
            zero_is_fine = f.name in may_be_zero
            limit = np.inf if type(value) is float or f.name == "total_timesteps" else 2**31  # arrays count in 32 bits
            # Written so that NaN is refused too.
            signed = f.name == "final_ent_coef"
            if not signed and type(value) in (int, float) and not (0 < value < limit or (value == 0 and zero_is_fine)):
                use = "of 0 or more" if zero_is_fine else "above 0"
                raise ValueError(f"{flag} {value}: use a number {use}, and below {limit}")
            if f.name in ("gamma", "gae_lambda") and value > 1:
                raise ValueError(f"{flag} {value} is too large: use 1 or less")
        if self.final_ent_coef is not None and not np.isfinite(self.final_ent_coef):
            raise ValueError(f"--final-ent-coef {self.final_ent_coef} is not finite: use a number, or leave it out")
        if self.dt_max < self.dt_min:
            raise ValueError(f"--dt-max {self.dt_max} is below --dt-min {self.dt_min}: swap them")
        for name in self.train_tasks + self.held_out_tasks:
            if name not in TASKS:
                raise ValueError(f"--train-tasks and --held-out-tasks know no {name}: use {', '.join(TASKS)}")
            if (self.train_tasks + self.held_out_tasks).count(name) > 1:
                raise ValueError(f"--train-tasks and --held-out-tasks (or the suite's) name {name} twice: set both")
        if not self.train_tasks:
            raise ValueError("--train-tasks is empty: name one at least")
        if bool(self.trial_length) == bool(self.trial_episodes):
            raise ValueError(
                f"--trial-length {self.trial_length} and --trial-episodes {self.trial_episodes}: set one to 0, not both"
            )
        shares = int(np.lcm(self.num_minibatches, len(self.train_tasks))) * self.num_devices
        if self.num_envs % shares:
            raise ValueError(
                f"--num-envs {self.num_envs} is not divisible by --num-minibatches {self.num_minibatches} and by "
                f"{len(self.train_tasks)} --train-tasks on each of --num-devices {self.num_devices}: use --num-envs "
                f"{-(-self.num_envs // shares) * shares}"
            )
        if self.total_timesteps < self.batch_size:
            rollout = f"a rollout, --num-envs {self.num_envs} x --num-steps {self.num_steps}"
            raise ValueError(f"--total-timesteps {self.total_timesteps} is less than {rollout}: use {self.batch_size}")


# ==== Environment: trials of several tasks behind `reset` and `step` ==================================================
class Timestep(NamedTuple):
    """What N environments return. From `reset`: reset is True and rewards are zero."""

    obs: jax.Array  # (N, O) what the agent sees next
    reset: jax.Array  # (N,) bool: obs is the first of a trial, so the memory must not look back past it
    reward: jax.Array  # (N,) scaled
    done: jax.Array  # (N,) bool: the action ended the episode, by a termination, a time limit or the trial's end
    truncated: jax.Array  # (N,) bool: ended, but not by a termination
    final_obs: jax.Array  # (N, O) what the agent would have seen next, had the episode gone on
    raw_reward: jax.Array  # (N,) not divided by the spread of the task's returns
    discounted_return: jax.Array  # (N,) discounted sum of the episode's raw rewards so far, as VecNormalize has it
    episode_return: jax.Array  # (N,) sum of raw rewards of the episode up to this step, undiscounted


class Pool(NamedTuple):
    """What new episodes and trials draw from, with replacement: n start states and, apart from them, n pairs of
    matrices with bodies.

    Redrawn every rollout. To draw where an episode ends means to reset all n copies at every step, which takes brax
    longer than the step.
    """

    inner: tuple  # state of the task at the start of an episode, n of them
    obs: jax.Array  # (n, o) the task's own observation
    obs_matrix: jax.Array  # (n, o, projected_obs_size)
    action_matrix: jax.Array  # (n, projected_action_size, a)
    body: dict  # (n,) of each field of EnvParams that differs between trials


class EnvState(NamedTuple):
    """n copies of one task; of several tasks, there is a tuple of these."""

    inner: tuple
    obs_matrix: jax.Array
    action_matrix: jax.Array
    body: dict
    pool: Pool
    trial_step: jax.Array  # (n,) int32, steps since the trial began
    episode: jax.Array  # (n,) int32, episodes of the trial that have ended
    episode_length: jax.Array
    episode_return: jax.Array
    discounted_return: jax.Array


def random_orthonormal(key, n, rows, columns):
    """n matrices (rows, columns), rows >= columns, uniform among those with orthonormal columns (Haar measure).

    The signs of R's diagonal are what makes Q of a Gaussian matrix uniform (Mezzadri 2007).
    """
    q, r = jnp.linalg.qr(jax.random.normal(key, (n, rows, columns)))
    return q * jnp.sign(jnp.diagonal(r, axis1=1, axis2=2))[:, None, :]


class CopiesOf:
    """n copies of one task, from gymnax or brax, behind random projections.

    The task's observation o is squashed to arcsinh(o), linear below 1 and logarithmic above: so the large velocities of
    some task need no statistics, and small motions stay linear, which is the easiest to undo. The agent sees arcsinh(o)
    @ obs_matrix, of uniformly random orthonormal rows times sqrt(projected size / o's size): distances are kept up to
    that factor, no information is lost, and an entry has the mean variance of o's entries, whatever their number: the
    projection adds neither padding nor a scale that would tell the task. The task gets clip(action @ action_matrix, -1,
    1), the range of every task's actions here. The columns of that matrix are orthonormal: each of the task's actions
    is reached, by an action of the agent that has the same norm. Fields of the task's parameters that have a range, its
    body, are drawn uniformly.
    """

    def __init__(self, name, args):
        self.task, self.args = TASKS[name], args
        import gymnax

        if self.task.env_id in gymnax.registered_envs:
            self.env, params = gymnax.make(self.task.env_id)
            given = self.task.params or {}
            self.ranges = {field: value for field, value in given.items() if isinstance(value, tuple)}
            self.params = params.replace(**{field: given[field] for field in given.keys() - self.ranges.keys()})
            space = self.env.action_space(self.params)
            self.obs_size = len(self.task.seen) or self.env.observation_space(self.params).shape[0]
            self.action_size = int(np.prod(space.shape))  # 1 for Discrete: its sign picks
            if getattr(space, "n", 2) != 2:
                raise ValueError(f"task {name} has {space.n} discrete actions: use one that has two, or continuous")
        else:
            with contextlib.redirect_stdout(io.StringIO()):  # brax complains of packages that nobody needs here
                from brax import envs

            self.env, self.params = envs.get_environment(self.task.env_id, backend=args.brax_backend), None
            self.ranges = {}
            if self.task.params or self.task.seen or self.task.reward_scale != 1:
                raise ValueError(f"task {name} is of brax: leave out params, seen and reward_scale, which gymnax has")
            self.obs_size, self.action_size = self.env.observation_size, self.env.action_size
        for flag, size, needed in (
            ("--projected-obs-size", args.projected_obs_size, self.obs_size),
            ("--projected-action-size", args.projected_action_size, self.action_size),
        ):
            if size < needed:
                raise ValueError(f"{flag} {size} is too small for {name}: use {needed} or more")

    # ---- one copy, unprojected
    def start(self, key):
        """State and observation (o,) at the start of an episode."""
        if self.params is None:
            state = self.env.reset(key)
            return state, state.obs
        obs, state = self.env.reset_env(key, self.params)  # a range changes how the task moves, not how it starts
        return state, self.visible(obs)

    def physics(self, key, state, action, body):
        """One step with action (a,) in [-1, 1]: state, observation (o,), reward and whether it terminated."""
        if self.params is None:
            state = self.env.step(state, action)
            return state, state.obs, state.reward, state.done > 0.5
        params = self.params.replace(**body)
        space = self.env.action_space(params)
        if hasattr(space, "n"):
            action = (action[0] > 0).astype(jnp.int32)
        else:
            low, high = space.low, space.high
            action = (low + (action.reshape(space.shape) + 1) / 2 * (high - low)).astype(jnp.float32)
        obs, state, reward, terminated, _ = self.env.step_env(key, state, action, params)
        return state, self.visible(obs), jnp.float32(reward) * self.task.reward_scale, terminated

    def visible(self, obs):
        return (obs[jnp.array(self.task.seen)] if self.task.seen else obs).astype(jnp.float32)

    # ---- n copies
    def draw(self, key, n) -> Pool:
        start_key, obs_key, action_key, body_key = jax.random.split(key, 4)
        body_keys = jax.random.split(body_key, len(self.ranges))
        inner, obs = jax.vmap(self.start)(jax.random.split(start_key, n))
        O, A = self.args.projected_obs_size, self.args.projected_action_size
        if self.args.projection:
            obs_matrix = random_orthonormal(obs_key, n, O, self.obs_size).mT * np.sqrt(O / self.obs_size)
            action_matrix = random_orthonormal(action_key, n, A, self.action_size)
        else:
            obs_matrix = jnp.tile(jnp.eye(self.obs_size, O), (n, 1, 1))
            action_matrix = jnp.tile(jnp.eye(A, self.action_size), (n, 1, 1))
        body = {
            field: jax.random.uniform(k, (n,), minval=low, maxval=high)
            for k, (field, (low, high)) in zip(body_keys, self.ranges.items(), strict=True)
        }
        return Pool(inner, obs, obs_matrix, action_matrix, body)

    def agent_obs(self, obs, obs_matrix, action, reward, new_episode, new_trial):
        """(n, O): projected observation, previous action, previous reward, new_episode, new_trial.

        Previous action and reward are zero as a trial starts.
        """
        projected = jnp.einsum("no,noO->nO", jnp.arcsinh(obs), obs_matrix)
        previous = jnp.concatenate([action, reward[:, None]], axis=1)
        previous = jnp.where(new_trial[:, None], 0.0, previous)
        return jnp.concatenate([projected, previous, new_episode[:, None], new_trial[:, None]], axis=1)

    def reset(self, key, n, stagger) -> tuple[EnvState, Timestep]:
        pool_key, stagger_key = jax.random.split(key)
        pool = self.draw(pool_key, n)
        zero, steps, true = jnp.zeros(n), jnp.zeros(n, jnp.int32), jnp.ones(n, bool)
        begun = jax.random.randint(stagger_key, (n,), 0, self.args.trial_length or self.args.trial_episodes)
        begun = jnp.where(stagger, begun, 0)  # staggered, else all trials would end at the same step
        trial_step, episode = (begun, steps) if self.args.trial_length else (steps, begun)
        action = jnp.zeros((n, self.args.projected_action_size))
        obs = self.agent_obs(pool.obs, pool.obs_matrix, action, zero, true, true)
        of_trial = pool.obs_matrix, pool.action_matrix, pool.body
        state = EnvState(pool.inner, *of_trial, pool, trial_step, episode, steps, zero, zero)
        return state, Timestep(obs, true, zero, ~true, ~true, obs, zero, zero, zero)

    def step(self, key, state: EnvState, action, spread, trials_end) -> tuple[EnvState, Timestep]:
        n = action.shape[0]
        physics_key, start_key, trial_key = jax.random.split(key, 3)
        true_action = jnp.clip(jnp.einsum("nA,nAa->na", action, state.action_matrix), -1, 1)
        inner, obs, raw_reward, terminated = jax.vmap(self.physics)(
            jax.random.split(physics_key, n), state.inner, true_action, state.body
        )
        reward = raw_reward / spread
        episode_length, trial_step = state.episode_length + 1, state.trial_step + 1
        ended = terminated | (episode_length >= self.task.episode_length)
        episode = state.episode + ended
        place = trial_step if self.args.trial_length else episode
        new_trial = trials_end & (place >= (self.args.trial_length or self.args.trial_episodes))
        done = ended | new_trial
        final_obs = self.agent_obs(obs, state.obs_matrix, action, reward, jnp.zeros(n), jnp.zeros(n, bool))

        def choose(where, new, old):
            return jax.tree.map(lambda x, y: jnp.where(where.reshape((n,) + (1,) * (x.ndim - 1)), x, y), new, old)

        starts, trials = (jax.random.randint(k, (n,), 0, n) for k in (start_key, trial_key))
        pool, now = state.pool, (state.obs_matrix, state.action_matrix, state.body)
        new_start = jax.tree.map(lambda x: x[starts], (pool.inner, pool.obs))
        fresh = jax.tree.map(lambda x: x[trials], (pool.obs_matrix, pool.action_matrix, pool.body))
        inner, obs = choose(done, new_start, (inner, obs))
        obs_matrix, action_matrix, body = choose(new_trial, fresh, now)
        episode_return = state.episode_return + raw_reward
        discounted_return = self.args.gamma * state.discounted_return + raw_reward
        obs, truncated = self.agent_obs(obs, obs_matrix, action, reward, done, new_trial), done & ~terminated
        timestep = Timestep(
            obs, new_trial, reward, done, truncated, final_obs, raw_reward, discounted_return, episode_return
        )
        of_trial = [jnp.where(new_trial, 0, x) for x in (trial_step, episode)]
        of_episode = [jnp.where(done, 0, x) for x in (episode_length, episode_return, discounted_return)]
        return EnvState(inner, obs_matrix, action_matrix, body, state.pool, *of_trial, *of_episode), timestep


def join(parts):
    """From a state and Timestep of each task: the tuple of states, and one Timestep of all N environments."""
    states, timesteps = zip(*parts, strict=True)
    return states, jax.tree.map(lambda *x: jnp.concatenate(x), *timesteps)


class Environment:
    """Several tasks side by side. Each has an equal, fixed share of the N environments, so none is stepped in vain.

    Raises ValueError if a task does not fit into the projected sizes.
    """

    def __init__(self, names, args, trials_end=True):
        self.names, self.trials_end = names, trials_end
        self.tasks = [CopiesOf(name, args) for name in names]

    def reset(self, key, num_envs) -> tuple[tuple, Timestep]:
        keys, n = jax.random.split(key, len(self.tasks)), num_envs // len(self.tasks)
        return join(task.reset(k, n, self.trials_end) for task, k in zip(self.tasks, keys, strict=True))

    def redraw(self, key, states) -> tuple:
        """Gives every task new start states and matrices to draw from; those in use stay."""
        keys = jax.random.split(key, len(self.tasks))
        parts = zip(self.tasks, keys, states, strict=True)
        return tuple(state._replace(pool=task.draw(k, len(state.episode))) for task, k, state in parts)

    def step(self, key, states, action, spread) -> tuple[tuple, Timestep]:
        """Steps all N environments with action (N, A); spread (K,) is what each task's rewards are divided by."""
        keys = jax.random.split(key, len(self.tasks))
        parts = zip(self.tasks, keys, states, jnp.split(action, len(self.tasks)), spread, strict=True)
        return join(task.step(k, state, a, s, self.trials_end) for task, k, state, a, s in parts)


# ==== Sequence model: S5 with resets inside the scan ==================================================================
def hippo_normal(state_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues (P,) and eigenvectors (2P, P), complex128, of the normal part of HiPPO-LegS of size 2P.

    That matrix is -1/2 on the diagonal plus a skew part, so its eigenvalues come in conjugate pairs; one of each is
    kept (Gu et al. 2022), since the other adds the conjugate: hence 2 Re(Cx) in S5. Starting there gives a wide range
    of frequencies, all of which decay. NumPy in float64, since it is needed once and float32 loses digits.
    """
    root = np.sqrt(np.arange(2 * state_size) + 0.5)
    upper = np.triu(np.outer(root, root), k=1)
    frequency, vectors = np.linalg.eigh(-1j * (upper - upper.T))  # of a Hermitian matrix: real, ascending
    return -0.5 + 1j * frequency[state_size:], vectors[:, state_size:]


def linear_recurrence(a_bar, bu, reset, state, parallel, reverse=False):
    """x_t = a_bar (1 - reset_t) x_{t-1} + bu_t for all t, in one of two ways; x_{t+1} for x_{t-1} if reverse.

    Shapes as in `s5_scan`.
    """
    if not parallel:

        def step(x, inputs):
            bu_t, reset_t = inputs
            x = jnp.where(reset_t[:, None], 0.0, a_bar * x) + bu_t
            return x, x

        return jax.lax.scan(step, state, (bu, reset), reverse=reverse)[1]

    a = jnp.where(reset[..., None], 0.0, a_bar)  # (T, N, P)
    first = -1 if reverse else 0  # the initial state enters the first step taken
    bu = bu.at[first].add(a[first] * state)

    def compose(earlier, later):  # two affine maps x -> a x + b, one after the other
        return earlier[0] * later[0], later[0] * earlier[1] + later[1]

    return jax.lax.associative_scan(compose, (a, bu), reverse=reverse)[1]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def s5_scan(a_bar, bu, reset, state, parallel):
    """States x (T, N, P) of x_t = a_bar (1 - reset_t) x_{t-1} + bu_t, from x_{-1} = state.

    The paper's resettable operator carries the reset as a third element; a_bar times zero gives the same states with
    two. `parallel` picks the associative scan, of logarithmic depth; the step-by-step one does less work and is faster
    on a CPU. The gradient is the same recurrence run backwards in time, so that only x is kept of the forward pass.

    Shapes: a_bar (P,), bu (T, N, P), reset (T, N) bool, state (N, P); complex but for reset.
    """
    return linear_recurrence(a_bar, bu, reset, state, parallel)


def s5_scan_forward(a_bar, bu, reset, state, parallel):
    x = linear_recurrence(a_bar, bu, reset, state, parallel)
    return x, (a_bar, reset, state, x)


def s5_scan_backward(parallel, residuals, grad_x):
    a_bar, reset, state, x = residuals
    # The chain rule (without conjugates, as JAX has it): grad_bu_t = grad_x_t + a_bar (1 - reset_{t+1}) grad_bu_{t+1}.
    next_reset = jnp.concatenate([reset[1:], jnp.ones_like(reset[:1])])  # nothing comes after the last step
    grad_bu = linear_recurrence(a_bar, grad_x, next_reset, jnp.zeros_like(state), parallel, reverse=True)
    carried = jnp.where(reset[..., None], 0.0, grad_bu)  # (T, N, P), gradient of a_bar x_{t-1}
    grad_a_bar = (carried * jnp.concatenate([state[None], x[:-1]])).sum((0, 1))  # (P,)
    return grad_a_bar, grad_bu, None, a_bar * carried[0]


s5_scan.defvjp(s5_scan_forward, s5_scan_backward)


class S5(nn.Module):
    """Diagonal state space layer (Smith et al. 2023): x' = Λx + Bu, y = 2 Re(Cx) + Du, sampled at Δ.

    In steps: x_t = a_bar x_{t-1} + scale B u_t with a_bar = exp(ΛΔ); Λ is diagonal, and every state has its own Δ.
    Call with state (N, P) complex64, u (T, N, D), reset (T, N) bool; returns the last state and y (T, N, D).
    """

    args: Args

    @nn.compact
    def __call__(self, state, u, reset):
        (T, N, D), P = u.shape, self.args.state_size
        hippo, vectors = hippo_normal(P)

        # B and C start real and are turned into the eigenbasis. They are stored as real matrices, B transposed as
        # [Re B, Im B] and C as Re C above -Im C: no complex gradient, and one matrix product on each side of the scan.
        def init_b(key):
            b = vectors.conj().T @ jax.random.normal(key, (2 * P, D)) / np.sqrt(D)  # (P, D)
            return jnp.concatenate([b.real.T, b.imag.T], axis=1)  # (D, 2P)

        def init_c(key):
            c = jax.random.normal(key, (D, 2 * P)) @ vectors / np.sqrt(2 * P)  # (D, P)
            return jnp.concatenate([c.real.T, -c.imag.T])  # (2P, D), since Re(Cx) = Re(C) Re(x) - Im(C) Im(x)

        # The real part of Λ is minus an exponential: no gradient step can make the layer unstable.
        log_decay = self.param("log_decay", lambda _: jnp.asarray(np.log(-hippo.real), jnp.float32))
        frequency = self.param("frequency", lambda _: jnp.asarray(hippo.imag, jnp.float32))
        b = self.param("B", init_b)
        c = self.param("C", init_c)
        d = self.param("D", nn.initializers.normal(1.0), (D,))
        low, high = np.log(self.args.dt_min), np.log(self.args.dt_max)
        dt = jnp.exp(self.param("log_dt", lambda key: jax.random.uniform(key, (P,), minval=low, maxval=high)))

        lam = jax.lax.complex(-jnp.exp(log_decay), frequency)
        a_bar = jnp.exp(lam * dt)  # (P,)
        # White input of variance 1 gives a state of variance scale^2 / (1 - |a_bar|^2): one, if not --zoh, whatever Δ.
        scale = (a_bar - 1) / lam if self.args.zoh else jnp.sqrt(-jnp.expm1(2 * lam.real * dt))

        # Products see T and N as one axis: a weight gradient summed over two axes is three times slower on a CPU.
        u_flat = u.reshape(T * N, D)
        b_bar = jax.lax.complex(b[:, :P], b[:, P:]) * scale  # (D, P)
        bu = u_flat @ jnp.concatenate([b_bar.real, b_bar.imag], axis=1)  # (T N, 2P)
        bu = jax.lax.complex(bu[:, :P], bu[:, P:]).reshape(T, N, P)
        x = s5_scan(a_bar, bu, reset, state, jax.default_backend() != "cpu")
        x_flat = x.reshape(T * N, P)
        y = 2 * jnp.concatenate([x_flat.real, x_flat.imag], axis=1) @ c + d * u_flat  # (T N, D), 2 Re(Cx) + Du
        return x[-1], y.reshape(T, N, D)


class SequenceModel(nn.Module):
    """Pre-norm residual blocks: LayerNorm, S5, GELU, gated linear unit.

    carry: a tuple of S5 states, one a block. Call with x (T, N, D), reset (T, N); returns carry and y (T, N, D).
    T is 1 when acting and num_steps when learning; both give the same y up to rounding.
    """

    args: Args

    @nn.compact
    def __call__(self, carry, x, reset):
        T, N, D = x.shape
        next_carry = []
        for state in carry:  # one a block
            state, y = S5(self.args)(state, nn.LayerNorm()(x), reset)
            y = nn.gelu(y).reshape(T * N, D)
            x = x + (y * nn.sigmoid(nn.Dense(D)(y))).reshape(T, N, D)
            next_carry.append(state)
        return tuple(next_carry), x

    def initial_carry(self, num_envs):
        return (jnp.zeros((num_envs, self.args.state_size), jnp.complex64),) * self.args.num_layers


# ==== Actor-critic ====================================================================================================
def outcome_of(obs, args):
    """The projected observation and the previous reward (..., o + 1): those of the (..., O) that actions change."""
    o, A = args.projected_obs_size, args.projected_action_size
    return jnp.concatenate([obs[..., :o], obs[..., o + A : o + A + 1]], axis=-1)


class ActorCritic(nn.Module):
    """Encoder, sequence model, and heads for a Gaussian policy, the value, and the outcome of an action.

    What an action does shows in the change of observation and reward, and as a product: change times action. Both are
    hard to come by: the change is a small difference of two outputs of the encoder, the product unknown to sums and
    ReLUs. So the encoder is given the change, by a memory of one step, as others put a shift before their state spaces
    (Fu et al. 2023), and its first layer, like that of the heads, is a gated one (Shazeer 2020). META_LOG.md has what
    that brings.

    carry: the last projected observation and reward (N, o + 1) and the sequence model's carry. Call with carry, obs (T,
    N, O), reset (T, N), and action (T, N, A), or none where no prediction is asked for; returns carry, the policy's
    mean and log standard deviation (T, N, A) each, value (T, N), and the prediction (T, N, o + 1) of the change that
    the action leads to, in units of its usual size.
    """

    args: Args

    @nn.compact
    def __call__(self, carry, obs, reset, action=None):
        T, N, _ = obs.shape
        o, A = self.args.projected_obs_size, self.args.projected_action_size

        def dense(x, size, scale=np.sqrt(2)):
            return nn.Dense(size, kernel_init=nn.initializers.orthogonal(scale))(x)

        def gated(x, size):
            a, b = jnp.split(dense(x, 2 * size, 1.0), 2, axis=-1)
            return a * (1 + b)

        def direction_and_size(x):
            size = jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-8)  # at least 1e-4
            return x / size, jnp.log(size) / 3 + 1  # -2 to about 1

        last, carry = carry
        outcome = jnp.concatenate([last[None], outcome_of(obs, self.args)])  # (T + 1, N, o + 1)
        new_episode = obs[..., -2] > 0.5  # between two episodes there is no change, but a jump
        forget = reset | new_episode if self.args.num_layers else jnp.ones_like(reset)
        change = jnp.where(forget[..., None], 0.0, outcome[1:] - outcome[:-1])
        x = jnp.concatenate([obs, *direction_and_size(change[..., :o]), *direction_and_size(change[..., o:])], axis=-1)
        x = gated(x.reshape(T * N, -1), self.args.encoder_size)
        x = nn.relu(dense(x, self.args.d_model)).reshape(T, N, self.args.d_model)
        carry, x = SequenceModel(self.args)(carry, x, reset)
        x = x.reshape(T * N, self.args.d_model)

        def head(x, size, scale):
            hidden = nn.relu(dense(gated(x, self.args.head_size), self.args.head_size))
            return dense(hidden, size, scale).reshape(T, N, size)

        # How much to explore depends on what the memory holds, so the deviation is an output as well. It stays between
        # 0.1 and 2, so that neither noise nor certainty runs away, and starts near 0.45. The mean stays within 3: where
        # only an action's sign counts nothing else would hold it, and layers that multiply see the action again.
        mean, log_std = jnp.split(head(x, 2 * A, 0.01), 2, axis=-1)
        mean = 3 * jnp.tanh(mean / 3)
        log_std = np.log(0.1) + (np.log(2) - np.log(0.1)) * nn.sigmoid(log_std)
        value = head(x, 1, 0.01)[..., 0]
        action = jnp.zeros((T, N, A)) if action is None else action
        prediction = head(jnp.concatenate([x, action.reshape(T * N, A)], axis=1), o + 1, 1.0)
        return (outcome[-1], carry), (mean, log_std), value, prediction

    def initial_carry(self, num_envs):
        last = jnp.zeros((num_envs, self.args.projected_obs_size + 1))
        return last, SequenceModel(self.args, parent=None).initial_carry(num_envs)


# ==== PPO =============================================================================================================
class Transition(NamedTuple):
    """A rollout, every field with leading axes (T, N)."""

    obs: jax.Array
    reset: jax.Array  # obs[t] is the first of a trial: what the memory goes by
    action: jax.Array  # (T, N, A), as drawn; the environment clips
    log_prob: jax.Array
    value: jax.Array
    reward: jax.Array  # scaled, plus gamma times the value of the final observation where truncated
    done: jax.Array  # action[t] ended an episode: what the advantage goes by
    change: jax.Array  # (T, N, projected_obs_size + 1) of observation and reward by action[t]
    discounted_return: jax.Array  # of raw rewards


class TrainState(NamedTuple):
    """All that training needs to go on: a checkpoint holds this and nothing else. Axis N is split over the devices."""

    params: dict
    opt_state: tuple
    env_state: tuple
    obs: jax.Array  # (N, O)
    reset: jax.Array  # (N,)
    carry: tuple  # the network's memory before it has seen obs
    key: jax.Array
    num_updates: jax.Array  # int32, updates done
    return_mean: jax.Array  # (K,) mean and variance of each task's discounted raw returns in all rollouts so far
    return_var: jax.Array
    lr_scale: jax.Array  # factor of the step size, at most 1


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


def gaussian(policy, action):
    """Log-probability of the action and entropy, both (...,), from mean, log_std and action, each (..., A)."""
    mean, log_std = policy
    log_prob = -0.5 * jnp.square((action - mean) / jnp.exp(log_std)) - log_std - 0.5 * np.log(2 * np.pi)
    return log_prob.sum(-1), (log_std + 0.5 * np.log(2 * np.pi * np.e)).sum(-1)


def ppo_loss(params, network, carry, batch, advantage, target, ent_coef, args):
    """Clipped objective, value loss and entropy bonus (Schulman et al. 2017), and the prediction's squared error.

    batch: Transition (T, M); carry: the memory, leading axis M, that the rollout began with; advantage, target (T, M).
    Returns the scalar loss and a dict of scalars to log.
    """
    _, policy, value, prediction = network.apply(params, carry, batch.obs, batch.reset, batch.action)
    log_prob, entropy = gaussian(policy, batch.action)
    log_ratio = log_prob - batch.log_prob
    ratio = jnp.exp(jnp.minimum(log_ratio, 20.0))  # finite, however far a step went that `learn` is about to skip
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    clipped = jnp.clip(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -jnp.minimum(ratio * advantage, clipped * advantage).mean()
    value_loss = 0.5 * jnp.square(value - target).mean()
    prediction_loss = jnp.square(prediction - batch.change).mean()
    loss = policy_loss + args.vf_coef * value_loss - ent_coef * entropy.mean() + args.prediction_coef * prediction_loss
    return loss, {
        "losses/policy_loss": policy_loss,
        "losses/value_loss": value_loss,
        "losses/prediction_loss": prediction_loss,
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
    num_envs, K = args.num_envs // args.num_devices, len(env.names)
    network = ActorCritic(args)
    adam = optax.adam(learning_rate_schedule(args), eps=1e-5)
    optimizer = optax.chain(optax.clip_by_global_norm(args.max_grad_norm), adam)

    def init(key) -> TrainState:
        key, env_key, params_key = jax.random.split(key, 3)
        env_key = jax.random.fold_in(env_key, jax.lax.axis_index("devices"))
        env_state, first = env.reset(env_key, num_envs)
        carry = network.initial_carry(num_envs)
        params = network.init(params_key, carry, first.obs[None], first.reset[None])
        opt_state, num_updates = optimizer.init(params), jnp.zeros((), jnp.int32)
        return_var = jnp.square(jnp.array([TASKS[name].spread for name in env.names]))  # until there is a rollout
        zero, one = 0 * return_var, jnp.ones(())
        return TrainState(
            params, opt_state, env_state, first.obs, first.reset, carry, key, num_updates, zero, return_var, one
        )

    def act(state: TrainState, key):
        """One step of the rollout."""
        action_key, env_key = jax.random.split(key)
        carry, (mean, log_std), value, _ = network.apply(state.params, state.carry, state.obs[None], state.reset[None])
        action = mean + jnp.exp(log_std) * jax.random.normal(action_key, mean.shape)  # (1, N, A)
        env_state, timestep = env.step(env_key, state.env_state, action[0], jnp.sqrt(state.return_var) + 1e-3)
        # A time limit cuts off what the episode was still worth: add it, judged with the memory of before the reset.
        # A termination is worth nothing more, although the trial goes on: with the restart's value, falling were free.
        final_obs, no_reset = timestep.final_obs[None], jnp.zeros_like(state.reset)[None]
        _, _, final_value, _ = network.apply(state.params, carry, final_obs, no_reset)
        reward = timestep.reward + args.gamma * jnp.where(timestep.truncated, final_value[0], 0.0)
        log_prob, _ = gaussian((mean, log_std), action)
        done, change = timestep.done, outcome_of(timestep.final_obs, args) - outcome_of(state.obs, args)
        transition = Transition(
            state.obs, state.reset, action[0], log_prob[0], value[0], reward, done, change, timestep.discounted_return
        )
        ended = done, jnp.where(done, timestep.episode_return, 0.0)
        reset = timestep.reset & args.reset_memory
        state = state._replace(env_state=env_state, obs=timestep.obs, reset=reset, carry=carry)
        return state, (transition, jax.tree.map(lambda x: x.reshape(K, -1).sum(1), ended))

    def update(state: TrainState, _):
        """One rollout, and update_epochs passes over it."""
        key, device_key = jax.random.split(state.key)
        device_key = jax.random.fold_in(device_key, jax.lax.axis_index("devices"))
        act_key, pool_key, *epoch_keys = jax.random.split(device_key, 2 + args.update_epochs)
        # Squared, so that the bonus fades well before the step size does: as actions become regular, the network has to
        # learn anew to read its memory among them. A bonus below zero makes them regular (benchmarks/LOG.md, item 22).
        final = args.ent_coef if args.final_ent_coef is None else args.final_ent_coef
        ent_coef = final + (args.ent_coef - final) * (1 - state.num_updates / args.num_updates) ** 2
        state = state._replace(env_state=env.redraw(pool_key, state.env_state))
        first_carry = state.carry  # as acting left it; each pass over the rollout starts from it again
        state, (batch, episodes) = jax.lax.scan(act, state, jax.random.split(act_key, args.num_steps))
        _, _, last_value, _ = network.apply(state.params, state.carry, state.obs[None], state.reset[None])
        advantage = gae(batch.reward, batch.value, batch.done, last_value[0], args.gamma, args.gae_lambda)
        target = advantage + batch.value

        # Predictions are judged in units of each task's usual change, else those of slow tasks would hardly count, and
        # clipped at three of them, else a rare jump, which nobody could foresee, would outweigh all steps in between.
        change = batch.change.reshape(args.num_steps, K, -1, args.projected_obs_size + 1)
        usual = jax.lax.pmean(jnp.abs(change).mean((0, 2), keepdims=True), "devices")
        change = jnp.clip(change / (usual + 1e-4), -3, 3).reshape(batch.change.shape)
        batch = batch._replace(change=change)

        # Welford's update: rewards are divided by the spread of their task's returns in all rollouts so far.
        returns = batch.discounted_return.reshape(args.num_steps, K, -1)
        mean = jax.lax.pmean(returns.mean((0, 2)), "devices")  # (K,)
        var = jax.lax.pmean(jnp.square(returns - mean[:, None]).mean((0, 2)), "devices")
        shift, count = mean - state.return_mean, state.num_updates + 1
        return_mean = state.return_mean + shift / count
        var = state.return_var + (var + shift * (mean - return_mean) - state.return_var) / count
        state = state._replace(return_mean=return_mean, return_var=var)

        def learn(params_and_opt_state, env_ids):
            """One gradient step on the environments env_ids (M,), over the whole length of the rollout."""
            params, opt_state = params_and_opt_state
            carry = jax.tree.map(lambda x: x[env_ids], first_carry)
            minibatch = jax.tree.map(lambda x: x[:, env_ids], (batch, advantage, target))
            grads, losses = jax.grad(ppo_loss, has_aux=True)(params, network, carry, *minibatch, ent_coef, args)
            flat, unflatten = ravel_pytree(grads)  # one all-reduce, not one an array
            flat = jax.lax.pmean(flat, "devices")
            losses["losses/grad_norm"] = jnp.linalg.norm(flat)
            updates, stepped = optimizer.update(unflatten(flat), opt_state, params)
            updates = jax.tree.map(lambda x: state.lr_scale * x, updates)
            # Skip the step if the policy is far from its rollout already: one of several tasks may run away in a few.
            near = jax.lax.pmean(losses["losses/approx_kl"], "devices") < 2.5 * args.target_kl
            losses["losses/skipped"] = 1.0 - near
            updated = optax.apply_updates(params, updates), stepped

            # The optimiser's counts go on, since the step size goes by them.
            kept = jax.tree.map(
                lambda x, y: jnp.where(near | (x.dtype == jnp.int32), x, y), updated, (params, opt_state)
            )
            return kept, losses

        order = jnp.concatenate([jax.random.permutation(k, num_envs) for k in epoch_keys])
        order = order.reshape(args.update_epochs * args.num_minibatches, -1)  # (gradient steps, M)
        (params, opt_state), losses = jax.lax.scan(learn, (state.params, state.opt_state), order)
        losses["losses/explained_variance"] = 1 - (target - batch.value).var() / (target.var() + 1e-8)
        # Sharp policies move far with each step. To skip steps does not bring them back, so steps get shorter until the
        # policy stays near its rollout, and then slowly longer.
        losses["losses/lr_scale"] = state.lr_scale
        kl = jax.lax.pmean(losses["losses/approx_kl"].mean(), "devices")
        lr_scale = jnp.where(kl > args.target_kl, state.lr_scale / 1.5, jnp.minimum(1.05 * state.lr_scale, 1.0))
        state = state._replace(params=params, opt_state=opt_state, lr_scale=lr_scale)
        state = state._replace(key=key, num_updates=state.num_updates + 1)
        return state, (jax.tree.map(jnp.mean, losses), jax.tree.map(lambda x: x.sum(0), episodes))

    def train(state: TrainState) -> tuple[TrainState, dict]:
        """Means over updates; returns over the episodes that ended, NaN for a task without any, as is charts/score.

        An episode that its trial's end has cut off counts as it is; evaluations count whole episodes only.
        """
        state, (losses, episodes) = jax.lax.scan(update, state, length=args.log_interval)
        metrics = jax.lax.pmean(jax.tree.map(jnp.mean, losses), "devices")
        count, returns = jax.lax.psum(jax.tree.map(lambda x: x.sum(0), episodes), "devices")  # (K,) each
        zero, one = (jnp.array([getattr(TASKS[name], x) for name in env.names]) for x in ("zero", "one"))
        metrics["charts/score"] = ((returns / count - zero) / (one - zero)).mean()
        for name, number, total in zip(env.names, count, returns, strict=True):
            metrics |= {f"charts/episodes/{name}": number, f"charts/episodic_return/{name}": total / number}
        return state, metrics

    split, copied = jax.P("devices"), jax.P()
    specs = TrainState(copied, copied, split, split, split, split, *5 * [copied])
    mesh = jax.make_mesh((args.num_devices,), ("devices",), devices=jax.devices()[: args.num_devices])
    init = jax.shard_map(init, mesh=mesh, in_specs=copied, out_specs=specs, check_vma=False)
    return init, jax.shard_map(train, mesh=mesh, in_specs=(specs,), out_specs=(specs, copied), check_vma=False)


# ==== Evaluation ======================================================================================================
# The agent, and two that lack what their names say. The last sees the start of a trial for ever, as it never did in
# training: what it lacks is therefore not only what was learned in context.
MEMORIES = ("kept", "wiped every episode", "wiped every step")


def evaluate(params, spread, key, memory, args, env):
    """Raw rewards and episode ends, (S, K E) each: S steps of E = eval_trials trials of each of env's K tasks.

    memory: index of MEMORIES. The trials of one key have the same matrices whatever the memory. Actions are sampled, as
    in training: to explore is part of the policy. The weights are fixed. S is long enough for every episode begun
    within the trial to be whole. With --no-reset-memory the kept memory comes from a trial on other matrices, which
    goes before. Returns also, for --render, brax's states of the first trial, or None.
    """
    network, num_envs = ActorCritic(args), len(env.names) * args.eval_trials
    reset_key, key = jax.random.split(key)
    longest = max(task.task.episode_length for task in env.tasks)
    num_steps = args.eval_trial_length + longest if args.trial_length else args.eval_trial_length * longest

    def step(state, key):
        env_state, timestep, carry = state
        action_key, env_key = jax.random.split(key)
        new_trial = timestep.reset & (args.reset_memory | (memory > 0))
        reset = new_trial | ((memory == 1) & timestep.done) | (memory == 2)
        # Where the memory is wiped, the agent sees what it saw in training when its memory was empty: a trial's first
        # observation, without previous action and reward, which would be a memory too. (PointRobot-misc observes both
        # by itself, so that there a memory of one step is left.)
        start_of_trial = timestep.obs.at[:, args.projected_obs_size : -2].set(0.0).at[:, -2:].set(1.0)
        obs = jnp.where(reset[:, None], start_of_trial, timestep.obs)
        carry, (mean, log_std), _, _ = network.apply(params, carry, obs[None], reset[None])
        action = mean + jnp.exp(log_std) * jax.random.normal(action_key, mean.shape)
        frame = jax.tree.map(lambda x: x[0], env_state[0].inner.pipeline_state) if args.render else None
        env_state, timestep = env.step(env_key, env_state, action[0], spread)
        return (env_state, timestep, carry), (timestep.raw_reward, timestep.done, frame)

    def rollout(state, key):
        redraw_key, key = jax.random.split(key)
        env_state, *rest = state
        state = env.redraw(redraw_key, env_state), *rest  # new start states as often as in training
        return jax.lax.scan(step, state, jax.random.split(key, args.num_steps))

    rollouts = jax.random.split(key, -(-num_steps // args.num_steps))  # the last one is cut off
    carry = network.initial_carry(num_envs)
    if not args.reset_memory:
        before = (*env.reset(jax.random.fold_in(reset_key, 1), num_envs), carry)
        (_, _, carry), _ = jax.lax.scan(rollout, before, jax.vmap(partial(jax.random.fold_in, data=1))(rollouts))
    _, outcome = jax.lax.scan(rollout, (*env.reset(reset_key, num_envs), carry), rollouts)
    return jax.tree.map(lambda x: jnp.concatenate(x)[:num_steps], outcome)


def reward_spread(return_var, names, args):
    """What the rewards of the named tasks are divided by in an evaluation, (seeds, K); return_var: (seeds, tasks).

    As training left it; for held-out tasks, of which training knows nothing, the spread of random actions' returns.
    """
    spread = {name: jnp.full(args.num_seeds, TASKS[name].spread) for name in names}
    spread |= dict(zip(args.train_tasks, jnp.sqrt(return_var).T + 1e-3, strict=True))
    return jnp.stack([spread[name] for name in names], axis=1)


def episodes_of(rewards, dones, args):
    """Trial, index within it, first step and return of every episode begun within it; from (S, E) rewards and ends."""
    rows = []
    for trial in range(rewards.shape[1]):
        borders = [0, *np.flatnonzero(dones[:, trial]) + 1]
        for i, (first, end) in enumerate(pairwise(borders)):
            if (first if args.trial_length else i) < args.eval_trial_length:
                rows.append((trial, i, first, rewards[first:end, trial].sum(dtype=float)))
    return np.array(rows)  # (episodes, 4)


def adaptation(rewards, dones, env, args):
    """What one evaluation shows, as rows of adaptation.csv.

    rewards, dones: (seeds, memories, S, K E). Of each task and memory, over the trials of all seeds: the score against
    the index of the episode; against the step of the trial, in parts that get longer, the reward, and the share of
    steps that end an episode ("ends"); and the score over the second half of the trial (mean over its episodes, then
    over trials). Each with the half-width of a 95 % interval (Student's t; too narrow, where what a trial can get
    depends on its starts, as all draw them from the same pools); and what raw return a mean score stands for.
    """
    from scipy import stats

    steps, rows = args.eval_trial_length if args.trial_length else rewards.shape[2], []
    borders = np.unique(np.geomspace(1, steps + 1, 21).round().astype(int)) - 1  # of 20 parts, or of as many as steps
    for k, name in enumerate(env.names):
        task, mine = TASKS[name], np.arange(rewards.shape[3]).reshape(len(env.names), -1)[k]
        for m, memory in enumerate(MEMORIES):
            reward, done = (np.concatenate(x[:, m][:, :, mine], axis=1) for x in (rewards, dones))  # (S, trials)
            trial, index, first, returns = episodes_of(reward, done, args).T
            score = (returns - task.zero) / (task.one - task.zero)
            second = (first if args.trial_length else index) >= args.eval_trial_length / 2
            half = {i: score[second & (trial == i)].mean() for i in np.unique(trial[second])}  # trial: score
            samples = [("second half", 0, np.array([*half.values()]))]
            samples += [("episode", i, score[index == i]) for i in range(int(index.max()) + 1)]
            # Trials of few short episodes are over sooner: what their copies do afterwards does not count.
            within = (np.cumsum(done, 0) - done < args.eval_trial_length) | bool(args.trial_length)
            for first_step, end in pairwise(borders):
                count = within[first_step:end].sum(0)
                many = count > (end - first_step) / 2
                for against, what in (("step", reward), ("ends", done)):
                    mean = (what * within)[first_step:end].sum(0)[many] / count[many]
                    samples += [(against, (first_step + end) / 2, mean)]
            if m == 0:
                kept = half
            else:  # the same trial, that is the same matrices, with and without
                samples += [("kept minus this", 0, np.array([kept[i] - half[i] for i in half if i in kept]))]
            for against, x, sample in (s for s in samples if len(s[2])):  # no episode may begin in the second half
                mean, is_score = sample.mean(), against in ("second half", "episode")
                width = stats.sem(sample) * stats.t.ppf(0.975, len(sample) - 1) if len(sample) > 1 else np.nan
                raw_return = task.zero + mean * (task.one - task.zero) if is_score else np.nan
                row = {"task": name, "memory": memory, "against": against, "x": x, "mean": mean}
                rows.append(row | {"interval": width, "trials": len(sample), "raw_return": raw_return})
    return rows


def without_nan(row):
    """A row of a table, whose cells are empty where there is no number: one sample has no interval."""
    return {name: "" if x != x else x for name, x in row.items()}


def report(run_dir, rows, env, args, console):
    """adaptation.csv, adaptation.png and a printed table from the rows of `adaptation`."""
    from matplotlib.figure import Figure

    with (run_dir / "adaptation.csv").open("w", newline="") as f:
        table = csv.DictWriter(f, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(map(without_nan, rows))

    def pick(*wanted):
        return [r for r in rows if (r["task"], r["memory"], r["against"]) == wanted]

    titles = {name: name + (" (held out)" if name in args.held_out_tasks else "") for name in env.names}
    fig = Figure(figsize=(3 * len(env.names) + 1, 5), layout="constrained")
    axes = fig.subplots(2, len(env.names), squeeze=False)
    for name, column in zip(env.names, axes.T, strict=True):
        # A reward for every step that the pole stands is the same at every step; when it falls tells more.
        same = np.ptp([r["mean"] for r in rows if (r["task"], r["against"]) == (name, "step")]) < 1e-5
        lower = "ends" if same else "step"
        for ax, against in zip(column, ("episode", lower), strict=True):
            means = []
            for i, memory in enumerate(MEMORIES):
                mine = pick(name, memory, against)  # less the episodes that only trials of short episodes came to
                mine = [(r["x"], r["mean"], r["interval"]) for r in mine if r["trials"] >= 0.5 * mine[0]["trials"]]
                x, mean, width = np.array(mine).T
                ax.plot(x, mean, color=f"C{i}", label=f"memory {memory}")
                ax.fill_between(x, mean - width, mean + width, color=f"C{i}", alpha=0.2, lw=0)
                means.append(mean)
            between = zip(x, means[0], means[2], strict=False)  # as far as both go
            ax.fill_between(*zip(*between, strict=True), color="grey", alpha=0.1, lw=0, label="kept - wiped every step")
            trained = args.trial_episodes if against == "episode" else args.trial_length
            if trained:
                ax.axvline(trained, color="grey", linestyle=":", linewidth=1)  # trials of training end here
            ylabel = {"episode": "score", "step": "reward per step", "ends": "episodes that end, per step"}[against]
            ax.set(xlabel=f"{against.replace('ends', 'step')} of the trial", ylabel=ylabel)
        column[1].set_xscale("log")
        column[0].set_title(titles[name])
    axes[0, 0].legend(fontsize="x-small")
    fig.savefig(run_dir / "adaptation.png", dpi=150)

    gaps = (f"kept - {memory}".replace(" every", "\nevery") for memory in MEMORIES[1:])
    table = Table("task", "raw return", "memory kept", *gaps)
    table.columns[0].overflow = "fold"  # names stay whole in a narrow terminal
    table.title = "score over the second half of a trial: 0 random or idle, 1 specialist; 95 % interval over trials"
    for name in env.names:
        kept = pick(name, "kept", "second half")
        cells = [kept, *(pick(name, memory, "kept minus this") for memory in MEMORIES[1:])]
        cells = [f"{c[0]['mean']:.2f} ± {c[0]['interval']:.2f}".replace("nan", "–") if c else "–" for c in cells]
        table.add_row(titles[name], f"{kept[0]['raw_return']:.4g}" if kept else "–", *cells)
    console.print(table)


def render(run_dir, frames, rewards, dones, env, args):
    """HTML pages of a trial's first and last episode; frames: brax states, (S, ...); rewards, dones: (S, 1)."""
    from brax.io import html

    task = env.tasks[0].env
    sys = task.sys.tree_replace({"opt.timestep": task.dt})  # the viewer takes this for the time between two frames
    starts = episodes_of(rewards, dones, args)[:, 2].astype(int)
    for which, start in (("first", starts[0]), ("last", starts[-1])):
        steps = range(start, start + dones[start:].argmax() + 1)
        states = [jax.tree.map(lambda x, t=t: x[t], frames) for t in steps]
        path = run_dir / f"{env.names[0]}_{which}_episode.html"
        path.write_text(html.render(sys, states))
        print(path)


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


def setup() -> tuple[Args, Environment, Environment]:
    """Flags, the environments to train in and to evaluate in; or one line on stderr and exit code 2."""
    args = parse_flags()
    try:
        run_dir = args.resume or args.eval_only
        if run_dir:
            flag, own = "--resume", ("resume", "total_timesteps")
            if args.eval_only:
                flag, own = "--eval-only", ("eval_only", "held_out_tasks", "eval_trials", "eval_trial_length", "render")
            given = {word.split("=")[0].replace("_", "-") for word in sys.argv[1:] if word.startswith("--")}
            if foreign := sorted(given - {"--" + name.replace("_", "-") for name in own}):
                raise ValueError(f"{flag} keeps the run's own flags: drop {' '.join(foreign)}")
            config = run_dir / "config.json"
            if not config.is_file() or not (run_dir / "checkpoint").is_dir():
                raise ValueError(f"{flag} {run_dir} holds no config.json and checkpoint/: name a directory under runs/")
            if args.eval_only and not any((run_dir / "checkpoint").iterdir()):
                raise ValueError(f"--eval-only {run_dir} has no checkpoint yet: go on with --resume {run_dir}")
            try:
                stored = json.loads(config.read_text())
                flags_of_run = stored["args"].keys()
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f"{flag} {run_dir}/config.json is damaged: it cannot go on") from None
            if flags_of_run != dataclasses.asdict(args).keys():
                raise ValueError(f"{flag} {run_dir} is of another script, or version (git_commit in config.json)")
            new = {name: getattr(args, name) for name in own if "--" + name.replace("_", "-") in given}
            args = stored["args"] | new
            if args["eval_only"]:  # which needs no more than one device
                args |= {"num_devices": 1, "track": False}
            args = Args(**{name: tuple(x) if isinstance(x, list) else x for name, x in args.items()})
            if args.total_timesteps < (own := stored["args"]["total_timesteps"]):
                raise ValueError(f"--total-timesteps {args.total_timesteps} is below the run's own: use {own} or more")
        args.check()
        if args.num_devices > len(jax.devices()):
            raise ValueError(f"--num-devices {args.num_devices} is more than there are: use {len(jax.devices())}")
        if args.track and not importlib.util.find_spec("wandb"):
            raise ValueError("--track needs Weights & Biases, which is not installed: pip install wandb")
        tasks = (args.render,) if args.render else args.train_tasks + args.held_out_tasks
        if args.render and (not args.eval_only or args.render not in TASKS or CopiesOf(args.render, args).params):
            raise ValueError(f"--render {args.render} needs --eval-only, and a brax task: reacher, ant ...")
        env, eval_env = Environment(args.train_tasks, args), Environment(tasks, args, trials_end=False)
        return args, env, eval_env
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def main():
    start_time = time.time()
    args, env, eval_env = setup()
    import orbax.checkpoint as ocp

    console, signals = Console(), []
    for number in () if args.eval_only else (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: signals.append(number))  # ends the loop after the call in flight
    jax.config.update("jax_default_matmul_precision", "default" if args.tf32 else "highest")
    run_dir = args.resume or args.eval_only or new_run_dir(args, args.suite)
    keys = jnp.stack([jax.random.key(args.seed + i) for i in range(args.num_seeds)])

    init, train = make_train(args, env)
    # One seed after another: batched QR, of the orthogonal weights, can hang in jaxlib 0.10 on a CPU of few cores.
    state = jax.jit(partial(jax.lax.map, init))(keys)
    options = ocp.CheckpointManagerOptions(max_to_keep=1)
    checkpoints = ocp.CheckpointManager((run_dir / "checkpoint").absolute(), options=options)
    update = checkpoints.latest_step() or 0
    if update:
        whole = ocp.args.StandardRestore(state)
        part = {"params": state.params, "return_var": state.return_var}  # all that an evaluation needs
        part = ocp.args.PyTreeRestore(part, ocp.checkpoint_utils.construct_restore_args(part), partial_restore=True)
        # Where names or shapes differ, orbax tells of it in many lines, some from threads that it leaves behind.
        logging.disable()
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                restored = checkpoints.restore(update, args=part if args.eval_only else whole)
                state = state._replace(**restored) if args.eval_only else restored
            except (ValueError, KeyError):
                flag = "--eval-only" if args.eval_only else "--resume"
                why = "has a checkpoint that does not fit this script: use its version, git_commit in config.json"
                print(f"error: {flag} {run_dir} {why}", file=sys.__stderr__, flush=True)
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

    over_memories = jax.vmap(partial(evaluate, args=args, env=eval_env), (None, None, None, 0))
    eval_fn = jax.jit(jax.vmap(over_memories, (0, 0, 0, None)))
    eval_keys = jax.vmap(lambda key: jax.random.fold_in(key, 2**31))(keys)  # far from what init splits off

    def evaluation(state, update):
        """Runs the trials of an evaluation and writes down what they show; returns the rows of evaluations.csv."""
        spread = reward_spread(state.return_var, eval_env.names, args)
        outcome = eval_fn(state.params, spread, eval_keys, jnp.arange(len(MEMORIES)))
        rewards, dones, frames = jax.tree.map(np.asarray, outcome)
        if args.render:
            one = jax.tree.map(lambda x: x[0, 0], frames)
            render(run_dir, one, rewards[0, 0, :, :1], dones[0, 0, :, :1], eval_env, args)
            return None
        rows = adaptation(rewards, dones, eval_env, args)
        report(run_dir, rows, eval_env, args, console)
        when = {"update": str(update), "eval_trial_length": str(args.eval_trial_length)}
        halves = [when | without_nan(row) for row in rows if row["against"] in ("second half", "kept minus this")]
        path, others = run_dir / "evaluations.csv", []
        if path.exists():  # an evaluation made again replaces the old one
            with path.open(newline="") as f:
                others = [
                    r for r in csv.DictReader(f) if not (when.items() <= r.items() and r["task"] in eval_env.names)
                ]
        with path.open("w", newline="") as f:
            table = csv.DictWriter(f, when | rows[0], lineterminator="\n")
            table.writeheader()
            table.writerows(others + halves)
        return halves

    if args.eval_only:
        evaluation(state, update)
        return

    compile_start = time.time()
    train = jax.jit(over_seeds(train, args), donate_argnums=0).lower(state).compile()
    compile_seconds = time.time() - compile_start
    memory = train.memory_analysis()
    working = (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**20
    console.print(f"compiled in {compile_seconds:.0f} s; needs {working:,.0f} MiB of memory, the train state included")

    log = MetricsLog(run_dir, args, update)
    with Progress(console=console) as progress:
        bar = progress.add_task("", total=args.num_updates, completed=update)
        last_save, loop_start, first_update = time.time(), time.time(), update
        while update < args.num_updates and not signals:
            call_start = time.time()
            state, metrics = train(state)
            metrics = jax.tree.map(np.asarray, metrics)  # waits for the device
            call_seconds = time.time() - call_start
            if not np.isfinite(metrics["losses/grad_norm"]).all():
                why = f"the gradient was not finite after update {update} of {run_dir}; no later one is saved"
                raise SystemExit(f"error: {why}: start a new run with a smaller --learning-rate")
            update += args.log_interval
            steps_per_second = args.log_interval * args.batch_size * args.num_seeds / call_seconds
            log.write(update, metrics, steps_per_second)
            score = f"{metrics['charts/score'].mean():.2f}".replace("nan", "–")
            status = f"score {score}  {steps_per_second:,.0f} steps/s"
            progress.update(bar, completed=update, description=status)
            if not console.is_terminal:  # where no bar can be drawn, as in the log of a batch job
                console.print(f"update {update:,} of {args.num_updates:,}: {status}")
            due = args.eval_interval and update % args.eval_interval < args.log_interval
            if due and update < args.num_updates:
                start = time.time()
                evaluation(state, update)
                loop_start += time.time() - start  # no part of training
            if time.time() - last_save > args.checkpoint_interval and update < args.num_updates:
                checkpoints.save(update, args=ocp.args.StandardSave(state))
                last_save = time.time()
    loop_seconds = time.time() - loop_start
    if checkpoints.latest_step() != update:
        checkpoints.save(update, args=ocp.args.StandardSave(state))
    checkpoints.wait_until_finished()
    log.close()
    if update:
        plot_learning_curve(run_dir, args, "charts/score", 0.0, "random or idle, whichever is better")

    def stop(number, _):  # what is saved can be evaluated later
        how = f"python {sys.argv[0]} --resume {run_dir}"
        console.print(f"stopped after update {update}; continue with: {how}", soft_wrap=True)
        raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    if signals:
        stop(signals[0], None)
    results = evaluation(state, update)
    steps = (update - first_update) * args.batch_size * args.num_seeds
    timing = {"total_seconds": time.time() - start_time, "compile_seconds": compile_seconds}
    if steps:  # none if a finished run was resumed
        timing["steps_per_second"] = steps / loop_seconds
    shown = (f"{name} {value:,.0f}" if value > 9 else f"{name} {value:.3g}" for name, value in timing.items())
    console.print("  ".join(shown))
    (run_dir / "eval.json").write_text(json.dumps(timing | {"results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
