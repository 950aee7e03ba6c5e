"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

FolderArgument = Annotated[Path, typer.Argument(help="storage path of a search", metavar="DIR")]
TaskOption = Annotated[list[str] | None, typer.Option("--task", help="lm-eval task or group; repeatable")]
TaskPathOption = Annotated[
    list[str] | None,
    typer.Option("--task-path", help="folder of task files, beside the file's own; repeatable"),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="torch device: cpu, cuda, cuda:1; default: a GPU if any")
]
JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON object to stdout")]
TrustOption = Annotated[bool, typer.Option(help="allow a model's own Python files to run")]
UnsafeOption = Annotated[bool, typer.Option(help="allow tasks that execute what a model writes")]
BackendOption = Annotated[str | None, typer.Option(help="engine: hf or vllm")]
