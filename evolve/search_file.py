"""The search file: a merge recipe in which a value may be a range, plus tasks and settings.

Everything outside `tasks`, `search` and `scoring` is the recipe; `evolve.space` turns its ranges
into variables. This module reads and validates the rest. A file with `genome:` is a
mergekit-evolve file; `evolve.mergekit_file` puts it in these words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
)

from evolve.errors import SearchFileError
from evolve.genome import GenomeSpace
from evolve.mergekit_file import MergekitFile, in_our_words
from evolve.redaction import secret_faults
from evolve.space import LayerPathSpace, SearchSpace, Space
from merge_core.errors import RecipeError, nearest, schema_faults
from merge_core.moe.recipe import MoeRecipe
from merge_core.plan import origin
from merge_core.recipe import Recipe, load_yaml
from merge_core.recipe_yaml import dump_yaml

Signal = Literal["metric", "likelihood", "both"]
SECTIONS = ("tasks", "report_only", "search", "scoring")


class _Section(BaseModel):
    # Strict: true is no number, and "yes" in quotes is not true.
    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False, strict=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        """Take 1e3 for 1000 where a whole number is wanted."""
        return int(value) if isinstance(value, float) and value.is_integer() else value


def _or_fault(rule: str) -> WrapValidator:
    """Say in one line what a field takes that may be one of several kinds; pydantic has one for each."""

    def checked(value: Any, taken: ValidatorFunctionWrapHandler) -> Any:
        try:
            return taken(value)
        except ValidationError:
            raise ValueError(rule) from None

    return WrapValidator(checked)


class TaskSpec(_Section):
    """One objective: an lm-eval task or group by name, or one of the kinds in OBJECTIVES.

    `module:function` names a Python function of the user's.
    """

    name: str
    metric: str | None = None
    """`metric` or `metric,filter`; default: the task's first metric and first filter."""
    weight: float = Field(default=1.0, gt=0)
    """Share in the weighted sum; positive, the direction is the metric's own."""
    direction: Literal["maximize", "minimize"] | None = None
    """For functions, and for metrics that have no direction of their own."""
    text: str | None = None
    """Of `perplexity` and `kl_divergence`: a text file."""
    reference: str | None = None
    """Of `kl_divergence`: the model whose distributions a candidate is held against."""
    positions: int | None = Field(default=None, ge=1)
    """Of `kl_divergence`: next-token distributions a document."""

    is_signed: ClassVar[bool] = False
    """Whether the sign of `weight`, and not the metric, says what is better."""

    @property
    def kind(self) -> str:
        """A key of OBJECTIVES, "function", or "task" for what lm-eval knows."""
        if self.name in OBJECTIVES:
            return self.name
        return "function" if _FUNCTION.fullmatch(self.name) else "task"

    def faults(self, field: str) -> list[str]:
        """List keys that this kind of entry does not take, and those it needs.

        Args:
            field: where the entry stands: `tasks[0]`.
        """
        takes, needs = OBJECTIVES.get(self.name) or _OTHERS[self.kind]
        what = self.kind if self.kind in OBJECTIVES else f"a {self.kind}"
        given = [key for key in _EXTRA_KEYS if getattr(self, key) is not None]
        faults = [
            f"{field}.{key} is {getattr(self, key)!r}; {what} takes no {key}, remove it"
            for key in given
            if key not in takes
        ]
        return faults + [
            f"{field}.{key} is missing; {what} needs it, write {key}: {_EXAMPLES[key]}"
            for key in needs
            if key not in given
        ]

    def as_config(self) -> dict[str, Any]:
        """Return the entry as plain data; of the keys that few entries take, those given."""
        return {
            key: value
            for key, value in self.model_dump(mode="json").items()
            if value is not None or key == "metric"
        }


class SignedTaskSpec(TaskSpec):
    """An entry of a mergekit-evolve file: weight * value is added as written."""

    model_config = ConfigDict(strict=False)  # as mergekit-evolve reads it

    metric: str | None = "acc,none"
    weight: float = 1.0

    is_signed: ClassVar[bool] = True

    def faults(self, field: str) -> list[str]:
        """List what such a file cannot name."""
        if self.kind != "task":
            return [
                f"{field}.name is {self.name!r}; beside genome: only lm-eval tasks can be named, write a "
                f"search file with ranges for other objectives"
            ]
        if self.direction is not None:
            return [f"{field}.direction is {self.direction!r}; the sign of weight says it, remove it"]
        return super().faults(field)


# What is no lm-eval task: for each kind the keys it takes and those it cannot do without.
OBJECTIVES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "output_tokens": (("direction",), ()),
    "seconds_per_document": (("direction",), ()),
    "perplexity": (("direction", "metric", "text"), ("text",)),
    "kl_divergence": (("direction", "text", "reference", "positions"), ("text", "reference")),
}
_OTHERS = {
    "task": (("metric", "direction"), ()),
    "function": (("direction",), ("direction",)),
}
_EXTRA_KEYS = ("metric", "direction", "text", "reference", "positions")
_EXAMPLES = {
    "text": "FILE",
    "reference": "MODEL",
    "direction": "maximize or minimize, in the search file",
}
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class Constraint(_Section):
    """What a candidate must keep: on `task` its score is at most `by` worse than `not_below`.

    Where less is better, "below" means above.
    """

    task: str
    """A score's key: an entry of `tasks:`."""
    not_below: Annotated[Literal["base"] | float, _or_fault("it must be base, or a score such as 0.5")]
    """`base`, for what the base model scores on the same documents, or a score."""
    by: float = Field(default=0.0, ge=0)

    def __str__(self) -> str:
        return f"{self.task} not below {self.not_below}" + (f" by {self.by:g}" if self.by else "")


class SearchSettings(_Section):
    """How candidates are proposed, and how many."""

    sampler: Literal["auto", "cma", "tpe", "gp", "nsga2", "nsga3", "qmc", "random", "greedy_soup"] = (
        "auto"
    )
    objective: Literal["weighted_sum", "pareto"] = "weighted_sum"
    n_iterations: int = Field(default=100, ge=1)
    """Candidates in all, a hard limit."""
    seed: int = Field(default=0, ge=0)
    layer_granularity: int = Field(default=0, ge=0)
    """Layers a group; 0 = off."""
    sigma0: float | None = Field(default=None, gt=0, le=1)
    """Of cma: the first standard deviation, as a share of each range; null = the sampler's own."""
    population_size: int | None = Field(default=None, ge=2)
    """Of cma: candidates a generation; null = the sampler's own."""
    racing: Literal["auto", "always", "none"] = "auto"
    """Whether candidates are asked blocks of documents first; `auto`: where it saves most of them."""
    signal: Literal["auto", "metric", "likelihood", "both"] = "metric"
    """What the sampler follows; the verdict is on the tasks' own metrics."""
    rounds: int = Field(default=1, ge=1)
    """Rounds of search; each next one merges the best merges of the one before as well."""
    polish: Annotated[
        Literal["auto"] | Annotated[int, Field(ge=0)],
        _or_fault("it must be auto, or a whole number of candidates, 0 for none"),
    ] = "auto"
    """Of the candidates, how many at the end are drawn around the best; see resolve_polish."""
    seed_recipes: list[str] = Field(default_factory=list)
    """Recipe files that are tried first, beside what is known: each model alone, the average."""
    timeout_s: float | None = Field(default=None, gt=0)
    """No candidate is begun that would end after so many seconds, counted over all runs."""
    max_documents: int | None = Field(default=None, ge=1)
    """Documents that candidates may be asked in all, finals included."""
    max_gpu_hours: float | None = Field(default=None, gt=0)
    """No candidate is begun that would end after so many GPU hours, counted over all runs."""
    adapters_at_once: Annotated[
        Literal["none", "auto"] | Annotated[int, Field(ge=1)],
        _or_fault("it must be none, auto, or a whole number of candidates, at least 1"),
    ] = "none"
    """How many candidates one vLLM engine serves at once, as adapters of their base; none = it merges."""
    candidate_timeout_s: float | None = Field(default=None, gt=0)
    """How long a candidate may take, merge, load and score; longer ones are stopped, and tried again."""
    max_failed_share: float = Field(default=0.5, gt=0, le=1)
    """Stop when more than this share of the candidates failed (after the first five)."""
    constraints: list[Constraint] = Field(default_factory=list)

    @property
    def followed(self) -> Signal:
        """The signal that the sampler follows, once `auto` is resolved."""
        assert self.signal != "auto", "resolve_signal comes first"
        return self.signal

    @property
    def n_polish(self) -> int:
        """How many candidates at the end are drawn around the best, once `auto` is resolved."""
        assert self.polish != "auto", "resolve_polish comes first"
        return self.polish

    @property
    def n_adapters(self) -> int:
        """How many candidates are served at once as adapters, once `auto` is resolved; 0 = none."""
        return self.adapters_at_once if isinstance(self.adapters_at_once, int) else 0


class ScoringSettings(_Section):
    """Which documents score a candidate, with which engine."""

    backend: Literal["auto", "hf", "vllm"] = "auto"
    limit: int | None = Field(default=200, ge=1)
    """Search documents a task, drawn by seed; null = all."""
    holdout: float = Field(default=0.5, ge=0)
    """Documents a task kept for the verdict: below 1 a share, else a count."""
    draw: Literal["seeded", "first", "shuffled"] = "seeded"
    """`first`: of each lm-eval task the first `limit` documents are searched on, as in lm-eval, and
    the holdout comes from those after them; `shuffled`: likewise, in an order drawn by seed."""
    split: Literal["test", "validation", "train"] = "test"
    """Which documents are preferred, search and holdout, where a task has them; `test`: lm-eval's own."""
    num_fewshot: int | None = Field(default=None, ge=0)
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = True
    """Whether, with a chat template, few-shot examples are turns of a conversation."""
    system_instruction: str | None = None
    """Stands before every prompt, as lm-eval's option of that name."""
    task_paths: list[str] = Field(default_factory=lambda: ["tasks"])
    engine: dict[str, Any] = Field(default_factory=dict)
    """Passed to the engine as it is."""

    @field_validator("holdout")
    @classmethod
    def _share_or_count(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError("below 1 it is a share, from 1 on a whole number of documents")
        return value


class _Settings(_Section):
    tasks: Sequence[TaskSpec] = Field(default_factory=list)
    report_only: Sequence[TaskSpec] = Field(default_factory=list)
    search: SearchSettings = Field(default_factory=SearchSettings)
    scoring: ScoringSettings = Field(default_factory=ScoringSettings)

    @field_validator("tasks", "report_only", mode="before")
    @classmethod
    def _plain_names(cls, value: Any) -> Any:
        if value is None:
            return []
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ValueError("it must be a list of names and entries, such as [gsm8k]")
        return [{"name": item} if isinstance(item, str) else item for item in value]

    @field_validator("search", "scoring", mode="before")
    @classmethod
    def _empty_section(cls, value: Any) -> Any:
        return {} if value is None else value


class _MergekitSettings(_Settings):
    tasks: Sequence[SignedTaskSpec] = Field(default_factory=list)
    report_only: Sequence[SignedTaskSpec] = Field(default_factory=list)


def _autos(section: SearchSettings | ScoringSettings) -> list[str]:
    return [key for key, value in section if value == "auto"]


_KNOWN_KEYS = {
    "": _Settings.model_fields,
    "tasks": TaskSpec.model_fields,
    "report_only": TaskSpec.model_fields,
    "search.constraints": Constraint.model_fields,
    "search": SearchSettings.model_fields,
    "scoring": ScoringSettings.model_fields,
}


def _recipe_keys(data: Mapping[str, Any]) -> Iterable[str]:
    """Return the keys that a file of this kind may have outside the sections."""
    if "genome" in data:
        return MergekitFile.model_fields
    if "experts" in data:
        return MoeRecipe.own_keys()
    return {*Recipe.model_fields, "layer_path"}


def _repeated(settings: _Settings) -> list[str]:
    """List what `report_only` has of `tasks`."""
    searched = [(task.name, task.text, task.reference) for task in settings.tasks]
    return [
        f"report_only[{i}].name is {task.name!r}, which stands under tasks and is reported anyway; "
        f"remove it from one of them"
        for i, task in enumerate(settings.report_only)
        if (task.name, task.text, task.reference) in searched
    ]


class SearchFile:
    """A parsed search file.

    Attributes:
        template: the recipe as written, ranges included; of a mergekit-evolve file the genome.
        tasks: TaskSpecs, in order.
        report_only: TaskSpecs that only winner and baselines are scored on.
        search: SearchSettings.
        scoring: ScoringSettings.
        is_mergekit: whether it is a mergekit-evolve file.
        name: what the search is called: the file's stem.
    """

    def __init__(self, data: Mapping[str, Any], name: str = "search") -> None:
        self.name = name
        faults = secret_faults(data)
        self.is_mergekit = "genome" in data
        if self.is_mergekit:
            data = in_our_words(data, faults)
        self.template = {key: value for key, value in data.items() if key not in SECTIONS}
        known = {*_recipe_keys(data), *SECTIONS}
        faults += [
            f"{key}: unknown key {key!r}; {nearest(str(key), known)}"
            for key in self.template
            if key not in known
        ]
        # Slices may have methods of their own; experts and paths need none.
        bodies = {"merge_method", "slices", "modules", "experts", "layer_path"}
        if not self.is_mergekit and not bodies & set(data):
            faults.append("merge_method is missing; it is required, add it")
        schema = _MergekitSettings if self.is_mergekit else _Settings
        try:
            settings = schema.model_validate({k: data[k] for k in SECTIONS if k in data})
        except ValidationError as error:
            faults += schema_faults(error, _KNOWN_KEYS)
        else:
            faults += [
                fault
                for section in ("tasks", "report_only")
                for i, spec in enumerate(getattr(settings, section))
                for fault in spec.faults(f"{section}[{i}]")
            ]
            faults += _repeated(settings)
        if faults:
            raise SearchFileError(faults)
        self.tasks = settings.tasks
        self.report_only = settings.report_only
        self.search = settings.search
        self.scoring = settings.scoring

    @classmethod
    def load(cls, path: str | Path) -> SearchFile:
        """Read a search file.

        Raises:
            SearchFileError: with every fault found.
        """
        try:
            data = load_yaml(path)
        except RecipeError as error:
            raise SearchFileError(error.faults) from None
        if not isinstance(data, Mapping):
            raise SearchFileError(f"{path} holds {data!r:.60}; it must be a mapping with `merge_method:`")
        return cls(data, Path(path).stem)

    def changed(
        self,
        *,
        tasks: Sequence[str] = (),
        search: Mapping[str, Any] | None = None,
        scoring: Mapping[str, Any] | None = None,
    ) -> SearchFile:
        """Return a copy with command-line options applied; None values change nothing.

        `tasks` are added to the file's; one that is there already is not added twice.
        """
        data = self.as_dict()
        named = {task.name for task in self.tasks}
        data["tasks"] += [
            {"name": name, "metric": None} for name in dict.fromkeys(tasks) if name not in named
        ]
        for section, options in (("search", search), ("scoring", scoring)):
            data[section] |= {k: v for k, v in (options or {}).items() if v is not None}
        return SearchFile(data, self.name)

    def space(self, n_layers: Callable[[str], int]) -> SearchSpace:
        """Return the space that the file spans.

        Args:
            n_layers: gives a model's number of layers; called only where groups of layers are wanted.

        Raises:
            SearchFileError: with every fault of the ranges and of the recipes they span.
        """

        if self.is_mergekit:
            file = MergekitFile.model_validate(self.template)
            return GenomeSpace(file.genome, n_layers, self.search.seed if file.random_init else None)

        if "layer_path" in self.template:
            if self.search.layer_granularity:
                raise SearchFileError(
                    f"search.layer_granularity is {self.search.layer_granularity}; beside layer_path "
                    f"write layer_path.group"
                )
            return LayerPathSpace(self.template, n_layers)

        def of_the_merge() -> int:
            plain = Space(self.template)
            return n_layers(origin(plain.recipe(plain.starts())))

        return Space(self.template, self.search.layer_granularity, of_the_merge)

    def settled(self, earlier: SearchFile) -> SearchFile:
        """Return a copy whose `auto` settings mean what they meant when the search began.

        `auto` depends on the number of candidates and on the machine; a search that goes on does not
        change for either.

        Args:
            earlier: the resolved file of the same search.
        """
        return self.changed(
            search={key: getattr(earlier.search, key) for key in _autos(self.search)},
            scoring={key: getattr(earlier.scoring, key) for key in _autos(self.scoring)},
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the whole file as plain data, defaults spelled out."""
        return {
            **self.template,
            "tasks": [task.as_config() for task in self.tasks],
            **({"report_only": [t.as_config() for t in self.report_only]} if self.report_only else {}),
            "search": self.search.model_dump(mode="json"),
            "scoring": self.scoring.model_dump(mode="json"),
        }

    def to_yaml(self) -> str:
        """Return the resolved file as YAML text."""
        return dump_yaml(self.as_dict())
