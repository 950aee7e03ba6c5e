"""The null test, in brief: candidates that differ but are equally good show no gain."""

import runpy
from pathlib import Path

import numpy as np
import pytest

NULL = runpy.run_path(str(Path(__file__).resolve().parents[1] / "benchmarks/null_test.py"))


@pytest.mark.parametrize("correlation", NULL["CORRELATIONS"])
def test_equally_good_candidates_seldom_show_a_gain(correlation: float) -> None:
    plan = NULL["simulated_plan"]()
    found = np.array([NULL["claims"](plan, each) for each in NULL["searches"](plan, 30, correlation)])
    verdict, over_one, best_minus_one, _ = found.sum(axis=0)
    # At the nominal 2.5% more than 4 of 30 would claim one once in 1,000 times.
    assert verdict <= over_one <= 4
    assert best_minus_one > over_one


def test_candidates_that_are_better_do_show_it() -> None:
    plan = NULL["simulated_plan"]()
    found = [NULL["power"](plan, each, (3,)) for each in NULL["searches"](plan, 10, 0.8, 0.3)]
    assert sum(is_shown for ((is_shown, _),) in found) >= 8
    assert all(gain > 0.1 for ((_, gain),) in found)
