"""What stands in the record: trials, outcomes, notes. They are written once, and kept in memory.

One trial is one evaluation of one candidate. A trial is created with its parameters in one
transaction; its outcomes are on disk before it is told; so whatever is killed, a finished trial is
whole and an interrupted one stays RUNNING, to be evaluated again under the same number.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from evolve.objectives import Rating
from evolve.record_check import checked_note, reading
from evolve.samplers import Proposal
from evolve.space import SearchSpace
from evolve.study.outcomes import OutcomeFiles
from evolve.study.standing import Standing
from evolve.study.storage import Storage
from evolve.tasks import Outcomes, n_documents
from evolve.workers.worker import Seconds


class Record:
    """A search's record, opened.

    Attributes:
        folder: the storage path (`DIR` of the commands).
        name: the study's name in the storage.
    """

    def __init__(self, folder: Path, name: str, storage: Storage) -> None:
        self.folder = folder
        self.name = name
        self._storage = storage
        self._checked: dict[str, str] = {}  # notes as they were last checked, by key

    @cached_property
    def outcomes(self) -> OutcomeFiles:
        """What each document gave, by "trial-N", "baseline-N" ..."""
        shared = self.note("artifacts")
        folder = self.folder / "outcomes"
        if shared is None:
            return OutcomeFiles(folder)
        return OutcomeFiles(folder, Path(shared["folder"]), f"{self.name}-{shared['search']}-")

    # ---- trials -------------------------------------------------------------------------------

    @cached_property
    def _trials(self) -> list[FrozenTrial]:
        # Read once: whoever writes is the only one, and keeps this list as the storage has it.
        with reading(self.folder / "the storage"):
            return self._storage.trials()

    @cached_property
    def _standing(self) -> Standing:
        standing = Standing()
        for trial in sorted(self.finished(), key=lambda trial: int(trial.user_attrs.get("told", -1))):
            standing.add(trial)
        return standing

    def trials(self) -> list[FrozenTrial]:
        """All trials, by number; not to be changed."""
        return self._trials

    def finished(self) -> list[FrozenTrial]:
        """The trials that were told, by number."""
        return [trial for trial in self._trials if trial.state.is_finished()]

    @property
    def n_finished(self) -> int:
        """How many trials were told."""
        return self._standing.n_finished

    @property
    def latest(self) -> FrozenTrial | None:
        """The trial that was told last."""
        return self._standing.latest

    @property
    def n_documents(self) -> int:
        """How many documents the trials were asked that were told; failed ones do not say."""
        return self._standing.n_documents

    @property
    def n_failed(self) -> int:
        """How many trials failed."""
        return self._standing.states[TrialState.FAIL]

    def begin(self, number: int, proposal: Proposal, space: SearchSpace) -> None:
        """Create trial `number` as RUNNING, with its active parameters, in one transaction."""
        before = self._trials
        attributes = {**proposal.attributes, "attempts": 1}
        params = space.active(proposal.values)
        before.append(self._storage.create_trial(number, params, space.distributions(), attributes))

    def begin_again(self, number: int, n_times: int = 1) -> None:
        """Count further attempts of a trial: it was interrupted, or its worker was lost."""
        trial = self._trials[number]
        attempts = int(trial.user_attrs["attempts"]) + n_times
        self._storage.set_attributes(trial, {"attempts": attempts})

    def complete(
        self,
        number: int,
        rating: Rating,
        scores: Mapping[str, float],
        outcomes: Outcomes,
        seconds: Seconds,
        standard_errors: Mapping[str, float],
        further: Mapping[str, Any] | None = None,
    ) -> None:
        """Tell a trial: outcomes to disk first, then scores, then the state.

        Args:
            standard_errors: of scores that are estimates from a part of the documents.
            further: attributes that are recorded too.
        """
        self.outcomes.save(f"trial-{number}", {"search": outcomes})
        attributes = {
            "scores": dict(scores),
            "objective": rating.objective,
            "seconds": vars(seconds),
            "documents": n_documents(outcomes),
            **(further or {}),
        }
        if standard_errors:
            attributes["standard_errors"] = dict(standard_errors)
            attributes["objective_error"] = rating.error
        if rating.violations:
            attributes["violations"] = rating.violations
        self._tell(number, TrialState.COMPLETE, attributes, rating)

    def fail(self, number: int, kind: str, text: str, seconds: Seconds) -> None:
        """Tell a trial as failed, with the boundary it failed at and why."""
        attributes = {"failure": {"kind": kind, "text": text[:2000]}, "seconds": vars(seconds)}
        self._tell(number, TrialState.FAIL, attributes, None)

    def _tell(
        self, number: int, state: TrialState, attributes: Mapping[str, Any], rating: Rating | None
    ) -> None:
        trial = self._trials[number]
        told = {**attributes, "told": self.n_finished}
        violations = rating.violations if rating else {}
        # What `Trial.set_constraint` keeps, which is for trials that Optuna evaluates.
        constraints = {f"constraints:{name}": violation for name, violation in violations.items()}
        self._storage.tell(trial, state, rating.values if rating else None, told, constraints)
        self._standing.add(trial)

    # ---- notes --------------------------------------------------------------------------------

    @cached_property
    def _notes(self) -> dict[str, str]:
        with reading(self.folder / "the storage"):
            return self._storage.notes()

    def note(self, key: str) -> Any:
        """Read a note kept with the study; None where there is none."""
        text = self._notes.get(key)
        if text is None:
            return None
        with reading(self.folder / key):
            note = json.loads(text)
        if self._checked.get(key) != text:
            checked_note(self.folder, key, note, len(self._trials))
            self._checked[key] = text
        return note

    def keep_note(self, key: str, value: Any) -> None:
        """Keep a note (JSON) with the study."""
        self.keep_notes({key: value})

    def keep_notes(self, notes: Mapping[str, Any]) -> None:
        """Keep notes (JSON) with the study, in one transaction."""
        texts = {key: json.dumps(value) for key, value in notes.items()}
        changed = {key: text for key, text in texts.items() if self._notes.get(key) != text}
        if changed:
            self._storage.keep_notes(changed)
            self._notes.update(changed)
