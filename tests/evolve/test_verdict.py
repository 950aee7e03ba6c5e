from pathlib import Path

import numpy as np
import pytest

from evolve.baselines import baseline_jobs
from evolve.intervals import gain_interval, score_interval
from evolve.search_file import ScoringSettings, TaskSpec
from evolve.tasks import Outcome, TaskSet
from evolve.verdict import conclude
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
