"""Measure everything that the project promises, in one process: ``python examples/benchmark.py --suite --json FILE``.

The records go to FILE; what has no place in a record (times after loading, synchronisations, memory) is printed and
goes to FILE with ``_checks`` in its name.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from . import first_token, rows, timing
from . import machine as machines
from .models import build_model, make_prompt, weights_of

# (name, batch, prompt tokens, new tokens, mode)
RUNS = (
    ("greedy", 1, 20, 128, "greedy"),
    ("stream", 1, 20, 128, "stream"),
    ("sample", 1, 20, 128, "sample"),
    ("context", 1, 1024, 128, "greedy"),
    ("batch 8", 8, 20, 128, "greedy"),
    ("batch 32", 32, 20, 128, "greedy"),
)
# Bits, the batches to measure, and the most GB that the weights may hold of the GPU's memory.
QUANTISED = ((8, (1,), 7.5), (4, (1, 8), 4.6))
# What this file does in a process of its own.
FIRST, HELD = "--first-generate", "--memory-of"


def first_generate() -> None:
    """Print the seconds of the first calls after loading, as JSON on the last line; needs a process of its own."""
    model = build_model(None)
    ids = make_prompt(model, 1, 20)
    times = {
        mode: timing.timed(lambda mode=mode: timing.run_once(model, ids, mode, 16)) for mode in ("greedy", "sample")
    }
    print(json.dumps(times))


def memory_held(bits: int, name: str | None = None) -> None:
    """Print the GB of the GPU that PyTorch holds after quantising a model, as JSON; needs a process of its own."""
    model = build_model(name)
    model.quantize(bits)
    print(json.dumps(torch.cuda.memory_reserved() / 1e9))


def in_new_process(*arguments: str, cache: str | None = None) -> Any:
    """Run this file with these arguments, Triton's cache in the directory ``cache``, and read what it prints."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    if cache is not None:
        environment["TRITON_CACHE_DIR"] = cache
    done = subprocess.run(
        [sys.executable, "-m", __name__, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def synchronisations(model: torch.nn.Module, tokens: int = 50) -> int:
    """Count the host synchronisations that torch notices while ``tokens`` tokens are streamed."""
    ids = make_prompt(model, 1, 20)
    stream = model.stream_tokens(ids, max_new_tokens=tokens + 20, eos_token_id=None, speculate=0, **timing.SAMPLING)
    for _ in range(10):
        next(stream)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(tokens):
                next(stream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.close()
    return sum("synchroniz" in str(w.message) for w in caught)


def memory_at_2048(model: torch.nn.Module) -> tuple[float, float]:
    """Return the GB reserved at the peak of a generation up to 2048 tokens, and those of the weights and the cache."""
    model.release_cache()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    ids = make_prompt(model, 1, 2000)
    model.generate(ids, do_sample=False, max_new_tokens=48, eos_token_id=None, pad_token_id=3)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    config = model.config
    cache = 2 * config.num_layers * config.hidden_size * 2048 * 2
    peak = torch.cuda.max_memory_reserved()
    model.release_cache()
    return peak / 1e9, (weights + cache) / 1e9


def measure(
    model: torch.nn.Module,
    machine: machines.Machine,
    args: argparse.Namespace,
    batch: int,
    prompt: int,
    new: int,
    mode: str,
) -> dict[str, Any]:
    """Print and return the record of one of RUNS, then free what generation kept on the GPU."""
    work = argparse.Namespace(**vars(args) | {"new_tokens": new, "mode": mode})
    record = timing.measure(model, make_prompt(model, batch, prompt), work, machine).record
    print(timing.describe(record), flush=True)
    model.release_cache()
    torch.cuda.empty_cache()
    return record


class Checks:
    """What the suite promises, with what was measured; printed one by one."""

    def __init__(self) -> None:
        self.results: list[dict[str, Any]] = []

    def add(self, what: str, value: float, must: str, good: bool, goal: str | None = None) -> None:
        """Note and print a check."""
        result = {"what": what, "measured": round(value, 4), "must": must, "met": bool(good)}
        self.results.append(result | ({"goal": goal} if goal else {}))
        wanted = f"must be {must}" + (f", goal {goal}" if goal else "")
        print(f"{'ok  ' if good else 'MISS'} {what}: {value:.4g} ({wanted})", flush=True)

    def add_first_tokens(self, records: list[dict[str, Any]]) -> None:
        """Note what was asked of first tokens."""
        for what, ms, must, goal in first_token.aims(records):
            self.add(what, ms, f"<= {must:g}", ms <= must, f"<= {goal:g}")

    def add_rows(self, records: list[dict[str, Any]]) -> None:
        """Note what was asked of steps of many rows."""
        for what, share, must, goal in rows.aims(records):
            self.add(what, share, f">= {must:.2f}", share >= must, f">= {goal:.2f}")

    def write(self, path: Path) -> None:
        """Write the checks; those of another part of the suite that the file holds stay."""
        mine = {result["what"] for result in self.results}
        others = json.loads(path.read_text("utf-8")) if path.is_file() else []
        kept = [result for result in others if result["what"] not in mine]
        path.write_text(json.dumps([*kept, *self.results], indent=1) + "\n", encoding="utf-8")


def run(args: argparse.Namespace) -> None:
    """Measure everything, or the part that ``args.suite`` names; print what is promised, and write the files."""
    checks = Checks()
    machine = machines.look()
    if machine.read_ceiling is None:
        raise SystemExit("The read ceiling is measured with Triton, which is not installed: `pip install triton`.")
    print(
        f"read ceiling {machine.read_ceiling:.0f} GB/s, matrix rate {machine.matrix_rate:.0f} TFLOP/s, "
        f"clocks {machine.clocks}, {machine.name}",
        flush=True,
    )
    for part, measured in (("floats", floats), ("integers", integers)):
        if args.suite in (part, "all"):
            measured(args, machine, checks)
    if args.json:
        path = Path(args.json)
        checks.write(path.with_name(f"{path.stem}_checks.json"))


def floats(args: argparse.Namespace, machine: machines.Machine, checks: Checks) -> None:
    """Measure the float16 model."""
    check, records = checks.add, {}
    model = build_model(args.model_name)
    for name, *work in (*RUNS, ("greedy again", *RUNS[0][1:])):
        records[name] = measure(model, machine, args, *work)
    firsts = [measure(model, machine, args, *prompt, 1, "greedy") for prompt in first_token.PROMPTS]
    batches = batches_of(model, machine, args)
    long = measure(model, machine, rows.shorter(args), *rows.LONG, "greedy")
    timing.append(args.json, [*records.values(), *firsts, *batches, long])
    step = {name: record["ms_per_step"] for name, record in records.items()}
    greedy = step["greedy"]
    check(
        "fp16 greedy, share of the read ceiling",
        records["greedy"]["share"],
        ">= 0.90",
        records["greedy"]["share"] >= 0.9,
    )
    check("stream with sampling, times greedy", step["stream"] / greedy, "<= 1.05", step["stream"] <= 1.05 * greedy)
    check("context of 1024, ms more per token", step["context"] - greedy, "<= 0.3", step["context"] - greedy <= 0.3)
    for batch, limit in ((8, 1.25), (32, 1.6)):
        ratio = step[f"batch {batch}"] / greedy
        check(f"batch {batch}, times batch 1 per step", ratio, f"<= {limit}", ratio <= limit)
    checks.add_rows([*records.values(), *batches])
    ms = long["ms_per_step"]
    check("64 rows with prompts of 512 tokens, fp16, ms", ms, f"<= {rows.LONG_MUST}", ms <= rows.LONG_MUST)
    checks.add_first_tokens(firsts)
    for tokens in first_token.BESIDE_A_BUSY_PROCESS:
        ratio, on_one_core = first_token.beside_a_busy_process(model, tokens, args.iters)
        check(first_token.BUSY.format(tokens=tokens), ratio, "<= 1.2", ratio <= 1.2)
        print(f"     with both processes on the same core: {on_one_core:.2f} times a quiet one", flush=True)
    peak, needed = memory_at_2048(model)
    check("memory at 2048 tokens beyond weights and cache, GB", peak - needed, "<= 1", peak - needed <= 1)
    count = synchronisations(model)
    check("host synchronisations in 50 tokens", count, "0", count == 0)
    with tempfile.TemporaryDirectory() as cache:
        for state, limit in (("empty", 20), ("filled", 3)):
            start = time.perf_counter()
            times = in_new_process(FIRST, cache=cache)
            check(f"first generate, kernel cache {state}, s", times["greedy"], f"<= {limit}", times["greedy"] <= limit)
            print(f"     then the first sampled call: {times['sample']:.2f} s", flush=True)
            print(f"     whole process: {time.perf_counter() - start:.0f} s", flush=True)
    if args.profile:
        for name, batch, prompt, _, mode in RUNS:
            if name in ("greedy", "stream", "batch 8", "batch 32"):
                print(name)
                timing.profile(model, make_prompt(model, batch, prompt), mode, 32)


def integers(args: argparse.Namespace, machine: machines.Machine, checks: Checks) -> None:
    """Measure the int8 and the int4 model."""
    for bits, batches, limit in QUANTISED:
        gc.collect()
        torch.cuda.empty_cache()
        held = in_new_process(HELD, str(bits), *([args.model_name] if args.model_name else []))
        model = build_model(args.model_name).quantize(bits)
        steps = [measure(model, machine, args, batch, 20, 128, "greedy") for batch in batches]
        firsts = [measure(model, machine, args, *prompt, 1, "greedy") for prompt in first_token.PROMPTS]
        steps += batches_of(model, machine, args)
        timing.append(args.json, steps + firsts)
        checks.add_rows(steps)
        checks.add_first_tokens(firsts)
        checks.add(f"memory after loading int{bits}, GB", held, f"<= {limit}", held <= limit)
        del model


def batches_of(model: torch.nn.Module, machine: machines.Machine, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the batches that are asked of the model's weights and that the other runs do not have."""
    shorter = rows.shorter(args)
    return [measure(model, machine, shorter, batch, 20, 128, "greedy") for batch in rows.BATCHES[weights_of(model)]]


if __name__ == "__main__" and sys.argv[1:2] in ([FIRST], [HELD]):
    first_generate() if sys.argv[1] == FIRST else memory_held(int(sys.argv[2]), *sys.argv[3:])
