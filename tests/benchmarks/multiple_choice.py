"""Multiple choice by one request a question, beside one a choice, and beside the hf engine.

    python tests/benchmarks/multiple_choice.py MODEL [--documents 200] [--rounds 2] [--json]

Questions with four choices, answered by a letter, as in mmlu: which letter two words begin with (224
in all). The resident vLLM engine answers them by its own adapter, and as lm-eval's VLLM class asks
(a request for each choice, with the log-probabilities of the whole prompt), in turn, after a warm-up
of both; the prefix cache is emptied before each, and the best of the rounds counts. Then the hf
engine answers with the same weights. Printed are requests, seconds, on how many documents both
engines score the same and choose the same letter, and how often each letter was chosen.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Pair:
    """What an adapter reads of an lm-eval request."""

    args: tuple[str, str]


TASK = {
    "task": "letters",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": ["A", "B", "C", "D"],
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}],
}


WORDS = {
    "A": "apple anchor arrow attic acorn antler autumn amber",
    "B": "banana bottle bridge button basket beaver barrel blanket",
    "C": "candle carpet castle copper cotton camel cellar cactus",
    "D": "dragon desert doctor dinner diamond donkey dagger drawer",
}


def write_task(folder: Path, n_documents: int) -> None:
    """Write the task and its data: which letter two words begin with."""
    rng = random.Random(0)
    lines = []
    pairs = [
        (answer, *pair) for answer, words in WORDS.items() for pair in permutations(words.split(), 2)
    ]
    for answer, one, other in rng.sample(pairs, n_documents):
        question = (
            f"Is it A, B, C or D? The words 'tiger' and 'table' begin with the letter T. "
            f"The words '{one}' and '{other}' begin with the letter"
        )
        lines.append(json.dumps({"question": question, "answer": "ABCD".index(answer)}))
    data = folder / "letters.jsonl"
    data.write_text("\n".join(lines))
    task = {**TASK, "dataset_kwargs": {"data_files": {"test": str(data)}}}
    (folder / "letters.yaml").write_text(yaml.safe_dump(task))


def start(backend: str, model: Path, dtype: str, folder: Path, options: dict[str, Any]) -> Any:
    """Start a worker that holds the model and has the task's requests built."""
    from evolve.engines import EngineSettings
    from evolve.search_file import ScoringSettings, TaskSpec
    from evolve.workers.worker import Prompting, Worker, WorkerSetup
    from merge_core.merge import merged_tensors
    from merge_core.plan import Sources, merged_config, model_alone
    from merge_core.recipe import Recipe

    recipe = Recipe.parse({**model_alone(str(model)).as_config(), "out_dtype": dtype})
    sources = Sources()
    scoring = ScoringSettings(limit=None, holdout=0, task_paths=[str(folder)])
    settings = EngineSettings(merged_config(recipe, sources), model, options=options)
    prompting = Prompting(str(model), False)
    setup = WorkerSetup(backend, settings, (TaskSpec(name="letters"),), scoring, 0, prompting)
    worker = Worker(setup)
    worker.engine.load(merged_tensors(recipe, sources))
    return worker


def answer(worker: Any) -> tuple[float, list[float]]:
    """Score all documents: seconds, and the value of each."""
    setup = worker.setup
    bank = worker._bank(setup.engine.folder, setup.prompting, "search")
    began = time.perf_counter()
    outcomes = bank.answer("search")["letters"]
    return time.perf_counter() - began, [outcome.value for outcome in outcomes]


def letters(lm: Any, folder: Path) -> str:
    """Return the likeliest letter of each question."""
    pairs = [(question, f" {letter}") for question in questions(folder) for letter in "ABCD"]
    found = [value for value, _ in lm.loglikelihood([Pair(pair) for pair in pairs])]
    rows = [found[i : i + 4] for i in range(0, len(found), 4)]
    return "".join("ABCD"[row.index(max(row))] for row in rows)


def questions(folder: Path) -> list[str]:
    """Read the questions back."""
    return [json.loads(line)["question"] for line in (folder / "letters.jsonl").read_text().splitlines()]


def by_prompt_logprobs(llm: Any, lm: Any, asked: list[str]) -> float:
    """Ask as lm-eval's VLLM class does: each choice a prompt, scored whole; returns seconds."""
    import vllm

    params = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)
    prompts = []
    for question in asked:
        for letter in "ABCD":
            context, continuation = lm._encode_pair(question, f" {letter}")
            prompts.append({"prompt_token_ids": context + continuation})
    began = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    for output, prompt in zip(outputs, prompts, strict=True):
        assert prompt["prompt_token_ids"][-1] in output.prompt_logprobs[-1]
    return time.perf_counter() - began


def measure(model: Path, n_documents: int, dtype: str, n_rounds: int) -> dict[str, Any]:
    """Run all of it and return the figures."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_task(folder, n_documents)
        worker = start("vllm", model, dtype, folder, {"max_model_len": 256})
        engine = worker.engine
        lm = engine.lm(model)
        asked = questions(folder)
        answer(worker)
        by_prompt_logprobs(engine._llm, lm, asked[:8])
        seconds, requests = [], 0
        for _ in range(n_rounds):
            engine._llm.reset_prefix_cache()
            before = lm.n_requests
            taken, ours = answer(worker)
            requests = lm.n_requests - before
            seconds.append(taken)
            engine._llm.reset_prefix_cache()
            seconds.append(by_prompt_logprobs(engine._llm, lm, asked))
        our_letters = letters(lm, folder)
        engine.close()
        worker = start("hf", model, dtype, folder, {})
        taken, theirs = answer(worker)
        their_letters = letters(worker.engine.lm(model), folder)
    return {
        "documents": n_documents,
        "dtype": dtype,
        "requests": requests,
        "seconds": round(min(seconds[0::2]), 3),
        "seconds_by_prompt_logprobs": round(min(seconds[1::2]), 3),
        "seconds_hf": round(taken, 3),
        "times_faster": round(min(seconds[1::2]) / min(seconds[0::2]), 2),
        "same_as_hf": sum(a == b for a, b in zip(ours, theirs, strict=True)) / n_documents,
        "same_letter_as_hf": sum(a == b for a, b in zip(our_letters, their_letters, strict=True))
        / n_documents,
        "letters_chosen": {letter: our_letters.count(letter) for letter in "ABCD"},
    }


def main() -> None:
    """Measure and print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    figures = measure(arguments.model.resolve(), arguments.documents, arguments.dtype, arguments.rounds)
    if arguments.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):<28}{value}")


if __name__ == "__main__":
    main()
