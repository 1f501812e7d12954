"""What the benchmarks make of their measurements."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import foresight


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
