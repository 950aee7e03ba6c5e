"""What --check foretells: the arithmetic by hand, and real checks of the quickstart."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from evolve.cli import app
from evolve.forecast import Amounts, Pace, Scoring, foretell
from evolve.plan import make_plan
from evolve.rehearsal import amounts
from evolve.samplers import make_sampler
from evolve.samplers.pace import proposing_seconds
from evolve.search_file import SearchFile

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "configs/quickstart.yml"


@pytest.fixture(autouse=True)
def _at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


# ---- the arithmetic ------------------------------------------------------------------------------

# A candidate takes 1 + 1 + 4 + 1 = 7 s; 40 documents take 4 s.
PACE = Pace(
    start_up_s=10,
    first_s=20,
    merge_s=1,
    load_s=1,
    score_s=4,
    other_s=1,
    by_signal=Scoring(0, 0.1),
    by_metric=Scoring(0, 0.1),
    proposing_s=0,
    trial_bytes=100,
    document_bytes=2,
    folder_bytes=1000,
)
AMOUNTS = Amounts(
    n_candidates=11,
    n_workers=1,
    timeout_s=None,
    rounds=(),
    n_finalists=0,
    search=40,
    holdout=60,
    reported=0,
    baselines=(1, 1),
    n_shortlisted=3,
    n_repetitions=2,
)


def test_a_search_is_the_sum_of_its_parts() -> None:
    found = foretell(PACE, AMOUNTS)
    assert found.parts() == pytest.approx(
        {
            "start_up": 10,
            "search": 20 + 10 * 7,
            "rounds": 0,
            "finals": 0,
            "baselines": 2 * (3 + 10),
            "shortlist": 3 * (3 + 6),
            "noise": 2 * (3 + 6),
        }
    )
    assert found.total_s == pytest.approx(171)
    assert found.gpu_hours(2) == pytest.approx(2 * 171 / 3600)
    assert found.disk_bytes == 1000 + 11 * 100 + 2 * (2 * 100 + 3 * 60 + 2 * 60)


def test_workers_share_all_but_the_start() -> None:
    rounds = replace(AMOUNTS, rounds=((3, 10),), n_finalists=3)
    one, two = foretell(PACE, rounds), foretell(PACE, replace(rounds, n_workers=2))
    assert two.search_s == pytest.approx(20 + 9 * 7 / 2)
    assert two.rounds_s == pytest.approx(one.rounds_s * 2 / 3)  # the third waits for a worker
    assert two.finals_s == pytest.approx(one.finals_s * 2 / 3)
    assert two.baselines_s == pytest.approx(one.baselines_s * 3 / 5)  # beside the shortlist's three
    assert two.shortlist_s == pytest.approx(one.shortlist_s * 3 / 5)
    assert two.noise_s == pytest.approx(one.noise_s / 2)
    assert two.start_up_s == one.start_up_s


def test_rounds_and_finals_come_in_between() -> None:
    found = foretell(PACE, replace(AMOUNTS, rounds=((4, 10), (2, 20), (1, 0)), n_finalists=3))
    assert found.rounds_s == pytest.approx(4 * (3 + 1) + 2 * (3 + 2))
    assert found.finals_s == pytest.approx(3 * (3 + 4))


def test_without_a_holdout_the_search_documents_judge() -> None:
    found = foretell(PACE, replace(AMOUNTS, holdout=0, n_shortlisted=0))
    assert found.shortlist_s == 0
    assert found.noise_s == pytest.approx(2 * (3 + 4))


def test_each_way_of_prompting_a_baseline_is_scored() -> None:
    found = foretell(PACE, replace(AMOUNTS, baselines=(2, 1)))
    assert found.baselines_s == pytest.approx((3 + 20) + (3 + 10))


def test_reported_documents_are_asked_of_baselines_and_winner() -> None:
    before, found = foretell(PACE, AMOUNTS), foretell(PACE, replace(AMOUNTS, reported=10))
    assert found.baselines_s - before.baselines_s == pytest.approx(2 * 1)
    assert found.shortlist_s - before.shortlist_s == pytest.approx(3 + 1)


def test_a_timeout_ends_the_search_with_the_candidate_under_way() -> None:
    assert foretell(PACE, replace(AMOUNTS, timeout_s=30)).search_s == pytest.approx(37)
    assert foretell(PACE, replace(AMOUNTS, timeout_s=1)).search_s == pytest.approx(20)


def test_a_slow_sampler_counts() -> None:
    assert foretell(replace(PACE, proposing_s=5), AMOUNTS).search_s == pytest.approx(95)


def test_scoring_goes_through_what_was_measured() -> None:
    line = Scoring.through([(100, 12.0), (10, 3.0)])
    assert line.seconds(10) == pytest.approx(3)
    assert line.seconds(100) == pytest.approx(12)
    assert line.seconds(0) == 0
    # A block that was slower than all documents says nothing of a document's own time.
    assert Scoring.through([(10, 3.0), (100, 2.0)]) == Scoring(0, 0.02)
    assert Scoring.through([(10, 1.0), (10, 1.0)]) == Scoring(0, 0.1)


def test_a_sampler_that_thinks_is_timed_and_a_quick_one_is_not() -> None:
    space = SearchFile.load(QUICKSTART).space(lambda model: 2)
    assert proposing_seconds(make_sampler("random", space, 0), space, 20, 1) < 1
    assert proposing_seconds(make_sampler("gp", space, 0), space, 30, 1) > 0.3


def test_the_amounts_of_a_raced_search() -> None:
    file = SearchFile.load(QUICKSTART).changed(
        search={"n_iterations": 48, "racing": "always"}, scoring={"limit": 100}
    )
    found = amounts(make_plan(file), 1)
    # Blocks of 3 * 6 of 300 documents; rounds of 48/4 and 48/12 candidates, 36 and 90 documents.
    assert found.rounds == ((12, pytest.approx(36 * 0.94)), (4, pytest.approx(54 * 0.94)))
    assert (found.n_finalists, found.search, found.holdout) == (3, 300, 600)
    assert found.baselines == (1,) * 6
    assert (found.n_shortlisted, found.n_repetitions) == (3, 2)


def test_a_space_that_ends_before_the_search_bounds_it() -> None:
    data = yaml.safe_load(QUICKSTART.read_text())
    for model in data["models"]:
        model["parameters"]["weight"] = {"choices": [0.5, 1.0]}
    data["search"] |= {"n_iterations": 500, "sampler": "random"}
    found = amounts(make_plan(SearchFile(data, "finite")), 1)
    assert (found.n_candidates, found.n_shortlisted) == (8, 3)


# ---- the command ---------------------------------------------------------------------------------


def checked(*flags: str) -> Result:
    done = CliRunner().invoke(app, ["run", str(QUICKSTART), "--check", "--limit", "10", *flags])
    assert done.exit_code == 0, done.output
    return done


def test_a_check_prints_every_part_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    out = checked("--storage-path", str(tmp_path / "out"), "--gpu-hour-price", "2").stdout
    for part in (
        "models[0].weight",
        "0 to 1.5",
        "generations of 7",
        "qs_sort: 10 search",
        "memory: ",
        "disk: ",
        "a candidate: ",
        "time: about ",
        "baselines ",
        "money: no GPU is used",
        "a gain of ",
    ):
        assert part in out
    assert sorted(tmp_path.iterdir()) == [temporary]
    assert not list(temporary.glob("evolve-check-*"))
    assert not (ROOT / "quickstart-search").exists()


def test_the_json_holds_it_all(tmp_path: Path) -> None:
    search = tmp_path / "raced.yml"
    text = QUICKSTART.read_text().replace("n_iterations: 40", "n_iterations: 40, racing: always")
    search.write_text(text)
    done = CliRunner().invoke(app, ["run", str(search), "--check", "--json", "--limit", "40"])
    assert done.exit_code == 0, done.output
    data: dict[str, Any] = json.loads(done.stdout)
    assert [variable["low"] for variable in data["variables"]] == [0.0] * 3
    assert (data["racing"], data["polish"], data["n_candidates"]) == ("always", 8, 40)
    assert data["generation"] == 7
    seconds = data["seconds"]
    assert seconds["total"] == pytest.approx(sum(v for k, v in seconds.items() if k != "total"))
    assert all(seconds[part] > 0 for part in seconds)
    measured = data["measured"]
    assert 3 <= measured["candidates"] <= 40
    assert measured["merge"] + measured["load"] + measured["score"] <= measured["candidate"] + 1e-9
    assert data["disk"]["total_bytes"] > 40 * data["disk"]["trial_bytes"] > 0
    assert 0 < data["resolvable"]["qs_sort"]["holdout"] < data["resolvable"]["qs_sort"]["search"]
    assert (data["gpus"], data["money"]) == (0, None)


def test_a_check_that_nothing_survives_ends_as_the_search_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = tmp_path / "failing.yml"
    broken = "tasks: [qs_sort, {name: 'broken_objective:broken', direction: maximize}]"
    search.write_text(QUICKSTART.read_text().replace("tasks: [qs_reverse, qs_sort, qs_largest]", broken))
    code = "def broken(documents):\n    raise ValueError('never')\n"
    (tmp_path / "broken_objective.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    done = CliRunner().invoke(app, ["run", str(search), "--check", "--limit", "5"])
    assert done.exit_code != 0
    assert "could be evaluated" in str(done.exception)
    assert "never" in str(done.exception)
