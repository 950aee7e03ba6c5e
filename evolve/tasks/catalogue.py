"""lm-eval's own task files, read as text: which of its 14,000 must be parsed for some names.

Parsing all of them takes lm-eval seconds. A file can only matter to a name that stands in it, or in
a file that it includes; a group's file also names the group's members.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

_TOKEN = re.compile(r"""[^\s"'\[\]{},]+""")
_KEY = r"""["']?(?:task|group|tag)["']?\s*:"""
_NAMED = re.compile(rf"""^\s*(?:-\s+)?(?:{_KEY}|-)[ \t]*["']?([^\s"'\[\]{{}}#]+)""", re.M)
_NO_TASKS = {".py", ".pyc", ".md", ".jpg", ".json"}


class Catalogue:
    """The files under lm-eval's task folder, by the words in them.

    Attributes:
        root: the folder.
    """

    def __init__(self) -> None:
        import lm_eval.tasks

        self.root = Path(lm_eval.tasks.__file__).parent

    @cached_property
    def _texts(self) -> dict[Path, str]:
        return {
            path: path.read_text(encoding="utf-8", errors="ignore")
            for path in self.root.rglob("*")
            if path.suffix not in _NO_TASKS and path.is_file()
        }

    @cached_property
    def _by_word(self) -> dict[str, list[Path]]:
        found: dict[str, list[Path]] = defaultdict(list)
        for path, text in self._texts.items():
            for word in set(_TOKEN.findall(text)):
                found[word].append(path)
                if "/" in word:  # an included file is known by its name alone
                    found[word.rpartition("/")[2]].append(path)
        return found

    def names(self) -> set[str]:
        """Return what may be a task's, group's or tag's name, and some words that are none."""
        return {name for text in self._texts.values() for name in _NAMED.findall(text)}

    def files(self, names: Iterable[str]) -> set[Path] | None:
        """Return the files that say what the names mean; None where a group cannot be followed."""
        files: set[Path] = set()
        groups: dict[str, set[str]] = defaultdict(set)
        wanted, seen = list(names), set(names)
        while wanted:
            name = wanted.pop()
            stack = list(self._by_word.get(name, ()))
            while stack:
                path = stack.pop()
                if path not in files:
                    files.add(path)
                    stack += self._including(path)
                    for group, named in self._groups(path).items():
                        groups[group] |= named
            members = groups[name]
            if not all(member in self._by_word for member in members):
                return None
            wanted += members - seen
            seen |= members
        return files

    def _including(self, path: Path) -> list[Path]:
        """Return the files that include a file."""
        return [
            other
            for other in self._by_word.get(path.name, ())
            if any(
                os.path.normpath(other.parent / word) == str(path)
                for word in _TOKEN.findall(self._texts[other])
                if word.endswith(path.name)
            )
        ]

    def _groups(self, path: Path) -> dict[str, set[str]]:
        """Return the group that a file defines, if it does, with the names of its members."""
        from lm_eval.tasks._yaml_loader import load_yaml

        if path.suffix != ".yaml" or "group" not in self._texts[path]:
            return {}
        try:
            config = load_yaml(path, resolve_func=False, recursive=True)
        except Exception:  # lm-eval passes over such a file, too
            return {}
        return {config["group"]: set(members_of(config))} if isinstance(config.get("group"), str) else {}


def members_of(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names in a group's `task:`, those of groups written inside it too."""
    children = config.get("task")
    for child in children if isinstance(children, list) else [children]:
        if isinstance(child, str):
            yield child
        elif isinstance(child, Mapping):
            yield from (child[key] for key in ("group", "task") if isinstance(child.get(key), str))
            if isinstance(child.get("task"), list):
                yield from members_of(child)


@contextmanager
def parsing_only(files: set[Path] | None, root: Path) -> Iterator[None]:
    """Let lm-eval's TaskManager parse only these of the files in its own folder; None: all."""
    from lm_eval.tasks._index import TaskIndex

    every = TaskIndex._iter_yaml_files

    def some(folder: Path) -> Iterator[Path]:
        if files is None or folder != root:
            yield from every(folder)
        else:  # in lm-eval's order: of two files that define a name the first counts
            yield from sorted((p for p in files if p.suffix == ".yaml"), key=Path.as_posix)

    TaskIndex._iter_yaml_files = staticmethod(some)
    try:
        yield
    finally:
        TaskIndex._iter_yaml_files = staticmethod(every)
