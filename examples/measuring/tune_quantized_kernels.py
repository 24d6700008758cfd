"""Measure a decode step with int8 and int4 weights made of the Triton kernels alone, and find their shapes.

    python -m examples.measuring.tune_quantized_kernels --tune      # the table for quantized_configs.py
    python -m examples.measuring.tune_quantized_kernels --chain     # whole steps, next to fp16 in the same process

Weights are random. Times are medians over replays of a CUDA graph of a whole step, in which every launch reads another
matrix, so that nothing comes from L2, and are quoted against the read ceiling of the same process. Shapes are tuned in
whole steps and not alone: what a kernel leaves free decides how early the next one starts.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch

from faster_chatglm_6b.ops import triton as kernels
from faster_chatglm_6b.ops.triton import quantized_configs
from faster_chatglm_6b.ops.triton.quantized_configs import Row, row_config, rows_for

from .machine import read_ceiling

LAYERS, HIDDEN, HEADS, SIZE, INNER, VOCAB = 28, 4096, 32, 128, 16384, 130528
QKV, DENSE, UP, DOWN, HEAD = (3 * HIDDEN, HIDDEN), (HIDDEN, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER), (VOCAB, HIDDEN)
SHAPES = (QKV, DENSE, UP, DOWN, HEAD)
ALPHA = math.sqrt(2 * LAYERS)
CANDIDATES = [
    Row(*numbers)
    for numbers in (
        (4, 4, 2, 2), (4, 4, 2, 3), (4, 4, 2, 4), (4, 2, 4, 3), (4, 2, 4, 4), (4, 2, 4, 6), (4, 4, 1, 6), (8, 4, 1, 2),
        (8, 4, 1, 3), (8, 2, 2, 2), (8, 2, 2, 3), (8, 2, 2, 4), (16, 2, 1, 2),
    )
]  # fmt: skip


def median_ms(call: Callable[[], object], repeats: int = 11) -> float:
    """Median time of ``call`` on the device."""
    times = []
    for _ in range(repeats + 2):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return sorted(times[2:])[repeats // 2]


def captured_ms(call: Callable[[], None], repeats: int = 11) -> float:
    """Median time of the launches of ``call`` as one graph."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return median_ms(graph.replay, repeats)


class Product:
    """A random weight of 16, 8 or 4 bits and its bias, and the launches on it."""

    def __init__(self, shape: tuple[int, int], bits: int, group_size: int = -1):
        n, k = shape
        self.bits, self.group_size = bits, group_size
        self.bias = torch.zeros(n, dtype=torch.float16, device="cuda")
        if bits == 16:
            self.weight = torch.randn(n, k, dtype=torch.float16, device="cuda") * 0.02
            self.bytes = 2 * n * k
            return
        words = torch.randint(-(2**31), 2**31 - 1, (n, k * bits // 32), dtype=torch.int32, device="cuda")
        self.weight = words.view(torch.int8)
        groups = 1 if group_size < 0 else k // group_size
        self.scale = torch.full((n, groups), 0.02 / 2 ** (bits - 2), dtype=torch.float16, device="cuda")
        self.bytes = n * k * bits // 8 + 2 * n * groups

    def __call__(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        residual: torch.Tensor | None = None,
        workspace: kernels.Workspace | None = None,
    ) -> torch.Tensor:
        if self.bits == 16:
            return kernels.fused_matmul_bias(x, self.weight, self.bias, residual, ALPHA, False, out, workspace)
        return kernels.fused_linear_with_groupwise_quantized_weight(
            x, self.weight, self.scale, self.bias, self.bits, self.group_size, residual, ALPHA, False, out, workspace
        )


class Step:
    """One decode step of the ChatGLM-6B shape."""

    def __init__(self, bits: int, head_bits: int, group_size: int = -1):
        self.layers = [[Product(s, bits, group_size) for s in (QKV, DENSE, UP, DOWN)] for _ in range(LAYERS)]
        self.head = Product(HEAD, head_bits)
        self.embedding = torch.randn(1000, HIDDEN, dtype=torch.float16, device="cuda")
        self.name = f"{bits} bits" + (f", groups of {group_size}" if group_size > 0 else "") + f", head {head_bits}"
        self.bytes = self.head.bytes + sum(product.bytes for layer in self.layers for product in layer)

    def measure(self, batch: int, context: int = 32, greedy: bool = True) -> float:
        """ms per step."""
        half = {"dtype": torch.float16, "device": "cuda"}
        ints = {"dtype": torch.int32, "device": "cuda"}
        hidden, normed, packed, mixed, inner, logits = (
            torch.zeros(batch, width, **half) for width in (HIDDEN, HIDDEN, 3 * HIDDEN, HIDDEN, INNER, VOCAB)
        )
        # Those of every LayerNorm lie elsewhere, as in the model.
        gammas, shifts = torch.ones(2 * LAYERS + 1, HIDDEN, **half), torch.zeros(2 * LAYERS + 1, HIDDEN, **half)
        capacity = 256 if context < 200 else 2048
        keys, values = (torch.randn(LAYERS, batch, HEADS, capacity, SIZE, **half) for _ in range(2))
        cos, sin = (torch.rand(capacity + 2, SIZE // 4, **half) for _ in range(2))
        workspace = kernels.Workspace("cuda", batch)
        zeros, length = torch.zeros(batch, **ints), torch.full((1,), context, **ints)
        state = kernels.DecodeState(
            tokens=torch.ones(batch, dtype=torch.int64, device="cuda"),
            finished=torch.zeros(batch, **ints),
            ids=torch.zeros(batch, capacity, dtype=torch.int64, device="cuda"),
            ids_length=torch.ones(1, **ints),
            cache_length=torch.ones(1, **ints),
            step=torch.zeros(1, **ints),
            eos_ids=torch.full((1,), -1, dtype=torch.int64, device="cuda"),
            seed=torch.zeros(1, dtype=torch.int64, device="cuda"),
            ring=torch.zeros(16, batch, dtype=torch.int64, device="cuda"),
            pad_id=3,
        )
        tokens = torch.ones(batch, dtype=torch.int64, device="cuda")

        def normalised(norm: int, product: Product, out: torch.Tensor, gelu: bool = False) -> None:
            if product.bits == 16:
                kernels.layer_norm_matmul_bias(
                    hidden, gammas[norm], shifts[norm], 1e-5, product.weight, product.bias, gelu, normed, out, workspace
                )
            else:
                kernels.layer_norm_quantized_linear(
                    hidden, gammas[norm], shifts[norm], 1e-5, product.weight, product.scale, product.bias, product.bits,
                    product.group_size, gelu, normed, out, workspace,
                )  # fmt: skip

        def step() -> None:
            kernels.embedding(tokens, self.embedding, out=hidden)
            for index, (qkv, dense, up, down) in enumerate(self.layers):
                normalised(2 * index, qkv, packed)
                kernels.decode_attention(
                    packed, keys[index], values[index], length, zeros, zeros, zeros, cos, sin,
                    max_length=capacity, stable_state=True, workspace=workspace, out=mixed,
                )  # fmt: skip
                dense(mixed, hidden, normed, workspace=workspace)
                normalised(2 * index + 1, up, inner, gelu=True)
                down(inner, hidden, normed, workspace=workspace)
            normalised(2 * LAYERS, self.head, logits)
            if greedy:
                kernels.greedy_sample(logits, state, workspace=workspace)

        return captured_ms(step)


def tune(bits: int) -> dict[tuple[int, int], Row]:
    """The fastest configuration of every weight shape in a whole step, one shape after the other, twice."""
    step = Step(bits, 8)
    best = {shape: row_config(rows_for(torch.device("cuda")), bits, *shape) for shape in SHAPES}

    def measured(table: dict[tuple[int, int], Row]) -> float:
        # The head is of 8 bits whatever the layers are.
        rows = {bits: table, 8: {HEAD: table[HEAD]} | (table if bits == 8 else {})}
        quantized_configs._HOPPER_ROWS = quantized_configs._OTHER_ROWS = rows
        return step.measure(1)

    for _ in range(2):
        for shape in SHAPES:
            times = {
                config: measured(best | {shape: config}) for config in {best[shape]: 0} | dict.fromkeys(CANDIDATES)
            }
            best[shape] = min(times, key=times.get)
            ordered = sorted(times.items(), key=lambda item: item[1])
            print(f"{bits} bits {shape}: " + "  ".join(f"{spell(c)}: {ms:.3f}" for c, ms in ordered), flush=True)
    return best


def spell(config: Row) -> str:
    """The numbers of a configuration."""
    return ",".join(str(number) for number in dataclasses.astuple(config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", action="store_true", help="search the shapes of every product")
    parser.add_argument("--chain", action="store_true", help="measure whole steps")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the records of --chain")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    ceiling = read_ceiling()
    print(f"{torch.cuda.get_device_name()}: read ceiling {ceiling:.0f} GB/s", flush=True)
    if arguments.tune:
        rows = {bits: tune(bits) for bits in (4, 8)}
        quantized_configs._HOPPER_ROWS = quantized_configs._OTHER_ROWS = rows
        print(f"rows: {rows}", flush=True)
    if not arguments.chain:
        return
    for bits, head_bits, group_size in ((16, 16, -1), (8, 16, -1), (8, 8, -1), (4, 16, -1), (4, 8, -1), (4, 16, 128)):
        step = Step(bits, head_bits, group_size)
        for batch in (1, 8) if head_bits == 16 else (1,):
            ms = step.measure(batch)
            share = step.bytes / ms / 1e6 / ceiling
            record = {"weights": step.name, "batch": batch, "ms": round(ms, 4), "share": round(share, 3)}
            print(json.dumps(record), flush=True)
            if arguments.json:
                with arguments.json.open("a") as file:
                    file.write(json.dumps(record) + "\n")
        del step
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
