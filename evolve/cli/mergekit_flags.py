"""mergekit-evolve's command-line flags, so that its commands run as `evolve run` too.

They are hidden from the help. A flag is taken for our option of the same meaning, changes a setting
of the search file, or has nothing to do here, and then a notice says why.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from evolve.errors import SearchFileError
from evolve.merge_progress import say

if TYPE_CHECKING:
    from evolve.search_file import SearchFile

CONSENT = "--i-understand-the-depths-of-the-evils-i-am-unleashing"


def _flag(*names: str, **settings: Any) -> Any:
    return typer.Option(*names, hidden=True, **settings)


@dataclass(frozen=True)
class MergekitFlags:
    """The flags as given; None where one is not, so that its absence is no choice."""

    max_fevals: Annotated[int | None, _flag("--max-fevals", min=1)] = None
    random_seed: Annotated[int | None, _flag("--random-seed", min=0)] = None
    num_gpus: Annotated[int | None, _flag("--num-gpus", min=1)] = None
    task_search_path: Annotated[list[str] | None, _flag("--task-search-path")] = None
    vllm: Annotated[bool | None, _flag("--vllm/--no-vllm")] = None
    timeout: Annotated[float | None, _flag("--timeout")] = None
    sigma0: Annotated[float | None, _flag("--sigma0")] = None
    force_population_size: Annotated[int | None, _flag("--force-population-size")] = None
    batch_size: Annotated[int | None, _flag("--batch-size", min=1)] = None
    save_final_model: Annotated[bool | None, _flag("--save-final-model/--no-save-final-model")] = None
    consent: Annotated[bool, _flag(CONSENT)] = False
    strategy: Annotated[Literal["pool", "buffered", "serial"] | None, _flag("--strategy", "-s")] = None
    in_memory: Annotated[bool | None, _flag("--in-memory/--no-in-memory")] = None
    merge_cuda: Annotated[bool | None, _flag("--merge-cuda/--no-merge-cuda")] = None
    reshard: Annotated[bool | None, _flag("--reshard/--no-reshard")] = None
    allow_crimes: Annotated[bool | None, _flag("--allow-crimes/--no-allow-crimes")] = None
    load_in_8bit: Annotated[bool | None, _flag("--load-in-8bit")] = None
    load_in_4bit: Annotated[bool | None, _flag("--load-in-4bit")] = None
    wandb: Annotated[bool | None, _flag("--wandb/--no-wandb")] = None
    wandb_project: Annotated[str | None, _flag("--wandb-project")] = None
    wandb_entity: Annotated[str | None, _flag("--wandb-entity")] = None

    def given(self) -> Iterator[tuple[str, Any]]:
        """Walk the flags that were given: field and value."""
        for each in fields(self):
            value = getattr(self, each.name)
            if value is not None and value is not False:
                yield each.name, value

    def notices(self) -> list[str]:
        """Say of each given flag that has nothing to do why that is."""
        return [
            f"notice: --{name.replace('_', '-')} has nothing to do: {_NOTHING_TO_DO[name]}"
            for name, _ in self.given()
            if name in _NOTHING_TO_DO
        ]

    def changed(self, search_file: SearchFile, backend: str | None) -> SearchFile:
        """Return the search file with the settings that flags change.

        Args:
            backend: the one of the command line.
        """
        scoring = {}
        if self.batch_size is not None and (backend or search_file.scoring.backend) == "vllm":
            say("notice: --batch-size has nothing to do: vLLM makes up its own batches")
        elif self.batch_size is not None:
            scoring["engine"] = {**search_file.scoring.engine, "batch_size": self.batch_size}
        search = {
            "timeout_s": self.timeout,
            "sigma0": self.sigma0,
            "population_size": self.force_population_size,
        }
        return search_file.changed(search=search, scoring=scoring)


# Flags that are options of ours by another name.
_SAME = {
    "max_fevals": "n_iterations",
    "random_seed": "seed",
    "num_gpus": "workers",
    "task_search_path": "task_path",
    "vllm": "backend",
}
_NOTHING_TO_DO = {
    "strategy": "each worker merges and scores candidate after candidate; --workers says how many",
    "in_memory": "candidates are always merged into the live model",
    "merge_cuda": "candidates are merged on the engine's device; name it with --device",
    "reshard": "weights are read where they lie, and best.yml names your own models",
    "allow_crimes": "the models of a search must be of one architecture",
    "load_in_8bit": "candidates are scored in the dtype in which they ship",
    "load_in_4bit": "candidates are scored in the dtype in which they ship",
    "wandb": "nothing leaves this machine; the record is in the search's folder, see evolve status",
    "wandb_project": "nothing leaves this machine; the record is in the search's folder",
    "wandb_entity": "nothing leaves this machine; the record is in the search's folder",
}


def with_mergekit_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command mergekit-evolve's flags beside its own options.

    Args:
        command: has a keyword argument `mergekit`, which gets the MergekitFlags.
    """
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.name != "mergekit"]
    defaults = {p.name: p.default for p in own}
    hints = get_type_hints(MergekitFlags, include_extras=True)
    added = [
        inspect.Parameter(
            each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=hints[each.name]
        )
        for each in fields(MergekitFlags)
    ]

    @wraps(command)
    def run(**options: Any) -> None:
        flags = MergekitFlags(**{each.name: options.pop(each.name) for each in fields(MergekitFlags)})
        for name, ours in _SAME.items():
            value = getattr(flags, name)
            if value is None or value == []:
                continue
            if options[ours] not in (defaults[ours], []):
                raise SearchFileError(
                    f"--{name.replace('_', '-')} and --{ours.replace('_', '-')} are both given and mean "
                    f"the same; leave one out"
                )
            options[ours] = ("vllm" if value else "hf") if name == "vllm" else value
        for notice in flags.notices():
            say(notice)
        command(**options, mergekit=flags)

    parameters = [*own, *added]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run
