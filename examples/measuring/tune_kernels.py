"""Measure the decode step of the ChatGLM-6B shape without the host, and find the block shapes of its kernels.

    python -m examples.measuring.tune_kernels --chain         # the step with the tables of ops/triton/configs.py
    python -m examples.measuring.tune_kernels --tune 1 8 32   # search tables for these batch sizes

The step is the product's own over random weights, as one CUDA graph. Every time is quoted against the read ceiling of
the same process: the rate at which a kernel that only reads gets through 8 GiB.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton

from faster_chatglm_6b.ops.triton import configs
from faster_chatglm_6b.ops.triton.configs import Attention, Dot, Family, Gemv

from .decode_step import DENSE, DOWN, HEAD, PARTS, QKV, SHAPES, UP, TimedStep
from .machine import read_ceiling
from .models import bytes_per_step, random_model


def record(step: TimedStep, ms: float, ceiling: float) -> dict:
    """Describe a step that took ``ms`` on a machine that reads ``ceiling`` GB/s."""
    rate = step.bytes / ms / 1e6
    return {
        "batch": step.batch,
        "context": step.context,
        "sampler": step.sampler,
        "without": sorted(step.without),
        "dtype": str(step.model.dtype).removeprefix("torch."),
        "ms_per_step": round(ms, 4),
        "bytes_per_step": step.bytes,
        "gb_per_s": round(rate, 1),
        "read_ceiling_gb_per_s": round(ceiling, 1),
        "share": round(rate / ceiling, 4),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def chain_records(model: torch.nn.Module, ceiling: float) -> Iterator[dict]:
    """Measure the step in every mode that has a target, and batch 1 without each of its small kernels."""
    for batch in (1, 8, 32):
        for context, samplers in ((32, ("greedy", "top_k", "full")), (1024, ("greedy",))):
            for sampler in samplers:
                step = TimedStep(model, batch, context, sampler)
                yield record(step, step.measure(), ceiling)
    for missing in ({"sampling"}, {"attention"}, {"norm"}, PARTS):
        step = TimedStep(model, 1, 32, without=missing)
        yield record(step, step.measure(), ceiling)


def _with(table: dict, key: tuple[int, int], value: Gemv | Dot | None) -> dict:
    rest = {k: v for k, v in table.items() if k != key}
    return rest if value is None else rest | {key: value}


def _gemv_knobs(family: Family) -> Iterator[tuple[str, list[Family]]]:
    blocks = [Gemv(2, 2048, 4), Gemv(1, 2048, 2), Gemv(1, 4096, 4), Gemv(1, 4096, 8), Gemv(2, 4096, 4)]
    blocks += [Gemv(2, 4096, 8), Gemv(4, 4096, 8), Gemv(4, 1024, 4)]
    long_blocks = [Gemv(8, 512, 4), Gemv(4, 2048, 8), Gemv(1, 16384, 16)]
    loops = [Gemv(2, 4096, 8, 4), Gemv(2, 4096, 8, 8), Gemv(2, 4096, 4, 8), Gemv(1, 4096, 4, 16)]
    for key in (DENSE, QKV, UP, DOWN, HEAD):
        choices = blocks + (long_blocks if key == DOWN else loops)
        yield f"gemv {key}", [dataclasses.replace(family, gemv=_with(family.gemv, key, c)) for c in choices]
        if key in (QKV, UP):
            tables = [_with(family.layer_norm_gemv, key, c) for c in [None, *loops]]
            yield f"LayerNorm inside {key}", [dataclasses.replace(family, layer_norm_gemv=t) for t in tables]


def _dot_knobs(family: Family, rows: int) -> Iterator[tuple[str, list[Family]]]:
    blocks = {
        16: [(64, 128, 4, 3), (64, 128, 4, 4), (64, 256, 4, 3), (128, 64, 4, 5), (128, 128, 4, 3)],
        32: [(64, 128, 4, 4), (64, 128, 4, 3), (64, 64, 4, 6), (128, 128, 8, 3)],
        64: [(64, 128, 4, 3), (128, 64, 4, 4), (128, 64, 8, 4), (128, 128, 8, 3)],
    }[rows]
    for key in SHAPES:
        splits = (1,) if key == HEAD else (1, 2, 4) if key in (DENSE, DOWN) else (1, 2)
        for_rows = family.dot.get(rows, {})
        tables = [family.dot | {rows: _with(for_rows, key, Dot(*b, s))} for b in blocks for s in splits]
        yield f"dot {rows} {key}", [dataclasses.replace(family, dot=t) for t in tables]


def _attention_knobs(family: Family, name: str) -> Iterator[tuple[str, list[Family]]]:
    choices = [Attention(t, w, v) for t, w in ((32, 2), (32, 4), (64, 4), (128, 4), (128, 8)) for v in (1, 2, 4, 8)]
    yield name, [dataclasses.replace(family, **{name: c}) for c in choices]


def tune(model: torch.nn.Module, batch: int, log: Callable[[str], None]) -> Family:
    """Search one table entry after another, each time keeping what makes the whole step fastest."""
    capability, family = configs.capability(model.device), configs.family(model.device)
    knobs = _gemv_knobs if batch == 1 else lambda f: _dot_knobs(f, max(triton.next_power_of_2(batch), 16))
    rounds = [
        (32, knobs),
        (150, lambda f: _attention_knobs(f, "attention_short")),
        (1024, lambda f: _attention_knobs(f, "attention")),
    ]
    for context, make in rounds:
        step = TimedStep(model, batch, context)
        configs.FAMILIES[capability] = family
        best = step.measure()
        log(f"batch {batch}, context {context}: {best:.4f} ms with the tables as they are")
        names = [name for name, _ in make(family)]
        for index in range(len(names)):
            # The generator is made anew, so that its variants start from the best family so far.
            name, variants = next(item for i, item in enumerate(make(family)) if i == index)
            start = family
            for variant in variants:
                configs.FAMILIES[capability] = variant
                try:
                    ms = step.measure(9)
                except triton.runtime.errors.OutOfResources:
                    continue
                changed = _difference(start, variant)
                log(f"  {name}: {ms:.4f} {changed}")
                # Less than a thousandth is noise.
                if ms < best * 0.999:
                    best, family = ms, variant
        log(f"batch {batch}, context {context}: {best:.4f} ms")
    configs.FAMILIES[capability] = family
    return family


def _difference(old: Family, new: Family) -> str:
    for field in dataclasses.fields(Family):
        if getattr(old, field.name) != getattr(new, field.name):
            value = getattr(new, field.name)
            if isinstance(value, dict):
                value = {k: v for k, v in value.items() if getattr(old, field.name).get(k) != v} or "none"
            return str(value)
    return "unchanged"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chain", action="store_true", help="measure the step in every mode")
    parser.add_argument("--tune", type=int, nargs="+", default=[], metavar="BATCH", help="search block shapes")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"])
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the records of --chain")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs an NVIDIA GPU")
    torch.manual_seed(0)
    ceiling = read_ceiling()
    model = random_model(getattr(torch, arguments.dtype))
    weights = bytes_per_step(model, 1, 0) / 1e9
    print(f"{torch.cuda.get_device_name()}: read ceiling {ceiling:.0f} GB/s, {weights:.2f} GB per step")
    for batch in arguments.tune:
        family = tune(model, batch, lambda line: print(line, flush=True))
        print(f"tables after batch {batch}:\n{family}", flush=True)
    if arguments.chain:
        for entry in chain_records(model, ceiling):
            print(json.dumps(entry), flush=True)
            if arguments.json:
                with arguments.json.open("a") as file:
                    file.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
