"""Candidates as adapters, without an engine: what can be served, and generations in step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from evolve import session
from evolve.automatic import ADAPTERS, resolve_adapters
from evolve.errors import PausedError, SearchFileError
from evolve.loop import run
from evolve.memory import Memory
from evolve.plan import Plan
from evolve.search_file import SearchFile
from evolve.study import Study
from evolve.workers import Pool
from evolve.workers.start import Workers, start_pool
from evolve.workers.worker import Job, Result
from merge_core.plan import Sources

from ..merge_core.adapters import saved_adapter

pytest.importorskip("peft", reason="PEFT writes the adapters")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, llama_builder: Callable[..., Any]) -> Path:
    folder = tmp_path_factory.mktemp("adapted")
    for seed, name in enumerate(("one", "two")):
        base = llama_builder()
        base.save_pretrained(folder / "base")
        saved_adapter(base, folder / name, seed, target_modules=["q_proj", "down_proj"])
    return folder


def search(models: Path, at_once: Any = 4, method: str = "linear", **sections: Any) -> SearchFile:
    entries = [
        {"model": f"{models}/base+{models}/{name}", "parameters": {"weight": {"low": 0.0, "high": 1.0}}}
        for name in ("one", "two")
    ]
    scoring = {"backend": "vllm", **sections.pop("scoring", {})}
    settings = {"adapters_at_once": at_once, **sections.pop("search", {})}
    return SearchFile(
        {
            "merge_method": method,
            "base_model": f"{models}/base",
            "models": entries,
            "tasks": ["qs_sort"],
            "search": settings,
            "scoring": scoring,
            **sections,
        }
    )


def resolved(file: SearchFile, device: str = "cpu") -> int | str:
    sources = Sources()
    space = file.space(lambda reference: sources.architecture(reference).n_layers)
    return resolve_adapters(file, space, sources, device)


def test_a_number_is_taken_and_auto_is_for_gpus(models: Path) -> None:
    assert resolved(search(models)) == 4
    assert resolved(search(models, "none"), "cuda") == "none"
    assert resolved(search(models, "auto"), "cuda") == ADAPTERS
    assert resolved(search(models, "auto")) == "none"
    assert resolved(search(models, "auto", "ties"), "cuda") == "none"
    assert search(models).changed(search={"adapters_at_once": "none"}).search.n_adapters == 0


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"method": "ties"}, "ties is not linear"),
        ({"parameters": {"normalize": {"choices": [True, False]}}}, "sum to"),
        ({"parameters": {"normalize": False}}, "set normalize: true"),
        ({"dtype": {"choices": ["float32", "bfloat16"]}}, "several bases, shapes or dtypes"),
        ({"scoring": {"backend": "hf"}}, "use --backend vllm"),
        ({"scoring": {"engine": {"tensor_parallel_size": 2}}}, "one rank"),
        ({"search": {"candidate_timeout_s": 9.0}}, "drop candidate_timeout_s"),
        (
            {"tasks": ["qs_sort", {"name": "seconds_per_document", "weight": 1.0}]},
            "drop seconds_per_document",
        ),
    ],
)
def test_what_cannot_be_served_names_the_field(models: Path, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(SearchFileError, match=r"search\.adapters_at_once is 4; ") as raised:
        resolved(search(models, **changes))
    assert why in str(raised.value)


@pytest.mark.parametrize("value", [0, -1, "all"])
def test_other_values_are_refused(models: Path, value: Any) -> None:
    with pytest.raises(SearchFileError, match=r"search\.adapters_at_once"):
        search(models, value)


# ---- generations ----------------------------------------------------------------------------------


class Generations:
    """A pool that begins when all of a generation is submitted, around one that takes one by one."""

    size = 3
    by_generation = True

    def __init__(self, pool: Pool, log: list[Any]) -> None:
        self._pool, self._log = pool, log
        self._jobs: deque[Job] = deque()
        self._done: deque[Result] = deque()

    def submit(self, job: Job) -> None:
        self._jobs.append(job)

    def wait(self) -> Result:
        if not self._done:
            if self._jobs[0].kind == "trial":
                self._log.append([int(job.name) for job in self._jobs])
            while self._jobs:
                self._pool.submit(self._jobs.popleft())
                self._done.append(self._pool.wait())
        return self._done.popleft()

    def memory(self, references: Sequence[str], dtype: str | None) -> Memory:
        return self._pool.memory(references, dtype)

    def close(self) -> None:
        self._pool.close()


def test_a_generation_begins_when_the_last_is_told_also_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    begun: list[Any] = []

    def start(plan: Plan, workers: Workers, *others: Any) -> Generations:
        return Generations(start_pool(plan, workers, *others), begun)

    monkeypatch.setattr(session, "start_pool", start)
    file = SearchFile.load("configs/quickstart.yml").changed(
        search={"n_iterations": 8, "sampler": "cma"}, scoring={"limit": 8, "holdout": 8}
    )
    whole = run(file, folder=tmp_path / "whole").study
    assert begun == [[0, 1, 2], [3, 4, 5], [6, 7]]
    begun.clear()
    told = 0

    def interrupt(event: str, study: Study | None, plan: Plan) -> None:
        nonlocal told
        told += event == "told"
        if told == 4:
            raise PausedError

    with pytest.raises(PausedError):
        run(file, folder=tmp_path / "cut", progress=interrupt)
    resumed = run(file, folder=tmp_path / "cut").study
    assert begun == [[0, 1, 2], [3, 4, 5], [4, 5], [6, 7]]
    for one, other in zip(whole.trials(), resumed.trials(), strict=True):
        assert (one.params, one.values) == (other.params, other.values)
