"""The recipe's `tokenizer:` section and `chat_template:`, as mergekit writes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from merge_core.errors import nearest, shown
from merge_core.reference import Reference, reference_text

# Names of the chat templates in templates.py.
TEMPLATES = ("alpaca", "chatml", "exaone", "llama3", "mistral")
# A shorter text is taken for a name, as in mergekit.
_SHORTEST_JINJA = 20


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _token_source(value: Any) -> Any:
    """Read MODEL, as text or as a mapping, as {kind: model, model: MODEL}."""
    if isinstance(value, str) or (isinstance(value, Mapping) and "kind" not in value):
        return {"kind": "model", "model": reference_text(value)}
    if not isinstance(value, Mapping):
        raise ValueError(
            "a token's source is a model, {kind: zero}, or {kind: model_token, model: ..., token: ...}; "
            "name one"
        )
    if value["kind"] not in ("zero", "model_token"):
        raise ValueError(f"kind {shown(value['kind'])} is not known; it must be zero or model_token")
    return value


class TokenSource(_Part):
    """Where a token's row comes from.

    Attributes:
        kind: "model": the row of the same token in `model`; "model_token": that of `token`, or of
            the id `token_id`, in `model`; "zero": zeros.
    """

    kind: Literal["model", "model_token", "zero"]
    model: Reference | None = None
    token: str | None = None
    token_id: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _is_whole(self) -> TokenSource:
        given = [key for key in ("model", "token", "token_id") if getattr(self, key) is not None]
        if self.kind == "zero" and given:
            raise ValueError(f"kind zero has no {' or '.join(given)}; remove it")
        if self.kind == "model_token" and (self.model is None or len(given) != 2):
            raise ValueError("kind model_token needs model, and either token or token_id; give these")
        return self

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler) -> Any:
        return self.model if self.kind == "model" else handler(self)


class TokenEntry(_Part):
    """One token of `tokenizer.tokens`.

    Attributes:
        source: the row that models without the token get.
        force: whether those with it get that row too.
    """

    source: Annotated[TokenSource, BeforeValidator(_token_source)]
    force: bool = False


class TokenizerSettings(_Part):
    """Which tokens the merged model has, and where their rows come from.

    Attributes:
        source: "base", "union", or the model whose vocabulary it is.
        tokens: rows of single tokens; those that the vocabulary lacks are added to it.
        pad_to_multiple_of: what the number of rows is rounded up to.
    """

    source: Reference = "union"
    tokens: dict[str, TokenEntry] = Field(default_factory=dict)
    pad_to_multiple_of: int | None = Field(default=None, ge=1)

    def references(self) -> list[str]:
        """List the models that the section names, each once."""
        found = [] if self.source in ("base", "union") else [self.source]
        found += [e.source.model for e in self.tokens.values() if e.source.model is not None]
        return list(dict.fromkeys(found))


def checked_template(value: str) -> str:
    """Check `chat_template`: "auto", a name of TEMPLATES, or a template in Jinja.

    Raises:
        ValueError: none of these.
    """
    if value in ("auto", *TEMPLATES) or (len(value) >= _SHORTEST_JINJA and "{" in value):
        return value
    raise ValueError(
        f"it must be auto, a template's name or its text in Jinja; {nearest(value, ('auto', *TEMPLATES))}"
    )


def known_keys(section: Any) -> dict[str, Iterable[str]]:
    """Say which keys exist at each place of a `tokenizer:` section, below the tokens' own names."""
    known: dict[str, Iterable[str]] = {"tokenizer": TokenizerSettings.model_fields}
    tokens = section.get("tokens") if isinstance(section, Mapping) else None
    for token in tokens if isinstance(tokens, Mapping) else ():
        known[f"tokenizer.tokens.{token}"] = TokenEntry.model_fields
        known[f"tokenizer.tokens.{token}.source"] = TokenSource.model_fields
    return known
