"""Find the shapes of the integer products of 9 to 256 rows of x, each weight of the 6B shape alone.

    python -m examples.measuring.tune_many_rows --rows 64 128      # each kind of product, the fastest shapes first

A graph multiplies with several copies of a weight after one another, so that none comes from the L2 cache. Compiling
takes most of the time: a minute for each number of rows.
"""

import argparse
import functools
import math
from collections.abc import Callable, Iterator

import torch

from faster_chatglm_6b.ops import triton as kernels
from faster_chatglm_6b.ops.reference import unpack_int4
from faster_chatglm_6b.ops.triton.quantized.configs import tiles_config
from faster_chatglm_6b.ops.triton.quantized.pipelined.launch import launch_quantized_pipelined, serves_pipelined
from faster_chatglm_6b.ops.triton.quantized.pipelined.tables import Pipelined, fit_pipelined
from faster_chatglm_6b.ops.triton.quantized.tiles import launch_quantized_tiles

from .decode_step import DENSE, DOWN, QKV, UP, median_ms

_WEIGHTS = {"qkv": QKV, "dense": DENSE, "up": UP, "down": DOWN}
# Copies of each weight make at least so many bytes, twice those of an L2 cache.
_BYTES = 100 << 20
_REPEATS, _ROUNDS = 7, 4
# Shared memory of a program, but for what is not a stage, and programs between which a shape is worth a trial.
_STAGES_BYTES, _FEWEST, _MOST = 225_000, 90, 290
_MOST_STAGES = 12


def candidates(bits: int, rows: int, n: int, k: int) -> Iterator[Pipelined]:
    """Yield shapes that fit into shared memory and give about one or two programs to each multiprocessor."""
    block_m = min(max(1 << (rows - 1).bit_length(), 32), 256)
    for size in sorted({block_m, min(block_m, 128), min(block_m, 64)}):
        for warpgroups, turns, block_k in ((4, 2, 64), (4, 2, 128), (4, 4, 128), (2, 1, 64), (2, 2, 128)):
            if size == 256 and (warpgroups, turns) != (2, 1):
                continue
            for splits in (1, 2, 4, 8):
                shape = Pipelined(size, warpgroups, turns, block_k, turns, splits)
                programs = math.ceil(n / shape.weight_rows) * math.ceil(rows / size) * splits
                if not _FEWEST <= programs <= _MOST or k // block_k // splits < 2 * turns:
                    continue
                stage = (size * 2 + shape.weight_rows * bits // 8) * block_k
                sums = shape.weight_rows * size * 4
                room = _STAGES_BYTES // (1 if programs <= 132 else 2) - sums // 4 - sums * (turns - 1)
                stages = min(room // stage, _MOST_STAGES) // turns * turns
                if stages >= max(3, 2 * turns):
                    yield Pipelined(size, warpgroups, turns, block_k, stages, splits)


def microseconds(calls: list[Callable[[], object]]) -> float:
    """Return the time of one of ``calls`` in a graph of all of them."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_ROUNDS):
            for call in calls:
                call()
    return median_ms(graph.replay, _REPEATS, lambda: None) / (_ROUNDS * len(calls)) * 1000


def measure(bits: int, rows: int, n: int, k: int) -> dict[str, float]:
    """Return the microseconds of every kernel and shape whose product is right, the fastest first."""
    size = n * k * bits // 8
    weights = [
        torch.randint(-128, 128, (n, k * bits // 8), dtype=torch.int8, device="cuda")
        for _ in range(math.ceil(_BYTES / size))
    ]
    scale = (torch.rand(n, device="cuda") / 100 + 0.001).half()
    x, out = torch.randn(rows, k, device="cuda").half(), torch.empty(rows, n, dtype=torch.half, device="cuda")
    workspace = kernels.Workspace("cuda", rows)
    integers = unpack_int4(weights[0]) if bits == 4 else weights[0]
    exact = x.double() @ integers.double().T * scale.double()

    def launch(function: Callable, config: object, weight: torch.Tensor) -> None:
        scratch = workspace.partial, workspace.counters
        function(x, weight, scale, bits, -1, None, None, 1.0, False, out, config, *scratch)

    tiles = tiles_config(x.device, bits, rows, n, k, -1, workspace)
    tried = {str(tiles): functools.partial(launch, launch_quantized_tiles, tiles)}
    if serves_pipelined(x, weights[0], -1):
        for shape in candidates(bits, rows, n, k):
            fitted = fit_pipelined(shape, rows, n, workspace)
            tried[str(fitted)] = functools.partial(launch, launch_quantized_pipelined, fitted)
    times = {}
    for name, call in tried.items():
        out.fill_(math.nan)
        call(weights[0])
        if not (out.double() - exact).norm() < 1e-3 * exact.norm():
            print(f"wrong: {name}", flush=True)
            continue
        times[name] = microseconds([functools.partial(call, weight) for weight in weights])
    return dict(sorted(times.items(), key=lambda item: item[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4], choices=[8, 4])
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs an NVIDIA GPU")
    for bits in arguments.bits:
        for rows in arguments.rows:
            for name, (n, k) in _WEIGHTS.items():
                times = measure(bits, rows, n, k)
                fastest = ", ".join(f"{shape} {time:.1f}" for shape, time in list(times.items())[:4])
                print(f"int{bits}, {rows} rows, {name}, us: {fastest}", flush=True)


if __name__ == "__main__":
    main()
