"""Names to lm-eval tasks: from `task_paths` first, then from lm-eval's own."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import json
import logging
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from evolve.errors import SearchFileError
from evolve.search_file import ScoringSettings
from evolve.tasks.asked import ask_on
from evolve.tasks.catalogue import Catalogue, members_of, parsing_only
from merge_core.errors import HubUnreachableError, nearest

# Those that simple_evaluate sets before it loads tasks: some shuffle their options when loaded.
_PYTHON_SEED, _NUMPY_SEED = 0, 1234


@dataclass(frozen=True)
class Loaded:
    """What a name stands for.

    Attributes:
        leaves: its tasks.
        group: the group, if it is one.
        public: names of the leaves whose documents others are measured on: lm-eval's own tasks, on
            the split that lm-eval takes.
    """

    leaves: tuple[Any, ...]
    group: Any = None
    public: frozenset[str] = frozenset()


def load_tasks(
    places: Mapping[str, str], scoring: ScoringSettings, allow_unsafe_code: bool, faults: list[str]
) -> dict[str, Loaded]:
    """Load tasks by name.

    Args:
        places: by name the entry where it stands first: `tasks[0]`.
        faults: gets a line for each name that cannot be loaded.

    Raises:
        HubUnreachableError: a task's data set cannot be fetched.
    """
    quiet_lm_eval()
    compile_templates_once()
    from lm_eval.tasks import TaskManager

    paths = [Path(path) for path in scoring.task_paths]
    if scoring.task_paths != ScoringSettings().task_paths:
        faults += [
            f"scoring.task_paths: {path} is no folder; name a folder of task files, or remove it"
            for path in paths
            if not path.is_dir()
        ]
    paths = [path.resolve() for path in paths if path.is_dir()]
    manager = TaskManager(include_path=paths, include_defaults=False)
    known: Iterable[str] = manager.all_tasks
    missing = [name for name in places if name not in known]
    if missing or _reach_beyond(manager, places):
        catalogue = Catalogue()
        # Groups of the user's own may have members among lm-eval's tasks.
        files = catalogue.files([*places, *_reach_beyond(manager, places)])
        known = {*known, *catalogue.names()}
        with parsing_only(files, catalogue.root):
            manager = TaskManager(include_path=paths, include_defaults=True)
    loaded: dict[str, Loaded] = {}
    with _one_look_at_a_data_set():
        for name, entry in places.items():
            try:
                loaded[name] = _load(f"{entry}.name", name, manager, known, scoring)
                _refuse(f"{entry}.name", name, loaded[name], allow_unsafe_code)
            except SearchFileError as error:
                loaded.pop(name, None)
                faults += error.faults
    return loaded


def _load(field: str, name: str, manager: Any, known: Iterable[str], scoring: ScoringSettings) -> Loaded:
    if name not in known or name not in manager.all_tasks:
        folders = ", ".join(str(path) for path in scoring.task_paths)
        raise SearchFileError(
            f"{field} is {name!r}; neither lm-eval nor the task paths ({folders}) have such a task; "
            f"{_near_task(name, known)}"
        )
    if name in manager.all_tags:
        raise SearchFileError(f"{field} is {name!r}, a tag of several tasks; name its tasks or a group")
    try:
        with _lm_evals_seeds():
            tasks = manager.load([name])
    except Exception as error:
        _raise_if_unreachable(name, error)
        raise SearchFileError(
            f"{field} is {name!r}, which lm-eval cannot load: {type(error).__name__}: "
            f"{error!s:.300}; correct the task's file or its data"
        ) from error
    group = tasks.get("groups", {}).get(name)
    leaves = tuple(group.get_all_tasks() if group else tasks["tasks"].values())
    public = set()
    for task in leaves:
        _set_fewshot(task, scoring.num_fewshot)
        entry = manager.task_index.get(task.task_name) or manager.task_index[name]
        if not ask_on(task, scoring.split) and _is_lm_evals_own(entry):
            public.add(task.task_name)
    return Loaded(leaves, group, frozenset(public))


def _is_lm_evals_own(entry: Any) -> bool:
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).resolve().parent
    return entry.yaml_path is not None and folder in Path(entry.yaml_path).resolve().parents


def _refuse(field: str, name: str, loaded: Loaded, allow_unsafe_code: bool) -> None:
    """Refuse tasks that cannot or may not be run here."""
    if any(getattr(task, "UNSAFE_CODE", False) for task in loaded.leaves) and not allow_unsafe_code:
        raise SearchFileError(
            f"{field} is {name!r}, which executes code that the model writes; add --allow-unsafe-code "
            f"if that is what you want"
        )
    if any(getattr(task, "MULTIMODAL", False) for task in loaded.leaves):
        raise SearchFileError(
            f"{field} is {name!r}, which asks about images or sounds; name a task of texts alone"
        )


@contextmanager
def _one_look_at_a_data_set() -> Iterator[None]:
    """Let `datasets` look up a data set once, not once for each of its configurations.

    mmlu has 57 in one data set; the look-up asks the Hub six questions and parses the card, and
    does not depend on the configuration.
    """
    import datasets.load

    look_up = datasets.load.dataset_module_factory
    found: dict[str, Any] = {}

    def remembered(*args: Any, **kwargs: Any) -> Any:
        key = repr((args, sorted(kwargs.items())))
        if key not in found:
            found[key] = look_up(*args, **kwargs)
        return copy.deepcopy(found[key])  # its users take parts out of it

    datasets.load.dataset_module_factory = remembered
    try:
        yield
    finally:
        datasets.load.dataset_module_factory = look_up


@contextmanager
def _lm_evals_seeds() -> Iterator[None]:
    """Load under the global seeds of simple_evaluate, and leave the global generators as they were."""
    import numpy as np

    states = random.getstate(), np.random.get_state()
    random.seed(_PYTHON_SEED)
    np.random.seed(_NUMPY_SEED)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _reach_beyond(manager: Any, names: Iterable[str]) -> set[str]:
    """Name the members of groups that the manager does not know."""
    found: set[str] = set()
    wanted, seen = list(names), set(names)
    while wanted:
        entry = manager.task_index.get(wanted.pop())
        members = set(members_of(entry.cfg)) if entry and entry.kind.name == "GROUP" else set()
        wanted += members - seen
        seen |= members
        found |= {member for member in members if member not in manager.task_index}
    return found


def _near_task(name: str, known: Iterable[str]) -> str:
    close = nearest(name, known)
    return (
        close if close.startswith("did you mean") else "correct the name or add its folder to task_paths"
    )


def _raise_if_unreachable(name: str, error: Exception) -> None:
    """Tell a data set that cannot be fetched from a task that is wrong."""
    from datasets.exceptions import DatasetNotFoundError

    unreachable = isinstance(error, ConnectionError | TimeoutError) or "offline" in str(error).lower()
    if unreachable and not isinstance(error, DatasetNotFoundError | FileNotFoundError):
        raise HubUnreachableError(
            f"task {name}: its data set could not be fetched ({error!s:.200}); try again with a "
            f"connection to the Hub, or use a task with local data"
        ) from error


def _set_fewshot(task: Any, num_fewshot: int | None) -> None:
    """Set the number of shots as lm-eval does: a task that declares 0 keeps 0; none means 0."""
    declared = task.get_config("num_fewshot")
    if num_fewshot is not None and declared != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif declared is None:
        task.set_config(key="num_fewshot", value=0)


def compile_templates_once() -> None:
    """Let lm-eval keep compiled templates; else each is compiled for each document, at each scoring.

    For arc_easy that was 2 ms a document and candidate.
    """
    from lm_eval.utils import env

    if not hasattr(env.from_string, "cache_info"):
        env.from_string = lru_cache(maxsize=4096)(env.from_string)


def quiet_lm_eval() -> None:
    """Silence lm-eval's progress bars and notices: the search has its own."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def task_fingerprint(task: Any) -> str:
    """Fingerprint what a task's file says, what its local data files hold, and its functions' files.

    Where the files lie does not count; data sets of the Hub go by their name.
    """
    config = task.config.to_dict(keep_callable=True)
    config.pop("metadata", None)
    # Data are looked for where lm-eval is started, and beside the function that reads them.
    folders = [Path()]
    if (file := _source_of(config.get("custom_dataset"))) is not None:
        folders.append(file.parent)
    config["dataset_kwargs"] = _with_contents(config.get("dataset_kwargs"), folders)
    text = json.dumps(config, sort_keys=True, default=_spelled)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _with_contents(value: Any, folders: Sequence[Path]) -> Any:
    """Put in place of each name of a file what the file holds, as a digest."""
    if isinstance(value, Mapping):
        return {key: _with_contents(part, folders) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_with_contents(part, folders) for part in value]
    if isinstance(value, str):
        with contextlib.suppress(OSError, ValueError):  # no path at all
            for file in (folder / value for folder in folders):
                if file.is_file():
                    return hashlib.sha256(file.read_bytes()).hexdigest()
    return value


def _source_of(function: Any) -> Path | None:
    """Return the file that a function of the user's stands in; None for those of libraries."""
    try:
        file = Path(inspect.getsourcefile(function) or "")
    except TypeError:
        return None
    return file if file.is_file() and "site-packages" not in file.parts else None


def _spelled(value: Any) -> str:
    """Spell a function by its file or, in a library, its source; what else is no data by its kind."""
    if (file := _source_of(value)) is not None:
        return file.read_text(encoding="utf-8", errors="replace")
    try:
        return inspect.getsource(value)
    except (TypeError, OSError):
        return type(value).__qualname__
