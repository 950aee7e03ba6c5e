"""`evolve run`: a search, begun or resumed, or rehearsed with `--check`."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evolve.cli.mergekit_flags import CONSENT, MergekitFlags, with_mergekit_flags
from evolve.cli.options import (
    BackendOption,
    DeviceOption,
    JsonOption,
    TaskOption,
    TaskPathOption,
    TrustOption,
    UnsafeOption,
)
from evolve.cli.pause import goes_on_later, unless_paused
from evolve.cli.stderr import EXIT_OTHER, end, quiet_libraries
from evolve.merge_progress import say

if TYPE_CHECKING:
    from evolve.search_file import SearchFile
    from evolve.session import Place
    from evolve.workers.start import Workers


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
    from evolve.session import Place

    search_file = SearchFile.load(search)
    place = Place.of(search_file, storage_path, storage, artifacts)
    _refuse_own_file(search, place.folder)
    paths = [*(task_path or ()), *search_file.scoring.task_paths]
    search_file = search_file.changed(
        tasks=task or (),
        search={
            "n_iterations": n_iterations,
            "sampler": sampler,
            "seed": seed,
            "seed_recipes": [*search_file.search.seed_recipes, *(seed_recipe or ())],
        },
        scoring={
            "backend": backend,
            "limit": limit,
            "task_paths": list(dict.fromkeys(paths)) if task_path else None,
        },
    )
    search_file = mergekit.changed(search_file, backend)
    if search_file.is_mergekit and not mergekit.consent:
        _warn_of_benchmarks(search_file)
    quiet_libraries()
    from evolve import loop
    from evolve.workers import start

    placed = start.Workers(workers, gpus_per_worker, ray_address)
    if check:
        options = {
            "device": device,
            "trust_remote_code": trust_remote_code,
            "allow_unsafe_code": allow_unsafe_code,
        }
        _check(search_file, place, placed, gpu_hour_price, as_json, **options)
        return
    from evolve.progress import ProgressLine
    from evolve.report import print_result, result_json

    goes_on_later()
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
                progress=unless_paused(progress),
                under_way=unless_paused(progress.under_way),
                say=unless_paused(progress.say),
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
        say(f"the search in {folder} is complete; {more}")
    if as_json:
        print(json.dumps(data))
    else:
        print_result(data, str(folder))
    if result.best is None:
        from evolve.candidates import commonest_failure

        failed = result.study.n_failed or not data["ended"]
        why = commonest_failure(result.study.trials()) if failed else f"it ended at {data['ended']}"
        end([f"no candidate completed; {why}"], EXIT_OTHER)
    if mergekit.save_final_model:
        _save_final_model(folder)


def _refuse_own_file(search: Path, folder: Path) -> None:
    """Refuse a user's file in the place of one that the search would write.

    Raises:
        SearchFileError: it would be replaced.
    """
    from evolve.errors import SearchFileError
    from evolve.study import Study

    is_ours = search.resolve().parent == folder.resolve() and search.name in ("search.yml", "best.yml")
    if is_ours and not Study.is_in(folder):
        raise SearchFileError(
            f"--storage-path is {folder}, where the search keeps a {search.name} of its own, which would "
            f"replace yours; give another folder, or rename the file"
        )


def _warn_of_benchmarks(search_file: SearchFile) -> None:
    from evolve.mergekit_file import benchmarks

    if names := benchmarks(task.name for task in search_file.tasks):
        say(
            f"warning: {', '.join(names)}: common benchmarks, whose scores say little of a model that "
            f"was searched on them ({CONSENT} silences this line)"
        )


def _save_final_model(folder: Path) -> None:
    from merge_core.merge import save_merged
    from merge_core.recipe import Recipe

    best = folder / "best.yml"
    out = folder / "final_model"
    save_merged(Recipe.load(best), out, recipe_text=best.read_text(encoding="utf-8"), overwrite=True)
    say(f"wrote {out}")


def _check(
    search_file: SearchFile,
    place: Place,
    workers: Workers,
    price: float | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Try a few candidates and print what the search will take."""
    from evolve import session
    from evolve.check import check_json, print_check
    from evolve.progress import ProgressLine
    from evolve.rehearsal import rehearse
    from evolve.workers.start import start_pool
    from merge_core.machine import process_seconds

    progress = ProgressLine()
    under_way = unless_paused(progress.under_way)
    try:
        plan = session.settled_plan(search_file, place, under_way=under_way, **options)
        session.check(plan, place)
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
