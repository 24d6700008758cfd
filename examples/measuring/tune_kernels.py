"""Measure a decode step of the ChatGLM-6B shape made of the Triton kernels alone, and find its block shapes.

    python -m examples.measuring.tune_kernels --chain         # the step with the tables of ops/triton/configs.py
    python -m examples.measuring.tune_kernels --tune 1 8 32   # search tables for these batch sizes

The step has random weights and runs as one CUDA graph. Every time is quoted against the read ceiling of the same
process: the rate at which a kernel that only reads gets through 8 GiB.
"""

import argparse
import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import triton
import triton.language as tl

from faster_chatglm_6b.ops import triton as kernels
from faster_chatglm_6b.ops.triton import configs
from faster_chatglm_6b.ops.triton.configs import Attention, Dot, Family, Gemv

LAYERS, HIDDEN, HEADS, SIZE, INNER, VOCAB = 28, 4096, 32, 128, 16384, 130528
QKV, DENSE, UP, DOWN, HEAD = SHAPES = [
    (3 * HIDDEN, HIDDEN),
    (HIDDEN, HIDDEN),
    (INNER, HIDDEN),
    (HIDDEN, INNER),
    (VOCAB, HIDDEN),
]
ALPHA = math.sqrt(2 * LAYERS)
WEIGHT_BYTES = 2 * (LAYERS * sum(n * k for n, k in SHAPES[:4]) + VOCAB * HIDDEN)
PARTS = frozenset({"norm", "attention", "sampling"})


@triton.jit
def read_kernel(
    source,  # int32 [n]
    out,  # int32 [1]
    BLOCK: tl.constexpr,
):
    value = tl.load(source + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), eviction_policy="evict_first")
    total = tl.sum(value, 0)
    if total == 123456789:
        tl.store(out, total)


def median_ms(run: Callable[[], object], repeats: int, reset: Callable[[], object] = lambda: None) -> float:
    """Median time of ``run`` by CUDA events, each after ``reset``."""
    times = []
    for index in range(repeats + 3):
        reset()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if index >= 3:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def read_ceiling() -> float:
    """GB/s of the fastest of a few kernels that only read."""
    words = 2**31
    source = torch.randint(-(2**31), 2**31 - 1, (words,), dtype=torch.int32, device="cuda")
    out = torch.zeros(1, dtype=torch.int32, device="cuda")
    best = 0.0
    for block, warps in ((2048, 4), (4096, 4), (4096, 8), (8192, 8)):
        time = median_ms(lambda b=block, w=warps: read_kernel[(words // b,)](source, out, BLOCK=b, num_warps=w), 7)
        best = max(best, words * 4 / time / 1e6)
    return best


class Weights:
    """Random weights of the real shape."""

    def __init__(self, dtype: torch.dtype):
        def make(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, dtype=dtype, device="cuda") * 0.02

        self.layers = [[(make(n, k), make(n)) for n, k in SHAPES[:4]] for _ in range(LAYERS)]
        self.head = make(VOCAB, HIDDEN)
        self.gamma, self.beta = make(HIDDEN) + 1, make(HIDDEN)
        angle = torch.rand(2048, SIZE // 4, device="cuda") * 6.28
        self.cos, self.sin = angle.cos().to(dtype), angle.sin().to(dtype)
        self.dtype = dtype


class Chain:
    """One decode step for ``batch`` sequences with ``context`` keys, captured as a CUDA graph.

    ``parts`` can leave out the kernels that read no weights, to see what they cost.
    """

    def __init__(self, weights: Weights, batch: int, context: int, sampler: str = "greedy", parts: Iterable = PARTS):
        self.weights, self.batch, self.context, self.sampler, self.parts = weights, batch, context, sampler, set(parts)
        self.capacity = (context // 256 + 1) * 256

        def buffer(*shape: int) -> torch.Tensor:
            return torch.empty(batch, *shape, dtype=weights.dtype, device="cuda")

        def integers(*shape: int, value: int = 0) -> torch.Tensor:
            return torch.full(shape, value, dtype=torch.int32, device="cuda")

        cache = (LAYERS, batch, HEADS, self.capacity, SIZE)
        self.keys = torch.randn(cache, dtype=weights.dtype, device="cuda")
        self.values = torch.randn(cache, dtype=weights.dtype, device="cuda")
        self.x, self.h, self.context_out, self.normed = (buffer(HIDDEN) for _ in range(4))
        self.qkv, self.inner, self.logits = buffer(3 * HIDDEN), buffer(INNER), buffer(VOCAB)
        self.zeros = integers(batch)
        self.state = kernels.DecodeState(
            tokens=torch.ones(batch, dtype=torch.int64, device="cuda"),
            finished=integers(batch),
            ids=torch.zeros(batch, self.capacity + 64, dtype=torch.int64, device="cuda"),
            ids_length=integers(1),
            cache_length=integers(1),
            step=integers(1),
            eos_ids=torch.full((1,), -1, device="cuda"),
            seed=torch.full((1,), 7, device="cuda"),
            ring=torch.full((64, batch), -1).pin_memory(),
            pad_id=3,
        )
        self.number = torch.tensor([0.95], device="cuda")
        self.top_p = torch.tensor([0.7], device="cuda")
        self.top_k = integers(1, value=50)
        self.workspace = kernels.Workspace("cuda", batch)
        # The graph holds one step, and its last kernel advances the length.
        self.stable_state = True
        self.reset()

    def reset(self) -> None:
        self.state.ids_length.fill_(self.context + 1)
        self.state.cache_length.fill_(self.context)

    def _norm_matmul(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        w, gelu = self.weights, out is self.inner
        if "norm" in self.parts:
            kernels.layer_norm_matmul_bias(
                x, w.gamma, w.beta, 1e-5, weight, bias, gelu, self.normed, out, self.workspace
            )
        else:
            kernels.fused_matmul_bias(x, weight, bias, gelu=gelu, out=out, workspace=self.workspace)

    def step(self) -> None:
        w = self.weights
        kernels.embedding(self.state.tokens, w.head, self.x)
        for layer, ((qkv_w, qkv_b), (dense_w, dense_b), (up_w, up_b), (down_w, down_b)) in enumerate(w.layers):
            self._norm_matmul(self.x, qkv_w, qkv_b, self.qkv)
            if "attention" in self.parts:
                kernels.decode_attention(
                    self.qkv,
                    self.keys[layer],
                    self.values[layer],
                    self.state.cache_length,
                    self.zeros,
                    self.zeros,
                    self.zeros,
                    w.cos,
                    w.sin,
                    stable_state=self.stable_state,
                    workspace=self.workspace,
                    out=self.context_out,
                )
            kernels.fused_matmul_bias(
                self.context_out, dense_w, dense_b, self.normed, ALPHA, out=self.h, workspace=self.workspace
            )
            self._norm_matmul(self.h, up_w, up_b, self.inner)
            kernels.fused_matmul_bias(
                self.inner, down_w, down_b, self.normed, ALPHA, out=self.x, workspace=self.workspace
            )
        self._norm_matmul(self.x, w.head, None, self.logits)
        if "sampling" in self.parts:
            self._sample()

    def _sample(self) -> None:
        if self.sampler == "greedy":
            kernels.greedy_sample(self.logits, self.state, workspace=self.workspace)
        elif self.sampler == "top_k":
            kernels.top_k_sample(
                self.logits,
                self.state,
                self.number,
                self.top_k,
                self.top_p,
                invalid_rule=True,
                workspace=self.workspace,
            )
        else:
            kernels.full_sample(
                self.logits, self.state, self.number, None, self.top_p, invalid_rule=True, workspace=self.workspace
            )

    def bytes_per_step(self) -> int:
        cache = 2 * LAYERS * self.batch * HIDDEN * 2 * (self.context + 1) if "attention" in self.parts else 0
        return WEIGHT_BYTES + cache

    def measure(self, repeats: int = 15) -> float:
        """ms per step, captured with the tables as they are now."""
        self.reset()
        self.step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return median_ms(graph.replay, repeats, self.reset)


def record(chain: Chain, ms: float, ceiling: float) -> dict:
    rate = chain.bytes_per_step() / ms / 1e6
    return {
        "batch": chain.batch,
        "context": chain.context,
        "sampler": chain.sampler,
        "without": sorted(PARTS - chain.parts),
        "dtype": str(chain.weights.dtype).removeprefix("torch."),
        "ms_per_step": round(ms, 4),
        "bytes_per_step": chain.bytes_per_step(),
        "gb_per_s": round(rate, 1),
        "read_ceiling_gb_per_s": round(ceiling, 1),
        "share": round(rate / ceiling, 4),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def chain_records(weights: Weights, ceiling: float) -> Iterator[dict]:
    """The step in every mode that has a target, and batch 1 without each of its small kernels."""
    for batch in (1, 8, 32):
        for context, samplers in ((32, ("greedy", "top_k", "full")), (1024, ("greedy",))):
            for sampler in samplers:
                chain = Chain(weights, batch, context, sampler)
                yield record(chain, chain.measure(), ceiling)
    for missing in ({"sampling"}, {"attention"}, {"norm"}, PARTS):
        chain = Chain(weights, 1, 32, parts=PARTS - missing)
        yield record(chain, chain.measure(), ceiling)


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


def tune(weights: Weights, batch: int, log: Callable[[str], None]) -> Family:
    """Search one table entry after another, each time keeping what makes the whole step fastest."""
    capability = torch.cuda.get_device_capability()
    family = configs.FAMILIES.get(capability, configs.family(torch.device("cuda")))
    knobs = _gemv_knobs if batch == 1 else lambda f: _dot_knobs(f, max(triton.next_power_of_2(batch), 16))
    rounds = [
        (32, knobs),
        (150, lambda f: _attention_knobs(f, "attention_short")),
        (1024, lambda f: _attention_knobs(f, "attention")),
    ]
    for context, make in rounds:
        chain = Chain(weights, batch, context)
        configs.FAMILIES[capability] = family
        best = chain.measure()
        log(f"batch {batch}, context {context}: {best:.4f} ms with the tables as they are")
        names = [name for name, _ in make(family)]
        for index in range(len(names)):
            # The generator is made anew, so that its variants start from the best family so far.
            name, variants = next(item for i, item in enumerate(make(family)) if i == index)
            start = family
            for variant in variants:
                configs.FAMILIES[capability] = variant
                try:
                    ms = chain.measure(9)
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
    print(f"{torch.cuda.get_device_name()}: read ceiling {ceiling:.0f} GB/s, {WEIGHT_BYTES / 1e9:.2f} GB per step")
    weights = Weights(getattr(torch, arguments.dtype))
    for batch in arguments.tune:
        family = tune(weights, batch, lambda line: print(line, flush=True))
        print(f"tables after batch {batch}:\n{family}", flush=True)
    if arguments.chain:
        for entry in chain_records(weights, ceiling):
            print(json.dumps(entry), flush=True)
            if arguments.json:
                with arguments.json.open("a") as file:
                    file.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
