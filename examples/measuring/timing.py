"""Time the public calls of a model, and record what was measured.

Times are wall-clock times of the public calls, the device drained before and after. ms_per_step is the median time of
``model.generate`` for all new tokens minus the median for one (the prompt and its first token), divided by the other
tokens: what one more token costs a caller. With one new token it is the time of the whole call, which is how long the
first token takes. bytes_per_step are the weights and the keys and values that a step must read, floor_ms is how long
they take at the read ceiling (a read-only stream of 8 GiB timed in the same process), and share, the floor divided by
the measured time, tells how much is left to gain. A first token has to compute as well: operations_per_step counts
that (null for other tokens), and the floor is the longer of reading and computing at matrix_rate_tflops, the rate of
large float16 products in the same process.
"""

import argparse
import datetime
import gc
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from .machine import Machine, synchronize
from .models import bytes_per_step, head_of, operations_of_prompt, weights_of

KEYS = (
    "backend weights group_size head batch prompt_tokens new_tokens mode ms_per_step tokens_per_s bytes_per_step "
    "operations_per_step gb_per_s read_ceiling_gb_per_s matrix_rate_tflops floor_ms share peak_memory_gb gpu clocks "
    "torch triton date command"
).split()
SAMPLING = {"do_sample": True, "top_p": 0.7, "temperature": 0.95}


class Run(NamedTuple):
    """One measurement: the seconds of every iteration, and its record with the keys KEYS."""

    seconds: list[float]
    record: dict[str, Any]


def timed(call: Callable[[], Any]) -> float:
    """Return the seconds of one call; drain the device before and after it, and collect garbage before."""
    gc.collect()
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def run_once(model: torch.nn.Module, ids: torch.Tensor, mode: str, new_tokens: int) -> None:
    """Generate ``new_tokens``; random weights must not end the answer early, so there is no end token."""
    from transformers import LogitsProcessorList

    from faster_chatglm_6b.generation.processors import InvalidScoreLogitsProcessor

    # Without drafts: random weights repeat themselves, so these would come true and a step would bring several tokens.
    settings = {"max_new_tokens": new_tokens, "eos_token_id": None, "pad_token_id": 3, "speculate": 0}
    if mode == "greedy":
        model.generate(ids, do_sample=False, **settings)
        return
    # What chat and stream_chat ask for.
    settings |= SAMPLING | {"logits_processor": LogitsProcessorList([InvalidScoreLogitsProcessor()])}
    if mode == "sample":
        model.generate(ids, **settings)
        return
    for token in model.stream_tokens(ids, **settings):
        token.tolist()


def token_times(model: torch.nn.Module, ids: torch.Tensor, new_tokens: int) -> list[float]:
    """Return the seconds from the call of ``generate``, greedy, to each token's arrival at a streamer; increasing."""
    from transformers.generation.streamers import BaseStreamer

    class Clock(BaseStreamer):
        def __init__(self) -> None:
            self.arrivals: list[float] = []

        def put(self, value: torch.Tensor) -> None:
            value.tolist()
            self.arrivals.append(time.perf_counter())

        def end(self) -> None:
            pass

    clock = Clock()
    synchronize()
    start = time.perf_counter()
    settings = {"max_new_tokens": new_tokens, "eos_token_id": None, "pad_token_id": 3, "speculate": 0}
    model.generate(ids, do_sample=False, **settings, streamer=clock)
    # The first thing that generate gives a streamer is the prompt.
    return [round(arrival - start, 5) for arrival in clock.arrivals[1:]]


def measure(model: torch.nn.Module, ids: torch.Tensor, args: argparse.Namespace, machine: Machine) -> Run:
    """Time ``args.iters`` generations from the prompts ``ids`` [batch, length] after ``args.warmup_iters`` others."""
    batch, prompt_tokens = ids.shape
    on_gpu = machine.device == "cuda"
    for _ in range(args.warmup_iters):
        run_once(model, ids, args.mode, args.new_tokens)
        run_once(model, ids, args.mode, 1)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    # disable=None: no bar if the output goes to a file.
    rounds = tqdm(range(args.iters), desc=f"{args.backend} {weights_of(model)}", unit="it", leave=False, disable=None)
    whole, first = [], []
    for _ in rounds:
        whole.append(timed(lambda: run_once(model, ids, args.mode, args.new_tokens)))
        if args.new_tokens > 1:
            first.append(timed(lambda: run_once(model, ids, args.mode, 1)))
    # In turns, so that what else the machine does weighs on both alike.
    step = step_of(whole, first, args.new_tokens)
    if args.new_tokens == 1:
        moved, operations = (count(model, batch, prompt_tokens) for count in (bytes_per_step, operations_of_prompt))
    else:
        # The keys of the middle of the answer are the mean of its steps.
        moved, operations = bytes_per_step(model, batch, prompt_tokens + args.new_tokens / 2), None
    ceiling, floor = machine.read_ceiling, floor_of(moved, operations, machine)
    values = (
        args.backend,
        weights_of(model),
        model.config.quantization_group_size,
        head_of(model),
        batch,
        prompt_tokens,
        args.new_tokens,
        args.mode,
        round(step * 1e3, 4),
        round(batch / step, 1),
        moved,
        operations,
        round(moved / step / 1e9, 1),
        ceiling and round(ceiling, 1),
        machine.matrix_rate and round(machine.matrix_rate, 1),
        floor and round(floor * 1e3, 4),
        floor and round(floor / step, 4),
        round(torch.cuda.max_memory_reserved() / 1e9, 2) if on_gpu else None,
        machine.name,
        machine.clocks,
        torch.__version__,
        _triton_version(),
        datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        " ".join(["python", *sys.argv]),
    )
    return Run(whole, dict(zip(KEYS, values, strict=True)))


def step_of(whole: list[float], first: list[float], new_tokens: int) -> float:
    """Return the seconds per token after the first; the prompt counts too if noise hides the difference.

    Args:
        whole: seconds of calls for ``new_tokens``.
        first: seconds of calls for one token; empty if that is all.
    """
    step = statistics.median(whole)
    if not first:
        return step
    rest = step - statistics.median(first)
    if rest > 0:
        return rest / (new_tokens - 1)
    print(
        f"One token took as long as {new_tokens}: the machine is busy, or the iterations are few. The rates count the "
        "prompt too.",
        file=sys.stderr,
    )
    return step / new_tokens


def floor_of(moved: int, operations: int | None, machine: Machine) -> float | None:
    """Return the seconds that a step takes at least: of reading and computing the longer; None without a read ceiling.

    Args:
        moved: bytes that it reads.
        operations: what it computes; None if only reading counts.
    """
    if machine.read_ceiling is None:
        return None
    reading = moved / machine.read_ceiling / 1e9
    return reading if operations is None else max(reading, operations / machine.matrix_rate / 1e12)


def _triton_version() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    import triton

    return triton.__version__


def describe(record: dict[str, Any]) -> str:
    """Write a record in one line."""
    ceiling = record["read_ceiling_gb_per_s"]
    if ceiling is None:
        of_the_floor = ""
    elif record["new_tokens"] == 1:
        of_the_floor = f" floor {record['floor_ms']:.3f} ms: {record['share']:.3f}  peak {record['peak_memory_gb']} GB"
    else:
        of_the_floor = f" of {ceiling:.0f}: {record['share']:.3f}  peak {record['peak_memory_gb']} GB"
    return (
        f"{record['backend']:5} {record['weights']} {record['mode']:6} batch {record['batch']:<3} "
        f"prompt {record['prompt_tokens']:<5} new {record['new_tokens']:<4} {record['ms_per_step']:8.3f} ms/token "
        f"{record['tokens_per_s']:9.1f} tokens/s {record['gb_per_s']:7.0f} GB/s{of_the_floor}"
    )


def append(path: str | None, records: list[dict[str, Any]]) -> None:
    """Add records to a JSON list in a file, one line each.

    Raises:
        SystemExit: the file holds something else.
    """
    if path is None:
        return
    file = Path(path)
    known = known_records(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in known + records)
    file.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def known_records(file: Path) -> list[dict[str, Any]]:
    """Read the records that a file holds; none if it does not exist.

    Raises:
        SystemExit: it holds something else.
    """
    if not file.exists():
        return []
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        known = None
    if not isinstance(known, list):
        raise SystemExit(f"{file} holds no list of records, and nothing can be added to it; name another file.")
    return known


def profile(model: torch.nn.Module, ids: torch.Tensor, mode: str, new_tokens: int) -> None:
    """Print which kernels the steps' time goes to."""
    from torch.profiler import ProfilerActivity

    run_once(model, ids, mode, new_tokens)
    device = "CUDA" if model.device.type == "cuda" else "CPU"
    with torch.profiler.profile(activities=[getattr(ProfilerActivity, device)]) as profiler:
        run_once(model, ids, mode, new_tokens)
        synchronize()
    averages = profiler.key_averages()
    print(averages.table(sort_by=f"{device.lower()}_time_total", row_limit=20, max_name_column_width=48))
