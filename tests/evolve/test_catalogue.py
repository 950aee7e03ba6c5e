"""Which of lm-eval's files are parsed for a name, and that nothing is lost by it."""

from __future__ import annotations

from typing import Any

import pytest

from evolve.tasks.catalogue import Catalogue, members_of, parsing_only


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return Catalogue()


def test_a_names_files_are_few_and_a_groups_members_are_among_them(catalogue: Catalogue) -> None:
    arc, mmlu = catalogue.files(["arc_easy"]), catalogue.files(["mmlu"])
    assert arc is not None
    assert mmlu is not None
    assert "arc_easy.yaml" in {path.name for path in arc}
    assert len(arc) < 20
    default = {path.name for path in mmlu if path.parent == catalogue.root / "mmlu/default"}
    assert {"_mmlu.yaml", "_mmlu_stem.yaml", "mmlu_anatomy.yaml"} <= default
    assert len([name for name in default if name.startswith("mmlu_")]) == 57
    assert len(mmlu) < 1000


def test_a_word_that_names_nothing_has_no_files(catalogue: Catalogue) -> None:
    assert catalogue.files(["no_such_task_at_all"]) == set()
    assert {"mmlu", "gsm8k", "wikitext", "hellaswag"} <= catalogue.names()


@pytest.mark.slow
def test_what_is_parsed_says_the_same_as_all_of_lm_evals_files(catalogue: Catalogue) -> None:
    from lm_eval.tasks import TaskManager

    every = TaskManager().task_index

    def reached(index: Any, name: str, found: dict[str, Any]) -> dict[str, Any]:
        entry = index.get(name)
        if name not in found:
            found[name] = entry and (entry.kind, entry.yaml_path, sorted(entry.tags))
            if entry is not None and entry.kind.name == "TAG":
                [reached(index, member, found) for member in entry.tags]
            elif entry is not None and entry.kind.name == "GROUP":
                [reached(index, member, found) for member in members_of(entry.cfg)]
        return found

    for name in ("mmlu", "leaderboard", "bbh", "agieval", "glue", "ai2_arc", "gsm8k", "wikitext"):
        files = catalogue.files([name])
        assert files is not None, name
        with parsing_only(files, catalogue.root):
            some = TaskManager().task_index
        assert reached(some, name, {}) == reached(every, name, {}), name
    assert TaskManager().task_index.keys() == every.keys()
