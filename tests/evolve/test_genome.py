"""mergekit-evolve files: the same space as mergekit-evolve 0.1.5, decoded to the same recipes."""

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evolve.errors import SearchFileError
from evolve.genome import GenomeSpace
from evolve.mergekit_file import benchmarks
from evolve.search_file import SearchFile
from merge_core.methods import METHODS
from merge_core.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
MODELS = [f"configs/quickstart/models/{name}" for name in ("reverse", "sort", "largest")]
BASE = "configs/quickstart/models/base"
N_LAYERS = 4
BASED: dict[str, Any] = {"models": MODELS[:2], "base_model": BASE}


@pytest.fixture(autouse=True)
def _at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def file_of(genome: dict[str, Any], **top: Any) -> SearchFile:
    return SearchFile({"genome": genome, "tasks": ["qs_largest"], **top})


def space_of(genome: dict[str, Any], **top: Any) -> GenomeSpace:
    space = file_of(genome, **top).space(lambda model: N_LAYERS)
    assert isinstance(space, GenomeSpace)
    return space


# One of each way of decoding: grouped, filtered, smooth, normalized or not, base listed or not.
GENOMES: dict[str, dict[str, Any]] = {
    "linear": {"models": MODELS, "merge_method": "linear"},
    "linear smooth": {"models": MODELS, "merge_method": "linear", "smooth": True, "layer_granularity": 1},
    "linear, base listed": {"models": [*MODELS, BASE], "base_model": BASE, "merge_method": "linear"},
    "linear, not normalized": {"models": MODELS, "merge_method": "linear", "normalize": False},
    "task_arithmetic": {**BASED, "merge_method": "task_arithmetic"},
    "one model": {**BASED, "models": MODELS[:1], "merge_method": "task_arithmetic"},
    "signed": {**BASED, "merge_method": "task_arithmetic", "allow_negative_weights": True},
    "ties": {**BASED, "merge_method": "ties", "layer_granularity": 2},
    "ties, filtered": {**BASED, "merge_method": "ties", "filters": ["self_attn", "mlp"]},
    "ties, filtered groups": {
        "models": MODELS,
        "base_model": BASE,
        "merge_method": "ties",
        "filters": ["mlp"],
        "layer_granularity": 1,
        "normalize": False,
    },
    "ties, smooth": {**BASED, "merge_method": "ties", "smooth": True, "layer_granularity": 2},
    "ties, smooth, one group": {**BASED, "merge_method": "ties", "smooth": True, "filters": ["mlp"]},
    "dare_ties, smooth, filtered, signed": {
        **BASED,
        "merge_method": "dare_ties",
        "smooth": True,
        "layer_granularity": 1,
        "filters": ["mlp", "self_attn.q"],
        "allow_negative_weights": True,
    },
    "dare_ties, base listed": {
        **BASED,
        "models": [BASE, *MODELS],
        "merge_method": "dare_ties",
        "layer_granularity": -3,
        "tokenizer_source": "base",
    },
    "slerp of two": {"models": MODELS[:2], "merge_method": "slerp", "layer_granularity": 2},
    "slerp of three": {"models": MODELS, "merge_method": "slerp", "layer_granularity": 1},
    "slerp, base listed": {"models": [*MODELS, BASE], "base_model": BASE, "merge_method": "slerp"},
}
in_each_way = pytest.mark.parametrize("genome", GENOMES.values(), ids=GENOMES)


@pytest.fixture(scope="module")
def mergekit() -> Callable[[dict[str, Any]], Any]:
    """mergekit-evolve's own genome of a definition."""
    evo = pytest.importorskip("mergekit.evo.genome")

    def genome(definition: dict[str, Any]) -> Any:
        return evo.ModelGenome(evo.ModelGenomeDefinition.model_validate(definition))

    return genome


def as_recipe(config: Any) -> Recipe:
    """Read mergekit's config without what its method does not read, such as slerp's int8_mask."""
    data = config.model_dump(mode="json", exclude_none=True)
    known = METHODS[data["merge_method"]].parameters
    data["parameters"] = {name: value for name, value in data["parameters"].items() if name in known}
    return Recipe.parse(data)


def close(one: Any, other: Any) -> bool:
    """Compare configs, numbers to float32, in which mergekit computes its softmax."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(close(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(close, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)


# ---- the space --------------------------------------------------------------------------------


@in_each_way
def test_shape_and_starts_are_mergekits(genome: dict[str, Any], mergekit: Any) -> None:
    space = space_of(genome)
    first = mergekit(genome).initial_genotype().numpy()
    assert space.shape == first.shape
    np.testing.assert_allclose(space.genotype(space.starts()), first, rtol=1e-7)


@in_each_way
def test_any_genome_decodes_to_mergekits_recipe(genome: dict[str, Any], mergekit: Any) -> None:
    import torch

    space, theirs = space_of(genome), mergekit(genome)
    rng = np.random.default_rng(0)
    for _ in range(30):
        low, high = (np.array([getattr(v, end) for v in space.variables]) for end in ("low", "high"))
        # Exact in float32, so that plain numbers must be equal to the last digit.
        vector = rng.uniform(low, high).astype(np.float32).reshape(space.shape)
        expected = as_recipe(theirs.genotype_merge_config(torch.from_numpy(vector)))
        recipe = space.recipe(space.named(vector.astype(float)))
        if genome["merge_method"] == "slerp":
            assert close(recipe.as_config(), expected.as_config())
        else:
            assert recipe == expected


@in_each_way
def test_values_is_the_inverse_of_recipe(genome: dict[str, Any]) -> None:
    space = space_of(genome)
    assert space.values(space.recipe(space.starts())) == pytest.approx(space.starts())
    rng = random.Random(0)
    for _ in range(20):
        values = {v.name: rng.uniform(v.low, min(v.high, 2.0)) for v in space.variables}
        recipe = space.recipe(values)
        found = space.values(recipe)
        if genome["merge_method"] == "slerp":  # other scores may choose the same pairs
            assert close(space.recipe(found).as_config(), recipe.as_config())
        else:
            assert found == values


def test_a_recipe_that_is_not_in_the_space_has_no_values() -> None:
    space = space_of(GENOMES["ties"])
    other = space_of(GENOMES["ties, filtered"])
    with pytest.raises(SearchFileError, match="none that genome: with ties stands for"):
        space.values(other.recipe(other.starts()))
    large = {**space.starts(), "models[0].weight[1]": 2.5}
    with pytest.raises(SearchFileError, match=r"weight\[1\] is 2.5; the space has \[0, 2\]"):
        space.values(space.recipe(large))


def test_variables_are_named_by_path_and_bounded() -> None:
    space = space_of({**GENOMES["ties, filtered groups"], "models": MODELS[:1], "layer_granularity": 2})
    assert [v.name for v in space.variables] == [
        f"models[0].{kind}[{label}][{g}]"
        for g in range(2)
        for label in ("mlp", "*")
        for kind in ("weight", "density")
    ]
    assert {(v.low, v.high, v.start) for v in space.variables} == {(0.0, 2.0, 1.0), (0.0, 1.0, 1.0)}
    assert {(v.low, v.high) for v in space_of(GENOMES["signed"]).variables} == {(-2.0, 2.0)}
    assert {(v.low, v.high) for v in space_of(GENOMES["slerp of two"]).variables} == {(0.0, 4.0)}


def test_random_starts_are_the_seeds() -> None:
    def starts(seed: int) -> dict[str, Any]:
        file = file_of(GENOMES["ties"], random_init=True, search={"seed": seed})
        return file.space(lambda model: N_LAYERS).starts()

    assert starts(1) == starts(1) != starts(2)
    assert len(set(starts(1).values())) == len(starts(1))
    assert all(0 <= float(value) < 1 for value in starts(1).values())


def test_slerp_names_every_model_though_a_recipe_has_two() -> None:
    space = space_of(GENOMES["slerp of three"])
    assert len(space.recipe(space.starts()).references()) == 2
    assert set(space.references()) == set(MODELS)


def test_a_base_that_no_merge_can_use_gives_config_and_tokenizer() -> None:
    """In mergekit every such merge fails."""
    slerp = space_of({**BASED, "merge_method": "slerp"})
    recipe = slerp.recipe(slerp.starts())
    assert recipe.base_model == BASE
    assert [source.model for source in (recipe.slices or ())[0].sources] == MODELS[:2]
    for smooth in (False, True):
        linear = space_of({**BASED, "merge_method": "linear", "smooth": smooth})
        recipe = linear.recipe(linear.starts())
        listed = recipe.models if smooth else (recipe.slices or ())[0].sources
        assert [m.parameters["weight"] for m in listed or ()] == [0.5, 0.5, 0.0]
        for space in (slerp, linear):
            assert len(space.notes) == 1
            assert "gives config and tokenizer" in space.notes[0]


# ---- the file ---------------------------------------------------------------------------------


def test_defaults_are_mergekits() -> None:
    file = file_of(GENOMES["linear"])
    search, scoring = file.search, file.scoring
    assert (search.sampler, search.n_iterations, search.seed, search.sigma0) == ("cma", 100, 0, 1 / 6)
    assert scoring.draw == "first"
    assert scoring.backend == "hf"
    assert scoring.limit is None
    assert scoring.num_fewshot is None
    assert scoring.apply_chat_template
    assert scoring.fewshot_as_multiturn
    assert [(t.name, t.metric, t.weight) for t in file.tasks] == [("qs_largest", "acc,none", 1.0)]


def test_every_key_has_its_place() -> None:
    file = SearchFile(
        {
            "genome": GENOMES["linear"],
            "tasks": [{"name": "qs_sort", "metric": "exact_match,none", "weight": -2}, "qs_largest"],
            "limit": 7,
            "num_fewshot": 3,
            "shuffle": True,
            "random_init": True,
            "apply_chat_template": False,
            "fewshot_as_multiturn": False,
            "search": {"n_iterations": 9},
        }
    )
    assert [task.weight for task in file.tasks] == [-2.0, 1.0]
    scoring = file.scoring
    assert (scoring.limit, scoring.num_fewshot, scoring.draw) == (7, 3, "shuffled")
    assert not scoring.apply_chat_template
    assert not scoring.fewshot_as_multiturn
    assert file.search.n_iterations == 9
    again = SearchFile(file.as_dict())
    assert again.as_dict() == file.as_dict()
    assert again.changed(tasks=["qs_reverse"]).tasks[-1].metric is None  # its first, not acc


def test_numbers_in_quotes_are_read_as_mergekit_reads_them() -> None:
    tasks = [{"name": "qs_sort", "weight": "-2"}]
    file = SearchFile({"genome": GENOMES["linear"], "limit": "7", "shuffle": "yes", "tasks": tasks})
    assert (file.scoring.limit, file.scoring.draw, file.tasks[0].weight) == (7, "shuffled", -2.0)


@pytest.mark.parametrize(
    ("genome", "top", "fault"),
    [
        ({"models": MODELS, "merge_method": "ties"}, {}, "genome.base_model is missing; ties needs it"),
        ({**BASED, "merge_method": "dare_linear"}, {}, "genome.merge_method is 'dare_linear'"),
        ({**BASED, "merge_method": "slerp", "smooth": True}, {}, "genome.smooth is true; slerp"),
        ({**BASED, "merge_method": "slerp", "filters": ["mlp"]}, {}, "genome.filters are given; slerp"),
        ({"models": MODELS[:1], "merge_method": "slerp"}, {}, "genome.models lists 1 model; slerp"),
        ({"models": [], "merge_method": "linear"}, {}, "genome.models is []"),
        ({"merge_method": "linear"}, {}, "genome.models is missing"),
        ({**BASED, "merge_method": "ties", "smoth": True}, {}, "did you mean 'smooth'?"),
        ({**BASED, "merge_method": "ties", "filters": ["a", "a"]}, {}, "names 'a' twice"),
        (GENOMES["ties"], {"limt": 3}, "limt: unknown key 'limt'; did you mean 'limit'?"),
        (GENOMES["ties"], {"limit": 0}, "limit is 0"),
        (
            GENOMES["ties"],
            {"limit": 3, "scoring": {"limit": 3}},
            "limit stands at the top and in scoring",
        ),
        (GENOMES["ties"], {"search": {"layer_granularity": 2}}, "genome has its own"),
        (GENOMES["ties"], {"tasks": ["output_tokens"]}, "only lm-eval tasks can be named"),
        (GENOMES["ties"], {"tasks": [{"name": "a", "direction": "maximize"}]}, "the sign of weight"),
        (GENOMES["ties"], {"merge_method": "ties"}, "unknown key 'merge_method'"),
    ],
)
def test_faults_are_named(genome: dict[str, Any], top: dict[str, Any], fault: str) -> None:
    with pytest.raises(SearchFileError) as error:
        file_of(genome, **top)
    assert len(error.value.faults) == 1
    assert fault in error.value.faults[0]


def test_faults_that_need_the_models() -> None:
    with pytest.raises(SearchFileError, match=r"does not divide the 4 layers .* use one of \[1, 2, 4\]"):
        space_of({**GENOMES["ties"], "layer_granularity": 3})


_STEMS = """mmlu hendrycks agieval gsm8k hellaswag winogrande arc arc_easy ai2_arc truthfulqa bigbench
piqa openbookqa leaderboard boolq x_mmlu GSM8K arcade""".split()  # noqa: SIM905


def test_benchmarks_are_those_that_mergekit_refuses() -> None:
    evo = pytest.importorskip("mergekit.evo.config")
    names = [f"{stem}{end}" for stem in _STEMS for end in ("", "_train", "_x", "_train_x")]

    def is_refused(name: str) -> bool:
        data = {"genome": GENOMES["linear"], "tasks": [name]}
        try:
            evo.check_for_naughty_config(evo.EvolMergeConfiguration.model_validate(data))
        except ValueError:
            return True
        return False

    assert benchmarks(names) == [name for name in names if is_refused(name)]
