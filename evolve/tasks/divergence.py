"""`kl_divergence`: how far a candidate's next-token distributions are from a reference model's.

For a reference P and a candidate Q the score is the mean over positions of

    KL(P || Q) = sum over tokens t of P(t) * (log P(t) - log Q(t))

in nats, less is better. Of each distribution the TOP tokens that P finds likeliest are kept, and
all the rest as one bucket. Merging outcomes into a bucket can only lower a KL divergence (the
data-processing inequality), so the score is a lower bound of the full divergence; with most of P
in its top 64 tokens it is a close one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from evolve.errors import TrialEngineError
from evolve.search_file import TaskSpec
from evolve.tasks.draw import Leaf, Split
from evolve.tasks.measures import Mean
from evolve.tasks.outcome import Outcome
from merge_core.errors import CheckpointError
from merge_core.plan import merged_config, model_alone, plan_merge

if TYPE_CHECKING:
    from lm_eval.api.model import LM

    from merge_core.recipe import Recipe
    from merge_core.sources import Sources

TOP = 64
DEFAULT_POSITIONS = 8
# Below what float32 log-probabilities resolve: the bucket of the rest is never thought emptier.
_LEAST = 1e-9


@dataclass(frozen=True)
class Divergence(Mean):
    """An entry `kl_divergence`; a document's value is the mean over its positions.

    Attributes:
        reference: the model P.
        positions: next-token distributions a document, at most.
    """

    reference: str = ""
    positions: int = DEFAULT_POSITIONS

    is_asked: ClassVar[bool] = False

    @property
    def is_raced(self) -> bool:
        """Tell that the reference was asked about all documents together."""
        return False


def coarse_divergence(p: Mapping[int, float], q: Mapping[int, float]) -> float:
    """Return KL(P || Q) in nats over some tokens and one bucket of all others.

    Args:
        p, q: natural log-probabilities of the same tokens.
    """
    total = math.fsum(math.exp(logprob) * (logprob - q[token]) for token, logprob in p.items())
    rest_p = max(1.0 - math.fsum(map(math.exp, p.values())), _LEAST)
    rest_q = max(1.0 - math.fsum(math.exp(q[token]) for token in p), _LEAST)
    return max(total + rest_p * math.log(rest_p / rest_q), 0.0)


@dataclass
class References:
    """What reference models find likely after the beginnings of documents.

    Args:
        tasks: the entries; their reference's distributions are learned once for each LM.
        lm: tokenises; answers for the candidate.
        splits: whose documents are learned.
    """

    tasks: Sequence[Divergence]
    lm: LM
    splits: Sequence[Split]
    _learned: dict[tuple[str, Split], dict[tuple[int, ...], dict[int, float]]] = field(
        default_factory=dict
    )
    _cut: dict[tuple[str, int, int], list[tuple[int, ...]]] = field(default_factory=dict)

    def needed(self) -> list[str]:
        """Name the references that are still to be learned."""
        known = {key for key, _ in self._learned}
        return list(dict.fromkeys(task.reference for task in self.tasks if task.key not in known))

    def learn(self, reference: str, lm: LM) -> None:
        """Ask the LM, which holds the reference's weights now, for its distributions."""
        for task in self.tasks:
            for split in self.splits if task.reference == reference else ():
                # Asked as candidates will be, so that rounding is the same, too.
                prompts = self._asked(task, split)
                found = _ask(lm, prompts, min(TOP, len(lm.tokenizer)))
                self._learned[task.key, split] = dict(zip(prompts, found, strict=True))

    def outcomes(self, task: Divergence, split: Split) -> list[Outcome]:
        """Hold the candidate, whose weights the LM has now, against a reference.

        Raises:
            TrialEngineError: the engine gives no distributions.
        """
        learned = self._learned[task.key, split]
        prompts = self._asked(task, split)
        wanted = [list(learned[prompt]) for prompt in prompts]
        found = dict(zip(prompts, _ask(self.lm, prompts, wanted), strict=True))
        outcomes = []
        for leaf in task.leaves:
            for number in leaf.documents[split]:
                each = [
                    coarse_divergence(learned[prompt], found[prompt])
                    for prompt in self._prompts(task, leaf, number)
                ]
                outcomes.append(Outcome(leaf.name, number, math.fsum(each) / len(each)))
        return outcomes

    def _asked(self, task: Divergence, split: Split) -> list[tuple[int, ...]]:
        """List the different prompts of a split; in this order beginnings of one text adjoin."""
        return sorted(
            {
                prompt
                for leaf in task.leaves
                for number in leaf.documents[split]
                for prompt in self._prompts(task, leaf, number)
            }
        )

    def _prompts(self, task: Divergence, leaf: Leaf, number: int) -> list[tuple[int, ...]]:
        """Return the document's beginnings, evenly spread, as token ids; cut once."""
        place = leaf.name, number, task.positions
        if place not in self._cut:
            # One token of the context is for the answer.
            tokens = self.lm.tok_encode(leaf.docs[number]["text"])[: self.lm.max_length - 1]
            if not tokens:
                raise TrialEngineError(f"{leaf.name}, document {number}: the tokenizer finds no token")
            steps = range(1, task.positions + 1)
            lengths = sorted({max(1, round(len(tokens) * i / task.positions)) for i in steps})
            self._cut[place] = [tuple(tokens[:length]) for length in lengths]
        return self._cut[place]


def _ask(lm: LM, prompts: Sequence[tuple[int, ...]], wanted: Any) -> list[dict[int, float]]:
    """Ask for next-token log-probabilities: of the `wanted` tokens a prompt, or of so many."""
    if not prompts:
        return []
    if not hasattr(lm, "next_token_logprobs"):
        raise TrialEngineError("kl_divergence: this engine gives no next-token distributions")
    found: list[dict[int, float]] = lm.next_token_logprobs([list(p) for p in prompts], wanted)
    return found


def reference_faults(tasks: Sequence[Any], recipe: Recipe, sources: Sources) -> list[str]:
    """List references that the engine of a merge cannot hold: of another shape or vocabulary.

    Args:
        tasks: entries of a search; only those of `kl_divergence` are looked at.
        recipe: any candidate's; it plans without faults.
    """
    faults = []
    shapes = None
    for task in tasks:
        if not isinstance(task, Divergence):
            continue
        field = f"{task.key}: reference is {task.reference!r}"
        try:
            alone = model_alone(task.reference, recipe)
            its = {tensor.name: tensor.shape for tensor in plan_merge(alone, sources)}
            if shapes is None:
                shapes = {tensor.name: tensor.shape for tensor in plan_merge(recipe, sources)}
                kind = merged_config(recipe, sources).get("model_type")
        except CheckpointError as error:
            faults += [f"{field}; {fault}" for fault in error.faults]
            continue
        if merged_config(alone, sources).get("model_type") != kind or its != shapes:
            name = next((n for n in shapes if its.get(n) != shapes[n]), None) or next(iter(its))
            faults.append(
                f"{field}, whose tensors are not those of the merge ({name}: "
                f"{_dimensions(its.get(name))} instead of {_dimensions(shapes.get(name))}); name a "
                f"model of the same architecture and vocabulary"
            )
    return faults


def _dimensions(shape: Sequence[int] | None) -> str:
    return "none" if shape is None else "x".join(map(str, shape))


def make_divergence(spec: TaskSpec, leaf: Leaf) -> Divergence:
    """Make the objective of an entry `kl_divergence` over the documents of a text."""
    assert spec.reference is not None
    return Divergence(
        key=spec.name,
        weight=spec.weight,
        metric=spec.name,
        filter="none",
        leaves=(leaf,),
        higher_is_better=False,
        reference=spec.reference,
        positions=spec.positions or DEFAULT_POSITIONS,
    )
