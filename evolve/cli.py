"""The commands: evolve run | status | report | export | merge | extract-lora | methods | eval.

Only the command line lives here; what a command does is imported when it runs, so that
`evolve --help` answers at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from evolve.errors import (
    PausedError,
    PushError,
    SearchStoppedError,
    StorageError,
    TrialError,
    WorkersLostError,
)
from evolve.extraction import extract_lora
from evolve.mergekit_flags import CONSENT, MergekitFlags, with_mergekit_flags
from evolve.merging import merge
from evolve.method_table import methods
from evolve.redaction import printable
from merge_core.errors import HubUnreachableError, MergeError

if TYPE_CHECKING:
    from evolve.search_file import SearchFile
    from evolve.study import Study
    from evolve.verdict import Verdict
    from evolve.workers.start import Workers

MAX_FAULTS = 20
# Characters of an error line; longer ones lose their middle, and keep the repair at their end.
MAX_LINE = 1000
EXIT_OTHER, EXIT_INPUT, EXIT_PAUSED = 1, 2, 130
# With this variable set an error that nobody thought of ends in Python's traceback.
DEBUG = "EVOLVE_TRACEBACK"
PAUSED = "paused; everything finished is recorded, run the same command again to go on"
# How long a pause may take before the process leaves as it is.
PATIENCE_S = 30
_NOT_THE_INPUT = (HubUnreachableError, StorageError, SearchStoppedError, WorkersLostError, PushError)

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
@with_mergekit_flags
def run(
    search: Annotated[Path, typer.Argument(help="search file", metavar="SEARCH.yml")],
    n_iterations: Annotated[int | None, typer.Option(help="candidates in all, over every resume")] = None,
    task: TaskOption = None,
    storage_path: Annotated[Path | None, typer.Option(help="folder of the search")] = None,
    storage: Annotated[
        str | None, typer.Option(help="URL of another storage, such as PostgreSQL")
    ] = None,
    artifacts: Annotated[
        Path | None, typer.Option(help="folder that all hosts see, for outcomes too")
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="auto, cma, tpe, gp, nsga2, nsga3, qmc, random or greedy_soup")
    ] = None,
    backend: BackendOption = None,
    workers: Annotated[int, typer.Option(min=1, help="candidates evaluated at once")] = 1,
    gpus_per_worker: Annotated[float, typer.Option(min=0, help="GPUs each worker gets")] = 0,
    ray_address: Annotated[str | None, typer.Option(help="an existing Ray cluster")] = None,
    limit: Annotated[int | None, typer.Option(help="search documents a task")] = None,
    seed: Annotated[
        int | None, typer.Option(help="seed of the search and of the draw of documents")
    ] = None,
    seed_recipe: Annotated[
        list[str] | None,
        typer.Option("--seed-recipe", help="recipe to try first, beside the file's; repeatable"),
    ] = None,
    task_path: TaskPathOption = None,
    device: DeviceOption = None,
    trust_remote_code: TrustOption = False,
    allow_unsafe_code: UnsafeOption = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="try a few candidates, say what the search will take; write nothing"
        ),
    ] = False,
    gpu_hour_price: Annotated[
        float | None, typer.Option(min=0, help="with --check: what a GPU costs an hour")
    ] = None,
    as_json: JsonOption = False,
    *,
    mergekit: MergekitFlags,
) -> None:
    """Search for the best values of a merge recipe; run again to resume.

    mergekit-evolve's files and flags work, too.
    """
    from evolve.search_file import SearchFile

    search_file = SearchFile.load(search)
    search_file = search_file.changed(
        tasks=task or (),
        search={
            "n_iterations": n_iterations,
            "sampler": sampler,
            "seed": seed,
            "seed_recipes": [*search_file.search.seed_recipes, *(seed_recipe or ())],
        },
        scoring={"backend": backend, "limit": limit, "task_paths": task_path or None},
    )
    search_file = mergekit.changed(search_file, backend)
    if search_file.is_mergekit and not mergekit.consent:
        _warn_of_benchmarks(search_file)
    _quiet_libraries()
    from evolve import loop
    from evolve.workers import start

    placed = start.Workers(workers, gpus_per_worker, ray_address)
    if check:
        options = {
            "device": device,
            "trust_remote_code": trust_remote_code,
            "allow_unsafe_code": allow_unsafe_code,
        }
        _check(search_file, placed, gpu_hour_price, as_json, **options)
        return
    from evolve.progress import ProgressLine
    from evolve.report import print_result, result_json

    progress = ProgressLine()
    try:
        with redirect_stdout(sys.stderr):  # Ray prints there when it loses a worker
            result = loop.run(
                search_file,
                folder=storage_path,
                storage=storage,
                artifacts=artifacts,
                workers=placed,
                device=device,
                trust_remote_code=trust_remote_code,
                allow_unsafe_code=allow_unsafe_code,
                progress=_unless_paused(progress),
                under_way=_unless_paused(progress.under_way),
                say=_unless_paused(progress.say),
            )
    finally:
        progress.close()
    data, folder = result_json(result), result.study.folder
    if result.was_complete:
        more = result.study.note("exhausted")
        if not more:
            ended = data["ended"]
            more = (
                f"it ended at {ended}; raise that to go on" if ended else "raise --n-iterations to go on"
            )
        _say(f"the search in {folder} is complete; {more}")
    if as_json:
        print(json.dumps(data))
    else:
        print_result(data, str(folder))
    if result.best is None:
        why = loop.commonest_failure(result.study.trials())
        _end([f"no candidate completed; {why}"], EXIT_OTHER)
    if mergekit.save_final_model:
        _save_final_model(folder)


def _warn_of_benchmarks(search_file: SearchFile) -> None:
    from evolve.mergekit_file import benchmarks

    if names := benchmarks(task.name for task in search_file.tasks):
        _say(
            f"warning: {', '.join(names)}: common benchmarks, whose scores say little of a model that "
            f"was searched on them ({CONSENT} silences this line)"
        )


def _save_final_model(folder: Path) -> None:
    from merge_core.merge import save_merged
    from merge_core.recipe import Recipe

    best = folder / "best.yml"
    out = folder / "final_model"
    save_merged(Recipe.load(best), out, recipe_text=best.read_text(encoding="utf-8"), overwrite=True)
    _say(f"wrote {out}")


def _check(
    search_file: SearchFile, workers: Workers, price: float | None, as_json: bool, **options: Any
) -> None:
    from evolve.check import check_json, print_check
    from evolve.plan import make_plan
    from evolve.progress import ProgressLine
    from evolve.rehearsal import rehearse
    from evolve.workers.start import start_pool
    from merge_core.machine import process_seconds

    progress = ProgressLine()
    under_way = _unless_paused(progress.under_way)
    try:
        plan = make_plan(search_file, under_way=under_way, **options)
        under_way(f"starting the {plan.setup.backend} engine")
        pool = start_pool(plan, workers, progress.say)
        try:
            memory = pool.memory(plan.references(), plan.start.dtype)
            rehearsal = rehearse(plan, pool, process_seconds(), under_way)
        finally:
            pool.close()
    finally:
        progress.close()
    data = check_json(plan, memory, rehearsal, workers, price)
    if as_json:
        print(json.dumps(data))
    else:
        print_check(data)


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
def report(
    folder: Annotated[Path, typer.Argument(help="storage path of a search", metavar="DIR")],
    output: Annotated[Path | None, typer.Option("-o", help="file; default: DIR/report.html")] = None,
) -> None:
    """Write a report of a search: one HTML file with tables and charts."""
    from evolve.errors import SearchFileError
    from evolve.html_report import html_report
    from evolve.report import study_json
    from merge_core.checkpoint.write import write_text

    study, recipe_of, verdict = _open(folder)
    best = study.best()
    data = study_json(study, recipe_of(best) if best else None, verdict)
    output = output or folder / "report.html"
    text = html_report(study, study.search_file().space(lambda model: study.note("n_layers")), data)
    try:
        write_text(output, text)
    except OSError as error:
        raise SearchFileError(
            f"-o is {output}, which cannot be written ({error.strerror}); name another file"
        ) from None
    _say(f"wrote {output}")


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="storage path of a search", metavar="DIR")],
    trial: Annotated[int | None, typer.Option(help="trial number; default: the best")] = None,
    pareto: Annotated[bool, typer.Option("--pareto", help="every member of the Pareto front")] = False,
    output: Annotated[
        Path | None, typer.Option("-o", help="file, or with --pareto a folder; default: stdout")
    ] = None,
) -> None:
    """Write a trial's recipe as a plain merge config, or those of the front."""
    from evolve.errors import SearchFileError
    from evolve.export import export_yaml
    from evolve.provenance import head_lines
    from merge_core.checkpoint.write import write_text

    study, recipe_of, verdict = _open(folder)
    seed, documents = study.search_file().search.seed, study.note("documents")
    texts = {}
    for member in _exported(study, trial, pareto):
        recipe = recipe_of(member)
        head = head_lines(
            recipe,
            study.name,
            member.number,
            seed,
            study.scores(member),
            verdict if verdict and verdict.trial == member.number else None,
            documents,
            study.violations(member),
            study.note("notices") or (),
            study.note("metrics"),
        )
        texts[f"trial-{member.number}.yml"] = export_yaml(recipe, head)
    whole = "---\n".join(texts.values())
    if output is None:
        print(whole, end="")
        return
    try:
        if pareto and not output.suffix:
            output.mkdir(parents=True, exist_ok=True)
            for name, text in texts.items():
                write_text(output / name, text)
        else:
            write_text(output, whole)
    except OSError as error:
        raise SearchFileError(
            f"-o is {output}, which cannot be written ({error.strerror}); name another file"
        ) from None


def _exported(study: Study, number: int | None, pareto: bool) -> list[Any]:
    """Return the trials that `evolve export` is asked for: the front, one by number, or the best."""
    from optuna.trial import TrialState

    from evolve.errors import SearchFileError

    if pareto and number is not None:
        raise SearchFileError(f"--trial is {number} beside --pareto; give one of them")
    trials = study.trials()
    best = study.best()
    if best is None:
        raise SearchFileError(
            f"DIR is {study.folder}, where no trial is complete yet; let the search run first"
        )
    if pareto:
        if not (front := study.front()):
            raise SearchFileError(
                "--pareto asks for candidates that meet every constraint, and none does; without it "
                "the nearest is exported"
            )
        return front
    if number is None:
        return [best]
    if not 0 <= number < len(trials) or trials[number].state != TrialState.COMPLETE:
        complete = [t.number for t in trials if t.state == TrialState.COMPLETE]
        raise SearchFileError(
            f"--trial is {number}, which is not a completed trial; use one of {complete[:20]}"
            + (" ..." if len(complete) > 20 else "")
        )
    return [trials[number]]


def _open(folder: Path) -> tuple[Study, Callable[[Any], Any], Verdict | None]:
    """Open a search for reading: the study, trial to recipe, and the verdict if there is one."""
    from evolve.record_check import reading
    from evolve.study import Study
    from evolve.verdict import Verdict

    study = Study.open(folder)
    space = study.search_file().space(lambda model: study.note("n_layers"))
    note = study.note("verdict")

    def recipe_of(trial: Any) -> Any:
        with reading(f"{folder}: trial {trial.number}"):  # search.yml may be another than it was
            return space.recipe(trial.params)

    return study, recipe_of, Verdict.recalled(note) if note else None


app.command()(merge)
app.command("extract-lora")(extract_lora)
app.command()(methods)


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
    _quiet_libraries()
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
        scored = evaluate_models(models, options, _unless_paused(progress.under_way))
    finally:
        progress.close()
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
    os.environ.setdefault("DATASETS_VERBOSITY", "error")  # two lines for each data set in the cache
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore", FutureWarning)


def _say(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)


def _end(faults: list[str], status: int) -> NoReturn:
    """Print the faults as `error: ...` lines and leave."""
    for fault in faults[:MAX_FAULTS]:
        _say("error: " + _one_line(fault))
    sys.stdout.flush()
    raise SystemExit(status)


def _one_line(fault: str) -> str:
    """Make a fault one line of a readable length, whatever the values that it quotes."""
    line = " ".join(printable(fault).split())
    if len(line) > MAX_LINE:
        line = f"{line[: MAX_LINE - 200]} ... {line[-200:]}"
    return line


def _unforeseen(error: Exception) -> str:
    """Say of an error that nobody thought of what a report of it needs."""
    *_, last = traceback.extract_tb(error.__traceback__)
    return (
        f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno}); this is a fault of "
        f"evolve itself, run it again with {DEBUG}=1 for the whole traceback and report that"
    )


_signals: list[int] = []


def _unless_paused(progress: Callable[..., None]) -> Callable[..., None]:
    """Pause at the next event, too: Python drops what a signal raises inside a destructor."""

    def told(*event: Any) -> None:
        if _signals:
            raise PausedError
        progress(*event)

    return told


def _pause(signum: int, frame: Any) -> NoReturn:
    for each in (signal.SIGINT, signal.SIGTERM):  # a second one, whichever, stops at once
        signal.signal(each, _leave)
    _signals.append(signum)
    # An exception out of nowhere may leave a lock behind that something waits for at the end.
    signal.signal(signal.SIGALRM, _leave)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE_S)
    raise PausedError


def _leave(signum: int, frame: Any) -> NoReturn:
    """Go without tidying up: what is finished was recorded when it was finished."""
    os.write(sys.stderr.fileno(), f"{PAUSED}\n".encode())  # print may be at work below this
    os._exit(EXIT_PAUSED)


def main() -> None:
    """Run a command; errors become `error: ...` lines and an exit status."""
    signal.signal(signal.SIGTERM, _pause)
    signal.signal(signal.SIGINT, _pause)
    try:
        status = app(standalone_mode=False)
    except typer.Abort:
        _end(["interrupted"], EXIT_PAUSED)
    except PausedError:
        _say(PAUSED)
        raise SystemExit(EXIT_PAUSED) from None
    except Exception as error:
        if _signals:  # the signal's exception cut something short, a transaction say, which then failed
            _say(PAUSED)
            raise SystemExit(EXIT_PAUSED) from None
        if isinstance(error, MergeError):
            _end(error.faults, EXIT_OTHER if isinstance(error, _NOT_THE_INPUT) else EXIT_INPUT)
        if isinstance(error, TrialError):
            _end([str(error)], EXIT_OTHER)
        # Typer's usage errors; it carries its own copy of click, so they are known by their method.
        if hasattr(error, "format_message"):
            _end([error.format_message()], EXIT_INPUT)
        if os.environ.get(DEBUG):
            raise
        _end([_unforeseen(error)], EXIT_OTHER)
    raise SystemExit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    main()
