"""`evolve eval`: models and recipes scored side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from evolve.cli.options import (
    BackendOption,
    DeviceOption,
    JsonOption,
    TaskOption,
    TaskPathOption,
    TrustOption,
    UnsafeOption,
)
from evolve.cli.pause import unless_paused
from evolve.cli.stderr import quiet_libraries


def evaluate(
    models: Annotated[list[str], typer.Argument(help="models or recipes", metavar="MODEL|RECIPE.yml...")],
    task: TaskOption = None,
    like: Annotated[
        Path | None, typer.Option(help="score on this search's very documents", metavar="DIR")
    ] = None,
    split: Annotated[str, typer.Option(help="with --like: search or holdout")] = "search",
    limit: Annotated[
        int | None, typer.Option(min=1, help="documents a task, drawn by seed; default: all")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="seed of the draw of documents; default 0")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="compare with this one of them; default: the first")
    ] = None,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="score each recipe's models alone and their average too")
    ] = False,
    task_path: TaskPathOption = None,
    backend: BackendOption = None,
    device: DeviceOption = None,
    dtype: Annotated[str | None, typer.Option(help="score in this dtype")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="compare the engine's weights with each model's")
    ] = False,
    trust_remote_code: TrustOption = False,
    allow_unsafe_code: UnsafeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score models and recipes on tasks, side by side."""
    quiet_libraries()
    from evolve.evaluation import EvalOptions, evaluate_models
    from evolve.progress import ProgressLine
    from evolve.report import print_scores

    options = EvalOptions(
        tasks=tuple(task or ()),
        like=like,
        split=split,
        limit=limit,
        seed=seed,
        task_paths=tuple(task_path) if task_path else None,
        backend=backend,
        device=device,
        dtype=dtype,
        baseline=baseline,
        with_baselines=baselines,
        verify=verify,
        trust_remote_code=trust_remote_code,
        allow_unsafe_code=allow_unsafe_code,
    )
    progress = ProgressLine()
    try:
        scored = evaluate_models(models, options, unless_paused(progress.under_way))
    finally:
        progress.close()
    if as_json:
        print(json.dumps({"models": scored}))
    else:
        print_scores(scored)
