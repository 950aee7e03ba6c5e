import copy
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from evolve.baselines import baseline_jobs
from evolve.comparison import Comparison
from evolve.intervals import gain_interval, holm, mcnemar, score_interval, simultaneous
from evolve.power import documents_needed, resolvable_gain
from evolve.search_file import ScoringSettings, TaskSpec
from evolve.tasks import Outcome, TaskSet, report_set
from evolve.verdict import Elsewhere, Verdict, conclude, constrained
from evolve.workers.worker import Prompting
from merge_core.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tasks() -> TaskSet:
    scoring = ScoringSettings(task_paths=[str(ROOT / "tasks")])
    return TaskSet([TaskSpec(name="qs_sort"), TaskSpec(name="qs_largest", weight=2.0)], scoring, 0)


def outcomes(sort: list[float], largest: list[float]) -> dict[str, list[Outcome]]:
    return {
        key: [Outcome(key, i, value) for i, value in enumerate(values)]
        for key, values in (("qs_sort", sort), ("qs_largest", largest))
    }


def test_the_gain_is_the_difference_of_the_weighted_sums(tasks: TaskSet) -> None:
    gain = gain_interval(tasks, outcomes([1] * 50, [1, 0] * 50), outcomes([0] * 50, [0] * 100))
    assert gain.value == pytest.approx(1.0 + 2 * 0.5)
    assert 0 < gain.low < gain.value < gain.high


def test_equal_models_show_no_gain_and_a_symmetric_interval(tasks: TaskSet) -> None:
    same = outcomes([0, 1] * 40, [1, 1, 0] * 30)
    gain = gain_interval(tasks, same, same)
    assert gain.value == 0
    assert gain.low < 0 < gain.high
    assert gain.low == pytest.approx(-gain.high, abs=0.02)


def test_pairing_narrows_the_interval(tasks: TaskSet) -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2, 400)
    better = np.where(rng.random(400) < 0.1, 1, base)
    paired = gain_interval(tasks, outcomes(list(better), [1] * 400), outcomes(list(base), [1] * 400))
    shuffled = gain_interval(
        tasks, outcomes(list(better), [1] * 400), outcomes(list(rng.permutation(base)), [1] * 400)
    )
    assert paired.high - paired.low < 0.8 * (shuffled.high - shuffled.low)


@pytest.mark.parametrize(("n", "is_shown"), [(1, False), (2, False), (20, True)])
def test_a_handful_of_documents_claims_nothing(tasks: TaskSet, n: int, is_shown: bool) -> None:
    gain = gain_interval(tasks, outcomes([1] * n, [1] * n), outcomes([0] * n, [0] * n))
    assert (gain.low > 0) == is_shown


def test_intervals_cover_the_truth_as_often_as_they_say(tasks: TaskSet) -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(150):
        difficulty = rng.random(60)
        won = (rng.random(60) < difficulty).astype(float)
        lost = (rng.random(60) < difficulty * 0.8).astype(float)
        gain = gain_interval(tasks, outcomes(list(won), [1, 1]), outcomes(list(lost), [1, 1]))
        covered += gain.low <= 0.1 <= gain.high
    assert covered >= 0.9 * 150  # 95% nominal, three standard errors below is 90%


def test_a_score_has_wilsons_interval(tasks: TaskSet) -> None:
    interval = score_interval(tasks.tasks[0], outcomes([1] * 9 + [0], [])["qs_sort"], 0)
    # Wilson 1927 for 9 of 10, by hand, z = 1.95996:
    # (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
    assert (interval.value, interval.low, interval.high) == pytest.approx(
        (0.9, 0.59585, 0.98213), abs=1e-4
    )


def test_the_verdict_is_over_the_best_baseline(tasks: TaskSet) -> None:
    def by_split(values: dict[str, list[Outcome]]) -> dict[str, dict[str, list[Outcome]]]:
        return {"search": values, "holdout": values}

    good, bad = outcomes([1, 0] * 50, [1, 0] * 50), outcomes([0] * 100, [0] * 100)
    winner = outcomes([1, 1, 1, 0] * 25, [1] * 100)
    verdict = conclude(tasks, {7: winner}, {"bad": by_split(bad), "good": by_split(good)})  # type: ignore[arg-type]
    assert (verdict.trial, verdict.over, verdict.is_shown) == (7, "good", True)
    assert verdict.text.startswith("gain shown: +1.250 [")
    nothing = conclude(tasks, {7: good}, {"good": by_split(good)})  # type: ignore[arg-type]
    assert not nothing.is_shown
    assert nothing.text.startswith("no gain shown")


def test_without_a_holdout_no_gain_is_shown(tasks: TaskSet) -> None:
    values = outcomes([1], [1])
    verdict = conclude(tasks, {0: {}}, {"base": {"search": values, "holdout": {}}})
    assert verdict.text == "no gain shown: no holdout"
    assert verdict.holdout == {}


def test_baselines_are_each_model_the_average_and_the_starts() -> None:
    folder = ROOT / "configs/quickstart/models"
    models = [{"model": str(folder / m), "parameters": {"weight": 0.5}} for m in ("sort", "reverse")]
    start = Recipe.parse(
        {"merge_method": "task_arithmetic", "base_model": str(folder / "base"), "models": models}
    )
    jobs = baseline_jobs(start, Prompting(str(folder / "base"), False))
    assert [job.name for job in jobs] == [
        *(str(folder / m) for m in ("base", "sort", "reverse")),
        "average",
        "starts",
    ]
    # One tokenizer without chat template: nothing would differ if the owner asked.
    assert all(len(job.promptings) == 1 for job in jobs)


def test_a_model_called_like_a_baseline_is_none_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("base", "average", "starts"):
        (tmp_path / name).symlink_to(ROOT / "configs/quickstart/models/base")
    monkeypatch.chdir(tmp_path)
    models = [{"model": m, "parameters": {"weight": 0.5}} for m in ("average", "starts")]
    start = Recipe.parse({"merge_method": "task_arithmetic", "base_model": "base", "models": models})
    jobs = baseline_jobs(start, Prompting(None, False))
    names = [job.name for job in jobs]
    assert names == ["base", "average", "starts", "average (recipe)", "starts (recipe)"]


def test_a_model_with_another_template_is_also_asked_as_its_owner_would(tmp_path: Path) -> None:
    import shutil

    chatty = tmp_path / "chatty"
    shutil.copytree(ROOT / "configs/quickstart/models/sort", chatty)
    (chatty / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    base = str(ROOT / "configs/quickstart/models/base")
    models = [{"model": str(chatty), "parameters": {"weight": 0.5}}]
    start = Recipe.parse({"merge_method": "task_arithmetic", "base_model": base, "models": models})
    jobs = {job.name: job for job in baseline_jobs(start, Prompting(base, False))}
    assert jobs[str(chatty)].promptings == (Prompting(base, False), Prompting(str(chatty), True))
    assert len(jobs[base].promptings) == 1


def by_split(values: dict[str, list[Outcome]]) -> dict[str, dict[str, list[Outcome]]]:
    return {"search": values, "holdout": values}


def test_the_finalist_that_does_best_on_the_holdout_wins(tasks: TaskSet) -> None:
    base = by_split(outcomes([1, 0, 0, 0] * 25, [1, 0] * 50))
    members = {
        4: outcomes([1, 0, 0, 0] * 25, [1, 0] * 50),
        9: outcomes([1, 1, 1, 0] * 25, [1] * 100),
        2: outcomes([1, 1, 0, 0] * 25, [1] * 100),
    }
    verdict = conclude(tasks, members, {"base": base})  # type: ignore[dict-item]
    assert verdict.trial == 9
    assert [member.trial for member in verdict.shortlist] == [4, 9, 2]
    assert verdict.gain == verdict.shortlist[1].gain
    assert "at 95% certainty for 3 finalists" in verdict.text
    same = {n: members[2] for n in (5, 3)}
    assert conclude(tasks, same, {"base": base}).trial == 5  # type: ignore[dict-item]


def random_outcomes(rng: np.random.Generator, n: int, share: float) -> dict[str, list[Outcome]]:
    sort, largest = (rng.random((2, n)) < share).astype(float)
    return outcomes(list(sort), list(largest))


def test_more_finalists_and_more_baselines_widen_a_gains_interval(tasks: TaskSet) -> None:
    rng = np.random.default_rng(3)
    members = {i: random_outcomes(rng, 80, 0.6) for i in range(6)}
    baselines = {str(i): random_outcomes(rng, 80, 0.5) for i in range(4)}
    alone = Comparison(tasks, {0: members[0]}, baselines).gains()[0]
    among = Comparison(tasks, members, baselines).gains()[0]
    assert among.value == alone.value
    assert among.low < alone.low
    assert among.high > alone.high
    # Against each baseline the gain over the best of them is no larger, nor is its lower end.
    for name, baseline in baselines.items():
        over_one = Comparison(tasks, {0: members[0]}, {name: baseline}).gains()[0]
        assert alone.value <= over_one.value
        assert alone.low <= over_one.low


def test_finalists_that_are_the_same_cost_nothing(tasks: TaskSet) -> None:
    rng = np.random.default_rng(4)
    winner, base = random_outcomes(rng, 80, 0.6), random_outcomes(rng, 80, 0.5)
    alone = gain_interval(tasks, winner, base)
    for gain in Comparison(tasks, {0: winner, 1: winner, 2: winner}, {"base": base}).gains().values():
        assert (gain.low, gain.high) == pytest.approx((alone.low, alone.high))


def test_all_intervals_of_a_family_hold_at_once() -> None:
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(200):
        documents = rng.normal(size=(60, 8)) @ rng.normal(size=(8, 8))
        draws = rng.integers(0, 60, (500, 60))
        intervals = simultaneous(documents.mean(axis=0), documents[draws].mean(axis=1))
        held += all(interval.low <= 0 <= interval.high for interval in intervals)
    assert held >= 0.89 * 200  # 95% nominal; three standard errors below, and bootstrap's own loss


def test_a_loss_on_one_task_is_said_beside_a_gain_in_the_sum(tasks: TaskSet) -> None:
    base = by_split(outcomes([1] * 100, [0] * 100))
    winner = outcomes([1, 1, 0, 0] * 25, [1] * 100)
    verdict = conclude(tasks, {1: winner}, {"base": base})  # type: ignore[dict-item]
    assert verdict.text.startswith("gain shown: +1.500 [")
    assert "; gained on qs_largest +1.000 [" in verdict.text
    assert "; lost on qs_sort -0.500 [" in verdict.text
    sort, largest = (verdict.differences[key] for key in ("qs_sort", "qs_largest"))
    assert (sort.is_better, largest.is_better) == (False, True)
    # All 100 documents differ one way; Holm leaves the smaller of two p-values doubled.
    assert largest.p_value == pytest.approx(2 * 2 * 0.5**100)
    assert sort.p_value == pytest.approx(2 * 0.5**50)


def test_tasks_that_are_only_reported_say_what_was_lost_elsewhere(tasks: TaskSet) -> None:
    scoring = ScoringSettings(task_paths=[str(ROOT / "tasks")])
    reported = report_set([TaskSpec(name="qs_reverse")], scoring, 0, searched=[])

    def reverse(share: float) -> dict[str, list[Outcome]]:
        return {"qs_reverse": [Outcome("qs_reverse", i, float(i < share * 100)) for i in range(100)]}

    base, winner = outcomes([0] * 50, [0] * 50), outcomes([1] * 50, [1] * 50)
    elsewhere = Elsewhere(reported, reverse(0.5), {"base": reverse(0.8), "tuned": reverse(0.9)})
    baselines = {"base": by_split(base), "tuned": by_split(base)}
    verdict = conclude(tasks, {1: winner}, baselines, elsewhere=elsewhere)  # type: ignore[arg-type]
    assert "; lost on qs_reverse: -0.400 [" in verdict.text
    assert verdict.text.count("lost on") == 1
    assert "] against 'tuned'" in verdict.text
    assert verdict.report_only["qs_reverse"].value == 0.5
    assert [b.report_only["qs_reverse"].value for b in verdict.baselines] == [0.8, 0.9]
    recalled = Verdict.recalled(json.loads(json.dumps(asdict(verdict))))
    assert recalled == verdict


def test_it_says_how_many_documents_would_show_the_gain(tasks: TaskSet) -> None:
    rng = np.random.default_rng(6)
    base = np.array([1.0, 0.0] * 30)
    better = base.copy()
    better[:22] = np.where(np.arange(22) % 6 == 0, 0.0, 1.0)  # of 15 that differ 11 become right
    scoring = ScoringSettings(task_paths=[str(ROOT / "tasks")])
    one = TaskSet([TaskSpec(name="qs_sort")], scoring, 0)

    def of(values: np.ndarray) -> dict[str, list[Outcome]]:
        return {"qs_sort": [Outcome("qs_sort", i, float(value)) for i, value in enumerate(values)]}

    verdict = conclude(one, {0: of(better)}, {"base": by_split(of(base))})  # type: ignore[dict-item]
    assert verdict.text.startswith("no gain shown: +")
    n = verdict.documents_needed
    assert n is not None
    assert n > 60
    assert "it would take about " in verdict.text
    # With so many, and the same share of differences, it is shown about 8 times in 10.
    shown = 0
    for _ in range(60):
        drawn = rng.integers(0, 60, n)
        interval = gain_interval(one, of(better[drawn]), of(base[drawn]))
        shown += interval.low > 0
    assert 0.6 * 60 <= shown <= 0.97 * 60


def test_the_documents_needed_are_those_for_every_baseline() -> None:
    """The best one may hardly differ from the winner, and be shown long before another."""
    winner = np.array([1.0] * 180 + [0.0] * 120)
    near, far = winner.copy(), winner.copy()
    near[:10] = 0.0
    far[:90], far[180:255] = 0.0, 1.0

    one = TaskSet([TaskSpec(name="qs_sort")], ScoringSettings(task_paths=[str(ROOT / "tasks")]), 0)

    def of(values: np.ndarray) -> dict[str, list[Outcome]]:
        return {"qs_sort": [Outcome("qs_sort", i, float(value)) for i, value in enumerate(values)]}

    def needed(**baselines: np.ndarray) -> int | None:
        sides = {name: by_split(of(values)) for name, values in baselines.items()}
        return conclude(one, {0: of(winner)}, sides).documents_needed  # type: ignore[arg-type]

    alone = needed(far=far)
    assert alone is not None
    assert needed(near=near, far=far) == alone
    assert (needed(near=near) or 0) < alone
    assert needed(near=near, far=far, better=np.ones(300)) is None


def test_where_no_candidate_meets_the_constraints_the_rest_is_said_all_the_same(tasks: TaskSet) -> None:
    public = copy.copy(tasks)
    public.public = {"qs_sort": "test"}
    base, winner = outcomes([1] * 50, [0] * 100), outcomes([0] * 50, [1] * 100)
    verdict = conclude(public, {1: winner}, {"base": by_split(base)})  # type: ignore[dict-item]
    assert verdict.is_shown
    found = constrained(verdict, public, {"qs_sort not below 0.5": 0.5}, {})
    assert not found.is_shown
    assert found.text.startswith(
        "no gain shown: no candidate met every constraint; the nearest violates "
    )
    assert "; lost on qs_sort -1.000 [" in found.text
    assert found.text.endswith("; searched on qs_sort:test: not a leaderboard result")


def test_mcnemar_and_holm_are_as_published() -> None:
    def of(*values: float) -> list[Outcome]:
        return [Outcome("t", i, value) for i, value in enumerate(values)]

    # 9 documents differ, 8 of them one way: 2 (C(9,0) + C(9,1)) / 2^9.
    assert mcnemar(of(*[1] * 8, 0, 1, 1), of(*[0] * 8, 1, 1, 1)) == pytest.approx(20 / 512)
    assert mcnemar(of(1, 0), of(1, 0)) == 1.0
    # Holm 1979: the smallest times 4, the next times 3, ...; never below one before.
    assert holm([0.01, 0.04, None, 0.03, 0.005]) == pytest.approx([0.03, 0.06, None, 0.06, 0.02])


@pytest.mark.parametrize(("n", "discordant"), [(100, 0.3), (400, 0.1)])
def test_a_gain_that_is_called_resolvable_is_shown_in_8_searches_of_10(n: int, discordant: float) -> None:
    scoring = ScoringSettings(task_paths=[str(ROOT / "tasks")])
    one = TaskSet([TaskSpec(name="qs_sort")], scoring, 0)
    gain = resolvable_gain(n, discordant)
    rng = np.random.default_rng(7)
    shown = 0
    for _ in range(100):
        kind = rng.choice(
            [1, -1, 0], n, p=[(discordant + gain) / 2, (discordant - gain) / 2, 1 - discordant]
        )
        ours, theirs = (
            [Outcome("qs_sort", i, float(k == side)) for i, k in enumerate(kind)] for side in (1, -1)
        )
        shown += gain_interval(one, {"qs_sort": ours}, {"qs_sort": theirs}).low > 0
    assert 68 <= shown <= 92  # three standard errors


def test_what_can_be_resolved_falls_with_documents_and_is_nothing_for_too_few() -> None:
    gains = [resolvable_gain(n, 0.2) for n in (50, 100, 200, 1000)]
    assert gains == sorted(gains, reverse=True)
    assert resolvable_gain(10, 0.2) == float("inf")
    # Connor 1987: n = (1.95996 sqrt(0.2) + 0.84162 sqrt(0.2 - 0.1^2))^2 / 0.1^2 = 154.6
    assert resolvable_gain(155, 0.2) == pytest.approx(0.1, abs=2e-4)


def test_documents_needed_is_the_textbooks_number() -> None:
    # Miller 2024, equation 9, with a standard error of 0.05 on 100 documents: 2.8016^2 * 0.25 / 0.05^2
    assert documents_needed(100, 0.05, 0.05) == 785
