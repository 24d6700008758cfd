"""Measure the decode step of the ChatGLM-6B shape without the host, and find the block shapes of its kernels.

    python -m examples.measuring.tune_kernels --chain         # the step with the tables of ops/triton/configs.py
    python -m examples.measuring.tune_kernels --tune 1 8 32   # search tables for these batch sizes

The step is the product's own over random weights, as one CUDA graph. Every time is quoted against the read ceiling of
the same process: the rate at which a kernel that only reads gets through 8 GiB.
"""

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton

from faster_chatglm_6b.ops.triton import configs
from faster_chatglm_6b.ops.triton.configs import Attention, Dot, Family, Gemv
from faster_chatglm_6b.ops.triton.linear.fused_matmul_bias import MOST_DOT_ROWS

from .decode_step import DENSE, DOWN, HEAD, PARTS, QKV, SHAPES, UP, TimedStep, report_records
from .machine import read_ceiling
from .models import bytes_per_step, random_model

# A name of what is searched, and the variants of a family that it tries.
Knob = tuple[str, Callable[[Family], list[Family]]]


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


def _entry(table: str, key: tuple[int, int], choices: list[Gemv | None]) -> Callable[[Family], list[Family]]:
    """Vary what a table of GEMVs says of one weight."""

    def variants(family: Family) -> list[Family]:
        tables = [_with(getattr(family, table), key, choice) for choice in choices]
        return [dataclasses.replace(family, **{table: changed}) for changed in tables]

    return variants


def _gemv_knobs() -> Iterator[Knob]:
    blocks = [Gemv(2, 2048, 4), Gemv(1, 2048, 2), Gemv(1, 4096, 4), Gemv(1, 4096, 8), Gemv(2, 4096, 4)]
    blocks += [Gemv(2, 4096, 8), Gemv(4, 4096, 8), Gemv(4, 1024, 4)]
    long_blocks = [Gemv(8, 512, 4), Gemv(4, 2048, 8), Gemv(1, 16384, 16)]
    loops = [Gemv(2, 4096, 8, 4), Gemv(2, 4096, 8, 8), Gemv(2, 4096, 4, 8), Gemv(1, 4096, 4, 16)]
    for key in (DENSE, QKV, UP, DOWN, HEAD):
        yield f"gemv {key}", _entry("gemv", key, blocks + (long_blocks if key == DOWN else loops))
        if key in (QKV, UP):
            yield f"LayerNorm inside {key}", _entry("layer_norm_gemv", key, [None, *loops])


def _dot_entry(rows: int, key: tuple[int, int], choices: list[Dot]) -> Callable[[Family], list[Family]]:
    """Vary what the tables of tensor-core products say of one weight and so many rows."""

    def variants(family: Family) -> list[Family]:
        tables = [_with(family.dot.get(rows, {}), key, choice) for choice in choices]
        return [dataclasses.replace(family, dot=family.dot | {rows: changed}) for changed in tables]

    return variants


def _dot_knobs(rows: int) -> Iterator[Knob]:
    blocks = {
        16: [(64, 128, 4, 3), (64, 128, 4, 4), (64, 256, 4, 3), (128, 64, 4, 5), (128, 128, 4, 3)],
        32: [(64, 128, 4, 4), (64, 128, 4, 3), (64, 64, 4, 6), (128, 128, 8, 3)],
    }[rows]
    for key in SHAPES:
        splits = (1,) if key == HEAD else (1, 2, 4) if key in (DENSE, DOWN) else (1, 2)
        yield f"dot {rows} {key}", _dot_entry(rows, key, [Dot(*b, s) for b in blocks for s in splits])


def _attention_knob(name: str) -> Knob:
    choices = [Attention(t, w, v) for t, w in ((32, 2), (32, 4), (64, 4), (128, 4), (128, 8)) for v in (1, 2, 4, 8)]
    return name, lambda family: [dataclasses.replace(family, **{name: choice}) for choice in choices]


def _many_attention_knob(pairs: int) -> Knob:
    """Vary the attention of ``pairs`` sequences times heads, which need no splits."""
    choices = [Attention(t, w, 4) for t, w in ((16, 1), (32, 1), (32, 2), (64, 2), (64, 4), (128, 4))]

    def variants(family: Family) -> list[Family]:
        least = max(number for number in family.attention_many if number <= pairs)
        tables = [family.attention_many | {least: choice} for choice in choices]
        return [dataclasses.replace(family, attention_many=table) for table in tables]

    return "attention_many", variants


def tune(model: torch.nn.Module, batch: int, log: Callable[[str], None]) -> Family:
    """Search one table entry after another, each time keeping what makes the whole step fastest."""
    capability, family = configs.capability(model.device), configs.family(model.device)
    if batch == 1:
        products = _gemv_knobs()
    else:
        # The library serves more rows.
        products = _dot_knobs(max(triton.next_power_of_2(batch), 16)) if batch <= MOST_DOT_ROWS else ()
    pairs = batch * model.config.num_attention_heads
    short, long = _attention_knob("attention_short"), _attention_knob("attention")
    if pairs >= min(family.attention_many, default=pairs + 1):
        short = long = _many_attention_knob(pairs)
    rounds = ((32, products), (150, [short]), (1024, [long]))
    for context, knobs in rounds:
        step = TimedStep(model, batch, context)
        configs.FAMILIES[capability] = family
        best = step.measure()
        log(f"batch {batch}, context {context}: {best:.4f} ms with the tables as they are")
        for name, variants in knobs:
            start = family
            for variant in variants(start):
                configs.FAMILIES[capability] = variant
                try:
                    ms = step.measure(9)
                except triton.runtime.errors.OutOfResources:
                    continue
                log(f"  {name}: {ms:.4f} {_difference(start, variant)}")
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
        family = dataclasses.replace(family, found_on=torch.cuda.get_device_name())
        print(f"tables after batch {batch}:\n{family}", flush=True)
    if arguments.chain:
        report_records(chain_records(model, ceiling), arguments.json)


if __name__ == "__main__":
    main()
