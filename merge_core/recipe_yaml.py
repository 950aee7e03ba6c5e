"""YAML of recipes and search files: read safely and of bounded size, written so that it reads back.

A file may hold several documents, recipes of which one uses the results of others by their `name:`.
They are read as one mapping: the recipe that is wanted, the others under `intermediate:`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from merge_core.checkpoint.locate import STATE_DICT_SUFFIXES
from merge_core.errors import RecipeError, shown
from merge_core.reference import result_in

MAX_YAML_BYTES = 1 << 20
# Values in a file once its aliases are written out, and levels of lists and mappings.
MAX_YAML_VALUES = 100_000
MAX_YAML_DEPTH = 50


class _Loader(yaml.SafeLoader):
    """Safe YAML that also reads 1e-5 as a number and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} appears twice", key_node.start_mark
                )
            seen.add(key if isinstance(key, Hashable) else id(key))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Safe YAML that quotes what `_Loader` would read as a number."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?\d+(?:\.\d*)?[eE][-+]?\d+$"),
        list("-+0123456789"),
    )


def is_recipe_file(reference: str) -> bool:
    """Tell whether a reference names a recipe: any file but one of weights, whatever it is called.

    Where nothing of that name exists, a recipe is missed if it ends like one, else a model.
    """
    suffix = Path(reference).suffix
    if os.path.exists(reference):
        return os.path.isfile(reference) and suffix not in STATE_DICT_SUFFIXES
    return suffix.lower() in (".yml", ".yaml")


def load_yaml(path: str | Path) -> Any:
    """Read a YAML file, safely and of bounded size; several documents as one, see `joined`.

    Raises:
        RecipeError: the file is missing, too large, empty or not YAML.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"{path}: no such file; give the path of a YAML file")
    if path.stat().st_size > MAX_YAML_BYTES:
        raise RecipeError(
            f"{path} has {path.stat().st_size} bytes; a recipe has at most {MAX_YAML_BYTES}"
        )
    try:
        text = path.read_text(encoding="utf-8")
        documents = [data for data in _parsed(text) if data is not None]
    except UnicodeDecodeError:
        raise RecipeError(f"{path} is not UTF-8 text; give a YAML file") from None
    except RecursionError:
        raise RecipeError(
            f"{path}: not valid YAML: nested too deeply; correct the syntax there"
        ) from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or " ".join(f"{error}".split())
        raise RecipeError(f"{where}: not valid YAML: {problem}; correct the syntax there") from None
    if not documents:
        raise RecipeError(f"{path} is empty; it must hold a mapping with `merge_method:`")
    if len(documents) == 1:
        return _without_name(documents[0])
    try:
        return joined(documents)
    except RecipeError as error:
        raise RecipeError([f"{path}: {fault}" for fault in error.faults]) from None


def joined(documents: Sequence[Any]) -> dict[str, Any]:
    """Make one mapping of several recipes: the one that is wanted, the others by name below it.

    The wanted one is that without a name; where all have one, that which no other mentions.

    Raises:
        RecipeError: a document is no mapping, a name is given twice, or it is open which one is wanted.
    """
    faults, named, unnamed = [], {}, []
    for i, document in enumerate(documents):
        name = document.get("name") if isinstance(document, Mapping) else None
        if not isinstance(document, Mapping):
            faults.append(f"document {i + 1} is {shown(document)}; each must be a mapping, a recipe")
        elif name is None:
            unnamed.append(document)
        elif not isinstance(name, str):
            faults.append(f"document {i + 1}: name is {shown(name)}; it must be text, quote it")
        elif name in named:
            faults.append(f"document {i + 1}: name is {name!r}, as another's; give each its own")
        else:
            named[name] = document
    if len(unnamed) > 1:
        faults.append(
            f"{len(unnamed)} documents have no name; that one whose result is wanted has none, give the "
            f"others a `name:` by which they are used"
        )
    if faults:
        raise RecipeError(faults)
    if not unnamed:
        texts = {text for name, d in named.items() for text in _texts(d) if text != name}
        used = {result[0] for text in texts if (result := result_in(text, named))}
        last = [name for name in named if name not in used]
        if len(last) != 1:
            which = " and ".join(last) if last else "none"
            raise RecipeError(
                f"each document has a name, and {which} is used by no other; leave out the name of the "
                f"one whose result is wanted"
            )
        unnamed.append(named.pop(last[0]))
    others = {name: _without_name(document) for name, document in named.items()}
    return {**_without_name(unnamed[0]), **({"intermediate": others} if others else {})}


def _without_name(document: Any) -> Any:
    if not isinstance(document, Mapping) or not isinstance(document.get("name"), str | None):
        return document
    return {key: value for key, value in document.items() if key != "name"}


def _texts(node: Any) -> Iterator[str]:
    """Walk all text in plain data."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, Mapping | list):
        for part in node.values() if isinstance(node, Mapping) else node:
            yield from _texts(part)


def dump_yaml(data: Mapping[str, Any]) -> str:
    """Return a mapping as YAML text, keys in their order; `load_yaml` of it gives the same.

    What is under `intermediate:` becomes documents of their own, as mergekit-multi reads them.
    """
    plain = dict(data)
    intermediate = plain.pop("intermediate", None) or {}
    documents = [{"name": name, **document} for name, document in intermediate.items()]
    texts = [
        yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=99)
        for document in (*documents, plain)
    ]
    return "---\n".join(texts)


def _parsed(text: str) -> Iterator[Any]:
    """Yield a file's documents."""
    loader = _Loader(text)
    total = 0
    try:
        while loader.check_node():
            node = loader.get_node()
            assert node is not None
            n_values, depth = _extent(node, {})
            total += n_values
            if total > MAX_YAML_VALUES:
                raise ValueError(
                    f"{total} values with its aliases written out, at most {MAX_YAML_VALUES}"
                )
            if depth > MAX_YAML_DEPTH:
                raise RecursionError
            yield loader.construct_document(node)
    finally:
        loader.dispose()


def _extent(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """Count a node's values with aliases written out, and its levels; each node is visited once.

    Ten lines of aliases to aliases stand for a billion values, which the parser shares and
    everything after it writes out.
    """
    if id(node) in known:
        found = known[id(node)]
        if found is None:
            raise ValueError("an alias stands within what it names")
        return found
    known[id(node)] = None
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    extents = [_extent(part, known) for part in parts]
    found = 1 + sum(n for n, _ in extents), 1 + max((depth for _, depth in extents), default=0)
    known[id(node)] = found
    return found
