"""What the benchmarks make of their measurements."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import foresight
import memory_length
import s5_layer
import scaling


def test_errors_of_prediction_go_by_the_step_of_the_episode_in_units_of_the_usual_change():
    """Two trials of six steps: one of two episodes of three steps, one of a single episode."""
    foreseen = np.array([[0, 0], [0, 1], [1, 1], [0, 1], [1, 1], [1, 1]], bool)  # (S, E)
    done = np.zeros((6, 2), bool)
    done[2, 0] = True
    change = np.full((6, 2, 1), 5.0)
    prediction = np.where(foreseen[..., None], 1.0, 0.0)  # the usual change, or none
    errors = foresight.unforeseen(prediction, change, done)
    for no_change in (errors["first episode"][1, :6], errors["later episodes"][1, :3]):
        np.testing.assert_allclose(no_change, 1.0, atol=1e-4)
    first, later = errors["first episode"][0], errors["later episodes"][0]
    np.testing.assert_allclose(first[:6], [1, 0.5, 0, 0, 0, 0], atol=1e-4)
    np.testing.assert_allclose(later[:3], [1, 0, 0], atol=1e-4)
    assert np.isnan(first[6:]).all() and np.isnan(later[3:]).all()
    assert len(first) == len(later) == foresight.FIRST_STEPS


@pytest.mark.parametrize("length", memory_length.LENGTHS)
def test_every_model_gets_as_many_steps_and_a_rollout_holds_an_episode(length):
    steps = set()
    for model, script in (
        ("S5", scaling.s5_ppo_memory),
        ("LSTM", scaling.lstm_ppo),
        ("Transformer", scaling.transformer_ppo),
    ):
        flags = memory_length.flags(model, length, memory_length.Args(), memory_length.SETTINGS)
        args = script.Args(**{name.replace("-", "_"): value for name, value in flags.items()})
        args.check()
        assert args.num_steps > length and 1000 < args.total_timesteps // (length + 1) <= 10_000
        steps.add((args.num_updates, args.batch_size))
    assert len(steps) == 1


def test_the_stored_table_is_of_as_many_episodes_for_every_model():
    episodes = {}
    for row in memory_length.read(memory_length.HERE / "memory_length.csv"):
        episodes.setdefault(row["length"], set()).add(row["episodes"])
    assert all(len(different) == 1 for different in episodes.values()), episodes


@pytest.mark.parametrize(
    "what", [scaling.layer, scaling.update, scaling.acting_step, scaling.environments], ids=lambda what: what.__name__
)
def test_scaling_measures_the_three_models(what):
    rows = scaling.measure(what, 64, scaling.Args(max_attention_length=32))
    assert [row["model"] for row in rows] == ["S5", "LSTM", "Transformer"]
    assert all(row["ms"] > 0 and row["MiB"] > 0 for row in rows[:2])
    # A cell that was not run is blank; against the number of environments the context is always 256.
    assert (rows[2]["ms"] is None) == (what is not scaling.environments)


@pytest.mark.parametrize("script", scaling.SCRIPTS.values(), ids=scaling.SCRIPTS)
def test_an_acting_step_computes_the_whole_network(script):
    """Nothing that an agent needs of a step may be left out by the compiler: S5's products alone are 5 MFLOP."""
    function, inputs, _ = scaling.acting_step(script, 64)
    weights = sum(x.size for x in scaling.jax.tree.leaves(inputs[0]) if x.ndim == 2)
    flops = function.lower(*inputs).compile().cost_analysis()["flops"]
    assert flops > 2 * 32 * weights


def test_the_layers_that_are_compared_compute_the_same():
    compiled = [s5_layer.compile_layer(scan, 32) for scan in s5_layer.SCANS.values()]
    after = [function(*inputs) for function, inputs in compiled]
    for other in after[1:]:
        scaling.jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), after[0], other)
    moved = scaling.jax.tree.map(lambda x, y: float(np.abs(x - y).max()), after[0], compiled[0][1])
    assert max(scaling.jax.tree.leaves(moved)) > 1e-7
