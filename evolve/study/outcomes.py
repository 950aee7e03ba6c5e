"""Outcomes on disk: a parquet file for each trial or baseline, whole or not there.

Where several hosts go on with a search in turn, the files are kept in Optuna's artifact store too.
"""

from __future__ import annotations

import json
import numbers
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from optuna.artifacts import FileSystemArtifactStore
from optuna.artifacts.exceptions import ArtifactNotFound

from evolve.errors import StorageError, disk_faults_told
from evolve.record_check import reading
from evolve.tasks import SPLITS, Outcome, Outcomes, Split, as_json

_COLUMNS = {
    "split": "string",
    "task": "string",
    "leaf": "string",
    "document": "int64",
    "metric": "string",
    "counts": "bool",
    "value": "double",
    "detail": "string",
}


def save_outcomes(path: Path, outcomes: Mapping[Split, Outcomes]) -> None:
    """Write outcomes as parquet, one row a document, entry and metric, renamed into place.

    When this returns the file outlasts even a power failure, as what is told after it does.

    Columns: split, task (the entry's key), leaf, document, metric ("exact_match,strict-match"; null
    where the key says it), counts (whether it is the entry's own), and value (a number) or detail
    (JSON, where lm-eval keeps more than a number). A document's other metrics follow its own.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "split": split,
            "task": task,
            "leaf": outcome.leaf,
            "document": outcome.document,
            "metric": metric,
            "counts": counts,
            "value": float(value) if _is_number(value) else None,
            "detail": None if _is_number(value) else as_json(value),
        }
        for split, by_task in outcomes.items()
        for task, values in by_task.items()
        for outcome in values
        for metric, counts, value in [
            (outcome.metric, True, outcome.value),
            *((other, False, value) for other, value in outcome.others.items()),
        ]
    ]
    schema = pa.schema(list(_COLUMNS.items()))
    with _appearing(path) as file:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), file)


@contextmanager
def _appearing(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that is in its place, to stay, once all is written."""
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load_outcomes(path: Path) -> dict[Split, Outcomes]:
    """Read what `save_outcomes` wrote.

    Raises:
        StorageError: the file is missing or damaged.
    """
    with reading(path):
        return _loaded(path)


def _loaded(path: Path) -> dict[Split, Outcomes]:
    import pyarrow.parquet as pq

    found: dict[Split, Outcomes] = {split: {} for split in SPLITS}  # `report` where it is there
    others: dict[str, Any] = {}
    for row in pq.read_table(path).to_pylist():
        value = row["value"] if row["detail"] is None else json.loads(row["detail"])
        if not row["counts"]:
            others[row["metric"]] = value
            continue
        others = {}  # of the rows that follow
        outcome = Outcome(row["leaf"], row["document"], value, others, row["metric"])
        found.setdefault(row["split"], {}).setdefault(row["task"], []).append(outcome)
    return found


class OutcomeFiles:
    """The outcomes of one search, by name: files of its folder, and of a store that other hosts see.

    Args:
        folder: where the files are.
        shared: a folder that all hosts of the search see, where each file is copied to and fetched from
            where it is missing here; None = there is one host.
        prefix: of the search's files in there, which it may share with others.
    """

    def __init__(self, folder: Path, shared: Path | None = None, prefix: str = "") -> None:
        self._folder = folder
        self._store = None if shared is None else FileSystemArtifactStore(shared)
        self._prefix = prefix

    def path(self, name: str) -> Path:
        """Return the file's place on this host."""
        return self._folder / f"{name}.parquet"

    def save(self, name: str, outcomes: Mapping[Split, Outcomes]) -> None:
        """Write outcomes, here and in the store.

        Raises:
            StorageError: the disk or the store does not take them.
        """
        try:
            with disk_faults_told(self._folder):
                save_outcomes(self.path(name), outcomes)
                if self._store is not None:
                    with self.path(name).open("rb") as file:
                        self._store.write(self._prefix + self.path(name).name, file)
        except OSError as error:
            where = error.filename or self._folder
            raise StorageError(
                f"outcomes cannot be written to {where} ({error.strerror}); what was finished before is "
                f"recorded, mend that and run the same command again"
            ) from error

    def has(self, name: str) -> bool:
        """Tell whether outcomes are there, fetching them where another host wrote them."""
        return self.path(name).exists() or self._fetch(name)

    def load(self, name: str) -> dict[Split, Outcomes]:
        """Read outcomes.

        Raises:
            StorageError: they are not there.
        """
        if not self.has(name):
            raise StorageError(
                f"{self.path(name)} is not there; where the search ran on another host, copy its "
                f"outcomes here (--artifacts keeps them where all hosts see them)"
            )
        return load_outcomes(self.path(name))

    def _fetch(self, name: str) -> bool:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._store is None:
            return False
        try:
            with self._store.open_reader(self._prefix + self.path(name).name) as file:
                content = file.read()
            pq.read_metadata(pa.BufferReader(content))  # a host may have been killed while it wrote
        except (ArtifactNotFound, pa.ArrowInvalid):
            return False
        with _appearing(self.path(name)) as here:
            here.write(content)
        return True


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real)
