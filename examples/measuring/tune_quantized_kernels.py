"""Measure the decode step with int8 and int4 weights without the host, and find the shapes of its products.

    python -m examples.measuring.tune_quantized_kernels --tune    # search the tables of ops/triton/quantized/configs.py
    python -m examples.measuring.tune_quantized_kernels --chain   # whole steps, next to fp16 in the same process

The step is the product's own over random weights, as one CUDA graph, in which every launch reads another matrix, so
that nothing comes from L2. Times are medians and are quoted against the read ceiling of the same process. Shapes are
tuned in whole steps and not alone: what a kernel leaves free decides how early the next one starts.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch

from faster_chatglm_6b.ops.triton.quantized.configs import Row, row_config, rows_for

from .decode_step import HEAD, SHAPES, TimedStep, report_records
from .machine import read_ceiling
from .models import bytes_per_step, random_model

CONTEXT, REPEATS = 32, 11
# Bits of the layers and of the head, and columns per scale.
WEIGHTS = ((16, 16, None), (8, 16, None), (8, 8, None), (4, 16, None), (4, 8, None), (4, 16, 128))
CANDIDATES = [
    Row(*numbers)
    for numbers in (
        (4, 4, 2, 2), (4, 4, 2, 3), (4, 4, 2, 4), (4, 2, 4, 3), (4, 2, 4, 4), (4, 2, 4, 6), (4, 4, 1, 6), (8, 4, 1, 2),
        (8, 4, 1, 3), (8, 2, 2, 2), (8, 2, 2, 3), (8, 2, 2, 4), (16, 2, 1, 2),
    )
]  # fmt: skip


def quantized(bits: int, head_bits: int, group_size: int | None = None) -> torch.nn.Module:
    """Make a model of random weights of so many bits."""
    model = random_model()
    if bits < 16:
        model.quantize(bits, group_size, None if head_bits == 16 else head_bits)
    return model


def tune(model: torch.nn.Module, bits: int) -> dict[tuple[int, int], Row]:
    """Find the fastest configuration of every weight shape in a whole step, one shape after the other, twice.

    Args:
        model: one with layers of ``bits`` and a head of 8 bits.
    """
    step, rows = TimedStep(model, 1, CONTEXT), rows_for(model.device)
    best = {shape: row_config(rows, bits, *shape) for shape in SHAPES}

    def use(table: dict[tuple[int, int], Row]) -> None:
        rows[8] = rows.get(8, {}) | {HEAD: table[HEAD]}
        rows[bits] = rows.get(bits, {}) | table

    def measured(table: dict[tuple[int, int], Row]) -> float:
        use(table)
        return step.measure(REPEATS)

    for _ in range(2):
        for shape in SHAPES:
            configs = dict.fromkeys([best[shape], *CANDIDATES])
            times = {config: measured(best | {shape: config}) for config in configs}
            best[shape] = min(times, key=times.get)
            ordered = sorted(times.items(), key=lambda item: item[1])
            print(f"{bits} bits {shape}: " + "  ".join(f"{spell(c)}: {ms:.3f}" for c, ms in ordered), flush=True)
    use(best)
    return best


def spell(config: Row) -> str:
    """Write the numbers of a configuration."""
    return ",".join(str(number) for number in dataclasses.astuple(config))


def chain_records(ceiling: float) -> Iterator[dict]:
    """Measure whole steps of every kind of weights; the share counts the weights alone, as the log's does."""
    for bits, head_bits, group_size in WEIGHTS:
        model = quantized(bits, head_bits, group_size)
        groups = f", groups of {group_size}" if group_size else ""
        for batch in (1, 8) if head_bits == 16 else (1,):
            ms = TimedStep(model, batch, CONTEXT).measure(REPEATS)
            share = bytes_per_step(model, batch, 0) / ms / 1e6 / ceiling
            name = f"{bits} bits{groups}, head {head_bits}"
            yield {"weights": name, "batch": batch, "ms": round(ms, 4), "share": round(share, 3)}
        del model
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", action="store_true", help="search the shapes of every product")
    parser.add_argument("--chain", action="store_true", help="measure whole steps")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the records of --chain")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs an NVIDIA GPU")
    torch.manual_seed(0)
    ceiling = read_ceiling()
    print(f"{torch.cuda.get_device_name()}: read ceiling {ceiling:.0f} GB/s", flush=True)
    if arguments.tune:
        rows = {}
        for bits in (4, 8):
            rows[bits] = tune(quantized(bits, 8), bits)
            torch.cuda.empty_cache()
        print(f"rows, found on {torch.cuda.get_device_name()}: {rows}", flush=True)
    if arguments.chain:
        report_records(chain_records(ceiling), arguments.json)


if __name__ == "__main__":
    main()
