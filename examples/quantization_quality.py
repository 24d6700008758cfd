"""Measure what int8 and int4 cost in quality on the tiny trained checkpoint: perplexity and changed answers.

    python examples/quantization_quality.py [--dialogues 400]

Dialogues are held-out wordings of the checkpoint's corpus. Perplexity is over the tokens of the wanted answers; an
answer counts as changed if greedy decoding, fed the wanted answer, prefers another token at some place than with the
float weights.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer

import faster_chatglm_6b  # noqa: F401

TINY = Path(__file__).parent / "tiny_chatglm"
sys.path.insert(0, str(TINY / "training"))

from corpus import Corpus  # noqa: E402
from train import encode, prepare  # noqa: E402

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("float", {}),
    ("int8", {"bits": 8}),
    ("int8, int8 head", {"bits": 8, "head_bits": 8}),
    ("int4", {"bits": 4}),
    ("int4 in groups of 32", {"bits": 4, "group_size": 32}),
    ("int4 in groups of 32, int8 head", {"bits": 4, "group_size": 32, "head_bits": 8}),
]


def held_out_batches(tokenizer: Any, dialogues: int, size: int = 32) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the model's arguments for ``dialogues`` held-out dialogues of all kinds, similar lengths together."""
    every = Corpus().held_out()
    chosen = every[:: max(1, len(every) // dialogues)][:dialogues]
    samples = sorted((encode(dialogue, tokenizer) for dialogue in chosen), key=lambda sample: len(sample[0]))
    for start in range(0, len(samples), size):
        yield prepare(samples[start : start + size], tokenizer.pad_token_id, torch.device("cpu"))


def evaluate(model: Any, batches: list[dict[str, torch.Tensor]]) -> tuple[float, list[torch.Tensor]]:
    """Return the answers' perplexity, and per batch the preferred token [B, L - 1] at answer tokens, -1 elsewhere."""
    loss, tokens, preferred = 0.0, 0, []
    for batch in batches:
        labels = batch["labels"][:, 1:]
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False).logits
        logits = logits[:, :-1]
        wanted = labels != -100
        loss += float(torch.nn.functional.cross_entropy(logits[wanted], labels[wanted], reduction="sum"))
        tokens += int(wanted.sum())
        preferred.append(torch.where(wanted, logits.argmax(-1), -1))
    return math.exp(loss / tokens), preferred


def measure(dialogues: int) -> list[tuple[str, float, float]]:
    """Return (variant, perplexity, share of changed answers) of every variant."""
    tokenizer = AutoTokenizer.from_pretrained(str(TINY), trust_remote_code=True)
    batches = list(held_out_batches(tokenizer, dialogues))
    rows, reference = [], None
    for name, settings in VARIANTS:
        model = AutoModel.from_pretrained(str(TINY), trust_remote_code=True)
        model = (model.quantize(**settings) if settings else model).float().eval().requires_grad_(False)
        perplexity, preferred = evaluate(model, batches)
        reference = reference or preferred
        changed = [(a != b).any(dim=1) for a, b in zip(preferred, reference, strict=True)]
        rows.append((name, perplexity, float(torch.cat(changed).float().mean())))
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dialogues", type=int, default=400, help="held-out dialogues to measure on (%(default)s)")
    rows = measure(parser.parse_args().dialogues)
    print("| weights | perplexity of the answers | change | answers that change |\n|---|---|---|---|")
    for name, perplexity, changed in rows:
        print(f"| {name} | {perplexity:.4f} | {perplexity / rows[0][1] - 1:+.2%} | {changed:.1%} |")


if __name__ == "__main__":
    main()
