"""The model card: README.md of a merged model, which the Hub and its readers understand.

The front matter names models by Hub id only: a local folder means nothing to others.
"""

from __future__ import annotations

import itertools
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from merge_core.checkpoint.locate import locate, split_adapter
from merge_core.methods import METHODS
from merge_core.moe.recipe import MoeRecipe
from merge_core.plan import MergePlan, Sources, origin
from merge_core.recipe import Recipe
from merge_core.reference import result_in

# Begins a line at a recipe's head, a comment there, that the card shows to its readers.
NOTICE = "notice: "
_VERSIONS = ("evolve-merge", "torch", "safetensors")
_LICENSE_KEYS = ("license", "license_name", "license_link")
_MIXTURES = "https://github.com/arcee-ai/mergekit/blob/main/docs/moe.md"
# How many tensors that were left out are named; the rest is counted.
_SHOWN = 4


class Score(NamedTuple):
    """A task's score, with its interval where one is known."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.3f}"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Evaluation:
    """What is known of a merge's quality.

    Attributes:
        origin: a sentence on where the recipe comes from.
        split: which documents were scored: "holdout", those that no candidate was chosen by, or
            "search".
        rows: scores by task, of this model first, then of what it is held against.
        metrics, documents: per task what its score is, and how its documents were split.
        verdict: a sentence on what was gained, where one was reached.
    """

    origin: str
    split: str
    rows: Mapping[str, Mapping[str, Score]]
    metrics: Mapping[str, str]
    documents: Mapping[str, str]
    verdict: str | None = None

    def section(self) -> str:
        """Return it as the card's section."""
        tasks = list(next(iter(self.rows.values())))
        if not tasks:
            return f"{self.origin} Its scores were estimated from a part of the documents."
        lines = [f"{self.origin} Scores on the {self.split} documents, with 95% intervals:", ""]
        if self.split == "search":
            lines[0] = f"{self.origin} Scores on the very documents that it was chosen by:"
        lines.append("| | " + " | ".join(tasks) + " |")
        lines.append("|---" * (len(tasks) + 1) + "|")
        for name, scores in self.rows.items():
            cells = [str(scores[task]) if task in scores else "" for task in tasks]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        if self.verdict:
            lines += ["", f"{self.verdict[:1].upper()}{self.verdict[1:]}."]
        lines.append("")
        for task in tasks:
            said = [self.metrics.get(task), self.documents.get(task)]
            lines.append(f"* {task}: " + "; ".join(text for text in said if text))
        return "\n".join(lines)

    def index(self, name: str) -> list[dict[str, Any]]:
        """Return it as the Hub's `model-index`: this model's scores, machine-readable, if any."""
        results = [
            {
                "task": {"type": "text-generation"},
                "dataset": {"type": task, "name": f"{task} ({self.split} documents)"},
                "metrics": [{"type": self.metrics.get(task, "score"), "value": score.value}],
            }
            for task, score in next(iter(self.rows.values())).items()
        ]
        return [{"name": name, "results": results}] if results else []


def model_card(
    recipe: Recipe,
    sources: Sources,
    plan: MergePlan,
    title: str,
    recipe_text: str,
    evaluation: Evaluation | None = None,
) -> str:
    """Write the card of a merged model.

    Args:
        recipe: what was merged.
        sources: its models, open.
        plan: the recipe's output tensors.
        title: what to call the model.
        recipe_text: the recipe as it was given; notices at its head stand at the card's.
        evaluation: what it scored, where that is known.

    Returns:
        Markdown with a YAML front matter.
    """
    references = recipe.references()
    stated = {name: _license(folder, name) for name, folder in _folders(recipe, sources).items()}
    named = (*references, *recipe.adapters())
    ids = dict.fromkeys(name for reference in named for name in hub_ids(reference))
    front = {
        **({"base_model": list(ids)} if ids else {}),
        "library_name": "transformers",
        "tags": ["mergekit", "merge", *(["moe"] if _mixtures(recipe) else [])],
        **_merged_license(stated),
        **({"model-index": index} if evaluation and (index := evaluation.index(title)) else {}),
    }
    fence = "```" if "```" not in recipe_text else "~~~~~~"
    sections = [
        f"# {title}",
        f"A merge of {len(references)} pre-trained language models, made with evolve.",
        *(f"> {notice}" for notice in head_notices(recipe_text)),
        f"## Method\n\n{_method(recipe, plan)}",
        "## Models\n\n" + "\n".join(f"* {_linked(reference)}" for reference in named),
        *([f"## Evaluation\n\n{evaluation.section()}"] if evaluation else []),
        f"## Recipe\n\n{fence}yaml\n{recipe_text.rstrip()}\n{fence}",
        "## Licence\n\n" + _license_text(stated),
        "## What was left out\n\n" + "\n".join(f"* {line}" for line in _left_out(recipe, sources, plan)),
        f"## Versions\n\n{_versions()}",
    ]
    header = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    return f"---\n{header}---\n\n" + "\n\n".join(sections) + "\n"


def _method(recipe: Recipe, plan: MergePlan) -> str:
    mixtures = {name: _of_mixture(made, recipe) for name, made in _mixtures(recipe).items()}
    if isinstance(recipe, MoeRecipe):
        return f"A {mixtures['']}"
    methods = [METHODS[name] for name in plan.methods()]
    names = ", ".join(f"[{m.name}]({m.source})" if m.source else m.name for m in methods)
    base = f" with {_linked(recipe.base_model, recipe)} as base." if recipe.base_model else "."
    return names + base + "".join(f" `{name}` is a {text}" for name, text in mixtures.items())


def _mixtures(recipe: Recipe) -> dict[str, MoeRecipe]:
    """Return what is made of experts, by its name; the recipe's own result has none."""
    documents = {**recipe.results(), "": recipe}
    return {name: made for name, made in documents.items() if isinstance(made, MoeRecipe)}


def _of_mixture(made: MoeRecipe, recipe: Recipe) -> str:
    """Say what one mixture among a recipe's documents is."""
    shared = f" and {len(made.shared_experts)} shared" if made.shared_experts else ""
    return (
        f"[mixture]({_MIXTURES}) of {len(made.experts)} experts{shared}, of which a token "
        f"reaches {made.experts_per_token}. The experts are the models' MLPs; all else is from "
        f"{_linked(str(made.base_model), recipe)}. The router's gates are {made.gate_mode}."
    )


def head_notices(recipe_text: str) -> list[str]:
    """List the notices in a recipe file's head, its comments before the first key."""
    head = itertools.takewhile(lambda line: line.startswith("#"), recipe_text.splitlines())
    comments = (line.lstrip("#").strip() for line in head)
    return [comment.removeprefix(NOTICE) for comment in comments if comment.startswith(NOTICE)]


def hub_ids(reference: str) -> list[str]:
    """List the Hub repositories that a reference (`model[@revision][+adapter]`) names, if any."""
    if Path(reference).expanduser().is_dir():
        return []
    parts = [part for part in reference.split("+") if not Path(part).expanduser().is_dir()]
    return [part.partition("@")[0] for part in parts]


def _linked(reference: str, recipe: Recipe | None = None) -> str:
    is_result = recipe is not None and result_in(reference, recipe.intermediate) is not None
    ids = [] if is_result else hub_ids(reference)
    return f"[{reference}](https://huggingface.co/{ids[0]})" if ids else f"`{reference}`"


def _folders(recipe: Recipe, sources: Sources) -> dict[str, Path]:
    """Return where each model and each adapter lies, by its name alone; a card is in there or nowhere."""
    models, adapters = {}, recipe.adapters()
    for reference in recipe.references():
        model, adapter = split_adapter(reference)
        models[model] = sources.architecture(reference).checkpoint.folder
        adapters += [adapter] if adapter else []
    return models | {adapter: locate(adapter, is_adapter=True) for adapter in adapters}


def _license(folder: Path, reference: str) -> dict[str, str]:
    """Read what a model's or adapter's own card says of its licence: the license keys that it has."""
    front = _front_matter(folder, reference)
    found = {key: front[key] for key in _LICENSE_KEYS if front.get(key)}
    if isinstance(found.get("license"), list):
        found["license"] = ", ".join(map(str, found["license"]))
    return {key: str(value) for key, value in found.items()} if "license" in found else {}


def _front_matter(folder: Path, reference: str) -> Mapping[str, Any]:
    path: Path | None = folder / "README.md"
    if not (folder / "README.md").is_file():
        path = _downloaded_card(reference)
    if path is None:
        return {}
    start, _, rest = path.read_text(encoding="utf-8", errors="replace").lstrip("\ufeff").partition("\n")
    head, end, _ = rest.partition("\n---")
    if start.strip() != "---" or not end:
        return {}
    try:
        front = yaml.safe_load(head)
    except yaml.YAMLError:
        return {}
    return front if isinstance(front, dict) else {}


def _downloaded_card(reference: str) -> Path | None:
    """Fetch the card of a model or adapter of the Hub; a merge needs none, so no failure is told."""
    ids = hub_ids(reference)
    if not ids:
        return None
    from huggingface_hub import hf_hub_download

    revision = reference.partition("@")[2] or None
    try:
        return Path(hf_hub_download(ids[0], "README.md", revision=revision))
    except Exception:
        return None


def _merged_license(stated: Mapping[str, Mapping[str, str]]) -> Mapping[str, str]:
    """Return the license keys of the merge: those all agree on, else `other`, or none at all."""
    given = [found for found in stated.values() if found]
    if not given:
        return {}
    return given[0] if all(found == given[0] for found in given) else {"license": "other"}


def _license_text(stated: Mapping[str, Mapping[str, str]]) -> str:
    names = {
        reference: found.get("license_name", found["license"]) if found else "none stated"
        for reference, found in stated.items()
    }
    if not any(stated.values()):
        return "The models' cards state none."
    if len(set(names.values())) == 1:
        return f"All models state {next(iter(names.values()))}."
    each = "; ".join(f"{_linked(reference)}: {name}" for reference, name in names.items())
    return f"The models state different things, each of which holds for its part: {each}."


def _left_out(recipe: Recipe, sources: Sources, plan: MergePlan) -> list[str]:
    """Say what of the sources is not in the merge, one line each."""
    used = plan.read()
    lines = []
    documents = (recipe, *recipe.results().values())
    views = [(document.inputs(), sources.within(document)) for document in documents]
    for reference in recipe.references():
        seen = [view.architecture(reference) for inputs, view in views if reference in inputs]
        tensors = dict.fromkeys(name for model in seen for name in model.checkpoint.tensors)
        unused = [name for name in tensors if (reference, name) not in used]
        if unused:
            more = f" and {len(unused) - _SHOWN} more" if len(unused) > _SHOWN else ""
            shown = ", ".join(f"`{name}`" for name in unused[:_SHOWN])
            lines.append(f"{len(unused)} tensors of {_linked(reference)}: {shown}{more}")
    lines += [f"ignored: {warning}" for warning in recipe.check()[1]]
    if len(recipe.references()) > 1:
        kept = "config" if recipe.vocabulary() else "config and tokenizer"
        lines.append(f"{kept} of every model but {_linked(origin(recipe))}")
    return lines or ["nothing"]


def _versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for name in _VERSIONS:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:  # run from a folder that was not installed
            continue
    return ", ".join(found) + "."
