"""Resettable S5 and PPO learn to control unknown bodies within a trial (Lu et al. 2023, section 5).

A trial is one or more episodes of one task, seen through a fresh pair of random matrices: one mixes
what the task shows, the other what the agent does. Nothing names the task or the matrices, so the
agent has to find out within the trial what its actions do, and remember it until the trial ends.

    python s5_ppo_meta.py                           # find a hidden goal with an unknown body
    python s5_ppo_meta.py --suite cartpole          # the paper's projected CartPole, positions only
    python s5_ppo_meta.py --suite classic --total-timesteps 96000000    # five tasks at once
    python s5_ppo_meta.py --resume runs/RUN         # goes on after Ctrl-C or a kill

Expect of the first, in the second half of trials, scores (0: idle or random, 1: a rule that sees
the goal) of 0.7 to 1.1, mostly as much on bodies held out, and 0.0 to 0.4 with the memory wiped at
every episode. Departures:
- PPO, not Muesli. The network is also shown the last change of the observation and of the reward,
  and inner products, which no matrix for observations changes (--no-inner-products).
- S5's largest initial time step is 2. With 0.1 even the fastest states would average over 20 steps
  and lose velocities. Input is scaled for states of unit variance, not by zero-order hold (--zoh).
- Gradients reach back one rollout, which may be shorter than a trial. An advantage counts rewards
  of its episode; with --credit trial those of later ones too, unless the task ended the episode.
- Each environment keeps its task. Matrices and bodies are drawn anew for each trial.
- An episode's end inside a trial is a flag in the observation; only a trial's end is a reset.
- The agent sees its own unprojected action and the scaled reward.
- Suites dmc and dmc-small have DMControl's tasks (dmcontrol.py, pip install -e ".[dmc]"), where an
  action lasts four steps; dmc-small trains on two of ours too. The others have gymnax's and brax's.
"""

import argparse
import contextlib
import gzip
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from importlib.metadata import distributions
from itertools import pairwise, product
from pathlib import Path
from typing import Literal, NamedTuple

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


# ==== Tasks =======================================================================================
class Task(NamedTuple):
    """One environment, and what its returns are worth."""

    env_id: str  # of gymnax, of dmcontrol.py, or else of brax
    episode_length: int  # time limit, in steps
    baseline_return: float  # scores 0: the better of random actions and none at all
    specialist_return: float  # scores 1: this script on this task alone, or a rule that sees all
    return_std: float  # of random actions' discounted returns, about; it divides the rewards
    # ---- the next four are for gymnax only
    params: dict = {}  # noqa: RUF012 EnvParams that differ from the library's
    ranges: dict = {}  # noqa: RUF012 (low, high) of EnvParams that are drawn for each trial
    seen: slice = slice(None)  # entries of the observation that the agent sees
    noise_std: float = 0.0  # of noise on the observation, which is then clipped to its space
    same_start: bool = False  # episodes of a trial start alike: a hidden goal stays where it is


# benchmarks/reference_scores.py measures baseline, specialist and std. In mountain-car the
# specialist is no better than doing nothing, so that its return is the one that gym calls solved.
TASKS = {  # env_id, episode_length, baseline_return, specialist_return, return_std, params, ranges
    "cartpole-positions": Task("CartPole-v1", 200, 21.8, 199.8, 9.22, seen=slice(0, 3, 2)),
    "cartpole": Task("CartPole-v1", 200, 21.8, 200.0, 9.22),
    "pendulum": Task("Pendulum-v1", 200, -1147.0, -160.0, 170.0),
    "pendulum-heavy": Task("Pendulum-v1", 200, -1280.0, -179.0, 172.0, {"m": 1.5, "l": 0.8}),
    "point-robot": Task("PointRobot-misc", 100, -88.3, -35.4, 25.4, {"dense_reward": True}),
    "gymnax-reacher": Task("Reacher-misc", 100, 14.3, 27.4, 7.76),
    "mountain-car": Task("MountainCarContinuous-v0", 200, 0.0, 90.0, 0.815),
    "inverted-pendulum": Task("inverted_pendulum", 200, 70.2, 200.0, 9.78),
    "inverted-double-pendulum": Task("inverted_double_pendulum", 200, 637.0, 1825.0, 82.3),
    "reacher": Task("reacher", 100, -23.2, -17.0, 15.6),
}

# Hidden goals. In each trial an action moves the body 1/2 to 2 times as far as the usual one, drawn
# anew; bodies held out, a third as far, and 3 times. The swimmer moves by the square of dt.
# gymnax moves a robot that is within goal_radius: here, never.
POINT = {"dense_reward": True, "max_force": 0.2, "goal_radius": -1.0}
ARM = {"dt": 0.3, "torque_scale": 2.0}
point = partial(Task, "PointRobot-misc", 6, seen=slice(0, 2), same_start=True)
swimmer = partial(Task, "Swimmer-misc", 10, seen=slice(10, 14), same_start=True)
arm = partial(Task, "Reacher-misc", 10, seen=slice(0, 6), same_start=True)
GOALS = {  # baseline_return, specialist_return, return_std, params, ranges
    "point-goal": point(-5.375, -2.274, 2.115, POINT, {"max_force": (0.1, 0.4)}),
    "swimmer-goal": swimmer(5.151, 8.152, 1.851, {"dt": 0.3}, {"dt": (0.212, 0.424)}),
    "reacher-goal": arm(1.526, 6.45, 1.185, ARM, {"torque_scale": (1, 4)}),
    "point-weak": point(-5.375, -4.188, 2.019, POINT | {"max_force": 0.067}),
    "swimmer-weak": swimmer(5.151, 7.315, 2.069, {"dt": 0.173}),
    "reacher-weak": arm(1.512, 3.83, 1.281, ARM | {"torque_scale": 0.667}),
    "point-strong": point(-5.375, -1.201, 2.495, POINT | {"max_force": 0.6}),
    "swimmer-strong": swimmer(5.151, 8.548, 1.415, {"dt": 0.52}),
    "reacher-strong": arm(1.547, 7.746, 0.9942, ARM | {"torque_scale": 6.0}),
}
TASKS |= GOALS

# POPGym's Hard pendulums (Morad et al. 2023). A score is POPGym's return: it maps each reward from
# LOWEST..0 to -1..1, divided by the number of steps. So half of the lowest return scores 0.
LOWEST = -(np.pi**2 + 0.1 * 8**2 + 0.001 * 2**2)  # hanging, at full speed and force
ANGLE = {"seen": slice(0, 2)}
POPGYM = {
    "pendulum-stateless": Task("Pendulum-v1", 100, 50 * LOWEST, 0.0, 131.0, **ANGLE),
    "pendulum-noisy": Task("Pendulum-v1", 200, 100 * LOWEST, 0.0, 176.0, **ANGLE, noise_std=0.3),
}
TASKS |= POPGYM

# DMControl's tasks (Tassa et al. 2018), from dmcontrol.py. Scores are returns / 1000, as usual.
# Rewards are from 0 to 1 a step and often rare: random actions' returns hardly spread, and rewards
# divided by that spread would be huge.
PAPER_TRAIN = ("ball-in-cup-catch", "cartpole-swingup", "finger-spin", "finger-turn-hard")
PAPER_TRAIN += ("point-mass-easy", "reacher-easy")
PAPER_HELD_OUT = ("cartpole-balance", "finger-turn-easy", "pendulum-swingup", "point-mass-hard")
PAPER_HELD_OUT += ("reacher-hard",)
OURS = ("point-mass-wide", "cartpole-anywhere")  # being near pays too; any start but upright
DMC = {  # 250 actions of four steps each; the env_id of reacher-easy is ReacherEasy
    name: Task(name.title().replace("-", ""), 250, 0.0, 1000.0, 10.0)
    for name in PAPER_TRAIN + PAPER_HELD_OUT + OURS
}
TASKS |= DMC


def score(returns, name):
    """0 for the task's baseline_return, 1 for its specialist_return."""
    task = TASKS[name]
    return (returns - task.baseline_return) / (task.specialist_return - task.baseline_return)


class Suite(NamedTuple):
    """The flags that --suite stands for, explained in Args. A flag that is given wins."""

    train_tasks: tuple
    held_out_tasks: tuple
    projected_obs_size: int = 12
    projected_action_size: int = 2
    trial_length: int = 2
    bootstrap_truncated: bool = True


SUITES = {
    "goals": Suite(
        tuple(GOALS)[:3],
        tuple(GOALS)[3:],
        projected_obs_size=8,
        trial_length=16,  # an episode has time to go to the goal, but not to find it
        bootstrap_truncated=False,  # the value of steps that never come would drift
    ),
    "cartpole": Suite(("cartpole-positions",), (), 4, 1, trial_length=16),
    "classic": Suite(
        ("pendulum", "point-robot", "cartpole", "inverted-pendulum", "reacher"),
        ("gymnax-reacher", "inverted-double-pendulum", "pendulum-heavy", "mountain-car"),
    ),
    "dmc": Suite(PAPER_TRAIN, PAPER_HELD_OUT, trial_length=1),
    "dmc-small": Suite(  # what a CPU can carry
        ("cartpole-swingup", "point-mass-easy", "reacher-easy", *OURS),
        ("cartpole-balance", "point-mass-hard", "reacher-hard", "pendulum-swingup"),
        trial_length=1,
    ),
}


# ==== Arguments ===================================================================================
@dataclass
class Args:
    # ---- run
    seed: int = 0  # first seed; the others follow, SEED + 1 ...
    num_seeds: int = 1  # independent seeds, trained side by side
    num_devices: int = 1  # GPUs, or other devices of JAX, that share each seed's environments
    total_timesteps: int = 15_000_000  # steps of a seed, rounded up to whole log intervals
    log_interval: int = 10  # updates in one jitted call, and in one row of metrics.csv
    checkpoint_interval: int = 60  # seconds between saves, of metrics too; it also saves as it ends
    resume: Path | None = None  # run directory to go on with; flags given beside it replace its own
    track: bool = False  # send the metrics to Weights & Biases too, to project WANDB_PROJECT
    tf32: bool = False  # let NVIDIA GPUs use TF32; acting and learning then differ by about 1e-3

    # ---- tasks; what is None here comes from the suite
    suite: Literal[tuple(SUITES)] = "goals"  # tasks, sizes and trials
    train_tasks: tuple[str, ...] | None = None  # names of TASKS, with equal shares of NUM_ENVS
    held_out_tasks: tuple[str, ...] | None = None  # tasks to evaluate on only
    projected_obs_size: int | None = None  # entries of the projected observation
    projected_action_size: int | None = None  # entries of the action before its projection
    projection: bool = True  # --no-projection: the task's own entries, squashed, padded with zeros
    trial_length: int | None = None  # episodes of a trial
    eval_trials: int = 64  # trials of each task and kind of memory in the evaluation at the end

    # ---- sequence model
    num_layers: int = 4  # S5 blocks; 0 is the network without memory
    d_model: int = 64  # D, width of the blocks
    state_size: int = 32  # P, complex states of a block
    dt_slow: float = 0.0  # initial time step of half the states; 0: as the others
    dt_min: float = 0.001  # smallest initial time step; the slowest states last 2 / DT_MIN steps
    dt_max: float = 2.0  # largest initial time step; the fastest states last 2 / DT_MAX steps
    frequency_scale: float = 1.0  # times HiPPO's frequencies; 0: states decay, but do not turn
    layer_norm: bool = True  # normalise what each S5 layer sees, in place of a ReLU
    state_coef: float = 0.0  # weight of the penalty on the states' mean square
    sparsity_coef: float = 0.0  # weight of the penalty on input that is even over time
    zoh: bool = False  # scale S5's input by zero-order hold, as the paper does

    # ---- actor and critic
    inner_products: bool = True  # show the encoder what no matrix for observations changes
    encoder_size: int = 256  # hidden units of the observation encoder
    head_size: int = 128  # hidden units in each of the two layers of the actor and of the critic

    # ---- PPO
    num_envs: int = 480  # N, parallel environments
    num_steps: int = 128  # T, steps of a rollout; gradients reach back this far and no further
    num_minibatches: int = 32  # minibatches of a pass over the rollout, each of whole environments
    update_epochs: int = 2  # passes over each rollout
    learning_rate: float = 1e-3  # step size of Adam
    anneal_lr: bool = True  # lower the step size linearly to zero over the run
    credit: Literal["episode", "trial"] = "episode"  # whose later rewards an advantage counts
    gamma: float = 0.99  # discount of a step
    bootstrap_truncated: bool | None = None  # add the value beyond time limits; None: the suite's
    gae_lambda: float = 0.95  # lambda of the generalised advantage estimate
    clip_coef: float = 0.2  # epsilon of the clipped objective
    ent_coef: float = 0.005  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # global norm the gradient is clipped to

    def __post_init__(self):  # tyro prints what it raises
        for name, value in SUITES[self.suite]._asdict().items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        sizes = "trial_length eval_trials num_seeds num_devices log_interval "
        sizes += "num_envs num_steps total_timesteps num_minibatches update_epochs d_model "
        for name in (sizes + "encoder_size head_size").split():
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} is below 1")
        tasks = self.train_tasks + self.held_out_tasks
        if not self.train_tasks or len(set(tasks)) < len(tasks) or not TASKS.keys() >= set(tasks):
            known = ", ".join(TASKS)
            raise ValueError(f"--train-tasks, --held-out-tasks: one or more, each once, of {known}")
        shares = self.num_devices * math.lcm(self.num_minibatches, len(self.train_tasks))
        if self.num_envs % shares:
            needed = f"{shares}, for equal devices, minibatches and tasks"
            raise ValueError(f"--num-envs {self.num_envs} is no multiple of {needed}")
        if not 0 < self.dt_min <= self.dt_max < np.inf:
            raise ValueError(f"--dt-min {self.dt_min}, --dt-max {self.dt_max} are no range")
        if not 0 <= self.dt_slow < np.inf:
            raise ValueError(f"--dt-slow {self.dt_slow} is no time step")
        if self.num_updates * self.update_epochs * self.num_minibatches >= 2**31:
            raise ValueError(f"--total-timesteps {self.total_timesteps} needs 2^31 gradient steps")

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        """Updates that really run: total_timesteps, rounded up to whole log intervals."""
        return -(-self.total_timesteps // (self.batch_size * self.log_interval)) * self.log_interval


# ==== Environment: trials of several tasks behind `reset` and `step` ==============================
class Timestep(NamedTuple):
    """What a step of N environments returns."""

    obs: jax.Array  # (N, O) what the agent sees next
    reset: jax.Array  # (N,) bool: obs is the first of a trial, where the memory starts anew
    reward: jax.Array  # (N,) divided by the task's return_std
    done: jax.Array  # (N,) bool: the episode ended, by itself or by its time limit
    truncated: jax.Array  # (N,) bool: by its time limit alone
    final_obs: jax.Array  # (N, O) what the agent would have seen next, had the episode gone on
    raw_reward: jax.Array  # (N,)
    episode_return: jax.Array  # (N,) sum of raw rewards so far; NaN if not from the start
    failed: jax.Array  # (N,) bool: the physics gave numbers that are not finite


class Trial(NamedTuple):
    """What is fixed within a trial, of n environments."""

    obs_matrix: jax.Array  # (n, o, p), p = projected_obs_size
    action_matrix: jax.Array  # (n, projected_action_size, a)
    body: dict  # (n,) of each field of EnvParams that the task draws


class EnvState(NamedTuple):
    """n copies of one task; of several tasks, there is a tuple of these."""

    inner: tuple  # the library's own state
    trial: Trial
    trial_start: tuple  # state and observation that the trial began with
    starts: tuple  # n states and observations, of which a new start takes one at random
    trial_episodes: jax.Array  # (n,) int32, episodes of the trial that have ended
    episode_length: jax.Array  # (n,) int32, steps of the episode so far
    episode_return: jax.Array  # (n,)


def random_orthonormal(key, n, rows, columns):
    """n matrices (rows, columns), rows >= columns, uniform (Haar) among orthonormal columns.

    Gram-Schmidt of a Gaussian matrix, twice for float32. Batches of jaxlib's QR, side by side, can
    wait for each other for ever on a few CPU cores.
    """

    def orthogonalise(j, q):
        earlier, column = jnp.where(jnp.arange(columns) < j, q, 0.0), q[:, :, j]
        for _ in range(2):
            column -= jnp.einsum("nrc,nsc,ns->nr", earlier, earlier, column)
        return q.at[:, :, j].set(column / jnp.linalg.norm(column, axis=1, keepdims=True))

    matrices = jax.random.normal(key, (n, rows, columns))
    return jax.lax.fori_loop(0, columns, orthogonalise, matrices)


def where(condition, new, old):
    """Chooses between two trees whose leaves have the condition's axis (n,) in front."""
    return jax.tree.map(lambda x, y: jax.vmap(jnp.where)(condition, x, y), new, old)


class ProjectedTask:
    """n copies of one task, from gymnax, brax or DMControl, behind random projections.

    The task's observation o is squashed to arcsinh(o), linear below 1 and logarithmic above, not
    divided by running statistics. The agent sees arcsinh(o) @ obs_matrix. The rows of that matrix
    are orthonormal, times sqrt(projected size / o's size): distances are kept up to that factor,
    and neither zeros nor a scale give the task away. The task gets clip(action @ action_matrix,
    -1, 1). The columns of that matrix are orthonormal: for each action of the task the agent has
    one of the same norm that leads to it.
    """

    def __init__(self, name, args, trials_end=True):
        import gymnax

        self.task, self.args, self.trials_end = TASKS[name], args, trials_end
        self.is_gymnax = self.task.env_id in gymnax.registered_envs
        if self.is_gymnax:
            self.env, params = gymnax.make(self.task.env_id)
            self.params = params.replace(**self.task.params)
            self.action_size = math.prod(self.env.action_space(self.params).shape)  # Discrete: 1
        elif name in DMC:
            from dmcontrol import DMControl

            self.env = DMControl(self.task.env_id)
            self.action_size = self.env.action_size
        else:
            with contextlib.redirect_stdout(None):  # brax complains of packages not needed here
                from brax import envs

            self.env = envs.get_environment(self.task.env_id, backend="spring")
            self.action_size = self.env.action_size
        self.obs_size = jax.eval_shape(self.start, jax.random.PRNGKey(0))[1].size
        if args.projected_obs_size < self.obs_size or args.projected_action_size < self.action_size:
            raise ValueError(f"{name} needs sizes of at least {self.obs_size}, {self.action_size}")

    # ---- one copy, unprojected
    def start(self, key):
        """State and observation (o,) at the start of an episode."""
        if not self.is_gymnax:
            state = self.env.reset(key)
            return state, state.obs
        obs, state = self.env.reset_env(key, self.params)  # as for any other body
        return state, self.observe(key, obs)

    def physics(self, key, state, action, body):
        """One step with action (a,) in [-1, 1]: state, observation (o,), reward, terminated."""
        if not self.is_gymnax:
            state = self.env.step(state, action)
            return state, state.obs, state.reward, state.done > 0.5
        params = self.params.replace(**body)
        space = self.env.action_space(params)
        share = (action.reshape(space.shape) + 1) / 2
        if hasattr(space, "n"):  # discrete actions have equal parts of [-1, 1]
            action = jnp.int32(share * space.n).clip(0, space.n - 1)
        else:
            action = jnp.float32(space.low + share * (space.high - space.low))
        obs, state, reward, terminated, _ = self.env.step_env(key, state, action, params)
        return state, self.observe(key, obs), jnp.float32(reward), terminated

    def observe(self, key, obs):
        """What the agent is to see of a gymnax observation, (o,)."""
        if self.task.noise_std:
            noise_key = jax.random.split(key)[1]  # not key itself: gymnax has drawn from it
            space = self.env.observation_space(self.params)
            obs += self.task.noise_std * jax.random.normal(noise_key, obs.shape)
            obs = jnp.clip(obs, space.low, space.high)
        return jnp.float32(obs[self.task.seen])

    # ---- n copies
    def draw_trials(self, key, n) -> Trial:
        ranges = self.task.ranges
        obs_key, action_key, *body_keys = jax.random.split(key, 2 + len(ranges))
        p, A = self.args.projected_obs_size, self.args.projected_action_size
        if self.args.projection:
            obs_matrix = random_orthonormal(obs_key, n, p, self.obs_size).mT
            obs_matrix *= np.sqrt(p / self.obs_size)
            action_matrix = random_orthonormal(action_key, n, A, self.action_size)
        else:
            obs_matrix = jnp.tile(jnp.eye(self.obs_size, p), (n, 1, 1))
            action_matrix = jnp.tile(jnp.eye(A, self.action_size), (n, 1, 1))
        body = {
            field: jax.random.uniform(k, (n,), minval=low, maxval=high)
            for k, (field, (low, high)) in zip(body_keys, ranges.items(), strict=True)
        }
        return Trial(obs_matrix, action_matrix, body)

    def agent_obs(self, obs, trial, action, reward, new_episode, new_trial):
        """(n, p + A + 3): projected observation, last action and reward (zero as a trial starts),
        and two flags: an episode starts, a trial starts.
        """
        projected = jnp.einsum("no,nop->np", jnp.arcsinh(obs), trial.obs_matrix)
        previous = jnp.concatenate([action, reward[:, None]], axis=1)
        previous = jnp.where(new_trial[:, None], 0.0, previous)
        flags = jnp.stack([new_episode, new_trial], axis=1)
        return jnp.concatenate([projected, previous, flags], axis=1)

    def reset(self, key, n) -> tuple[EnvState, jax.Array]:
        """State and obs (n, O). Where trials end, the counters of the first trials start part-way.

        Else a rollout would show the same part of a trial in all environments.
        """
        start_key, trial_key, trial_part_key, episode_part_key = jax.random.split(key, 4)
        starts = jax.vmap(self.start)(jax.random.split(start_key, n))
        episodes = jax.random.randint(trial_part_key, (n,), 0, self.args.trial_length)
        length = jax.random.randint(episode_part_key, (n,), 0, self.task.episode_length)
        length *= self.trials_end
        zeros, true = jnp.zeros(n), jnp.ones(n, bool)
        state = EnvState(
            inner=starts[0],
            trial=self.draw_trials(trial_key, n),
            trial_start=starts,
            starts=starts,
            trial_episodes=episodes * self.trials_end,
            episode_length=length,
            episode_return=jnp.where(length > 0, jnp.nan, zeros),  # part of an episode: no return
        )
        action = jnp.zeros((n, self.args.projected_action_size))
        return state, self.agent_obs(starts[1], state.trial, action, zeros, true, true)

    def redraw(self, key, state: EnvState) -> EnvState:
        """New `starts`, once a rollout: in brax, to draw a start costs more than a step."""
        starts = jax.vmap(self.start)(jax.random.split(key, len(state.episode_length)))
        return state._replace(starts=starts)

    def step(self, key, state: EnvState, action) -> tuple[EnvState, Timestep]:
        """Steps n copies with action (n, A); episodes and, if trials end, trials start anew."""
        n, false = len(action), jnp.zeros(len(action), bool)
        physics_key, start_key, trial_key = jax.random.split(key, 3)
        true_action = jnp.einsum("nA,nAa->na", action, state.trial.action_matrix)
        inputs = state.inner, jnp.clip(true_action, -1, 1), state.trial.body
        keys = jax.random.split(physics_key, n)
        inner, obs, raw_reward, terminated = jax.vmap(self.physics)(keys, *inputs)
        # Where the physics fails, the episode ends, and nobody sees its numbers.
        failed = ~(jnp.isfinite(obs).all(1) & jnp.isfinite(raw_reward))
        obs, raw_reward = where(failed, (jnp.zeros_like(obs), jnp.zeros(n)), (obs, raw_reward))
        reward, terminated = raw_reward / self.task.return_std, terminated | failed

        episode_length = state.episode_length + 1
        episode_return = state.episode_return + raw_reward
        done = terminated | (episode_length >= self.task.episode_length)
        trial_episodes = state.trial_episodes + done
        new_trial = self.trials_end & (trial_episodes >= self.args.trial_length)
        final_obs = self.agent_obs(obs, state.trial, action, reward, false, false)

        # A new trial has matrices, a body and a start of its own. Most steps need none.
        draw = partial(self.draw_trials, trial_key, n)
        drawn = jax.lax.cond(new_trial.any(), draw, lambda: state.trial)
        trial = where(new_trial, drawn, state.trial)
        picks = jax.random.randint(start_key, (n,), 0, n)
        start = jax.tree.map(lambda x: x[picks], state.starts)
        trial_start = where(new_trial, start, state.trial_start)
        inner, obs = where(done, trial_start if self.task.same_start else start, (inner, obs))
        timestep = Timestep(
            obs=self.agent_obs(obs, trial, action, reward, done, new_trial),
            reset=new_trial,
            reward=reward,
            done=done,
            truncated=done & ~terminated,
            final_obs=final_obs,
            raw_reward=raw_reward,
            episode_return=episode_return,
            failed=failed,
        )
        state = state._replace(
            inner=inner,
            trial=trial,
            trial_start=trial_start,
            trial_episodes=jnp.where(new_trial, 0, trial_episodes),
            episode_length=jnp.where(done, 0, episode_length),
            episode_return=jnp.where(done, 0.0, episode_return),
        )
        return state, timestep


class Environment:
    """Several tasks side by side, each with an equal, fixed share of the N environments.

    With trials_end=False, as in an evaluation, all trials start together and none ends. Raises
    ValueError if a task does not fit into the projected sizes.
    """

    def __init__(self, names, args, trials_end=True):
        self.names = names
        self.tasks = [ProjectedTask(name, args, trials_end) for name in names]

    def reset(self, key, num_envs) -> tuple[tuple, jax.Array]:
        keys, n = jax.random.split(key, len(self.tasks)), num_envs // len(self.tasks)
        parts = [task.reset(k, n) for task, k in zip(self.tasks, keys, strict=True)]
        states, obs = zip(*parts, strict=True)
        return states, jnp.concatenate(obs)

    def redraw(self, key, states) -> tuple:
        """Gives every task new start states to draw from."""
        keys = jax.random.split(key, len(self.tasks))
        return tuple(map(ProjectedTask.redraw, self.tasks, keys, states))

    def step(self, key, states, action) -> tuple[tuple, Timestep]:
        """Steps all N environments with action (N, A)."""
        keys, actions = jax.random.split(key, len(self.tasks)), jnp.split(action, len(self.tasks))
        parts = map(ProjectedTask.step, self.tasks, keys, states, actions)
        states, timesteps = zip(*parts, strict=True)
        return states, jax.tree.map(lambda *x: jnp.concatenate(x), *timesteps)


# ==== Sequence model: S5 with resets inside the scan ==============================================
def hippo_normal(state_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues (P,), eigenvectors (2P, P), complex128, of HiPPO-LegS's normal part of size 2P.

    It is -1/2 on the diagonal plus a skew part, so that eigenvalues come in conjugate pairs. One of
    each is kept (Gu et al. 2022): the other adds the conjugate, hence 2 Re(Cx) in S5. In NumPy,
    once, since float32 loses digits.
    """
    root = np.sqrt(np.arange(2 * state_size) + 0.5)
    upper = np.triu(np.outer(root, root), k=1)
    frequency, vectors = np.linalg.eigh(-1j * (upper - upper.T))  # Hermitian: real, ascending
    return -0.5 + 1j * frequency[state_size:], vectors[:, state_size:]


def s5_scan(a_bar, bu, reset, state):
    """States x (T, N, P) of x_t = a_bar (1 - reset_t) x_{t-1} + bu_t, from x_{-1} = state.

    The paper's operator carries the reset as a third element; a_bar times zero does it with two.
    a_bar (P,), bu (T, N, P), state (N, P) are complex, reset (T, N) is bool.
    """
    if jax.default_backend() == "cpu":  # where one step after another does less work, and is faster

        def step(x, inputs):
            bu_t, reset_t = inputs
            x = jnp.where(reset_t[:, None], 0.0, a_bar * x) + bu_t
            return x, x

        return jax.lax.scan(step, state, (bu, reset))[1]

    def compose(earlier, later):  # two affine maps x -> a x + b, one after the other
        return earlier[0] * later[0], later[0] * earlier[1] + later[1]

    a = jnp.where(reset[..., None], 0.0, a_bar)  # (T, N, P); the state enters with the first input
    return jax.lax.associative_scan(compose, (a, bu.at[0].add(a[0] * state)))[1]


class S5(nn.Module):
    """Diagonal state space layer (Smith et al. 2023): x' = Lambda x + B u, y = 2 Re(C x) + D u.

    In steps of dt: x_t = a_bar x_{t-1} + scale B u_t with a_bar = exp(Lambda dt); Lambda is
    diagonal, and every state has its own dt. Call with state (N, P) complex64, u (T, N, D), reset
    (T, N) bool; returns the last state and y (T, N, D). `sow` hands its penalty to ppo_loss.
    """

    args: Args

    @nn.compact
    def __call__(self, state, u, reset):
        (T, N, D), P = u.shape, self.args.state_size
        hippo, vectors = hippo_normal(P)

        # B and C start real and are turned into the eigenbasis. They are stored as real matrices,
        # for one product on each side of the scan, and since optax expects real gradients.
        def init_b(key):  # (D, 2P): [Re B, Im B], transposed
            b = vectors.conj().T @ jax.random.normal(key, (2 * P, D)) / np.sqrt(D)  # (P, D)
            return jnp.concatenate([b.real.T, b.imag.T], axis=1)

        def init_c(key):  # (2P, D): Re C above -Im C, as Re(Cx) = Re C Re x - Im C Im x
            c = jax.random.normal(key, (D, 2 * P)) @ vectors / np.sqrt(2 * P)  # (D, P)
            return jnp.concatenate([c.real.T, -c.imag.T])

        # The real part of Lambda is minus an exponential: no step can make the layer unstable.
        log_decay = self.param("log_decay", lambda _: jnp.asarray(np.log(-hippo.real), jnp.float32))
        turns = self.args.frequency_scale * hippo.imag
        frequency = self.param("frequency", lambda _: jnp.asarray(turns, jnp.float32))
        b, c = self.param("B", init_b), self.param("C", init_c)
        d = self.param("D", nn.initializers.normal(1.0), (D,))
        low, high = np.full(P, self.args.dt_min), np.full(P, self.args.dt_max)
        if self.args.dt_slow:  # every second state keeps; the others soon forget, but learn first
            low[::2] = high[::2] = self.args.dt_slow
        span = {"minval": np.log(low), "maxval": np.log(high)}
        dt = jnp.exp(self.param("log_dt", lambda key: jax.random.uniform(key, (P,), **span)))

        lam = jax.lax.complex(-jnp.exp(log_decay), frequency)
        a_bar = jnp.exp(lam * dt)  # (P,)
        # White input of variance 1 gives states of variance scale^2 / (1 - |a_bar|^2): one, if not
        # --zoh, however slow they are. Zero-order hold scales by about dt: a lone cue is lost.
        scale = (a_bar - 1) / lam if self.args.zoh else jnp.sqrt(-jnp.expm1(2 * lam.real * dt))

        # Products see T and N as one axis: a gradient summed over two takes three times as long.
        u = u.reshape(T * N, D)
        b_bar = jax.lax.complex(b[:, :P], b[:, P:]) * scale  # (D, P)
        bu = u @ jnp.concatenate([b_bar.real, b_bar.imag], axis=1)  # (T N, 2P)
        bu = jax.lax.complex(bu[:, :P], bu[:, P:]).reshape(T, N, P)
        states = s5_scan(a_bar, bu, reset, state)
        # If size costs nothing, slow states gather a little of every step and drown what they keep.
        penalty = 0.0
        if self.args.state_coef:
            penalty += self.args.state_coef * jnp.square(jnp.abs(states)).mean()
        # Mean over root mean square of the input's size (Hoyer 2004): 1 if it is even, 0.1 if all
        # comes at a hundredth of the steps. To shrink it all does not help: the rest has to stop.
        if self.args.sparsity_coef:
            size = jnp.abs(u).mean(1)  # (T N,)
            evenness = size.mean() / jnp.sqrt(jnp.square(size).mean() + 1e-12)
            penalty += self.args.sparsity_coef * evenness
        self.sow("intermediates", "penalty", penalty)
        x = states.reshape(T * N, P)
        y = 2 * jnp.concatenate([x.real, x.imag], axis=1) @ c + d * u  # (T N, D)
        return states[-1], y.reshape(T, N, D)


class SequenceModel(nn.Module):
    """Residual blocks: ReLU, or LayerNorm (--layer-norm); S5, GELU, gated linear unit.

    carry: a tuple of S5 states, one a block. Call with x (T, N, D), reset (T, N); returns carry and
    y (T, N, D). T is 1 when acting and num_steps when learning; both give the same y.
    """

    args: Args

    @nn.compact
    def __call__(self, carry, x, reset):
        T, N, D = x.shape
        next_carry = []
        for state in carry:  # one a block, of which there are num_layers
            u = nn.LayerNorm()(x) if self.args.layer_norm else nn.relu(x)
            state, y = S5(self.args)(state, u, reset)
            y = nn.gelu(y).reshape(T * N, D)
            x = x + (y * nn.sigmoid(nn.Dense(D)(y))).reshape(T, N, D)
            next_carry.append(state)
        return tuple(next_carry), x

    def initial_carry(self, num_envs):
        return (jnp.zeros((num_envs, self.args.state_size), jnp.complex64),) * self.args.num_layers


# ==== Actor-critic ================================================================================
DECAYS = (0.9, 0.99)  # of the remembered sums, a step: they reach back 10 and 100 steps


def direction_and_size(x):
    """x (..., d) over its root mean square (..., 1), and log(root mean square) / 3 + 1."""
    size = jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-8)  # at least 1e-4
    return x / size, jnp.log(size) / 3 + 1


def inner_products(sums, obs, change, weights, reset):
    """Features that no matrix for observations changes: it keeps inner products, up to a scale.

    Remembered are K = 2 W len(DECAYS) decaying sums, of obs or of change (T, N, p) times one of the
    weights (T, N, W). Where an entry of the last action is the weight, the sum of changes points
    where that entry leads. reset (T, N) empties the sums (N, K, p) before a step is added, as it
    does S5's states: these too are a linear recurrence. Returns the sums after each step (T, N, K,
    p), and features (T, N, F): products / p among obs and the directions of change and of all sums,
    and how large the sums are.
    """
    terms = weights[..., None, None] * jnp.stack([obs, change], axis=2)[:, :, None]
    terms = terms.reshape(*reset.shape, -1, obs.shape[-1])  # (T, N, 2 W, p)
    decays = jnp.repeat(jnp.array(DECAYS), terms.shape[2])[:, None]
    terms = jnp.concatenate([terms] * len(DECAYS), axis=2)  # (T, N, K, p)

    def step(x, inputs):
        term, reset = inputs
        x = jnp.where(reset[:, None, None], 0.0, decays * x) + term
        return x, x

    sums = jax.lax.scan(step, sums, (terms, reset))[1]
    directions, sizes = direction_and_size(sums)
    now = jnp.stack([obs, direction_and_size(change)[0]], axis=2)
    vectors = jnp.concatenate([now, directions], axis=2)
    products = jnp.einsum("tnkp,tnlp->tnkl", vectors, vectors) / obs.shape[-1]
    one_of_each_pair = products[..., *np.triu_indices(vectors.shape[2])]
    return sums, jnp.concatenate([one_of_each_pair, sizes[..., 0]], axis=-1)


class ActorCritic(nn.Module):
    """Encoder, sequence model, and heads for a Gaussian policy and a value.

    What an action does shows in the change of observation and reward, so the encoder is given the
    change too, by a memory of one step like the shift of Fu et al. (2023), and inner products.

    carry: the last outcome (N, p + 1), the inner products' sums (N, K, p) and the sequence model's
    carry. Call with carry, obs (T, N, O), reset (T, N); returns carry, the policy's mean and log
    standard deviation (T, N, A) each, and value (T, N).
    """

    args: Args

    @nn.compact
    def __call__(self, carry, obs, reset):
        T, N, _ = obs.shape
        p, A = self.args.projected_obs_size, self.args.projected_action_size

        def dense(x, size, scale=np.sqrt(2)):
            return nn.Dense(size, kernel_init=nn.initializers.orthogonal(scale))(x)

        last, sums, carry = carry
        outcome = jnp.concatenate([obs[..., :p], obs[..., p + A : p + A + 1]], axis=-1)
        outcome = jnp.concatenate([last[None], outcome])  # (T + 1, N, p + 1)
        new_episode = obs[..., -2] > 0.5  # between two episodes there is no change, but a jump
        no_memory = jnp.full_like(reset, self.args.num_layers == 0)  # no change, no sums
        forget = (reset | new_episode | no_memory)[..., None]
        change = jnp.where(forget, 0.0, outcome[1:] - outcome[:-1])
        seen = [obs, *direction_and_size(change[..., :p]), *direction_and_size(change[..., p:])]
        if self.args.inner_products:
            weights = jnp.ones_like(obs[..., :1]), obs[..., p : p + A + 1], change[..., p:]
            inputs = obs[..., :p], change[..., :p], jnp.concatenate(weights, axis=-1)
            sums, products = inner_products(sums, *inputs, reset | no_memory)
            sums, seen = sums[-1], [*seen, products]
        x = jnp.concatenate(seen, axis=-1).reshape(T * N, -1)
        x = nn.relu(dense(nn.relu(dense(x, self.args.encoder_size)), self.args.d_model))
        carry, x = SequenceModel(self.args)(carry, x.reshape(T, N, self.args.d_model), reset)
        x = x.reshape(T * N, self.args.d_model)

        def head(size):
            hidden = nn.relu(dense(x, self.args.head_size))
            hidden = nn.relu(dense(hidden, self.args.head_size))
            return dense(hidden, size, 0.01).reshape(T, N, size)

        # How much to explore depends on what the memory holds, so the deviation is an output too,
        # from 0.1 to 2, at first near 0.45. The mean stays within 3: where only an action's sign
        # counts nothing else would hold it.
        mean, log_std = jnp.split(head(2 * A), 2, axis=-1)
        mean = 3 * jnp.tanh(mean / 3)
        log_std = np.log(0.1) + (np.log(2) - np.log(0.1)) * nn.sigmoid(log_std)
        return (outcome[-1], sums, carry), (mean, log_std), head(1)[..., 0]

    def initial_carry(self, num_envs):
        p, A = self.args.projected_obs_size, self.args.projected_action_size
        num_sums = 2 * (A + 3) * len(DECAYS) * self.args.inner_products
        vectors = jnp.zeros((num_envs, p + 1)), jnp.zeros((num_envs, num_sums, p))
        return *vectors, SequenceModel(self.args, parent=None).initial_carry(num_envs)


# ==== PPO =========================================================================================
class Transition(NamedTuple):
    """A step of N environments; over a rollout, every field has leading axes (T, N)."""

    obs: jax.Array
    reset: jax.Array  # obs[t] is the first of a trial: what the memory goes by
    action: jax.Array  # (T, N, A), as drawn; the environment clips
    log_prob: jax.Array
    value: jax.Array
    reward: jax.Array  # plus gamma times the value of what a time limit cut off
    done: jax.Array  # the advantage ends with action[t]: the episode did or, by --credit, the trial


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


def gaussian(policy, action):
    """Log-probability of action (..., A) and entropy, both (...,), from mean and log_std."""
    mean, log_std = policy
    log_prob = -0.5 * jnp.square((action - mean) / jnp.exp(log_std)) - log_std
    log_prob -= 0.5 * np.log(2 * np.pi)
    return log_prob.sum(-1), (log_std + 0.5 * np.log(2 * np.pi * np.e)).sum(-1)


def ppo_loss(params, network, carry, batch, advantage, target, args):
    """Clipped objective, value loss, entropy bonus (Schulman et al. 2017) of M whole environments.

    batch: Transition (T, M); carry: the memory, leading axis M, that the rollout began with;
    advantage, target (T, M). Returns the scalar loss, penalties added, and scalars to log.
    """
    inputs = params, carry, batch.obs, batch.reset
    (_, policy, value), sown = network.apply(*inputs, mutable="intermediates")
    log_prob, entropy = gaussian(policy, batch.action)
    log_ratio = log_prob - batch.log_prob
    ratio = jnp.exp(log_ratio)
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    clipped = jnp.clip(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -jnp.minimum(ratio * advantage, clipped * advantage).mean()
    value_loss = 0.5 * jnp.square(value - target).mean()
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy.mean()
    return loss + sum(jax.tree.leaves(sown)), {  # sown: the sequence model's penalties
        "losses/policy_loss": policy_loss,
        "losses/value_loss": value_loss,
        "losses/entropy": entropy.mean(),
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
    num_envs, K, network = args.num_envs // args.num_devices, len(env.names), ActorCritic(args)
    steps = args.num_updates * args.update_epochs * args.num_minibatches
    last = 0.0 if args.anneal_lr else args.learning_rate
    adam = optax.adam(optax.linear_schedule(args.learning_rate, last, steps), eps=1e-5)
    optimizer = optax.chain(optax.clip_by_global_norm(args.max_grad_norm), adam)

    def init(key):
        key, env_key, params_key = jax.random.split(key, 3)
        env_key = jax.random.fold_in(env_key, jax.lax.axis_index("devices"))
        env_state, obs = env.reset(env_key, num_envs)
        reset, carry = jnp.ones(num_envs, bool), network.initial_carry(num_envs)
        params = network.init(params_key, carry, obs[None], reset[None])
        actor = env_state, obs, reset, carry
        return TrainState(params=params, opt_state=optimizer.init(params), actor=actor, key=key)

    def act(params, actor, key):
        """One step of the rollout; returns the next actor, a Transition, and sums for metrics."""
        env_state, obs, reset, carry = actor
        action_key, env_key = jax.random.split(key)
        forward = partial(network.apply, params)
        carry, (mean, log_std), value = forward(carry, obs[None], reset[None])
        action = mean + jnp.exp(log_std) * jax.random.normal(action_key, mean.shape)  # (1, N, A)
        env_state, timestep = env.step(env_key, env_state, action[0])
        # A termination ends the advantage, though the trial goes on: else falling were free.
        ends, reward = timestep.done, timestep.reward
        if args.credit == "trial":  # then a time limit ends it only together with the trial
            ends &= timestep.reset | ~timestep.truncated
        if args.bootstrap_truncated:
            # The episode would have gone on: add what it was still worth, with the memory it had.
            final_obs, no_reset = timestep.final_obs[None], jnp.zeros_like(reset)[None]
            final_value = forward(carry, final_obs, no_reset)[2][0]
            reward += args.gamma * jnp.where(ends & timestep.truncated, final_value, 0.0)
        transition = Transition(
            obs=obs,
            reset=reset,
            action=action[0],
            log_prob=gaussian((mean, log_std), action)[0][0],
            value=value[0],
            reward=reward,
            done=ends,
        )
        actor, done = (env_state, timestep.obs, timestep.reset, carry), timestep.done
        whole = done & ~jnp.isnan(timestep.episode_return)
        sums = jnp.stack([whole, jnp.where(whole, timestep.episode_return, 0.0), timestep.failed])
        return actor, (transition, sums.reshape(3, K, -1).sum(2))  # (3, N) to (3, K)

    def update(state, _):
        """One rollout, and update_epochs passes over it."""
        key, device_key = jax.random.split(state.key)
        device_key = jax.random.fold_in(device_key, jax.lax.axis_index("devices"))
        act_key, redraw_key, *epoch_keys = jax.random.split(device_key, 2 + args.update_epochs)
        act_keys = jax.random.split(act_key, args.num_steps)
        env_state, *rest = state.actor
        actor = env.redraw(redraw_key, env_state), *rest
        actor, (batch, sums) = jax.lax.scan(partial(act, state.params), actor, act_keys)
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
        return state, (losses, sums.sum(0))

    def train(state):
        """log_interval updates. Losses are means over them, returns over episodes that ended."""
        state, (losses, sums) = jax.lax.scan(update, state, length=args.log_interval)
        metrics = jax.lax.pmean(jax.tree.map(jnp.mean, losses), "devices")
        count, returns, failed = jax.lax.psum(sums.sum(0), "devices")  # (K,) each
        metrics["charts/physics_failures"] = failed.sum()
        means = dict(zip(env.names, returns / count, strict=True))  # NaN: no episode ended
        metrics |= {f"charts/episodic_return/{name}": mean for name, mean in means.items()}
        scores = [score(mean, name) for name, mean in means.items()]
        metrics["charts/score"] = jnp.nanmean(jnp.stack(scores))
        return state, metrics

    copied, split = jax.P(), jax.P("devices")
    specs = TrainState(params=copied, opt_state=copied, actor=split, key=copied)
    spmd = partial(jax.shard_map, mesh=jax.make_mesh((args.num_devices,), ("devices",)))
    spmd = partial(spmd, out_specs=specs, check_vma=False)  # JAX cannot see that copies agree
    return spmd(init, in_specs=copied), spmd(train, in_specs=(specs,), out_specs=(specs, copied))


# ==== Evaluation ==================================================================================
# The agent, and two whose memory is emptied. The last lacks more than what is learned in context:
# all of its observations look like the first of a trial; in training only one does.
MEMORIES = ("kept", "wiped every episode", "wiped every step")


def run_trials(params, key, wipe_episode, wipe_step, args, env):
    """Raw rewards and ends of episodes, (S, K E) each: E = eval_trials trials of each of K tasks.

    wipe_episode, wipe_step: bools, when the memory is emptied. Trials of one key have the same
    matrices whatever the memory. Actions are sampled, as in training: to explore is part of the
    policy. S steps are as long as a trial can be.
    """
    network, num_envs = ActorCritic(args), len(env.names) * args.eval_trials
    reset_key, key = jax.random.split(key)
    num_steps = args.trial_length * max(x.task.episode_length for x in env.tasks)

    def step(state, key):
        env_state, obs, new_trial, done, carry = state
        action_key, env_key = jax.random.split(key)
        # Where the memory is wiped, the agent sees what it saw in training when its memory was
        # empty: a trial's first observation, without previous action and reward.
        reset = new_trial | (wipe_episode & done) | wipe_step
        first = obs.at[:, args.projected_obs_size : -2].set(0.0).at[:, -2:].set(1.0)
        obs = jnp.where(reset[:, None], first, obs)
        carry, (mean, log_std), _ = network.apply(params, carry, obs[None], reset[None])
        action = mean + jnp.exp(log_std) * jax.random.normal(action_key, mean.shape)
        env_state, now = env.step(env_key, env_state, action[0])
        return (env_state, now.obs, now.reset, now.done, carry), (now.raw_reward, now.done)

    env_state, obs = env.reset(reset_key, num_envs)
    true, carry = jnp.ones(num_envs, bool), network.initial_carry(num_envs)
    start = env_state, obs, true, true, carry
    return jax.lax.scan(step, start, jax.random.split(key, num_steps))[1]


def score_table(rewards, dones, names, args):
    """adaptation.csv from raw rewards and ends of episodes, (memories, S, K, trials) each.

    Mean score over trials, with a 95 % interval, of the first episode, the second and so on, then
    of all in the second half of a trial.
    """
    episodes = []
    for k, m, trial in np.ndindex(len(names), len(MEMORIES), rewards.shape[3]):
        reward, ends = rewards[m, :, k, trial], np.flatnonzero(dones[m, :, k, trial]) + 1
        for i, (start, end) in enumerate(pairwise([0, *ends[: args.trial_length]])):
            late = i >= args.trial_length // 2  # a lone episode is its own second half
            points = score(reward[start:end].sum(dtype=float), names[k])
            episodes.append((names[k], MEMORIES[m], trial, i, late, points))
    columns = ["task", "memory", "trial", "episode", "late", "score"]
    episodes = pd.DataFrame(episodes, columns=columns)
    halves = episodes[episodes["late"]].groupby(columns[:3], sort=False, as_index=False)
    halves = halves["score"].mean().assign(episode="second half")  # of each trial
    samples = pd.concat([episodes, halves]).groupby(["task", "memory", "episode"], sort=False)
    table = samples["score"].agg(mean="mean", ci95="sem", trials="count").reset_index()
    return table.assign(ci95=1.96 * table["ci95"].fillna(0.0))  # NaN where there is one trial


def plot_adaptation(path, table, args):
    """Score against the episode of the trial: a panel a task."""
    from matplotlib.figure import Figure

    names, table = table["task"].unique(), table[table["episode"] != "second half"]
    columns, lines = min(len(names), 3), -(-len(names) // 3)
    figure = Figure(figsize=(3 * columns + 1, 3 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, sharey=True, squeeze=False).flat
    for ax in axes[len(names) :]:
        ax.remove()
    for (name, ax), memory in product(zip(names, axes, strict=False), MEMORIES):
        rows = table[(table["task"] == name) & (table["memory"] == memory)]
        x, mean, width = rows[["episode", "mean", "ci95"]].to_numpy(float).T
        ax.plot(x, mean, ".-", label=f"memory {memory}")
        ax.fill_between(x, mean - width, mean + width, alpha=0.2, linewidth=0)
        held_out = " (held out)" if name in args.held_out_tasks else ""
        ax.set(xlabel="episode of the trial", title=name + held_out)
    axes[0].set(ylabel="score: 0 random or idle, 1 specialist")
    axes[0].legend(fontsize="x-small")
    figure.savefig(path, dpi=150)


def report(run_dir, state, keys, timing, args, env):
    """Runs the trials of all seeds; writes adaptation.csv, .png and eval.json, prints a table."""
    run = partial(run_trials, args=args, env=env)
    of_memories = jax.vmap(run, (None, None, 0, 0))
    of_seeds = jax.jit(jax.vmap(of_memories, (0, 0, None, None)))
    wipes = jnp.array([False, True, False]), jnp.array([False, False, True])  # as in MEMORIES
    outcome = jax.tree.map(np.asarray, of_seeds(state.params, keys, *wipes))
    shape = *outcome[0].shape[:3], len(env.names), args.eval_trials  # seeds, memories, S, K, E
    rewards, dones = (np.concatenate(x.reshape(shape), axis=-1) for x in outcome)  # joins seeds

    table = score_table(rewards, dones, env.names, args)
    write(run_dir / "adaptation.csv", table.to_csv(index=False).encode())
    plot_adaptation(run_dir / "adaptation.png", table, args)
    half = table[table["episode"] == "second half"].copy()
    results = {"second_half": half.to_dict("records")} | timing
    write(run_dir / "eval.json", json.dumps(results, indent=2).encode())
    half["score"] = half["mean"].map("{:.2f} +- ".format) + half["ci95"].map("{:.2f}".format)
    half = half.pivot(index="task", columns="memory", values="score").reindex(env.names)
    half[""] = np.where(half.index.isin(args.held_out_tasks), "held out", "")
    print("second half of trials, score by memory: 0 random or idle, 1 specialist; +- is 95 %")
    print(half.to_string(na_rep="-", index_names=False))


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
    with refuse("tasks, --projected sizes or --num-devices", ValueError):
        env = Environment(args.train_tasks, args)
        eval_env = Environment(args.train_tasks + args.held_out_tasks, args, trials_end=False)
        init, train = make_train(args, env)
    name = f"{Path(__file__).stem}__{args.suite}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
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
            bar.set_postfix_str(f"score {metrics['charts/score'].mean():.2f}")
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
    report(run_dir, state, keys, timing, args, eval_env)


if __name__ == "__main__":
    main()
