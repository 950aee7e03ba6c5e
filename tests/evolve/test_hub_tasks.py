"""lm-eval's own tasks from a stand-in Hub: totals, documents and prompts equal simple_evaluate's.

The comparison runs in a process of its own, because the Hub's clients read their settings when they
are imported: this file is also the script of that process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

LONG = 4096
FEW = "group: few\ntask:\n  - group: two\n    task: [mmlu_anatomy, mmlu_virology]\n"
FEW += "  - arc_challenge\naggregate_metric_list:\n  - {metric: acc, weight_by_size: %s}\n"
CLOSE = """task: close
dataset_path: openai/gsm8k
dataset_name: main
output_type: generate_until
training_split: train
test_split: test
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{answer}}"
num_fewshot: 1
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 8}
metric_list:
  - metric: !function metrics.closeness
    aggregation: !function metrics.middle
    higher_is_better: true
"""
METRICS = """
import difflib

def closeness(references, predictions, **kwargs):
    return difflib.SequenceMatcher(None, references[0], predictions[0]).ratio()

def middle(values):
    return sorted(values)[len(values) // 2]
"""


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a client of the stand-in Hub."""
    from .. import stand_in_hub  # here, since as a script this file is in no package

    root = tmp_path_factory.mktemp("hub")
    stand_in_hub.make_data(root)
    with stand_in_hub.served(root) as address:
        yield {
            **{k: v for k, v in os.environ.items() if not k.startswith("HF_")},
            "HF_ENDPOINT": address,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path_factory.mktemp("hf")),
            "PYTHONPATH": str(ROOT),
            "TQDM_DISABLE": "1",
            "OMP_NUM_THREADS": "1",
        }


@pytest.fixture(scope="module")
def compare(hub: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Run the cases below in a process of the Hub's client."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "few.yaml").write_text(FEW % "true")
    (folder / "unweighted.yaml").write_text(FEW.replace("few", "unweighted") % "false")
    (folder / "close.yaml").write_text(CLOSE)
    (folder / "metrics.py").write_text(METRICS)

    def run(*cases: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, __file__, str(folder), *cases],
            env=hub,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    return run


@pytest.fixture(scope="module")
def compared(compare: Callable[..., Any]) -> dict[str, Any]:
    return compare(*FAST)


def check(found: dict[str, Any]) -> None:
    """Totals to the last digit, every document's value under every metric and filter, every prompt."""
    for key, task in found.items():
        assert task["ours"] == task["theirs"], key
        assert task["documents"] == task["their_documents"], key
        assert task["prompts"] == task["their_prompts"], key


CHAT = {"apply_chat_template": True, "system_instruction": "Be brief.", "num_fewshot": 2}
# By name: the LM, the tasks, and what scoring says.
CASES: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "plain": ("rules", ["gsm8k", "close", "few", "unweighted", "arc_easy", "hellaswag", "wikitext"], {}),
    "few-shot": ("rules", ["few", "arc_easy"], {"num_fewshot": 2, "system_instruction": "Be brief."}),
    "chat": ("rules", ["few", "close"], CHAT),
    "hf": ("hf", ["few", "arc_easy", "hellaswag", "wikitext", "close"], {}),
    "mmlu": ("hf", ["mmlu", "gsm8k"], {}),
}
FAST = ["plain", "few-shot", "chat", "hf"]


def test_every_kind_of_task_equals_lm_evals_own(compared: dict[str, Any]) -> None:
    found = compared["plain"]
    check(found)
    gsm8k = found["gsm8k"]["ours"]
    assert 0 < gsm8k["exact_match,strict-match"] < gsm8k["exact_match,flexible-extract"] < 1
    assert found["few"]["ours"] != found["unweighted"]["ours"]
    assert set(found["hellaswag"]["ours"]) == {"acc,none", "acc_norm,none"}
    assert set(found["wikitext"]["ours"]) == {
        f"{metric},none" for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte")
    }


def test_it_is_said_which_documents_others_are_measured_on(compared: dict[str, Any]) -> None:
    """lm-eval's own tasks, also within a group of the user's; not a task of the user's own."""
    found = {key: task["public"] for key, task in compared["plain"].items()}
    by_split = {
        "test": ["gsm8k", "few", "unweighted", "arc_easy", "wikitext"],
        "validation": ["hellaswag"],
    }
    expected = {key: split for split, keys in by_split.items() for key in keys}
    assert found == {**expected, "close": None}


def test_few_shot_examples_are_lm_evals_own(compared: dict[str, Any]) -> None:
    check(compared["few-shot"])


def test_a_chat_template_and_system_prompt_are_lm_evals_own(compared: dict[str, Any]) -> None:
    check(compared["chat"])
    prompt = compared["chat"]["close"]["prompts"][0][2][0][0]
    assert prompt.startswith("<system>Be brief.<user>Question: ")
    assert prompt.count("<assistant>") == 3


def test_the_hf_engine_gives_lm_evals_totals(compared: dict[str, Any]) -> None:
    check(compared["hf"])


@pytest.mark.slow
def test_all_of_mmlu_and_gsm8k_with_the_hf_engine(compare: Callable[..., Any]) -> None:
    found = compare("mmlu")["mmlu"]
    check(found)
    assert len(found["mmlu"]["documents"]) == 57 * 20


def main(folder: str, *cases: str) -> None:
    """Run cases; print what they found as one JSON object."""
    found = {case: run_case(folder, *CASES[case]) for case in cases}
    print(json.dumps(found, default=float))


def run_case(folder: str, lm_name: str, names: list[str], scoring: dict[str, Any]) -> dict[str, Any]:
    """Score tasks by a RequestBank and by simple_evaluate; return both."""
    import lm_eval
    import lm_eval.tasks

    from evolve.search_file import ScoringSettings, TaskSpec
    from evolve.tasks import RequestBank, TaskSet

    lm = rule_lm() if lm_name == "rules" else hf_lm()
    own = Path(lm_eval.tasks.__file__).parent
    # Their folders alone: reading all of lm-eval's 14,000 files takes seconds.
    folders = [str(own / n) for n in ("gsm8k", "arc", "hellaswag", "wikitext", "mmlu/default")]
    scoring = {"task_paths": [*folders, folder], "limit": None, "holdout": 0, **scoring}
    specs = [TaskSpec(name=name) for name in names]
    tasks = TaskSet(specs, ScoringSettings(**scoring), 0)
    bank = RequestBank(tasks, lm, scoring.get("apply_chat_template", False), ("search",))
    outcomes = bank.answer("search")
    found: dict[str, Any] = {}
    for task in tasks.tasks:
        name = f"{task.metric},{task.filter}"
        totals = {name: task.score(outcomes[task.key])}
        for metric in outcomes[task.key][0].others:
            spec = TaskSpec(name=task.key, metric=metric)
            (other,) = TaskSet([spec], tasks.scoring, 0).tasks
            picked = [(o.leaf, o.document, o.others[metric]) for o in outcomes[task.key]]
            totals[metric] = other.score([type(outcomes[task.key][0])(*p) for p in picked])
        found[task.key] = {
            "ours": totals,
            "public": tasks.public.get(task.key),
            "documents": sorted(
                [o.leaf.rpartition("/")[2], o.document, metric, value]
                for o in outcomes[task.key]
                for metric, value in [(name, o.value), *o.others.items()]
            ),
            "prompts": sorted(
                [leaf.name.rpartition("/")[2], number, [list(i.args) for i in requests]]
                for leaf in task.leaves
                for number, requests in (
                    (n, bank._instances("search")[leaf.name, n]) for n in leaf.documents["search"]
                )
            ),
        }
    for name, its in found.items():  # one by one: the groups share leaves
        results = lm_eval.simple_evaluate(
            model=lm,
            tasks=[name],
            task_manager=lm_eval.tasks.TaskManager(
                include_path=scoring["task_paths"], include_defaults=False
            ),
            num_fewshot=scoring.get("num_fewshot"),
            apply_chat_template=scoring.get("apply_chat_template", False),
            system_instruction=scoring.get("system_instruction"),
            bootstrap_iters=0,
        )
        totals = results.get("groups", {}).get(name) or results["results"][name]
        its["theirs"] = {key: totals[key] for key in its["ours"]}
        rows = [row | {"leaf": leaf} for leaf, rows in results["samples"].items() for row in rows]
        its["their_documents"] = sorted(
            [row["leaf"], row["doc_id"], f"{metric},{row['filter']}", row[metric]]
            for row in rows
            for metric in row["metrics"]
        )
        its["their_prompts"] = sorted(
            [row["leaf"], row["doc_id"], [list(a) for a in row["arguments"]]]
            for row in rows
            if row["filter"] == rows[0]["filter"]
        )
    return found


def rule_lm() -> Any:
    """A model by rules: some sums right, in one format or the other; likelihoods by hash."""
    import hashlib
    import re

    from lm_eval.api.model import LM

    class RuleLM(LM):
        tokenizer_name = "rules"

        def apply_chat_template(self, history: Any, add_generation_prompt: bool = True) -> str:
            turns = [f"<{turn['role']}>{turn['content']}" for turn in history]
            return "".join([*turns, "<assistant>" * add_generation_prompt])

        def loglikelihood(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            return [(-number(*r.args), number(*r.args) < 1) for r in requests]

        def loglikelihood_rolling(self, requests: Any, **kwargs: Any) -> list[float]:
            return [-len(r.args[0]) * number(*r.args) for r in requests]

        def generate_until(self, requests: Any, **kwargs: Any) -> list[str]:
            return [answer(r.args[0]) for r in requests]

    def number(*texts: str) -> float:
        digest = hashlib.sha256("|".join(texts).encode()).digest()
        return 0.1 + int.from_bytes(digest[:4], "big") / 2**30

    def answer(prompt: str) -> str:
        a, b = map(int, re.findall(r"Sam has (\d+) \w+ and buys (\d+) more", prompt)[-1])
        kind = int(number(prompt) * 100) % 3
        return ("", f"it is {a + b}", f"they are {a + b}\n#### {a + b}")[kind]

    return RuleLM()


def hf_lm() -> Any:
    """The hf engine's view of a tiny random Llama in float32."""
    import tempfile

    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from evolve.engines.hf import HfEngine

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "configs/quickstart/models/base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=LONG,
        eos_token_id=tokenizer.eos_token_id,
        **sizes,
    )
    folder = tempfile.mkdtemp()
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return HfEngine.of(folder, "cpu").lm()


if __name__ == "__main__":
    main(*sys.argv[1:])
