"""`evolve eval`: models and recipes side by side, on the same documents."""

import shutil
from pathlib import Path

import pytest
import yaml

from evolve.errors import SearchFileError, TrialEngineError
from evolve.evaluation import EvalOptions, evaluate_models

ROOT = Path(__file__).resolve().parents[2]
MODELS = "configs/quickstart/models"
TASKS = EvalOptions(tasks=("qs_sort", "qs_largest"), limit=20)


@pytest.fixture(autouse=True)
def _at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def recipe(folder: Path, **changes: object) -> str:
    """Sort and largest, added to the base."""
    data = {
        "merge_method": "task_arithmetic",
        "base_model": f"{MODELS}/base",
        "models": [
            {"model": f"{MODELS}/{name}", "parameters": {"weight": 0.7}} for name in ("sort", "largest")
        ],
        "dtype": "float32",
        **changes,
    }
    path = folder / "recipe.yml"
    path.write_text(yaml.safe_dump(data))
    return str(path)


def test_each_model_is_compared_with_the_first_on_the_same_documents() -> None:
    base, sort = evaluate_models([f"{MODELS}/base", f"{MODELS}/sort"], TASKS)
    assert base["differences"] == {}
    assert sort["over"] == base["name"]
    for task, interval in sort["differences"].items():
        assert interval["value"] == pytest.approx(sort["scores"][task] - base["scores"][task])
        assert interval["low"] <= interval["value"] <= interval["high"]
    assert sort["differences"]["qs_sort"]["low"] > 0.5  # a specialist against a base that cannot


def test_models_of_one_shape_take_turns_in_one_engine_and_score_as_alone(tmp_path: Path) -> None:
    names = [recipe(tmp_path), f"{MODELS}/sort", f"{MODELS}/largest"]
    done: list[str] = []
    together = evaluate_models(
        names, EvalOptions(**{**vars(TASKS), "dtype": "float32"}), lambda text: done.append(text)
    )
    assert sum(text.startswith("starting") for text in done) == 1
    for name, scored in zip(names, together, strict=True):
        (alone,) = evaluate_models([name], EvalOptions(**{**vars(TASKS), "dtype": "float32"}))
        assert alone["scores"] == scored["scores"]


def test_models_of_other_shapes_get_engines_of_their_own(wider_model: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(ROOT / MODELS / "base").save_pretrained(wider_model)
    sort, _, again = evaluate_models([f"{MODELS}/sort", str(wider_model), f"{MODELS}/base"], TASKS)
    assert [sort["scores"]["qs_sort"], again["scores"]["qs_sort"]] == [1.0, 0.0]


def test_a_recipes_baselines_are_its_models_and_their_average(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    options = EvalOptions(**{**vars(TASKS), "with_baselines": True, "baseline": "average"})
    scored = evaluate_models([path], options)
    assert [model["name"] for model in scored] == [
        path,
        f"{MODELS}/base",
        f"{MODELS}/sort",
        f"{MODELS}/largest",
        "average",
    ]
    assert [bool(model["differences"]) for model in scored] == [True, True, True, True, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"like": Path("nowhere"), "tasks": (), "seed": None}, "--limit is 20; with --like"),
        ({"baseline": f"{MODELS}/sotr"}, f"did you mean '{MODELS}/sort'"),
        ({"split": "holdout"}, "--split goes with --like"),
    ],
)
def test_options_that_do_not_go_together_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SearchFileError, match=message):
        evaluate_models([f"{MODELS}/sort"], EvalOptions(**{**vars(TASKS), **changes}))  # type: ignore[arg-type]


def test_a_recipe_may_have_any_name_and_a_file_of_weights_none(tmp_path: Path) -> None:
    path = Path(recipe(tmp_path))
    names = [str(path), *(str(path.with_name(name)) for name in ("recipe", "R.YML", "recipe.yml.bak"))]
    for name in names[1:]:
        shutil.copy(path, name)
    options = EvalOptions(tasks=("qs_sort",), limit=2)
    assert [each["scores"] for each in evaluate_models(names[1:], options)] == [
        evaluate_models(names[:1], options)[0]["scores"]
    ] * 3
    path.rename(path.with_suffix(".bin"))
    for name, message in (("recipe.bin", "recipe.bin"), ("missing.yml", "missing.yml: no such file")):
        with pytest.raises(SearchFileError, match=message):
            evaluate_models([str(path.with_name(name))], options)


def test_a_search_file_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(SearchFileError, match=r"quickstart.yml is a search file.*best\.yml"):
        evaluate_models(["configs/quickstart.yml"], TASKS)
    path = recipe(tmp_path, parameters={"lambda": {"low": 0.5, "high": 1.0}})
    with pytest.raises(SearchFileError, match="lambda"):
        evaluate_models([path], TASKS)


def test_the_engines_weights_are_compared_with_the_models_on_demand(tmp_path: Path) -> None:
    model = tmp_path / "sort"
    shutil.copytree(ROOT / MODELS / "sort", model)
    options = EvalOptions(**{**vars(TASKS), "limit": 2, "verify": True})
    assert evaluate_models([str(model)], options)[0]["n_documents"] == {"qs_sort": 2, "qs_largest": 2}

    def exchange(text: str) -> None:
        if text.startswith("verifying"):
            for file in (ROOT / MODELS / "largest").glob("*.safetensors"):
                shutil.copy(file, model / "other")
                (model / "other").replace(model / file.name)

    with pytest.raises(TrialEngineError, match="the engine holds other weights than the recipe gives"):
        evaluate_models([str(model)], options, exchange)
