"""What an exported recipe says of its scores reaches the model's card, and only where it is true."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from evolve.export import export_yaml
from evolve.intervals import Interval
from evolve.provenance import head_lines, read_evaluation
from evolve.verdict import Baseline, Verdict
from merge_core.card import Score
from merge_core.merge import save_merged
from merge_core.recipe import Recipe

SCORES = {"sums": 0.75, "poems:bleu,none": 12.5}
DOCUMENTS = {task: "10 search, 20 holdout, drawn by seed 3 from test" for task in SCORES}
METRICS = {"sums": "exact_match,none", "poems:bleu,none": "bleu,none"}


@pytest.fixture
def recipe(llamas: Any) -> Recipe:
    models = [{"model": llamas.x, "parameters": {"weight": 1 / 3}}, {"model": llamas.y}]
    return Recipe.parse({"merge_method": "linear", "models": models})


def judged() -> Verdict:
    holdout = {"sums": Interval(0.7, 0.5, 0.85), "poems:bleu,none": Interval(-1e-5, -2.0, 3.25)}
    baselines = [
        Baseline(name, SCORES, {task: Interval(0.5, 0.25, 0.75) for task in SCORES}, 1.0)
        for name in ("org/a", "models/b: the other | one")
    ]
    return Verdict(7, holdout, baselines, Interval(0.2, 0.1, 0.3), "org/a", "gain shown: +0.2\nover")


def text_of(recipe: Recipe, verdict: Verdict | None) -> str:
    head = head_lines(recipe, "my study", 7, 3, SCORES, verdict, DOCUMENTS, metrics=METRICS)
    return export_yaml(recipe, head)


def test_what_is_written_at_a_recipes_head_is_read_back(recipe: Recipe) -> None:
    found, warning = read_evaluation(text_of(recipe, judged()), recipe)
    assert warning is None
    assert found is not None
    assert "study my study, candidate 7, seed 3" in found.origin
    assert found.split == "holdout"
    assert list(found.rows) == ["this model", "org/a", "models/b: the other | one"]
    assert found.rows["this model"] == {
        "sums": Score(0.7, 0.5, 0.85),
        "poems:bleu,none": Score(0.0, -2.0, 3.25),
    }
    assert found.rows["org/a"] == dict.fromkeys(SCORES, Score(0.5, 0.25, 0.75))
    assert (found.metrics, found.documents) == (METRICS, DOCUMENTS)
    assert found.verdict == "gain shown: +0.2 over"


def test_without_a_verdict_the_scores_are_those_it_was_chosen_by(recipe: Recipe) -> None:
    found, _ = read_evaluation(text_of(recipe, None), recipe)
    assert found is not None
    assert found.split == "search"
    assert found.rows == {"this model": {task: Score(value) for task, value in SCORES.items()}}
    assert "the very documents that it was chosen by" in found.section()


def test_estimates_are_called_so_and_are_no_scores_of_the_card(recipe: Recipe) -> None:
    head = list(head_lines(recipe, "s", 7, 3, SCORES, standard_errors=dict.fromkeys(SCORES, 0.125)))
    assert f"search  sums: {SCORES['sums']:.4f}, estimated from a part of the documents (±0.1250)" in head
    found, _ = read_evaluation(export_yaml(recipe, iter(head)), recipe)
    assert found is not None
    assert found.index("name") == []
    assert found.section().endswith(" Its scores were estimated from a part of the documents.")


def test_scores_of_another_recipe_are_not_believed(recipe: Recipe) -> None:
    text = text_of(recipe, judged())
    changed = Recipe.parse({**recipe.as_config(), "random_seed": 1})
    found, warning = read_evaluation(text, changed)
    assert found is None
    assert warning is not None
    assert "was changed since study my study scored it" in warning
    by_hand = text.replace("search  sums", "hand  sums").replace("digest of this recipe", "digest")
    assert read_evaluation(by_hand, recipe)[0] is None
    assert read_evaluation(recipe.to_yaml(), recipe) == (None, None)
    assert read_evaluation("# my own words: 1\n" + recipe.to_yaml(), recipe) == (None, None)


def test_the_card_has_them_for_readers_and_for_the_hub(recipe: Recipe, tmp_path: Path) -> None:
    text = text_of(recipe, judged())
    evaluation, _ = read_evaluation(text, recipe)
    save_merged(recipe, tmp_path / "m", recipe_text=text, evaluation=evaluation)
    card = ModelCard((tmp_path / "m/README.md").read_text())
    assert card.data.eval_results is not None
    found = {r.dataset_type: (r.metric_type, r.metric_value) for r in card.data.eval_results}
    assert found == {"sums": ("exact_match,none", 0.7), "poems:bleu,none": ("bleu,none", 0.0)}
    section = card.text.partition("## Evaluation")[2].partition("\n## ")[0]
    assert "| this model | 0.700 [0.500, 0.850] |" in section
    assert "Gain shown: +0.2 over." in section
    assert "* sums: exact_match,none; 10 search, 20 holdout" in section
