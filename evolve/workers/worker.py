"""What one worker does: merge a recipe into its engine, have the documents answered."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from evolve.engines import Engine, EngineSettings, shape, start_engine
from evolve.errors import (
    TrialEngineError,
    TrialError,
    TrialMergeError,
    TrialWorkerError,
    boundary,
    breaks_worker,
)
from evolve.memory import Memory, measure
from evolve.search_file import ScoringSettings, Signal, TaskSpec
from evolve.tasks import Documents, Outcomes, RequestBank, Split, TaskSet, report_set
from merge_core.checkpoint.locate import tokenizer_folder
from merge_core.plan import Sources, files_folder, merged_config, model_alone
from merge_core.recipe import Recipe


@dataclass(frozen=True)
class Prompting:
    """How a model is asked.

    Attributes:
        tokenizer: the model whose tokenizer it is; None = that of the recipe which is scored.
        apply_chat_template: whether the tokenizer's chat template is applied.
    """

    tokenizer: str | None
    apply_chat_template: bool


@dataclass(frozen=True)
class Job:
    """One recipe to be scored.

    Attributes:
        name: what the result is filed under: a trial's number, a baseline's name.
        kind: which of the loop's questions this answers.
        recipe: what to merge.
        splits: on which documents.
        promptings: each is scored by itself; weights are loaded once.
        in_reverse: whether the requests are sent in another order.
        signal: what the documents are scored by.
        documents: only these of the splits; None = all.
        n_lost: how many workers it has cost already, as far as is known.
    """

    name: str
    kind: Literal["trial", "final", "baseline", "winner", "noise"]
    recipe: Recipe
    splits: tuple[Split, ...]
    promptings: tuple[Prompting, ...]
    in_reverse: bool = False
    signal: Signal = "metric"
    documents: Documents | None = None
    n_lost: int = 0


@dataclass
class Seconds:
    """Where a candidate's time went."""

    merge: float = 0.0
    load: float = 0.0
    score: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.merge + other.merge, self.load + other.load, self.score + other.score)


@dataclass
class Result:
    """Outcomes by prompting and split, or what failed.

    Attributes:
        failure: (kind, text) of a TrialError.
        as_adapter: whether an adapter over the base was scored in place of the merged weights.
        broke_worker: whether the worker that failed must not be used again.
        n_tries: how often a pool began the job.
    """

    job: Job
    outcomes: dict[Prompting, dict[Split, Outcomes]] = field(default_factory=dict)
    seconds: Seconds = field(default_factory=Seconds)
    failure: tuple[str, str] | None = None
    broke_worker: bool = False
    n_tries: int = 1
    as_adapter: bool = False

    def fail(self, error: TrialError) -> None:
        """Keep what went wrong in place of the outcomes."""
        self.outcomes = {}
        self.failure = (error.kind, str(error))
        self.broke_worker = breaks_worker(error)


@dataclass(frozen=True)
class WorkerSetup:
    """Everything a worker needs to start, in any process; picklable.

    Attributes:
        backend: "hf" or "vllm".
        engine: how to start it.
        tasks, scoring, seed: give the same TaskSet, and so the same documents, everywhere.
        report_only: tasks whose documents are the split "report".
        shared_as: names what the workers of a host keep together; None = nothing.
        references, adapters: models, and adapters on results, that candidates may use; where one of
            them is not there, no worker starts.
        prompting: the merge's own; its requests are built at the start.
        signal: what the sampler follows.
        start: the recipe that engine and requests are made for, where these are its own tokenizer's.
    """

    backend: str
    engine: EngineSettings
    tasks: tuple[TaskSpec, ...]
    scoring: ScoringSettings
    seed: int
    prompting: Prompting
    allow_unsafe_code: bool = False
    signal: Signal = "metric"
    report_only: tuple[TaskSpec, ...] = ()
    shared_as: str | None = None
    start: Recipe | None = None
    references: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()


class Worker:
    """An engine, the open sources and the request banks of one process.

    The engine stays up while candidates are of one shape: one config, its layers and dtype included.
    For another it is closed and another is started; the requests stay as they were built.

    Args:
        setup: see WorkerSetup.
        tasks, sources, reported: reused where the caller has them already; `reported` are the tasks of
            the split "report".

    Raises:
        TrialWorkerError: a model is not on this host.
    """

    engine: Engine

    def __init__(
        self,
        setup: WorkerSetup,
        tasks: TaskSet | None = None,
        sources: Sources | None = None,
        reported: TaskSet | None = None,
    ) -> None:
        self.setup = setup
        self.sources = sources or Sources(keep=True, shared_as=setup.shared_as)
        if faults := self.sources.open_all(setup.references, setup.adapters):
            raise TrialWorkerError(f"on host {socket.gethostname()}: {'; '.join(faults)}")
        self.tasks = tasks or TaskSet(
            setup.tasks,
            setup.scoring,
            setup.seed,
            allow_unsafe_code=setup.allow_unsafe_code,
        )
        # A tokenizer that was made for the search lies in a folder of the process that made it.
        self._first = setup.engine if setup.start is None else self._settings(setup.start)
        self._shape: str | None = None
        self._start()
        self._held: Recipe | None = None
        self._reported = reported
        self._banks: dict[tuple[Path, bool, bool], RequestBank] = {}
        self._bank(self._folder(setup.prompting, setup.start), setup.prompting, "search")

    def _start(self) -> None:
        """Start the engine that the first candidates need."""
        self.engine = start_engine(self.setup.backend, self._first)
        self._shape = shape(self._first)

    def _tasks_of(self, split: Split) -> TaskSet:
        if split != "report":
            return self.tasks
        setup = self.setup
        self._reported = self._reported or report_set(
            setup.report_only,
            setup.scoring,
            setup.seed,
            searched=setup.tasks,
            allow_unsafe_code=setup.allow_unsafe_code,
        )
        return self._reported

    def _folder(self, prompting: Prompting, recipe: Recipe | None) -> Path:
        """Return where the tokenizer is that a recipe's model is asked with."""
        if prompting.tokenizer is not None:
            return tokenizer_folder(prompting.tokenizer)
        return self._first.folder if recipe is None else files_folder(recipe, self.sources)

    def _bank(self, folder: Path, prompting: Prompting, split: Split) -> RequestBank:
        key = folder, prompting.apply_chat_template, split == "report"
        if key not in self._banks:
            if self._shape is None:  # the last engine did not start
                self._fit(self._first)
            lm = self.engine.lm(folder)
            signal = "metric" if split == "report" else self.setup.signal
            bank = RequestBank(self._tasks_of(split), lm, prompting.apply_chat_template, signal=signal)
            for reference in bank.needs_references():
                self._hold(reference)
                bank.learn_reference(reference, self.engine.lm(folder))
            self._banks[key] = bank
        return self._banks[key]

    def _hold(self, reference: str) -> None:
        """Load a model as it is, in the first engine's dtype."""
        self._fit(self._first)
        config = self._first.config
        dtype = config.get("dtype") or config.get("torch_dtype")
        recipe = Recipe.parse({**model_alone(reference).as_config(), "out_dtype": dtype})
        self._load(recipe)

    def _fit(self, settings: EngineSettings) -> None:
        """Keep the engine where it is of this shape, else start another in its place."""
        wanted = shape(settings)
        if wanted == self._shape:
            return
        self._stop()
        with boundary(TrialEngineError, "starting an engine of the merged model's shape"):
            self.engine = start_engine(self.setup.backend, settings)
        self._shape = wanted

    def _settings(self, recipe: Recipe) -> EngineSettings:
        """Say which engine a recipe's model needs."""
        with boundary(TrialMergeError, "finding the merged model's shape"):
            config = merged_config(recipe, self.sources)
            folder = files_folder(recipe, self.sources)
        return replace(self.setup.engine, config=config, folder=folder)

    def _stop(self) -> None:
        """Close the engine where there is one: the last may not have started."""
        if self._shape is not None:
            self.engine.close()
        self._shape, self._held = None, None

    def _load(self, recipe: Recipe) -> tuple[float, float]:
        self._held = None  # whatever a load that fails leaves behind
        seconds = self.engine.load_recipe(recipe, self.sources)
        self._held = recipe
        return seconds

    def close(self) -> None:
        """Stop the engine, forget the requests, leave the sources."""
        self._banks.clear()
        self._stop()
        self.sources.close()

    def memory(self, references: Sequence[str], dtype: str | None) -> Memory:
        """Measure what sources and engine take; see `evolve.memory.measure`."""
        return measure(self.engine, self.sources, references, dtype, self.setup.adapters)

    def restart(self) -> None:
        """Start the engine anew, whatever state the old one is in.

        Raises:
            TrialEngineError: it does not start.
        """
        with contextlib.suppress(Exception):  # a broken engine may not even close
            self._stop()
        self._shape, self._held = None, None
        with boundary(TrialEngineError, "starting the engine anew"):
            self._start()

    def evaluate(self, job: Job) -> Result:
        """Merge, load and score; a failure is part of the result, never raised."""
        result = Result(job)
        try:
            with boundary(TrialWorkerError, "evaluating the candidate"):
                self._evaluate(job, result)
        except TrialError as error:
            result.fail(error)
        return result

    def _evaluate(self, job: Job, result: Result) -> None:
        # Before the candidate's weights: a new bank may load those of its references.
        with boundary(TrialEngineError, "preparing the requests"):
            folders = {p: self._folder(p, job.recipe) for p in job.promptings}
            banks = {
                (prompting, split): self._bank(folders[prompting], prompting, split)
                for prompting in job.promptings
                for split in job.splits
            }
        seconds = result.seconds
        began = time.perf_counter()
        self._fit(self._settings(job.recipe))
        for (prompting, _), bank in banks.items():
            bank.ask(self.engine.lm(folders[prompting]))
        fitting = time.perf_counter() - began
        # A candidate that is asked block by block is loaded once.
        if job.documents is None or job.recipe != self._held:
            seconds.merge, seconds.load = self._load(job.recipe)
        seconds.load += fitting
        began = time.perf_counter()
        for (prompting, split), bank in banks.items():
            with boundary(TrialEngineError, "answering the requests"):
                its_own: Split = "search" if split == "report" else split
                outcomes = bank.answer(
                    its_own, job.signal, documents=job.documents, in_reverse=job.in_reverse
                )
                result.outcomes.setdefault(prompting, {})[split] = outcomes
        seconds.score = time.perf_counter() - began
        self._check_scores(result)

    def _check_scores(self, result: Result) -> None:
        """Have the scores computed, so that what cannot be fails here.

        Raises:
            TrialTaskError: a score is not finite, or its function fails.
        """
        job = result.job
        for by_split in result.outcomes.values():
            for split, outcomes in by_split.items():
                for task in self._tasks_of(split).following(job.signal).tasks:
                    its = outcomes[task.key]
                    if job.documents is not None:
                        # Few documents may be of other entries only, or such that have no value.
                        its = [outcome for outcome in its if outcome.value is not None]
                    if its or job.documents is None:
                        task.score(its)
