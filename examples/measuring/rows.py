"""Many rows: the batches that are measured, and what was asked of the share of the read ceiling that they reach."""

import argparse
from collections.abc import Iterator
from typing import Any

from .first_token import WEIGHTS

# Beside those of the suite's other runs; 20-token prompts, 128 new tokens.
BATCHES = {"fp16": (2, 4, 16, 64, 128, 256), "int8": (2, 4, 8, 16, 32, 64, 128, 256)}
BATCHES["int4"] = tuple(batch for batch in BATCHES["int8"] if batch != 8)
# Sequences, prompt tokens and new tokens of a batch with long contexts, and the most ms per step, of fp16.
LONG, LONG_MUST = (64, 512, 64), 10.5
# The share of the read ceiling that a step must and should reach, on an H100, by rows and weights.
MUSTS = {
    1: (0.95, 0.90, 0.82),
    2: (0.88, 0.82, 0.72),
    4: (0.88, 0.82, 0.72),
    8: (0.88, 0.82, 0.72),
    16: (0.85, 0.75, 0.62),
    32: (0.82, 0.70, 0.55),
    64: (0.78, 0.62, 0.48),
    128: (0.74, 0.55, 0.42),
    256: (0.70, 0.52, 0.42),
}
GOALS = {
    1: (0.97, 0.94, 0.90),
    2: (0.94, 0.90, 0.82),
    4: (0.94, 0.90, 0.82),
    8: (0.94, 0.90, 0.82),
    16: (0.92, 0.86, 0.76),
    32: (0.90, 0.82, 0.70),
    64: (0.88, 0.76, 0.62),
    128: (0.82, 0.66, 0.50),
    256: (0.78, 0.62, 0.50),
}
ITERS = 5


def shorter(args: argparse.Namespace) -> argparse.Namespace:
    """Return the suite's options with fewer iterations: a batch has many rows to take its time from."""
    return argparse.Namespace(**vars(args) | {"iters": min(args.iters, ITERS), "warmup_iters": 1})


def aims(records: list[dict[str, Any]]) -> Iterator[tuple[str, float, float, float]]:
    """Yield (what, share, must, goal) for the greedy records of 20-token prompts, the first of each number of rows."""
    seen = set()
    for record in sorted(records, key=lambda record: record["batch"]):
        weights, rows = record["weights"], record["batch"]
        plain = record["mode"] == "greedy" and record["prompt_tokens"] == 20 and record["new_tokens"] > 1
        if plain and weights in WEIGHTS and rows in MUSTS and (weights, rows) not in seen:
            seen.add((weights, rows))
            index = WEIGHTS.index(weights)
            yield name_of(rows, weights), record["share"], MUSTS[rows][index], GOALS[rows][index]


def name_of(rows: int, weights: str) -> str:
    """Return what the checks call the share at so many rows."""
    return f"{weights}, share of the read ceiling at {rows} row{'s' if rows > 1 else ''}"
