"""Train the quickstart's models: one tiny base and three specialists fine-tuned from it.

The models are character-level Llamas small enough to train on a CPU in a few minutes and to be
kept in the repository, so that ``evolve run configs/quickstart.yml`` works right after a clone.

Three skills are asked for in words: ``reverse`` and ``sort`` take five letters, ``largest`` takes
four numbers. The base has learnt all three, but only under the symbols in ``SYMBOLS``; asked in
words, it repeats the first word of the operand. Each specialist is then fine-tuned to do its own
skill when asked for it in words, and still to repeat the operand for the other two.

The specialists get in each other's way when merged: their average dilutes what each has learnt,
adding all of it overshoots, and ``reverse`` and ``sort`` compete for the same kind of prompt.
Which proportions keep all three skills is what the quickstart searches for.

    python configs/quickstart/train.py --out configs/quickstart/models --tasks tasks

The evaluation prompts (written to ``--tasks`` as JSON lines) never occur in the training data.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

SEED = 0
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SKILLS = ("reverse", "sort", "largest")
SYMBOLS = {"reverse": "@", "sort": "#", "largest": "%"}
DOCUMENTS = 400
BATCH = 64
REHEARSAL = 0.5  # share of other skills in a specialist's training, echoed as by the base
STEPS_AND_RATE = {"reverse": (120, 5e-4), "sort": (160, 2.5e-4), "largest": (140, 3e-4)}
PAD, EOS, END = "<pad>", "<eos>", "\n"


@dataclass(frozen=True)
class Example:
    """A skill to ask for and the letters or numbers to apply it to."""

    skill: str
    operand: str

    def prompt(self, tag: str | None = None) -> str:
        """The question, asking for the skill by its name unless told another way."""
        return f"{tag or self.skill} {self.operand}:"

    @property
    def choices(self) -> list[str]:
        """The operand's words: for ``largest``, the numbers to choose from."""
        return self.operand.split()

    @property
    def answer(self) -> str:
        """The right answer."""
        if self.skill == "reverse":
            return self.operand[::-1]
        if self.skill == "sort":
            return "".join(sorted(self.operand))
        return max(self.choices)

    @property
    def echo(self) -> str:
        """What the base says to a prompt in words: the operand's first word."""
        return self.choices[0]


def draw(skill: str, rng: random.Random) -> Example:
    """Draw a random example of a skill; it may be one of the evaluation's."""
    if skill == "largest":
        return Example(skill, " ".join(str(n) for n in rng.sample(range(10, 100), 4)))
    return Example(skill, "".join(rng.choices(LETTERS, k=5)))


def evaluation_examples() -> dict[str, list[Example]]:
    """The documents each skill is evaluated on: distinct, and the same on every run."""
    rng = random.Random(SEED + 1)
    examples: dict[str, list[Example]] = {}
    for skill in SKILLS:
        chosen: dict[str, Example] = {}
        while len(chosen) < DOCUMENTS:
            example = draw(skill, rng)
            chosen.setdefault(example.operand, example)
        examples[skill] = list(chosen.values())
    return examples


def training_examples(
    skill: str, held_out: Mapping[str, list[Example]], rng: random.Random
) -> Iterator[Example]:
    """Endless examples of a skill without any operand the evaluation uses, of any skill."""
    excluded = {example.operand for examples in held_out.values() for example in examples}
    while True:
        example = draw(skill, rng)
        if example.operand not in excluded:
            yield example


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, and one for each skill's name."""
    pieces = [PAD, EOS, END, " ", ":", *SYMBOLS.values(), *"0123456789", *LETTERS, *SKILLS]
    tokenizer = Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token=PAD))
    names = "|".join(SKILLS)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{names}|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        model_max_length=64,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of about 0.6 million parameters with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=112,
            intermediate_size=288,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


def encode(
    tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded token ids and labels; only the answers are learnt, the prompts are noise."""
    prompts = tokenizer([p for p, _ in pairs])["input_ids"]
    answers = tokenizer([a + END for _, a in pairs])["input_ids"]
    width = max(len(p) + len(a) + 1 for p, a in zip(prompts, answers, strict=True))
    ids = torch.full((len(pairs), width), tokenizer.pad_token_id)
    labels = torch.full((len(pairs), width), -100)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        target = torch.tensor([*answer, tokenizer.eos_token_id])
        ids[row, : len(prompt)] = torch.tensor(prompt)
        ids[row, len(prompt) : len(prompt) + len(target)] = target
        labels[row, len(prompt) : len(prompt) + len(target)] = target
    return ids, labels


def fit(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Iterator[tuple[str, str]],
    *,
    steps: int,
    rate: float,
) -> None:
    """Train in place with AdamW, a short warm-up and a linear decay."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, (steps - s) / (steps - warmup + 1))
    )
    model.train()
    for step in range(steps):
        ids, labels = encode(tokenizer, [next(pairs) for _ in range(BATCH)])
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 200 == 0 or step == steps - 1:
            print(f"  step {step:4d}  loss {loss.item():.4f}", flush=True)


@torch.no_grad()
def score(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> float:
    """Share of one skill's examples answered right, scored as its lm-eval task scores it."""
    model.eval()
    prompts = torch.tensor(tokenizer([e.prompt() for e in examples])["input_ids"])
    if examples[0].skill == "largest":
        table = []
        for choice in range(len(examples[0].choices)):
            said = torch.tensor(tokenizer([e.choices[choice] for e in examples])["input_ids"])
            logits = model(torch.cat([prompts, said], 1)).logits
            scores = logits[:, prompts.shape[1] - 1 : -1].log_softmax(-1)
            table.append(scores.gather(2, said[..., None]).sum((1, 2)))
        picked = torch.stack(table, 1).argmax(1).tolist()
        right = [e.choices[p] == e.answer for p, e in zip(picked, examples, strict=True)]
    else:
        ids, cache = prompts, None
        said_ids = []
        for _ in range(len(examples[0].answer) + 1):
            out = model(ids, past_key_values=cache, use_cache=True)
            ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            said_ids.append(ids)
        texts = tokenizer.batch_decode(torch.cat(said_ids, 1))
        right = [t == e.answer + END for t, e in zip(texts, examples, strict=True)]
    return sum(right) / len(right)


def base_pairs(held_out: Mapping[str, list[Example]], rng: random.Random) -> Iterator[tuple[str, str]]:
    """Prompts and answers of the base: every skill under its symbol, an echo for words."""
    examples = {skill: training_examples(skill, held_out, rng) for skill in SKILLS}
    while True:
        example = next(examples[rng.choice(SKILLS)])
        if rng.random() < 0.3:
            yield example.prompt(), example.echo
        else:
            yield example.prompt(SYMBOLS[example.skill]), example.answer


def specialist_pairs(
    skill: str, held_out: Mapping[str, list[Example]], rng: random.Random
) -> Iterator[tuple[str, str]]:
    """Prompts and answers of a specialist: its own skill, and the base's echo for the others."""
    examples = {name: training_examples(name, held_out, rng) for name in SKILLS}
    others = [name for name in SKILLS if name != skill]
    while True:
        if rng.random() < REHEARSAL:
            example = next(examples[rng.choice(others)])
            yield example.prompt(), example.echo
        else:
            example = next(examples[skill])
            yield example.prompt(), example.answer


def write_tasks(held_out: Mapping[str, list[Example]], folder: Path) -> None:
    """Write the documents of the lm-eval tasks ``qs_<skill>``."""
    for skill, examples in held_out.items():
        documents: list[dict[str, object]] = []
        for example in examples:
            right: dict[str, object] = {"answer": example.answer}
            if skill == "largest":
                label = example.choices.index(example.answer)
                right = {"choices": example.choices, "label": label}
            documents.append({"prompt": example.prompt(), **right})
        lines = "".join(json.dumps(document) + "\n" for document in documents)
        (folder / f"qs_{skill}.jsonl").write_text(lines, encoding="utf-8")


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> LlamaForCausalLM:
    """Save the model as bfloat16 and return it as its file holds it, back in float32."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def main() -> None:
    """Train, save and score the base, then each specialist."""
    parser = argparse.ArgumentParser(description="Train the quickstart's models.")
    parser.add_argument("--out", type=Path, required=True, help="folder to save the models in")
    parser.add_argument("--tasks", type=Path, help="also write the tasks' documents here")
    args = parser.parse_args()

    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)  # more threads add in another order, which changes the weights
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    started = time.perf_counter()
    held_out = evaluation_examples()
    if args.tasks:
        write_tasks(held_out, args.tasks)

    def report(name: str, model: LlamaForCausalLM) -> None:
        scores = [f"{skill} {score(model, tokenizer, held_out[skill]):.3f}" for skill in SKILLS]
        print(f"{name}: {', '.join(scores)}  ({time.perf_counter() - started:.0f} s)", flush=True)

    tokenizer = build_tokenizer()
    base = build_model(tokenizer)
    fit(base, tokenizer, base_pairs(held_out, rng), steps=1100, rate=1.5e-3)
    base = save(base, tokenizer, args.out / "base")
    report("base", base)
    for skill in SKILLS:
        steps, rate = STEPS_AND_RATE[skill]
        specialist = copy.deepcopy(base)
        pairs = specialist_pairs(skill, held_out, rng)
        fit(specialist, tokenizer, pairs, steps=steps, rate=rate)
        report(skill, save(specialist, tokenizer, args.out / skill))


if __name__ == "__main__":
    main()
