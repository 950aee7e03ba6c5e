"""Many workers: none idles behind another, and whoever dies, no candidate is lost or told twice."""

from pathlib import Path

import pytest

from ..benchmarks.scale import MODES, Simulation, simulate

WORKERS, CANDIDATES = 8, 48


@pytest.mark.slow
def test_workers_wait_for_no_other_and_lose_nothing_when_killed(tmp_path: Path) -> None:
    """Candidates of 0.3 to 1.5 s; behind a barrier eight such workers idle for over a third of it."""
    found = dict(simulate(Simulation(WORKERS, CANDIDATES, 0.3, 1.5), MODES, tmp_path))
    for name, each in found.items():
        assert sum(each.states.values()) == CANDIDATES, name
        # Each candidate came to its end once, but for those that were killed as often as is tried.
        assert len(each.ended) == len(set(each.ended)) == each.states["COMPLETE"], name
        assert each.states["COMPLETE"] >= CANDIDATES - each.killed // 3, name
        assert set(each.states) <= {"COMPLETE", "FAIL"}, name
    assert found["deaths"].killed > 0
    assert found["search"].in_use > found["barriers"].in_use
