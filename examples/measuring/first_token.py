"""The first token: the prompts that are measured, what was asked of them, and what a busy process beside ours costs."""

import contextlib
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch

from . import timing
from .models import make_prompt

# (batch, prompt tokens)
PROMPTS = ((1, 20), (1, 128), (1, 512), (1, 1024), (1, 2000), (8, 512))
# What it must take at most and what it should, in ms on an H100, by (batch, prompt tokens) and weights.
WEIGHTS = ("fp16", "int8", "int4")
MUSTS = {
    (1, 20): (7.0, 5.5, 4.5),
    (1, 128): (9.0, 9.0, 9.0),
    (1, 1024): (23.0, 26.0, 26.0),
    (1, 2000): (45.0, 50.0, 50.0),
    (8, 512): (84.0, 90.0, 90.0),
}
GOALS = {
    (1, 20): (5.0, 3.2, 2.2),
    (1, 128): (6.5, 6.0, 6.0),
    (1, 1024): (19.5, 21.0, 21.0),
    (1, 2000): (39.0, 41.0, 41.0),
    (8, 512): (75.0, 78.0, 78.0),
}
BESIDE_A_BUSY_PROCESS = (128, 1024)
BUSY = "first token of {tokens} tokens beside a busy process, times without it"


def aims(records: list[dict[str, Any]]) -> Iterator[tuple[str, float, float, float]]:
    """Yield (what, ms, must, goal) for those records of first tokens of which something was asked."""
    for record in records:
        prompt, weights = (record["batch"], record["prompt_tokens"]), record["weights"]
        if prompt in MUSTS and weights in WEIGHTS:
            index = WEIGHTS.index(weights)
            yield name_of(*prompt, weights), record["ms_per_step"], MUSTS[prompt][index], GOALS[prompt][index]


def name_of(batch: int, tokens: int, weights: str) -> str:
    """Return what the checks call a first token."""
    prompts = f"{tokens} tokens" if batch == 1 else f"{batch} x {tokens} tokens"
    return f"first token of {prompts}, {weights}, ms"


def beside_a_busy_process(model: torch.nn.Module, tokens: int, iters: int) -> tuple[float, float]:
    """Return how many times as long a first token takes while another process keeps one core busy.

    The first number is what users meet: the system may move either process to another core. The second has both
    processes on one core, the worst that can happen; it is NaN where a process cannot be bound to a core.
    """
    ids = make_prompt(model, 1, tokens)

    def call() -> None:
        timing.run_once(model, ids, "greedy", 1)

    def median() -> float:
        return statistics.median(timing.timed(call) for _ in range(iters))

    for _ in range(3):
        call()
    quiet = median()
    with busy_process():
        beside = median()
    if not hasattr(os, "sched_setaffinity"):
        return beside / quiet, float("nan")
    allowed = os.sched_getaffinity(0)
    # The main thread only: this is the one that launches.
    os.sched_setaffinity(0, {min(allowed)})
    try:
        quiet_on_one = median()
        with busy_process():
            beside_on_one = median()
    finally:
        os.sched_setaffinity(0, allowed)
    return beside / quiet, beside_on_one / quiet_on_one


@contextlib.contextmanager
def busy_process() -> Iterator[subprocess.Popen]:
    """Keep one core busy with another process, which inherits the cores that the calling thread may run on."""
    command = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            process.stdout.readline()
            yield process
        finally:
            process.kill()
