"""`evolve merge`: the command with mergekit-yaml's flags, its notices, and its progress."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evolve.merge_progress import duration, progress, say
from evolve.redaction import redacted, secret_faults
from merge_core.errors import OutputError, RecipeError
from merge_core.machine import process_seconds

if TYPE_CHECKING:
    from merge_core.estimate import Estimate
    from merge_core.plan import Planned, Sources
    from merge_core.recipe import Recipe

# mergekit's flags that change nothing here, and why.
_NOTHING_TO_DO = {
    "--trust-remote-code": "a merge reads names, shapes and numbers, and runs no code of a model",
    "--lora-merge-cache": "adapters are merged tensor by tensor, and no merged model is written",
    "--lora-merge-dtype": "adapters are merged in float32 and rounded once, to the recipe's dtype",
    "--low-cpu-memory": "each tensor goes to the disk as soon as it is merged",
    "--read-to-gpu": "weights are mapped from their files and go to the device tensor by tensor",
    "--multi-gpu": "the arithmetic runs on one device; name it with --device",
    "--lazy-unpickle": "weights are always read one tensor at a time",
    "--async-write": "tensors are always merged ahead while others are written",
    "--write-threads": "tensors are always merged ahead while others are written",
    "--clone-tensors": "a layer that occurs twice is always written twice",
    "--no-safe-serialization": "weights are always written as safetensors",
}

Flag = typer.Option


def merge(
    recipe: Annotated[Path, typer.Argument(help="merge config", metavar="RECIPE.yml")],
    out: Annotated[Path, typer.Argument(help="folder for the model", metavar="OUT")],
    strict: Annotated[bool, Flag("--strict", help="unknown parameters are errors")] = False,
    overwrite: Annotated[bool, Flag("--overwrite", help="replace OUT if it exists")] = False,
    check: Annotated[
        bool, Flag("--check", help="check everything, foretell disk, memory and time; write nothing")
    ] = False,
    intermediate_dir: Annotated[
        Path | None,
        Flag("--intermediate-dir", "-I", help="write the results of named documents too", metavar="DIR"),
    ] = None,
    push_to_hub: Annotated[
        str | None, Flag(help="upload OUT to this Hub repository as well", metavar="REPO")
    ] = None,
    private: Annotated[bool, Flag("--private", help="make that repository private")] = False,
    random_seed: Annotated[int | None, Flag(help="seed of random masks; overrides the recipe")] = None,
    copy_tokenizer: Annotated[bool, Flag(help="copy the tokenizer files")] = True,
    write_model_card: Annotated[bool, Flag(help="write README.md")] = True,
    out_shard_size: Annotated[str, Flag(help="bytes a file: 5B, 500M; 0 = one file")] = "5B",
    allow_crimes: Annotated[bool, Flag(help="mix architectures")] = False,
    unsafe_truncate_embeddings: Annotated[
        bool, Flag(help="cut vocabularies to the smallest; token ids are taken to be equal")
    ] = False,
    tensor_intersection: Annotated[
        bool, Flag("--tensor-intersection", "-i", help="files of weights: only the tensors all have")
    ] = False,
    tensor_union: Annotated[
        bool, Flag("--tensor-union", "-u", help="files of weights: the tensors that any has")
    ] = False,
    transformers_cache: Annotated[
        Path | None, Flag(help="where downloaded models are kept", metavar="DIR")
    ] = None,
    cuda: Annotated[bool, Flag(help="the same as --device cuda")] = False,
    device: Annotated[str | None, Flag(help="where the arithmetic runs: cpu, cuda, auto")] = None,
    num_threads: Annotated[
        int | None, Flag("--num-threads", "-j", min=1, help="threads that merge")
    ] = None,
    verbose: Annotated[
        int, Flag("--verbose", "-v", count=True, help="say more; twice: each tensor", metavar="")
    ] = 0,
    quiet: Annotated[
        bool, Flag("--quiet/--no-quiet", "-q", help="only errors and warnings on stderr")
    ] = False,
    gpu_rich: Annotated[
        bool, Flag("--gpu-rich", help="--cuda --low-cpu-memory --read-to-gpu --multi-gpu")
    ] = False,
    trust_remote_code: Annotated[bool, Flag(help="no effect: no model's code runs")] = False,
    lora_merge_cache: Annotated[str | None, Flag(help="no effect", metavar="DIR")] = None,
    lora_merge_dtype: Annotated[str | None, Flag(help="no effect")] = None,
    low_cpu_memory: Annotated[bool, Flag(help="no effect: tensors never pile up")] = False,
    read_to_gpu: Annotated[bool, Flag(help="no effect")] = False,
    multi_gpu: Annotated[bool, Flag(help="no effect: one device")] = False,
    lazy_unpickle: Annotated[bool, Flag(help="no effect: always so")] = False,
    async_write: Annotated[bool, Flag(help="no effect: always so")] = False,
    write_threads: Annotated[int | None, Flag(help="no effect")] = None,
    clone_tensors: Annotated[bool, Flag(help="no effect: always so")] = False,
    safe_serialization: Annotated[bool, Flag(help="no effect: always so")] = True,
) -> None:
    """Merge models as a recipe says, and write the result.

    `evolve methods` lists the merge methods and their parameters. Flags are mergekit-yaml's.
    """
    given = {
        "--trust-remote-code": trust_remote_code,
        "--lora-merge-cache": lora_merge_cache,
        "--lora-merge-dtype": lora_merge_dtype,
        "--low-cpu-memory": low_cpu_memory or gpu_rich,
        "--read-to-gpu": read_to_gpu or gpu_rich,
        "--multi-gpu": multi_gpu or gpu_rich,
        "--lazy-unpickle": lazy_unpickle,
        "--async-write": async_write,
        "--write-threads": write_threads is not None,
        "--clone-tensors": clone_tensors,
        "--no-safe-serialization": not safe_serialization,
    }
    if private and not push_to_hub:
        raise OutputError("--private is given without --push-to-hub; name the repository to make")
    if tensor_intersection and tensor_union:
        raise RecipeError("--tensor-intersection and --tensor-union are given; use one of them")
    shard_bytes = _bytes("--out-shard-size", out_shard_size)
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if transformers_cache:
        # huggingface_hub reads it once, when it is imported.
        os.environ["HF_HUB_CACHE"] = str(transformers_cache.expanduser().absolute())

    from merge_core.card import NOTICE, head_notices
    from merge_core.checkpoint.write import check_output, has_tokenizer
    from merge_core.recipe import Recipe, load_yaml

    data = load_yaml(recipe)
    if faults := secret_faults(data):
        raise RecipeError(faults)
    if isinstance(data, dict) and random_seed is not None:
        data["random_seed"] = random_seed
        data["intermediate"] = {
            name: {**document, "random_seed": random_seed}
            for name, document in data.get("intermediate", {}).items()
        }
    parsed = Recipe.parse(data, strict)
    check_output(out, overwrite, [recipe])
    results = _results(parsed, intermediate_dir)
    for folder in results:
        check_output(folder, overwrite, [recipe])
    if push_to_hub:
        from evolve.hub import check_push

        push_to_hub = check_push(push_to_hub)

    import torch

    from evolve.engines import resolve_device
    from merge_core.estimate import estimate
    from merge_core.machine import give_back_freed_memory
    from merge_core.merge import save_merged
    from merge_core.plan import Sources, donor, plan_merge, unmatched_filters

    plan_options: dict[str, Any] = {
        "allow_crimes": allow_crimes,
        "unsafe_truncate_embeddings": unsafe_truncate_embeddings,
        "tensors": "intersection" if tensor_intersection else "union" if tensor_union else "same",
    }
    device = device or ("cuda" if cuda or gpu_rich else "cpu")
    device = resolve_device(None if device == "auto" else device)
    if num_threads:
        torch.set_num_threads(num_threads)
    for flag in (flag for flag, is_given in given.items() if is_given and not quiet):
        say(f"notice: {flag} has nothing to do: {_NOTHING_TO_DO[flag]}")
    give_back_freed_memory()
    sources = Sources()
    plan = plan_merge(parsed, sources, **plan_options)
    for folder in (out, *results):
        check_output(folder, overwrite, sources.folders(parsed))
        if folder.resolve() in [path.resolve() for path in sources.folders(parsed)]:
            say(f"warning: {folder} is one of the models; it is replaced by the merge at the end")
    for warning in (*parsed.check()[1], *plan.warnings, *unmatched_filters(parsed, plan)):
        say(f"warning: {warning}")
    checkpoint = sources.within(parsed, **plan_options).architecture(donor(parsed)).checkpoint
    folder, copy_tokenizer = checkpoint.tokenizer_folder, copy_tokenizer and not checkpoint.is_state_dict
    if copy_tokenizer and not has_tokenizer(folder):
        say(f"warning: {folder} has no tokenizer files; the merged model will have none")
    if verbose:
        _describe(parsed, sources, plan, device)
    needs = estimate(
        parsed,
        sources,
        out,
        shard_bytes=shard_bytes,
        with_tokenizer=copy_tokenizer,
        device=device,
        timed=check,
        start_up_s=process_seconds(),
        **plan_options,
    )
    if check:
        _print_check(needs)
    needs.check(out)
    if check:
        print("the merge can begin")
        return
    from evolve.provenance import read_evaluation

    evaluation, changed = read_evaluation(recipe.read_text(encoding="utf-8"), parsed)
    if changed and write_model_card:
        say(f"warning: {changed}")
    for folder, result in results.items():
        save_merged(
            result,
            folder,
            sources=sources,
            overwrite=overwrite,
            shard_bytes=shard_bytes,
            with_tokenizer=copy_tokenizer,
            with_card=write_model_card,
            device=device,
            **plan_options,
        )
        print(f"wrote {folder}")
    text = redacted(recipe.read_text(encoding="utf-8"))
    if random_seed is not None:  # another recipe than the file's, about which the same is to be known
        text = "".join(f"# {NOTICE}{notice}\n" for notice in head_notices(text)) + parsed.to_yaml()
    with progress(plan, sum(planned.n_bytes for planned in plan), quiet, verbose) as on_tensor:
        save_merged(
            parsed,
            out,
            sources=sources,
            recipe_text=text,
            overwrite=overwrite,
            shard_bytes=shard_bytes,
            with_tokenizer=copy_tokenizer,
            with_card=write_model_card,
            evaluation=evaluation,
            device=device,
            on_tensor=on_tensor,
            **plan_options,
        )
    print(f"wrote {out}")
    if push_to_hub:
        from evolve.hub import push

        print(f"pushed to {push(out, push_to_hub, private)}")


def _results(recipe: Recipe, folder: Path | None) -> dict[Path, Recipe]:
    """List the intermediate results that are to be written, and where."""
    if folder is None:
        return {}
    if not recipe.intermediate:
        raise RecipeError(
            f"--intermediate-dir is {folder}, and the recipe has no named documents; leave it out"
        )
    return {folder / name: recipe.result(name) for name in recipe.results()}


def _bytes(option: str, text: str) -> int:
    """Read a size such as 5B, 500M or 1000000 (decimal units, B for 10^9 as in mergekit)."""
    units = {"K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}
    unit = units.get(text[-1:].upper())
    try:
        size = float(text[:-1]) * unit if unit else int(text)
        if size >= 0:
            return int(size)
    except (ValueError, OverflowError):
        pass
    raise RecipeError(f"{option} is {text!r}; it must be a number of bytes such as 5B, 500M or 0")


def _describe(recipe: Recipe, sources: Sources, plan: Sequence[Planned], device: str) -> None:
    import torch

    methods = dict.fromkeys(planned.method for planned in plan)
    for reference in recipe.references():
        model = sources.architecture(reference)
        say(
            f"{reference}: {model.checkpoint.folder}, {len(model.checkpoint.tensors)} tensors, "
            f"{model.n_layers} layers"
        )
    say(
        f"{', '.join(methods)} in {recipe.dtype or 'the dtype of the models'} on {device}, "
        f"{torch.get_num_threads()} threads, seed {recipe.random_seed}"
    )


def _print_check(needs: Estimate) -> None:
    from merge_core.machine import in_units

    available = "unknown" if needs.available_bytes is None else in_units(needs.available_bytes)
    seconds = "unknown" if needs.seconds is None else duration(needs.seconds)
    for name, text in (
        ("architecture", f"{needs.architecture}, {needs.n_layers} layers, {needs.n_tensors} tensors"),
        ("models", ", ".join(needs.models)),
        ("read", in_units(needs.read_bytes)),
        ("disk", f"{in_units(needs.write_bytes)} of {in_units(needs.free_bytes)} free"),
        ("memory", f"{in_units(needs.memory_bytes)} private, of {available} available"),
        ("time", seconds),
    ):
        print(f"{name + ':':<14}{text}")
