"""Estimates smoothed over the space: nearer to the truth, and where nothing is in doubt unchanged."""

import numpy as np
import pytest

from evolve.smoothing import coordinates, smoothed
from evolve.space import Variable

RNG = np.random.default_rng


def hill(points: np.ndarray) -> np.ndarray:
    return np.exp(-8 * ((points - 0.6) ** 2).sum(axis=1))


@pytest.mark.parametrize("seed", range(5))
def test_smoothed_estimates_are_nearer_to_the_truth(seed: int) -> None:
    rng = RNG(seed)
    points = rng.random((80, 3))
    truth, error = hill(points), 0.2
    estimates = truth + error * rng.standard_normal(80)
    steadier = smoothed(points, estimates, np.full(80, error))
    assert ((steadier - truth) ** 2).mean() < 0.5 * ((estimates - truth) ** 2).mean()


def test_an_estimate_without_error_stays_as_it_is() -> None:
    rng = RNG(0)
    points, estimates = rng.random((40, 3)), rng.random(40)
    errors = np.where(np.arange(40) % 4, 0.1, 0.0)
    steadier = smoothed(points, estimates, errors)
    assert (steadier[::4] == estimates[::4]).all()
    assert (steadier != estimates).sum() == 30
    assert (smoothed(points, estimates, np.zeros(40)) == estimates).all()


def test_what_a_candidate_has_for_its_own_is_kept() -> None:
    """One stands out from its neighbours, and so many documents say it that it is no luck."""
    rng = RNG(1)
    points = rng.random((60, 2))
    estimates = hill(points) + 0.2 * rng.standard_normal(60)
    steadier = smoothed(points, estimates, np.full(60, 0.01))
    assert np.abs(steadier - estimates).max() < 0.02


def test_the_order_of_candidates_does_not_matter() -> None:
    rng = RNG(2)
    points = rng.random((50, 4))
    estimates, errors = hill(points) + 0.1 * rng.standard_normal(50), rng.uniform(0.05, 0.15, 50)
    order = rng.permutation(50)
    there = smoothed(points, estimates, errors)[order]
    here = smoothed(points[order], estimates[order], errors[order])
    np.testing.assert_allclose(here, there, atol=1e-3)


def test_equal_estimates_stay_equal() -> None:
    points = RNG(3).random((10, 2))
    assert (smoothed(points, np.full(10, 0.4), np.full(10, 0.1)) == 0.4).all()


def test_choices_that_are_equal_have_coordinates_of_their_own() -> None:
    kind = Variable("normalize", choices=(1, True, "x"))
    assert coordinates([kind], {"normalize": True}).tolist() == [0.0, 1.0, 0.0]
    assert coordinates([kind], {"normalize": 1}).tolist() == [1.0, 0.0, 0.0]
    assert coordinates([kind], {}).tolist() == [0.0, 0.0, 0.0]


def test_coordinates_lie_in_the_unit_cube() -> None:
    over = [
        Variable("weight", low=0.0, high=2.0),
        Variable("scale", low=0.01, high=1.0, log=True),
        Variable("method", choices=("ties", "linear", None)),
        Variable("layer", low=4, high=12, step=1),
    ]
    values = {"weight": 0.5, "scale": 0.1, "method": None, "layer": 8}
    assert coordinates(over, values).tolist() == pytest.approx([0.25, 0.5, 0, 0, 1, 0.5])
    assert coordinates(over, {"method": "ties"}).tolist() == [0, 0, 1, 0, 0, 0]
