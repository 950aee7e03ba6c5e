"""The tokenizer of a merge: which vocabulary a recipe gives it, and the folder that holds it."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_core.architecture import text_config, with_text_config
from merge_core.checkpoint.locate import locate
from merge_core.checkpoint.write import copy_tokenizer, has_tokenizer
from merge_core.errors import CheckpointError, shown
from merge_core.sources import Sources
from merge_core.tokenizer.loaded import chat_template, load_tokenizer, special_token
from merge_core.tokenizer.templates import TEMPLATE_TEXTS
from merge_core.tokenizer.vocabulary import Vocabulary, build_vocabulary

if TYPE_CHECKING:
    from merge_core.recipe import Recipe


def merged_vocabulary(recipe: Recipe, donor: str, sources: Sources) -> Vocabulary | None:
    """Return the vocabulary that a recipe gives its merge; None where every model has the donor's ids.

    Args:
        donor: the model that config and tensor names come from, which "base" means too.
        sources: the recipe's models, open.

    Raises:
        CheckpointError: a tokenizer cannot be loaded, or a token that the recipe names has no row.
    """
    settings = recipe.vocabulary()
    if settings is None:
        return None
    models = recipe.inputs()
    folders = _folders(recipe, sources)
    n_rows = {model: sources.architecture(model).vocabulary_size or 0 for model in models}
    for model in settings.references():
        if model not in folders:
            folders[model], n_rows[model] = _tokenizer_alone(model, sources)

    def build() -> Vocabulary:
        return build_vocabulary(settings, donor, models, folders, n_rows, sources.tokenizers)

    structure = ("vocabulary", donor, *folders.items(), *n_rows.values(), settings.model_dump_json())
    vocabulary: Vocabulary = sources.remembered(structure, build)
    return vocabulary


def _folders(recipe: Recipe, sources: Sources) -> dict[str, Path]:
    """Return where the tokenizers of the merged models are, in the recipe's order."""
    return {model: sources.architecture(model).checkpoint.tokenizer_folder for model in recipe.inputs()}


def _tokenizer_alone(model: str, sources: Sources) -> tuple[Path, int]:
    """Return the tokenizer's folder of a model that is not merged, and how many rows its tables have."""
    size = text_config(_config_of(model, sources)).get("vocab_size")
    folder = (
        sources.architecture(model).checkpoint.tokenizer_folder if sources.makes(model) else locate(model)
    )
    return folder, size if isinstance(size, int) else 0


def _config_of(model: str, sources: Sources) -> dict[str, Any]:
    """Return a model's config.json; that of a folder with a tokenizer alone is empty."""
    if sources.makes(model):
        return sources.architecture(model).checkpoint.config
    path = locate(model) / "config.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def tokenizer_folder(recipe: Recipe, donor: str, sources: Sources) -> Path:
    """Return a folder with the merge's tokenizer, chat template and generation defaults.

    It is the donor's own where the recipe changes nothing of them; else a temporary one that is made
    once, with the donor's config.json and Python files beside the tokenizer.

    Raises:
        CheckpointError: there is no tokenizer to begin with, or it cannot be changed.
    """
    checkpoint = sources.architecture(donor).checkpoint
    own = checkpoint.tokenizer_folder
    vocabulary = merged_vocabulary(recipe, donor, sources)
    folder = own if vocabulary is None else vocabulary.folder
    is_unchanged = vocabulary is None or vocabulary.is_the_sources
    template = _template(recipe, sources)
    if folder == own and is_unchanged and template is None:
        return own
    if not has_tokenizer(folder):
        raise CheckpointError(
            f"chat_template is {shown(recipe.chat_template)}; {folder} has no tokenizer that it could "
            f"belong to, add its files, or remove chat_template"
        )
    key = json.dumps([str(own), str(folder), vocabulary.key if vocabulary else None, template])
    made, is_new = sources.tokenizers.new_folder(key)
    if is_new:
        copy_tokenizer(folder, made, checkpoint.folder)
        for file in (checkpoint.folder / "config.json", *checkpoint.folder.glob("*.py")):
            shutil.copyfile(file, made / file.name)
        if vocabulary is not None and not is_unchanged:
            _rewrite(vocabulary, made)
        if template is not None:
            _set_template(made, template)
    return made


def _rewrite(vocabulary: Vocabulary, folder: Path) -> None:
    """Give the tokenizer in a folder the tokens of a vocabulary."""
    from tokenizers import Tokenizer

    tokenizer = load_tokenizer(folder)
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise CheckpointError(
            f"the tokenizer in {vocabulary.folder} is written in Python ({type(tokenizer).__name__}); "
            f"tokens can be added to those of the tokenizers library only, use tokenizer_source: base"
        )
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(_without(data, vocabulary.dropped)))
    for name, token in dict(tokenizer.special_tokens_map).items():
        if token in vocabulary.dropped:
            setattr(tokenizer, name, None)
    extra = getattr(tokenizer, "extra_special_tokens", None)
    if isinstance(extra, list) and vocabulary.dropped.intersection(map(str, extra)):
        tokenizer.extra_special_tokens = [t for t in extra if str(t) not in vocabulary.dropped]
    tokenizer.add_tokens(list(vocabulary.appended))
    for file in folder.glob("*"):
        # What the rewritten files replace; older formats would contradict them.
        if file.name in ("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json"):
            file.unlink()
    tokenizer.save_pretrained(folder)
    if load_tokenizer(folder).get_vocab() != vocabulary.ids:
        raise CheckpointError(
            f"tokenizer: the tokenizer of {vocabulary.source!r} did not take the merged vocabulary as it "
            f"is; use tokenizer_source: base, or a model with a tokenizer.json"
        )


def _without(data: dict[str, Any], dropped: frozenset[str]) -> dict[str, Any]:
    """Take tokens, and merge rules that make or need them, out of a tokenizer.json."""
    if not dropped:
        return data
    model = dict(data["model"])
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {token: i for token, i in vocab.items() if token not in dropped}
    else:  # Unigram: [token, score] by id; those without a row are the last
        model["vocab"] = [entry for entry in vocab if entry[0] not in dropped]
    if "merges" in model:
        pairs = [rule.split(" ") if isinstance(rule, str) else rule for rule in model["merges"]]
        model["merges"] = [p for p in pairs if not {p[0], p[1], p[0] + p[1]} & dropped]
    added = [token for token in data["added_tokens"] if token["content"] not in dropped]
    return {**data, "model": model, "added_tokens": added}


def _template(recipe: Recipe, sources: Sources) -> str | None:
    """Return the template that the recipe sets; None where the tokenizer keeps its own."""
    if recipe.chat_template is None:
        return None
    if recipe.chat_template != "auto":
        return TEMPLATE_TEXTS.get(recipe.chat_template, recipe.chat_template)
    folders = _folders(recipe, sources).values()
    found = Counter(template for folder in folders if (template := chat_template(folder)))
    return found.most_common(1)[0][0] if found else None


def _set_template(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    (folder / "chat_template.json").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if config.pop("chat_template", None) is not None:
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def changed_tokens(
    config: dict[str, Any], vocabulary: Vocabulary, donor: str, sources: Sources
) -> dict[str, Any]:
    """Return config.json with the ids of special tokens of the model whose vocabulary it is.

    mergekit leaves the base's ids there, which mean other tokens in another model's vocabulary.
    """
    if vocabulary.source == donor:
        return config
    theirs = _config_of(vocabulary.source, sources)
    for part, change in ((theirs, dict.update), (text_config(theirs), None)):
        ids = {key: value for key, value in part.items() if key.endswith("_token_id") and key in config}
        config = {**config, **ids} if change else with_text_config(config, **ids)
    return config


def prompt_warnings(recipe: Recipe, donor: str, sources: Sources) -> Sequence[str]:
    """Say where the models were trained with another end of text, or another chat template."""
    if sources.architecture(donor).checkpoint.is_state_dict:
        return []
    folders = _folders(recipe, sources)

    def look() -> list[str]:
        with_any = {model: folder for model, folder in folders.items() if has_tokenizer(folder)}
        return list(_differences(with_any, donor, recipe.chat_template is not None))

    found: list[str] = sources.remembered(
        ("prompts", donor, *folders.items(), recipe.chat_template is not None), look
    )
    return found


def _differences(folders: dict[str, Path], donor: str, has_template: bool) -> Iterator[str]:
    eos = {model: special_token(folder, "eos_token") for model, folder in folders.items()}
    if len(set(eos.values())) > 1:
        each = ", ".join(f"{model} {token!r}" for model, token in eos.items())
        yield (
            f"the models end their texts with different tokens ({each}); the merge ends them as its "
            f"tokenizer says, tokenizer_source chooses it"
        )
    templates = {model: chat_template(folder) for model, folder in folders.items()}
    if len(set(templates.values())) > 1 and not has_template:
        others = [model for model, text in templates.items() if text != templates.get(donor)]
        yield (
            f"the chat template of {', '.join(others)} is another than that of {donor}; chat_template: "
            f"auto takes the most common one"
        )
