import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from evolve.engines.hf import HfEngine, ResidentLM
from evolve.errors import SearchFileError, TrialTaskError
from evolve.search_file import ScoringSettings, TaskSpec
from evolve.study import load_outcomes, save_outcomes
from evolve.tasks import Outcome, RequestBank, TaskSet, evaluate
from evolve.tasks.draw import draw

ROOT = Path(__file__).resolve().parents[2]
TASKS = str(ROOT / "tasks")
NAMES = ["qs_reverse", "qs_sort", "qs_largest"]
MODEL = str(ROOT / "configs/quickstart/models/largest")


def task_set(names: list[str] = NAMES, seed: int = 0, **scoring: object) -> TaskSet:
    settings = ScoringSettings(**{"task_paths": [TASKS], **scoring})  # type: ignore[arg-type]
    return TaskSet([TaskSpec(name=name) for name in names], settings, seed)


@pytest.fixture(scope="module")
def lm() -> ResidentLM:
    return HfEngine.of(MODEL, "cpu").lm()


@dataclass
class Sized:
    """A task of which the draw sees its name and its documents."""

    task_name: str
    eval_docs: Sequence[int]
    config: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(dataset_path=None))


def drawn(tasks: TaskSet, split: str) -> dict[str, tuple[int, ...]]:
    return {task.key: task.leaves[0].documents[split] for task in tasks.tasks}  # type: ignore[index]


def test_search_and_holdout_share_no_document() -> None:
    tasks = task_set(limit=None, holdout=0.5)
    for key, search in drawn(tasks, "search").items():
        holdout = drawn(tasks, "holdout")[key]
        assert not set(search) & set(holdout)
        assert len(search) == len(holdout) == 200


def test_the_limit_changes_neither_the_holdout_nor_the_order_of_the_draw() -> None:
    few, many = task_set(limit=20, holdout=0.25), task_set(limit=100, holdout=0.25)
    assert drawn(few, "holdout") == drawn(many, "holdout")
    for key, documents in drawn(few, "search").items():
        assert len(documents) == 20
        assert set(documents) < set(drawn(many, "search")[key])


def test_the_draw_depends_on_the_seed_alone() -> None:
    assert drawn(task_set(), "search") == drawn(task_set(), "search")
    assert drawn(task_set(), "search") != drawn(task_set(seed=1), "search")
    alone = drawn(task_set(["qs_sort"]), "search")["qs_sort"]
    assert alone == drawn(task_set(), "search")["qs_sort"]


@pytest.mark.parametrize(("holdout", "kept"), [(0.0, 0), (0.1, 40), (30, 30), (0.9, 200), (10_000, 200)])
def test_holdout_is_a_share_or_a_count_and_at_most_half(holdout: float, kept: int) -> None:
    tasks = task_set(["qs_sort"], holdout=holdout, limit=None)
    assert len(drawn(tasks, "holdout")["qs_sort"]) == kept
    assert len(drawn(tasks, "search")["qs_sort"]) == 400 - kept


@pytest.fixture(scope="module")
def group_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Few-shot, lower-is-better and grouped tasks over local data."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, n in (("big", 30), ("small", 6)):
        rows = [
            {"q": f"largest {i} {i + 3}:", "a": str(i + 3), "options": [str(i), str(i + 3)]}
            for i in range(n)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(
            f"task: g_{name}\ndataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}}}\n"
            "test_split: test\nfewshot_split: test\noutput_type: multiple_choice\ndoc_to_text: q\n"
            "doc_to_choice: options\ndoc_to_target: 1\nnum_fewshot: 2\n"
            "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
        )
    (folder / "rolling.yaml").write_text(
        "task: g_rolling\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {folder}/small.jsonl}}}}\n"
        "test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: q\n"
        "metric_list:\n  - metric: word_perplexity\n  - metric: bits_per_byte\n"
    )
    (folder / "group.yaml").write_text(
        "group: g_both\ntask: [g_big, g_small]\naggregate_metric_list:\n"
        "  - {metric: acc, aggregation: mean, weight_by_size: true}\n"
    )
    return str(folder)


def test_a_group_spreads_its_counts_over_its_leaves(group_folder: str) -> None:
    tasks = task_set(["g_both"], task_paths=[group_folder], limit=6, holdout=0.5)
    (task,) = tasks.tasks
    assert [len(leaf.documents["holdout"]) for leaf in task.leaves] == [15, 3]
    assert [len(leaf.documents["search"]) for leaf in task.leaves] == [5, 1]


def test_lm_evals_limit_counts_every_leaf_of_a_group(group_folder: str) -> None:
    options = {"task_paths": [group_folder], "draw": "first", "holdout": 0.5}
    (task,) = task_set(["g_both"], limit=5, **options).tasks
    assert [leaf.documents["search"] for leaf in task.leaves] == [tuple(range(5))] * 2
    assert [leaf.documents["holdout"] for leaf in task.leaves] == [tuple(range(5, 22)), (5,)]
    (task,) = task_set(["g_both"], limit=None, **options).tasks
    assert [task.n_documents(split) for split in ("search", "holdout")] == [36, 0]


def test_every_leaf_of_a_group_has_a_search_document(group_folder: str) -> None:
    (task,) = task_set(["g_both"], task_paths=[group_folder], limit=1, holdout=0.5).tasks
    assert [len(leaf.documents["search"]) for leaf in task.leaves] == [1, 1]


@pytest.mark.parametrize("limit", [5, 6, 7, 10, 57, 100, 503, 10_000])
@pytest.mark.parametrize("holdout", [0, 100])
@pytest.mark.parametrize("sizes", [[1, 2, 3, 400, 400], [100 + n**2 for n in range(-5, 40)]], ids=len)
def test_a_group_is_searched_on_no_more_than_limit_documents(
    sizes: list[int], holdout: int, limit: int
) -> None:
    leaves = [Sized(f"leaf_{i}", range(size)) for i, size in enumerate(sizes)]
    found = draw({"group": leaves}, ScoringSettings(limit=limit, holdout=holdout), 0)["group"]
    searched = [len(leaf.documents["search"]) for leaf in found]
    assert sum(searched) == min(max(limit, len(sizes)), sum(sizes) - holdout)
    assert all(searched)
    # Of a leaf with more documents as many are searched on, but for one that cannot be split.
    left = [size - len(leaf.documents["holdout"]) for size, leaf in zip(sizes, found, strict=True)]
    for n, s in zip(left, searched, strict=True):
        assert all(s >= other - 1 for m, other in zip(left, searched, strict=True) if n >= m)


@pytest.mark.parametrize("names", [["g_both", "g_big"], ["g_big", "g_both"], ["g_small", "g_rolling"]])
@pytest.mark.parametrize("limit", [None, 4])
@pytest.mark.parametrize("draw", ["seeded", "first", "shuffled"])
def test_what_one_entry_keeps_for_the_verdict_no_other_searches_on(
    group_folder: str, names: list[str], limit: int | None, draw: str
) -> None:
    tasks = task_set(names, task_paths=[group_folder], limit=limit, holdout=0.4, draw=draw)
    searched: dict[str, set[int]] = {}
    kept: dict[str, set[int]] = {}
    for task in tasks.tasks:
        for leaf in task.leaves:
            data = str(leaf.task.config.dataset_kwargs)
            searched.setdefault(data, set()).update(leaf.documents["search"])
            kept.setdefault(data, set()).update(leaf.documents["holdout"])
            assert leaf.documents["search"]
    for data in searched:
        assert not searched[data] & kept[data]


def test_a_changed_task_file_or_its_data_make_another_fingerprint(group_folder: str) -> None:
    def prints() -> dict[str, str]:
        return task_set(["g_big", "g_small"], task_paths=[group_folder]).files()

    before = prints()
    assert prints() == before
    task, data = Path(group_folder, "big.yaml"), Path(group_folder, "small.jsonl")
    written = {path: path.read_text() for path in (task, data)}
    try:
        task.write_text(written[task].replace("doc_to_text: q", "doc_to_text: 'Q {{q}}'"))
        assert [prints()[name] == before[name] for name in ("g_big", "g_small")] == [False, True]
        data.write_text(written[data].replace("largest 0", "largest 9"))
        assert prints()["g_small"] != before["g_small"]
    finally:
        for path, text in written.items():
            path.write_text(text)


@pytest.mark.parametrize(("num_fewshot", "n_notes"), [(None, 0), (0, 0), (1, 1)])
def test_a_task_that_keeps_no_examples_against_the_setting_is_noted(
    num_fewshot: int | None, n_notes: int, group_folder: str, tmp_path: Path
) -> None:
    text = Path(group_folder, "small.yaml").read_text()
    zero = text.replace("g_small", "g_zero").replace("num_fewshot: 2", "num_fewshot: 0")
    (tmp_path / "zero.yaml").write_text(zero)
    paths = [group_folder, str(tmp_path)]
    notes = task_set(["g_both", "g_zero"], task_paths=paths, num_fewshot=num_fewshot).notes
    assert len(notes) == n_notes
    assert all("num_fewshot is 1; it does not hold for g_zero: " in note for note in notes)


@pytest.mark.parametrize(
    "value", [{1, 2}, {("a", 1): 2}, [1.5, {"a": None}], object, float("nan")], ids=repr
)
def test_whatever_a_metric_gives_can_be_kept(value: object, tmp_path: Path) -> None:
    outcomes = {"t": [Outcome("t", 0, 1.0, {"odd,none": value}, "acc,none")]}
    save_outcomes(tmp_path / "o.parquet", {"search": outcomes})
    assert load_outcomes(tmp_path / "o.parquet")["search"]["t"][0].value == 1.0


@pytest.mark.parametrize(
    "names", [NAMES, ["g_both", "g_rolling"]], ids=["quickstart", "few-shot group and rolling"]
)
def test_scores_are_lm_evals_own_on_the_same_documents(
    names: list[str], lm: ResidentLM, group_folder: str
) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    tasks = task_set(names, task_paths=[TASKS, group_folder], limit=None, holdout=0.0)
    ours = RequestBank(tasks, lm, False, ("search",)).answer("search")
    manager = TaskManager(include_path=[TASKS, group_folder], include_defaults=False)
    theirs = lm_eval.simple_evaluate(
        model=lm, tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    for task in tasks.tasks:
        key = f"{task.metric},{task.filter}"
        scores = theirs.get("groups", {}).get(task.key) or theirs["results"][task.key]
        assert tasks.scores(ours)[task.key] == scores[key]
        for leaf in task.leaves:
            rows = theirs["samples"][leaf.task.task_name]
            expected = {row["doc_id"]: row[task.metric] for row in rows if row["filter"] == task.filter}
            found = {o.document: o.value for o in ours[task.key] if o.leaf == leaf.name}
            assert found == expected


def test_a_limit_changes_no_prompt_and_no_outcome(lm: ResidentLM, group_folder: str) -> None:
    def outcomes(limit: int | None) -> dict[tuple[str, int], float]:
        tasks = task_set(["g_both"], task_paths=[group_folder], limit=limit, holdout=0.5)
        answered = RequestBank(tasks, lm, False).answer("search")
        return {(o.leaf, o.document): o.value for o in answered["g_both"]}

    few, all_of_them = outcomes(5), outcomes(None)
    assert few.items() <= all_of_them.items()


def test_lower_is_better_counts_negative(group_folder: str) -> None:
    tasks = task_set(["g_rolling"], task_paths=[group_folder])
    assert tasks.tasks[0].metric == "word_perplexity"
    assert tasks.objective({"g_rolling": 12.0}) == -12.0


def test_a_task_named_twice_gets_a_key_for_each_metric(group_folder: str) -> None:
    specs = [TaskSpec(name="g_rolling", metric=m) for m in ("word_perplexity", "bits_per_byte")]
    tasks = TaskSet(specs, ScoringSettings(task_paths=[group_folder]), 0)
    assert [t.key for t in tasks.tasks] == [
        "g_rolling:word_perplexity,none",
        "g_rolling:bits_per_byte,none",
    ]


def test_answers_of_one_candidate_do_not_meet_those_of_the_next(lm: ResidentLM) -> None:
    bank = RequestBank(task_set(["qs_largest"], limit=20), lm, False)
    assert bank.answer("search") == bank.answer("search")


def test_a_score_that_is_no_number_is_a_failure() -> None:
    tasks = task_set(["qs_sort"])
    with pytest.raises(TrialTaskError, match="qs_sort: the score is nan"):
        tasks.scores({"qs_sort": [Outcome("qs_sort", 0, float("nan"))]})


def test_no_task_at_all_is_a_fault() -> None:
    with pytest.raises(SearchFileError, match="no task is named"):
        task_set([])


def test_evaluate_scores_a_folder_and_a_live_model() -> None:
    from merge_core.merge import load_merged
    from merge_core.plan import model_alone

    by_folder = evaluate(MODEL, ["qs_largest"], limit=50, task_paths=[TASKS])
    live = evaluate(load_merged(model_alone(MODEL)), ["qs_largest"], limit=50, task_paths=[TASKS])
    assert by_folder == live
    for alone in ("qs_largest", TaskSpec(name="qs_largest")):
        assert evaluate(MODEL, alone, limit=50, task_paths=[TASKS]) == live
    assert by_folder["qs_largest"] > 0.9
