"""A vLLM engine that holds a base once and serves many candidates at a time, each as an adapter.

Candidates that are linear merges of adapters of one base are adapters of it themselves
(`merge_core.combined`), and vLLM answers requests of several adapters in one batch. Their requests go
into one call: each candidate's scoring runs until it asks the engine, and waits there for the others'.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from greenlet import getcurrent, greenlet
from vllm.lora.request import LoRARequest

from evolve.engines import EngineSettings, vllm_cpu_adapters
from evolve.engines.vllm import VllmEngine
from evolve.engines.vllm_lm import VllmLM, forget_requests
from evolve.errors import TrialEngineError
from merge_core.combined import CombinedAdapter
from merge_core.recipe import Recipe
from merge_core.sources import Sources

T = TypeVar("T")
# Turns the engine's view into that of one candidate.
AsCandidate = Callable[[VllmLM], VllmLM]
_Asked = tuple[LoRARequest, list[Any], list[Any]]
# The ranks that vLLM can make room for.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


class VllmAdapters(VllmEngine):
    """An engine over one base with room for adapters.

    Args:
        settings: of the base; adapted models have its shape.
        size: how many adapters are served at once.
        examples: adapters that together have every module that candidates change, and the largest rank.
        base: the recipe that gives the base's weights.
        sources: open checkpoints.

    Raises:
        SearchFileError, TrialEngineError: vLLM cannot start, or cannot adapt this model.
    """

    def __init__(
        self,
        settings: EngineSettings,
        size: int,
        examples: Sequence[CombinedAdapter],
        base: Recipe,
        sources: Sources,
    ) -> None:
        if settings.device == "cpu":
            vllm_cpu_adapters.install()
        modules = {module.rpartition(".")[2] for example in examples for module in example.factors}
        super().__init__(
            settings,
            enable_lora=True,
            max_loras=size,
            max_lora_rank=room_for(max(example.rank for example in examples)),
            # No room on the output head: vLLM cannot score the tokens of a prompt through it.
            lora_target_modules=sorted(modules),
        )
        self._n_held = 0
        self._held: list[LoRARequest] = []
        self._adapters = tempfile.TemporaryDirectory(prefix="evolve-adapters-")
        self.load_recipe(base, sources)
        self.hold(examples[0])
        self.forget()

    def hold(self, adapter: CombinedAdapter) -> LoRARequest:
        """Give an adapter a place in the engine, of which there are `size` until `forget`.

        Raises:
            TrialEngineError: vLLM cannot apply it.
        """
        # vLLM tells adapters apart by number, and what it has cached of their prompts by name and
        # path, whatever weights they hold: none of the three is ever used again.
        self._n_held += 1
        name = f"candidate-{self._n_held}"
        folder = Path(self._adapters.name) / name
        adapter.save(folder)
        request = LoRARequest(name, self._n_held, str(folder))
        try:
            self._llm.llm_engine.add_lora(request)
        except Exception as error:
            reason = f"vLLM cannot load it as an adapter ({str(error) or type(error).__name__:.200})"
            raise TrialEngineError(reason) from error
        finally:
            shutil.rmtree(folder)
        self._held.append(request)
        (unplaced,) = self._on_ranks("evolve_unplaced", request.lora_int_id)
        if unplaced:
            raise TrialEngineError(f"vLLM has no place for an adapter's {', '.join(unplaced[:3])}")
        return request

    def forget(self) -> None:
        """Take all adapters out, with what was cached of their prompts.

        Raises:
            TrialEngineError: vLLM keeps the cache.
        """
        for request in self._held:
            self._llm.llm_engine.remove_lora(request.lora_int_id)
        self._held.clear()
        if not self._llm.reset_prefix_cache():
            raise TrialEngineError("vLLM kept cached prefixes of the previous candidates")

    def together(
        self, scorings: Sequence[tuple[LoRARequest, Callable[[AsCandidate], T]]]
    ) -> list[T | Exception]:
        """Score several candidates, whose requests are answered in common calls.

        Each scoring runs in turn until it asks the engine; when all that are left are asking, one call
        answers them. So what meets in a batch depends on no clock.

        Args:
            scorings: for each candidate its adapter, and a function that scores it.

        Returns:
            What each function returned, or raised.
        """
        hub = getcurrent()
        results: list[Any] = [None] * len(scorings)

        def run(i: int) -> None:
            request, score = scorings[i]

            def generate(inputs: list[Any], params: list[Any]) -> Sequence[Any]:
                answers: Sequence[Any] = hub.switch((request, inputs, params))
                return answers

            try:
                results[i] = score(lambda lm: lm.through(generate))
            except Exception as error:
                results[i] = error

        tasks = [greenlet(run) for _ in scorings]
        asking = [(task, task.switch(i)) for i, task in enumerate(tasks)]
        while asking := [(task, asked) for task, asked in asking if not task.dead]:
            answers = self._answers([asked for _, asked in asking])
            asking = [
                (task, task.throw(answer) if isinstance(answer, Exception) else task.switch(answer))
                for (task, _), answer in zip(asking, answers, strict=True)
            ]
        return results

    def _answers(self, asked: Sequence[_Asked]) -> list[list[Any] | Exception]:
        """Have the engine answer several candidates in one call, or each alone where that fails."""
        try:
            outputs = iter(
                self._llm.generate(
                    [prompt for _, inputs, _ in asked for prompt in inputs],
                    [each for _, _, params in asked for each in params],
                    use_tqdm=False,
                    lora_request=[request for request, inputs, _ in asked for _ in inputs],
                )
            )
        except Exception as error:
            forget_requests(self._llm)
            return [error] if len(asked) == 1 else [self._answers([each])[0] for each in asked]
        return [list(islice(outputs, len(inputs))) for _, inputs, _ in asked]

    def close(self) -> None:
        """Stop the engine, its ranks included, and give back its memory."""
        super().close()
        self._adapters.cleanup()


def room_for(rank: int) -> int:
    """Return the room that vLLM makes for adapters of a rank.

    Raises:
        TrialEngineError: it makes none so large.
    """
    for room in RANKS:
        if rank <= room:
            return room
    raise TrialEngineError(
        f"the candidates' adapters have rank {rank}, and vLLM serves {RANKS[-1]} at most; use fewer or "
        f"smaller ones, or search.adapters_at_once: none"
    )
