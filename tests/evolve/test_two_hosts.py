"""A host that leaves in the middle of a search takes no candidate with it."""

import pytest

from ..benchmarks.two_hosts import missing, two_hosts

CANDIDATES = 24


@pytest.mark.slow
def test_a_search_survives_the_loss_of_a_host() -> None:
    """Ray takes a host for dead after 2 s here; the storage is PostgreSQL on a third address."""
    if (lacking := missing()) is not None:
        pytest.skip(lacking)
    found = two_hosts(CANDIDATES, "link", health_check_s=2)
    assert found.told_before < CANDIDATES
    assert [number for number, *_ in found.trials] == list(range(CANDIDATES))
    assert {state for _, state, _ in found.trials} <= {"COMPLETE", "FAIL"}
    assert all(kind for _, state, kind in found.trials if state == "FAIL")
    assert sum(state == "COMPLETE" for _, state, _ in found.trials) >= CANDIDATES - 1
    assert found.result["n_trials"] == CANDIDATES
    assert found.result["best"]["holdout"]
    # The lost host's worker was noticed, not only outlived.
    assert found.told_after_s is not None
