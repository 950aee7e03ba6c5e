"""Searches and workers that are killed: the scripts of the benchmarks, cut to a minute."""

from pathlib import Path

import pytest

from ..benchmarks.kill import disturb
from ..benchmarks.kill_workers import survive


@pytest.mark.slow
@pytest.mark.parametrize("racing", [False, True], ids=["whole", "raced"])
def test_kills_at_random_moments_change_nothing(tmp_path: Path, racing: bool) -> None:
    found = disturb(tmp_path, n_kills=1 if racing else 3, racing=racing, n_candidates=14)
    assert found.n_searches >= 1


@pytest.mark.slow
def test_a_search_survives_its_workers(tmp_path: Path) -> None:
    found = survive(tmp_path, n_workers=3, n_kills=2, every_s=0, n_candidates=45)
    assert len(found.kills) == 2
