"""Tasks that go wrong, over tiny models: what a search must survive."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from evolve.search_file import SearchFile

WORDS = ["kxuep", "euoub", "yfwlx", "abcde", "bcaed", "zzyxw", "qwert", "tyuio", "asdfg", "zxcvb"]
FUNCTIONS = """
def raises(doc, results):
    raise ZeroDivisionError("no such day")

def nan(doc, results):
    return {"m": float("nan")}

def nothing(doc, results):
    return {"m": None}

def first_letter(doc, results):
    return {"m": float(results[0][0] == "a")}
"""
ACCURACY = {"metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}
CHOICE = {"output_type": "multiple_choice", "doc_to_choice": ["a", "b"], "doc_to_target": 0} | ACCURACY
OWN = [{"metric": "m", "aggregation": "mean", "higher_is_better": True}]
ALL_LETTERS = {"until": list("abcdefghijklmnopqrstuvwxyz:, \n"), "max_gen_toks": 7}

# By name: what differs from a task that sorts letters.
TASKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "without_end": {"generation_kwargs": {"until": [], "max_gen_toks": 40}},
    "without_limit": {"generation_kwargs": {"until": []}},  # lm-eval's own is 256 tokens
    "long_prompt": {"doc_to_text": "long"},
    "long_question": CHOICE | {"doc_to_text": "long"},
    "long_option": CHOICE | {"doc_to_choice": ["a" * 300, "b"]},
    "empty_answer": {"generation_kwargs": ALL_LETTERS},
    "raises": {"process_results": "!function f.raises", "metric_list": OWN},
    "nan": {"process_results": "!function f.nan", "metric_list": OWN},
    "nothing": {"process_results": "!function f.nothing", "metric_list": OWN},
    "first_letter": {
        "process_results": "!function f.first_letter",
        "metric_list": OWN,
        "generation_kwargs": ALL_LETTERS,
    },
}


def write_tasks(folder: Path) -> Path:
    """Write every task of TASKS; prompts of `long` have 206 tokens of the quickstart's tokenizer."""
    folder.mkdir()
    rows = [{"q": f"sort {w}:", "a": "".join(sorted(w)), "long": f"sort {w * 40}:"} for w in WORDS]
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "f.py").write_text(FUNCTIONS)
    for name, changes in TASKS.items():
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "d.jsonl")}},
            "test_split": "test",
            "num_fewshot": 0,
            "output_type": "generate_until",
            "doc_to_text": "q",
            "doc_to_target": "a",
            "target_delimiter": "",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 7},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
            **changes,
        }
        # The tag is YAML's own syntax, not a text.
        text = yaml.safe_dump(task).replace("'!function", "!function")
        lines = [x.rstrip("'") if "!function" in x else x for x in text.splitlines()]
        (folder / f"{name}.yaml").write_text("\n".join(lines) + "\n")
    return folder


def search(tasks: Path, name: str, models: Path, n_iterations: int = 2, **scoring: Any) -> SearchFile:
    """A search over base, sort and largest in `models`, on one of the tasks."""
    return SearchFile(
        {
            "merge_method": "task_arithmetic",
            "base_model": str(models / "base"),
            "models": [
                {"model": str(models / model), "parameters": {"weight": {"low": 0.0, "high": 1.0}}}
                for model in ("sort", "largest")
            ],
            "dtype": "float32",
            "tasks": [name],
            "search": {"n_iterations": n_iterations, "sampler": "random"},
            "scoring": {
                "backend": "hf",
                "limit": 4,
                "holdout": 4,
                "task_paths": [str(tasks)],
                **scoring,
            },
        }
    )


def without(models: Path, folder: Path, names: tuple[str, ...]) -> Path:
    """Copy the models without some entries of their JSON files."""
    shutil.copytree(models, folder)
    for path in folder.glob("*/*config.json"):
        content: Mapping[str, Any] = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in content.items() if k not in names}))
    return folder


def save_vllm_models(folder: Path, context: int = 64) -> Path:
    """Save base, sort and largest as random Llamas that vLLM's CPU kernels can run.

    A token takes 1 KiB of key-value cache.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(
        Path(__file__).resolve().parents[2] / "configs/quickstart/models/base"
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=32,
        max_position_embeddings=context,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
    )
    for seed, name in enumerate(("base", "sort", "largest")):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder
