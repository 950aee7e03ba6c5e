"""A search in the browser, while it runs: Optuna's dashboard over the record, which it cannot write.

The dashboard can rename and delete studies, tell trials and take notes. A search's record is written by
the search alone, so here it sees a storage that knows this one study and refuses to write, and requests
that would are refused before. It is served on loopback only, and to pages of its own only.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Container, Sequence
from copy import copy
from pathlib import Path
from socketserver import ThreadingMixIn
from threading import Lock
from typing import Any, NoReturn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy  # what a storage returns of a study; nowhere public
from optuna.trial import FrozenTrial, TrialState

from evolve.errors import SearchFileError
from evolve.study import Study
from merge_core.errors import MergeError

HOST = "127.0.0.1"
# A page asks several things at once; the record is read once for them.
_READ_AGAIN_AFTER_S = 1.0
_STUDY_ID = 0
_NAMES_OF_VALUES = "study:metric_names"  # where Optuna's `Study.set_metric_names` keeps them
_CONSTRAINTS = "constraints"  # where the dashboard looks for a trial's; above 0 where violated


class RecordedStorage(BaseStorage):
    """A search's record as an Optuna storage of one study, to be read only.

    Attributes of a trial that are tables, such as its scores, stand there one by one: `scores: sort`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = Lock()
        self._read_at = 0.0
        self._study: Study
        self._shown: list[FrozenTrial]
        self.read()

    def read(self) -> Study:
        """Return the study as it is, or was a moment ago.

        Raises:
            SearchFileError, StorageError: it is gone, or cannot be read.
        """
        with self._lock:
            if time.monotonic() - self._read_at > _READ_AGAIN_AFTER_S:
                self._study = Study.open(self._folder)
                self._shown = [_shown(trial) for trial in self._study.trials()]
                self._read_at = time.monotonic()
            return self._study

    # ---- the study ----------------------------------------------------------------------------

    def get_all_studies(self) -> list[FrozenStudy]:
        """Return the one study."""
        return [
            FrozenStudy(
                study_name=self.read().name,
                direction=None,
                directions=self.get_study_directions(_STUDY_ID),
                user_attrs=self.get_study_user_attrs(_STUDY_ID),
                system_attrs=self.get_study_system_attrs(_STUDY_ID),
                study_id=_STUDY_ID,
            )
        ]

    def get_study_id_from_name(self, study_name: str) -> int:
        """Return the study's number; KeyError for another name."""
        if study_name != self.read().name:
            raise KeyError(study_name)
        return _STUDY_ID

    def get_study_name_from_id(self, study_id: int) -> str:
        """Return the study's name."""
        return self._of(study_id).name

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        """Return a direction for each value of a trial: all are maximised."""
        return [StudyDirection.MAXIMIZE] * len(_names_of_values(self._of(study_id)))

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        """Return the folder, the front, and once there is one the verdict.

        The dashboard's own list of the best counts trials that violate a constraint; the front does not.
        """
        study = self._of(study_id)
        verdict = study.note("verdict")
        said = {"verdict": verdict["text"]} if verdict else {}
        numbers = ", ".join(str(trial.number) for trial in study.front())
        return {"folder": str(self._folder), "front": f"trials {numbers}" if numbers else "none", **said}

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        """Return the names of the values."""
        return {_NAMES_OF_VALUES: _names_of_values(self._of(study_id))}

    def _of(self, study_id: int) -> Study:
        if study_id != _STUDY_ID:
            raise KeyError(study_id)
        return self.read()

    # ---- its trials ---------------------------------------------------------------------------

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """Return the trials by number; they are not to be changed, whatever `deepcopy` says."""
        self._of(study_id)
        return [trial for trial in self._shown if states is None or trial.state in states]

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """Return one trial; KeyError where there is none."""
        self.read()
        for trial in self._shown:
            if trial._trial_id == trial_id:
                return trial
        raise KeyError(trial_id)

    def get_best_trial(self, study_id: int) -> FrozenTrial:
        """Return the trial that `evolve status` calls the best: finals and holdout count."""
        best = self._of(study_id).best()
        return self._shown[best.number] if best else super().get_best_trial(study_id)

    # ---- what only a search may ---------------------------------------------------------------

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise PermissionError("a search's record is written by the search alone")

    create_new_study = delete_study = set_study_user_attr = set_study_system_attr = _refuse
    create_new_trial = set_trial_param = set_trial_state_values = _refuse
    set_trial_intermediate_value = set_trial_user_attr = set_trial_system_attr = _refuse


def _names_of_values(study: Study) -> list[str]:
    """Return what each value of a trial is called."""
    search_file = study.search_file()
    if search_file.search.objective == "pareto":
        return [task.name for task in search_file.tasks]
    return ["weighted sum"]


def _shown(trial: FrozenTrial) -> FrozenTrial:
    """Return a trial whose attributes stand one by one, and whose constraints the dashboard knows."""
    attributes: dict[str, Any] = {}
    for key, value in trial.user_attrs.items():
        if isinstance(value, dict):
            attributes |= {f"{key}: {part}": of_part for part, of_part in value.items()}
        else:
            attributes[key] = value
    shown = copy(trial)
    shown.user_attrs = attributes
    shown.system_attrs = {**trial.system_attrs, _CONSTRAINTS: list(trial.constraints.values())}
    return shown


class _Server(ThreadingMixIn, WSGIServer):
    """Answers each request in a thread of its own: a chart may take seconds."""

    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    """Writes no line a request."""

    def log_message(self, format: str, *arguments: Any) -> None:
        """Write nothing."""


def server(folder: Path, port: int) -> WSGIServer:
    """Return a server of a search's dashboard on loopback; `serve_forever` runs it.

    Args:
        port: 0 takes a free one, see its `server_port`.

    Raises:
        SearchFileError: there is no search, or the port cannot be had.
        StorageError: the record cannot be read.
    """
    from optuna_dashboard import wsgi

    logging.getLogger("optuna").setLevel(logging.ERROR)
    storage = RecordedStorage(folder)
    app = _only_reads(wsgi(storage), storage)
    try:
        return make_server(HOST, port, app, server_class=_Server, handler_class=_Quiet)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or "it is no port"
        raise SearchFileError(
            f"--port is {port}, which cannot be had on {HOST} ({reason}); name another, or 0 for any"
        ) from None


def _only_reads(app: Callable[..., Any], storage: RecordedStorage) -> Callable[..., Any]:
    """Refuse what would write, and what a page of another site asks by a name that leads here.

    Where the record cannot be read just now, that is the answer.
    """

    def checked(environ: dict[str, Any], start_response: Callable[..., Any]) -> Sequence[bytes]:
        host = environ.get("HTTP_HOST", "").lower().rpartition("@")[2].rsplit(":", 1)[0]
        if host not in ("localhost", HOST):
            status, said = "403 Forbidden", "this dashboard is reached by localhost"
        elif environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            status, said = "405 Method Not Allowed", "a search's record is written by the search alone"
        else:
            try:
                storage.read()
            except MergeError as error:  # it was moved, or cannot be reached for a while
                status, said = "503 Service Unavailable", "; ".join(error.faults)
            else:
                found: Sequence[bytes] = app(environ, start_response)
                return found
        start_response(status, [("Content-Type", "application/json")])
        return [json.dumps({"reason": said}).encode()]

    return checked
