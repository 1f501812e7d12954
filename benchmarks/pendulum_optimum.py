"""What a policy that sees everything can get on POPGym's pendulums: dynamic programming.

    python benchmarks/pendulum_optimum.py    # a minute on one core

gymnax's Pendulum-v1, without noise, on a grid of angles, speeds and torques, backwards from the
last step, with linear interpolation. Then the policy that this gives runs 20,000 episodes in the
pendulum itself, from its own starts. Appends mean and 95 % interval of their scores to
pendulum_optimum.csv, as POPGym counts them: 1 is upright and still all the time.
"""

import numpy as np
from common import HERE, append, made_by
from scipy.ndimage import map_coordinates

from s5_ppo_meta import LOWEST

ANGLES, SPEEDS, TORQUES = 301, 201, 21
GRID = np.meshgrid(
    np.linspace(-np.pi, np.pi, ANGLES, endpoint=False), np.linspace(-8, 8, SPEEDS), indexing="ij"
)


def step(angle, speed, torque):
    """Reward, and the angle and speed that follow (Pendulum-v1)."""
    from_top = (angle + np.pi) % (2 * np.pi) - np.pi
    reward = -(from_top**2 + 0.1 * speed**2 + 0.001 * torque**2)
    speed = np.clip(speed + 0.05 * (15 * np.sin(angle) + 3 * torque), -8, 8)
    return reward, angle + 0.05 * speed, speed


def place(angle, speed):
    """Where on the grid these are, in cells."""
    return (angle + np.pi) % (2 * np.pi) / (2 * np.pi) * ANGLES, (speed + 8) / 16 * (SPEEDS - 1)


def policies(num_steps):
    """The best torques on the grid, (steps left - 1, angles, speeds)."""
    torques, value, best = np.linspace(-2, 2, TORQUES), np.zeros((ANGLES, SPEEDS)), []
    for _ in range(num_steps):
        around = np.concatenate([value, value[:1]])  # the angle comes round
        returns = []
        for torque in torques:
            reward, *after = step(*GRID, torque)
            returns.append(reward + map_coordinates(around, place(*after), order=1, mode="nearest"))
        value = np.max(returns, axis=0)
        best.append(torques[np.argmax(returns, axis=0)])
    return np.array(best)


def scores(best, num_steps, episodes=20_000):
    """Of episodes of num_steps with the policy of the nearest cell, as POPGym counts."""
    rng = np.random.default_rng(0)
    angle, speed = rng.uniform([[-np.pi], [-1]], [[np.pi], [1]], (2, episodes))
    total = np.zeros(episodes)
    for left in range(num_steps)[::-1]:
        i, j = (np.round(x).astype(int) for x in place(angle, speed))
        reward, angle, speed = step(angle, speed, best[left, i % ANGLES, j])
        total += reward
    return 1 - total / (num_steps / 2 * LOWEST)


def main():
    best = policies(200)
    for num_steps in (100, 200):
        points = scores(best, num_steps)
        row = {"steps": num_steps, "score": round(points.mean(), 4)}
        row["ci95"] = round(1.96 * points.std() / len(points) ** 0.5, 4)
        append(HERE / "pendulum_optimum.csv", row | made_by())


if __name__ == "__main__":
    main()
