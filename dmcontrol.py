"""DMControl's tasks (Tassa et al. 2018) in JAX, one copy each, behind brax's interface.

For --suite dmc and dmc-small of s5_ppo_meta.py; needs pip install -e ".[dmc]". tests/test_dmc.py
holds them against dm_control.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class DMState(NamedTuple):
    """State of one copy of a task of DMControl, with what brax's states have: obs, reward, done."""

    qpos: jax.Array  # (q,) positions of the joints
    qvel: jax.Array  # (v,) their velocities
    warmstart: jax.Array  # (v,) where the solver of the constraints begins
    kept: dict  # what an episode draws: mocap_pos (1, 3), where the target is; gains (a, q); reach
    obs: jax.Array  # (o,)
    reward: jax.Array  # from 0 to 1 a step of dm_control
    done: jax.Array  # 0: no task here ends by itself


# Playground's names, where they are others. It has no PointMassHard and neither task of ours.
BODIES = dict.fromkeys(("PointMassEasy", "PointMassHard", "PointMassWide"), "PointMass")
BODIES |= {"BallInCupCatch": "BallInCup", "CartpoleAnywhere": "CartpoleSwingup"}

# Steps of dm_control that an action lasts. There are 50 or 100 of them a second: what an action
# changes in a single one hardly shows, and a second would be many steps away.
ACTION_REPEAT = 4

# Low and high of the positions an episode starts from; of others the joints' limits or -pi, pi.
# Anywhere leaves out what is near upright, since CartpoleBalance is to be held out.
START_RANGES = {
    "BallInCupCatch": ((0.0, 0.0, -0.2, 0.2), (0.0, 0.0, 0.2, 0.5)),
    "CartpoleAnywhere": ((-1.0, 0.5), (1.0, 2 * np.pi - 0.5)),
    "CartpoleBalance": ((-0.1, -0.034), (0.1, 0.034)),
    "CartpoleSwingup": ((0.0, np.pi), (0.0, np.pi)),
}


class DMControl:
    """A task of DMControl, one copy, behind brax's interface, with MuJoCo Playground's bodies.

    Playground's observations and rewards are used, its starts and targets are not: they differ from
    DMControl's, draw from one key twice, or show the target before it has moved. As in DMControl,
    the agent sees the positions that a step led to; Playground's are one step of the physics older.
    Only what the physics goes on from is kept of MuJoCo's data: all of its 80 arrays would take
    longer to compile and to copy.
    """

    def __init__(self, env_id):
        try:
            import mujoco_playground
            from mujoco import mjx
        except ImportError as error:
            needed = 'DMControl\'s tasks need MuJoCo Playground: pip install -e ".[dmc]"'
            raise ValueError(f"{needed} ({error})") from error
        self.env_id, self.mjx, self.physics = env_id, mjx, mujoco_playground.step
        body, config = BODIES.get(env_id, env_id), {"impl": "jax"}
        self.env = mujoco_playground.registry.load(body, config_overrides=config)
        self.model, self.action_size = self.env.mjx_model, self.env.action_size
        self.blank = mjx.make_data(self.env.mj_model, impl="jax")
        joints = self.env.mj_model
        limits = np.where(joints.jnt_limited[:, None], joints.jnt_range, (-np.pi, np.pi))
        self.low, self.high = np.float32(START_RANGES.get(env_id, limits.T))
        self.step = jax.jit(self.step)  # else an evaluation's vmaps trace it again and again

    def reset(self, key) -> DMState:
        key, noise_key, speed_key, kept_key = jax.random.split(key, 4)

        def draw(key_and_qpos):
            key, now = jax.random.split(key_and_qpos[0])
            return key, jax.random.uniform(now, self.low.shape, minval=self.low, maxval=self.high)

        def touches(key_and_qpos):  # then it is drawn again, as in DMControl
            data = self.mjx.kinematics(self.model, self.blank.replace(qpos=key_and_qpos[1]))
            return (self.mjx.collision(self.model, data)._impl.contact.dist < 0).any()

        key, qpos = draw((key, None))
        if self.blank._impl.contact.dist.size:
            key, qpos = jax.lax.while_loop(touches, draw, (key, qpos))
        qvel = jnp.zeros(self.model.nv)
        if self.env_id == "CartpoleSwingup":
            qpos += 0.01 * jax.random.normal(noise_key, qpos.shape)
        if self.env_id.startswith("Cartpole"):
            qvel += 0.01 * jax.random.normal(speed_key, qvel.shape)
        kept = self.draw_kept(kept_key)
        return self.observe(self.place(qpos, qvel, kept), kept, jnp.zeros(self.action_size))

    def draw_kept(self, key) -> dict:
        """A target, the directions (a, q) in which each action pulls, or how far a target pays."""
        size_key, angle_key, side_key = jax.random.split(key, 3)
        angle = jax.random.uniform(angle_key, minval=-np.pi, maxval=np.pi)
        x, y = jnp.sin(angle), jnp.cos(angle)  # angles from the vertical
        if self.env_id.startswith("Reacher"):
            size = jax.random.uniform(size_key, minval=0.05, maxval=0.2)
            return {"mocap_pos": jnp.array([[size * x, size * y, 0.01]])}
        if self.env_id.startswith("FingerTurn"):  # on the circle of the spinner's tip
            return {"mocap_pos": jnp.array([[0.2 + 0.13 * x, 0.0, 0.4 + 0.13 * y]])}
        if self.env_id == "PointMassHard":  # neither parallel nor opposite: |cos| <= 0.9
            least = np.arccos(0.9)
            between = jax.random.uniform(size_key, minval=least, maxval=np.pi - least)
            other = angle + between * jax.random.rademacher(side_key, ())
            return {"gains": jnp.array([[x, y], [jnp.sin(other), jnp.cos(other)]])}
        if self.env_id == "PointMassWide":  # in the target's radii; sqrt: mostly far
            return {"reach": 32.0 ** jnp.sqrt(jax.random.uniform(size_key, minval=1e-6))}
        return {}

    def place(self, qpos, qvel, kept):
        """MuJoCo's data, with the joints and the target where they are."""
        data = self.blank.replace(qpos=qpos, qvel=qvel)
        return data.replace(mocap_pos=kept["mocap_pos"]) if "mocap_pos" in kept else data

    def step(self, state: DMState, action) -> DMState:
        """ACTION_REPEAT steps with one action; rewards add up."""

        def once(state, _):
            state = self.step_once(state, action)
            return state, state.reward

        state, rewards = jax.lax.scan(once, state, length=ACTION_REPEAT)
        return state._replace(reward=rewards.sum())

    def step_once(self, state, action) -> DMState:
        data = self.place(state.qpos, state.qvel, state.kept)
        data = data.replace(qacc_warmstart=state.warmstart)
        if "gains" in state.kept:  # PointMass pulls along the axes: add what its actions lack
            lacking = action @ state.kept["gains"] - action
            data = data.replace(qfrc_applied=self.env.mj_model.actuator_gear[:, 0] * lacking)
        data = self.physics(self.model, data, action, self.env.n_substeps)
        return self.observe(data, state.kept, action)

    def observe(self, data, kept, action) -> DMState:
        """What is kept of MuJoCo's data, and what is seen and paid."""
        data = self.mjx.sensor_pos(self.model, self.mjx.kinematics(self.model, data))
        data = self.mjx.sensor_vel(self.model, data)
        obs = self.env._get_obs(data, {})
        reward = self.env._get_reward(data, action, {}, {})
        if "reach" in kept:  # each halving of the distance adds as much
            distance = jnp.linalg.norm(obs[:2]) / self.env._target_size  # the target is at 0
            reward = jnp.clip(1 - jnp.log(distance) / jnp.log(kept["reach"]), 0, 1)
        return DMState(data.qpos, data.qvel, data.qacc_warmstart, kept, obs, reward, jnp.zeros(()))
