"""The commands: evolve run | status | export | merge | eval.

Only the command line lives here; what a command does is imported when it runs, so that
`evolve --help` answers at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from evolve.errors import PausedError, SearchStoppedError, StorageError, TrialError
from merge_core.errors import HubUnreachableError, MergeError, RecipeError

if TYPE_CHECKING:
    from evolve.study import Study
    from evolve.verdict import Verdict

MAX_FAULTS = 20
EXIT_OTHER, EXIT_INPUT, EXIT_PAUSED = 1, 2, 130
_NOT_THE_INPUT = (HubUnreachableError, StorageError, SearchStoppedError)

app = typer.Typer(
    name="evolve",
    help="Find the numbers in a merge recipe by search, and tell the truth about the gain.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

TaskOption = Annotated[list[str] | None, typer.Option("--task", help="lm-eval task or group; repeatable")]
TaskPathOption = Annotated[
    list[str] | None, typer.Option("--task-path", help="folder of task files; repeatable")
]
DeviceOption = Annotated[
    str | None, typer.Option(help="torch device: cpu, cuda, cuda:1; default: a GPU if any")
]
JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON object to stdout")]
TrustOption = Annotated[bool, typer.Option(help="allow a model's own Python files to run")]
UnsafeOption = Annotated[bool, typer.Option(help="allow tasks that execute what a model writes")]
BackendOption = Annotated[str | None, typer.Option(help="engine: hf or vllm")]


@app.command()
def run(
    search: Annotated[Path, typer.Argument(help="search file", metavar="SEARCH.yml")],
    n_iterations: Annotated[int | None, typer.Option(help="candidates in all, over every resume")] = None,
    task: TaskOption = None,
    storage_path: Annotated[Path | None, typer.Option(help="folder of the search")] = None,
    storage: Annotated[
        str | None, typer.Option(help="URL of another storage, such as PostgreSQL")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="auto, cma, tpe or random")] = None,
    backend: BackendOption = None,
    workers: Annotated[int, typer.Option(min=1, help="candidates evaluated at once")] = 1,
    gpus_per_worker: Annotated[float, typer.Option(min=0, help="GPUs each worker gets")] = 0,
    ray_address: Annotated[str | None, typer.Option(help="an existing Ray cluster")] = None,
    limit: Annotated[int | None, typer.Option(help="search documents a task")] = None,
    seed: Annotated[
        int | None, typer.Option(help="seed of the search and of the draw of documents")
    ] = None,
    task_path: TaskPathOption = None,
    device: DeviceOption = None,
    trust_remote_code: TrustOption = False,
    allow_unsafe_code: UnsafeOption = False,
    check: Annotated[
        bool, typer.Option("--check", help="do all up to the first candidate; write nothing")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Search for the best values of a merge recipe; run again to resume."""
    from evolve.search_file import SearchFile

    search_file = SearchFile.load(search).changed(
        tasks=task or (),
        search={"n_iterations": n_iterations, "sampler": sampler, "seed": seed},
        scoring={"backend": backend, "limit": limit, "task_paths": task_path or None},
    )
    _quiet_libraries()
    if check:
        _check(search_file, device, trust_remote_code, allow_unsafe_code)
        return
    from evolve import loop
    from evolve.report import ProgressLine, print_result, result_json

    progress = ProgressLine()
    try:
        result = loop.run(
            search_file,
            folder=storage_path,
            storage=storage,
            workers=loop.Workers(workers, gpus_per_worker, ray_address),
            device=device,
            trust_remote_code=trust_remote_code,
            allow_unsafe_code=allow_unsafe_code,
            progress=progress,
        )
    finally:
        progress.close()
    data, folder = result_json(result), result.study.folder
    if result.was_complete:
        _say(f"the search in {folder} is complete; raise --n-iterations to go on")
    if as_json:
        print(json.dumps(data))
    else:
        print_result(data, str(folder))
    if result.best is None:
        _end(["no candidate completed; see evolve status for the failures"], EXIT_OTHER)


def _check(
    search_file: Any, device: str | None, trust_remote_code: bool, allow_unsafe_code: bool
) -> None:
    from evolve.loop import Workers, start_pool
    from evolve.plan import make_plan
    from evolve.report import print_check

    plan = make_plan(
        search_file,
        device=device,
        trust_remote_code=trust_remote_code,
        allow_unsafe_code=allow_unsafe_code,
    )
    start_pool(plan, Workers()).close()
    print_check(plan)


@app.command()
def status(
    folder: Annotated[Path, typer.Argument(help="storage path of a search", metavar="DIR")],
    as_json: JsonOption = False,
) -> None:
    """Show how far a search is, its best trial and its failures."""
    from evolve.report import print_result, study_json

    study, recipe_of, verdict = _open(folder)
    best = study.best()
    data = study_json(study, recipe_of(best) if best else None, verdict)
    if as_json:
        print(json.dumps(data))
        return
    print_result(data, str(folder))
    for trial in study.trials():
        if "failure" in trial.user_attrs:
            failure = trial.user_attrs["failure"]
            print(f"trial {trial.number} failed at {failure['kind']}: {failure['text'].splitlines()[0]}")


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="storage path of a search", metavar="DIR")],
    trial: Annotated[int | None, typer.Option(help="trial number; default: the best")] = None,
    pareto: Annotated[bool, typer.Option("--pareto", help="every member of the Pareto front")] = False,
    output: Annotated[Path | None, typer.Option("-o", help="file; default: stdout")] = None,
) -> None:
    """Write a trial's recipe as a plain merge config."""
    from optuna.trial import TrialState

    from evolve.errors import SearchFileError
    from evolve.export import export_yaml
    from merge_core.checkpoint.write import write_text

    study, recipe_of, verdict = _open(folder)
    trials = study.trials()
    best = study.best()
    if best is None:
        raise SearchFileError(
            f"DIR is {folder}, where no trial is complete yet; let the search run first"
        )
    # With one objective the Pareto front is the best trial.
    number = best.number if trial is None or pareto else trial
    if not 0 <= number < len(trials) or trials[number].state != TrialState.COMPLETE:
        complete = [t.number for t in trials if t.state == TrialState.COMPLETE]
        raise SearchFileError(
            f"--trial is {number}, which is not a completed trial; use one of {complete[:20]}"
            + (" ..." if len(complete) > 20 else "")
        )
    holdout = verdict.holdout if verdict and verdict.trial == number else {}
    text = export_yaml(
        recipe_of(trials[number]),
        study.name,
        number,
        study.search_file().search.seed,
        trials[number].user_attrs["scores"],
        {name: vars(interval) for name, interval in holdout.items()},
        study.note("documents"),
    )
    if output:
        try:
            write_text(output, text)
        except OSError as error:
            raise SearchFileError(
                f"-o is {output}, which cannot be written ({error.strerror}); name another file"
            ) from None
    else:
        print(text, end="")


def _open(folder: Path) -> tuple[Study, Callable[[Any], Any], Verdict | None]:
    """Open a search for reading: the study, trial to recipe, and the verdict if there is one."""
    from evolve.space import Space
    from evolve.study import Study
    from evolve.verdict import Verdict

    study = Study.open(folder)
    search_file = study.search_file()
    space = Space(
        search_file.template, search_file.search.layer_granularity, lambda: study.note("n_layers")
    )
    note = study.note("verdict")
    return study, lambda trial: space.recipe(trial.params), Verdict.recalled(note) if note else None


@app.command()
def merge(
    recipe: Annotated[Path, typer.Argument(help="merge config", metavar="RECIPE.yml")],
    out: Annotated[Path, typer.Argument(help="folder for the model", metavar="OUT")],
    strict: Annotated[bool, typer.Option("--strict", help="unknown parameters are errors")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUT if it exists")] = False,
    check: Annotated[bool, typer.Option("--check", help="check everything; write nothing")] = False,
    device: Annotated[str, typer.Option(help="where the arithmetic runs")] = "cpu",
    cuda: Annotated[bool, typer.Option("--cuda", help="the same as --device cuda")] = False,
    copy_tokenizer: Annotated[bool, typer.Option(help="copy the tokenizer files")] = True,
    out_shard_size: Annotated[str, typer.Option(help="bytes a file: 5B, 500M; 0 = one file")] = "5B",
    random_seed: Annotated[
        int | None, typer.Option(help="seed of random masks; overrides the recipe")
    ] = None,
) -> None:
    """Merge models as a recipe says, and write the result."""
    from evolve.engines import resolve_device
    from merge_core.checkpoint.write import check_output, has_tokenizer
    from merge_core.merge import save_merged
    from merge_core.plan import Sources, donor, plan_merge
    from merge_core.recipe import Recipe, load_yaml

    data = load_yaml(recipe)
    if isinstance(data, dict) and random_seed is not None:
        data["random_seed"] = random_seed
    parsed = Recipe.parse(data, strict)
    device = resolve_device("cuda" if cuda else device)
    shard_bytes = _bytes("--out-shard-size", out_shard_size)
    check_output(out, overwrite)
    for warning in parsed.check()[1]:
        _say(f"warning: {warning}")
    sources = Sources()
    planned = plan_merge(parsed, sources)
    folder = sources.architecture(donor(parsed)).checkpoint.folder
    if not has_tokenizer(folder):
        _say(f"warning: {folder} has no tokenizer files; the merged model will have none")
    if check:
        print(f"{len(planned)} tensors from {len(parsed.references())} models; the merge can begin")
        return
    save_merged(
        parsed,
        out,
        sources=sources,
        recipe_text=recipe.read_text(encoding="utf-8") if random_seed is None else None,
        overwrite=overwrite,
        shard_bytes=shard_bytes,
        with_tokenizer=copy_tokenizer,
        device=device,
    )
    print(f"wrote {out}")


def _bytes(option: str, text: str) -> int:
    """Read a size such as 5B, 500M or 1000000 (decimal units, B for 10^9 as in mergekit)."""
    units = {"K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}
    unit = units.get(text[-1:].upper())
    try:
        return int(float(text[:-1]) * unit) if unit else int(text)
    except (ValueError, OverflowError):
        raise RecipeError(
            f"{option} is {text!r}; it must be a number of bytes such as 5B, 500M or 0"
        ) from None


@app.command("eval")
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
    seed: Annotated[int, typer.Option(min=0, help="seed of the draw of documents")] = 0,
    task_path: TaskPathOption = None,
    backend: BackendOption = None,
    device: DeviceOption = None,
    dtype: Annotated[str | None, typer.Option(help="score in this dtype")] = None,
    trust_remote_code: TrustOption = False,
    allow_unsafe_code: UnsafeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score models and recipes on tasks, side by side."""
    _quiet_libraries()
    from evolve.evaluation import EvalOptions, evaluate_models
    from evolve.report import print_scores

    scored = evaluate_models(
        models,
        EvalOptions(
            tasks=tuple(task or ()),
            like=like,
            split=split,
            limit=limit,
            seed=seed,
            task_paths=tuple(task_path) if task_path else None,
            backend=backend,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            allow_unsafe_code=allow_unsafe_code,
        ),
    )
    if as_json:
        print(json.dumps({"models": scored}))
    else:
        print_scores(scored)


def _quiet_libraries() -> None:
    """Keep the libraries' notices off stderr, which belongs to progress and errors."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _end(faults: list[str], status: int) -> NoReturn:
    """Print the faults as `error: ...` lines and leave."""
    for fault in faults[:MAX_FAULTS]:
        _say("error: " + " ".join(fault.split()))
    sys.stdout.flush()
    raise SystemExit(status)


def _pause(signum: int, frame: Any) -> NoReturn:
    # A second signal stops at once.
    signal.signal(signum, signal.SIG_DFL)
    raise PausedError


def main() -> None:
    """Run a command; errors become `error: ...` lines and an exit status."""
    signal.signal(signal.SIGTERM, _pause)
    signal.signal(signal.SIGINT, _pause)
    try:
        status = app(standalone_mode=False)
    except typer.Abort:
        _end(["interrupted"], EXIT_PAUSED)
    except PausedError:
        _say("paused; everything finished is recorded, run the same command again to go on")
        raise SystemExit(EXIT_PAUSED) from None
    except MergeError as error:
        _end(error.faults, EXIT_OTHER if isinstance(error, _NOT_THE_INPUT) else EXIT_INPUT)
    except TrialError as error:
        _end([str(error)], EXIT_OTHER)
    except Exception as error:
        # Typer's usage errors; it carries its own copy of click, so they are known by their method.
        if not hasattr(error, "format_message"):
            raise
        _end([error.format_message()], EXIT_INPUT)
    raise SystemExit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    main()
