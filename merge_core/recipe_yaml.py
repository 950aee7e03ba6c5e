"""YAML of recipes and search files: read safely and of bounded size, written so that it reads back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from merge_core.errors import RecipeError

MAX_YAML_BYTES = 4 << 20


class _Loader(yaml.SafeLoader):
    """Safe YAML that also reads 1e-5 as a number and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} appears twice", key_node.start_mark
                )
            seen.add(key if isinstance(key, str) else id(key))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Safe YAML that quotes what `_Loader` would read as a number."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?\d+(?:\.\d*)?[eE][-+]?\d+$"),
        list("-+0123456789"),
    )


def load_yaml(path: str | Path) -> Any:
    """Read one YAML document, safely and of bounded size.

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
        if text.count("*") > 1000 and text.count("&") > 10:
            raise RecipeError(f"{path} is full of YAML aliases; write the values out")
        data = yaml.load(text, Loader=_Loader)
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
    if data is None:
        raise RecipeError(f"{path} is empty; it must hold a mapping with `merge_method:`")
    return data


def dump_yaml(data: Any) -> str:
    """Return a document as YAML text, keys in their order; `load_yaml` of it gives the same."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=99)
