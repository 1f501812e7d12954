"""Pages of HTML that show the first and the last episode of a trial, in brax's viewer.

    python benchmarks/watch.py runs/CLASSIC reacher    # a run of s5_ppo_meta.py, a brax task

The agent of the run's first seed, memory kept, on a pair of matrices of its own; the trial has
as many episodes as the run's. Takes a minute, mostly to compile, and writes
RUN/TASK_first_episode.html and RUN/TASK_last_episode.html. The task need not be one of the run's,
but has to fit into its projected sizes.
"""

import dataclasses
import sys
from itertools import pairwise
from pathlib import Path

import jax
import numpy as np
from common import load

import s5_ppo_meta
from s5_ppo_meta import Environment, refuse, run_trials


class Filmed(Environment):
    """Hands out what brax draws in place of the raw reward."""

    def step(self, key, states, *inputs):
        frame = states[0].inner.pipeline_state
        states, timestep = super().step(key, states, *inputs)
        return states, timestep._replace(raw_reward=frame)


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    run_dir, name = Path(sys.argv[1]), sys.argv[2]
    of_run, state, keys = load(s5_ppo_meta, run_dir)
    with refuse(name, ValueError):
        args = dataclasses.replace(of_run, train_tasks=(name,), held_out_tasks=(), eval_trials=1)
        env = Filmed(args.train_tasks, args, trials_end=False)
    if not hasattr(env.tasks[0].env, "sys"):
        sys.exit(f"error: {name} is not a task of brax")
    params = jax.tree.map(lambda x: x[0], state.params)
    run = jax.jit(lambda *inputs: run_trials(*inputs, False, False, args, env))
    frames, done = jax.tree.map(np.asarray, run(params, keys[0]))

    from brax.io import html

    body = env.tasks[0].env
    system = body.sys.tree_replace({"opt.timestep": body.dt})  # which is the time between frames
    episodes = [*pairwise([0, *np.flatnonzero(done)[: args.trial_length] + 1])]
    for which, episode in (("first", episodes[0]), ("last", episodes[-1])):
        states = [jax.tree.map(lambda x, t=t: x[t, 0], frames) for t in range(*episode)]
        path = run_dir / f"{name}_{which}_episode.html"
        path.write_text(html.render(system, states))
        print(path)


if __name__ == "__main__":
    main()
