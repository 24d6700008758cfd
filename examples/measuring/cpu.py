"""Measure decoding on a CPU: the real shape with fewer layers, next to what the threads can read in this process.

A model of the 6B shape with ``--layers N`` is timed whole and with one layer, in turns. The difference tells what a
layer costs, and the time of all 28 layers is extrapolated from it; ``extrapolated`` in the record says so. The share
is the time that the bytes of 28 layers and the head take at the read ceiling, divided by the time. A CPU seldom is
ours alone, so times are the best of the iterations, and the ceiling is the best of what was read between them. With one
thread both are taken from the process's own clock, which stops while other programs have the core.
"""

import argparse
import datetime
import functools
import gc
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .models import CONFIG_6B, bytes_per_step, head_of, make_prompt, weights_of
from .timing import append, run_once

KEYS = (
    "weights dtype group_size head prompt_tokens new_tokens mode layers ms_at_layers ms_per_layer extrapolated "
    "ms_per_step bytes_per_step gb_per_s read_ceiling_gb_per_s share threads clock cpu kernel peak_memory_gb torch "
    "date command"
).split()
ALL_LAYERS = CONFIG_6B["num_layers"]


def random_model(
    layers: int, dtype: torch.dtype, bits: int, group_size: int | None, head_bits: int | None
) -> nn.Module:
    """Make a model of the 6B shape with random weights, whose float layers never exist if it is quantised.

    Args:
        layers: of the 28. bits: 16, 8 or 4.

    Raises:
        ValueError: settings that ``quantize`` would refuse.
    """
    from faster_chatglm_6b.configuration_chatglm import ChatGLMConfig
    from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration

    quantization = {}
    if bits != 16:
        quantization = {
            "quantization_bit": bits,
            "quantization_group_size": group_size,
            "quantization_head_bits": head_bits,
        }
    config = ChatGLMConfig(**{**CONFIG_6B, "num_layers": layers, **quantization})
    config.tie_word_embeddings = not head_bits
    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    # Random numbers take long: all weights repeat these.
    normal = torch.randn(1 << 22, generator=generator) * 0.02
    for owner in model.modules():
        for name, parameter in owner._parameters.items():
            if parameter is None or (owner is model.lm_head and not head_bits):
                continue
            if parameter.dtype == torch.int8:
                value = torch.empty(parameter.shape, dtype=torch.int8).random_(-128, 128, generator=generator)
            elif name == "weight_scale":
                value = torch.full(parameter.shape, 0.02 / (8 if bits == 4 else 128), dtype=dtype)
            elif parameter.dim() > 1:
                value = torch.empty(parameter.shape, dtype=dtype)
                flat = value.view(-1)
                for start in range(0, flat.numel(), normal.numel()):
                    part = flat[start : start + normal.numel()]
                    part.copy_(normal[: part.numel()])
            else:
                value = torch.full(parameter.shape, float(isinstance(owner, nn.LayerNorm) and name == "weight"))
                value = value.to(dtype)
            owner._parameters[name] = nn.Parameter(value, requires_grad=False)
    if not head_bits:
        model.lm_head.weight = model.transformer.word_embeddings.weight
    return model


def clock() -> str:
    """Name the clock that times are taken from: the process's own says nothing about several threads."""
    return "process" if torch.get_num_threads() == 1 else "wall"


def timed(call: Callable[[], Any]) -> float:
    """Return the seconds of a call by ``clock()``; collect garbage before."""
    now = time.process_time if clock() == "process" else time.perf_counter
    gc.collect()
    start = now()
    call()
    return now() - start


def read_ceiling(rounds: int = 8) -> float:
    """Measure the GB/s at which torch's threads add up 1 GiB of floats, the best of ``rounds``."""
    data = torch.zeros(256 << 20)
    times = [timed(data.sum) for _ in range(rounds)]
    return data.numel() * 4 / min(times) / 1e9


def cpu_name() -> str:
    """Return the processor's name with the vector instructions that torch uses."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(errors="replace").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def extrapolated(whole: float, one: float, layers: int) -> tuple[float, float]:
    """Return the seconds of a layer and of all 28, from the seconds with ``layers`` and with one."""
    layer = (whole - one) / (layers - 1)
    return layer, whole + layer * (ALL_LAYERS - layers)


def run(args: argparse.Namespace) -> None:
    """Measure what the arguments ask for, print it, and append the record to ``args.json``."""
    layers, dtype = args.layers or ALL_LAYERS, getattr(torch, args.dtype)
    try:
        model = random_model(layers, dtype, args.bits, args.group_size, args.head_bits)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    record = measure(model, layers, args)
    known = "extrapolated from" if record["extrapolated"] else "measured with"
    what = "the first token" if args.new_tokens == 1 else "one more token"
    print(f"{record['weights']} layers, {record['head']} head, {args.dtype}, on {record['cpu']}: {record['kernel']}")
    print(f"Threads: {record['threads']}; times by the {record['clock']} clock.")
    print(f"{layers} layers: {record['ms_at_layers']:.1f} ms for {what}")
    print(f"28 layers: {record['ms_per_step']:.1f} ms, {known} {layers} layers")
    ceiling = f"{record['read_ceiling_gb_per_s']:.1f} GB/s that this process reads"
    print(f"reading: {record['gb_per_s']:.1f} GB/s, {record['share']:.2f} of the {ceiling}")
    append(args.json, [record])


def measure(model: nn.Module, layers: int, args: argparse.Namespace) -> dict[str, Any]:
    """Time ``args.iters`` generations after ``args.warmup_iters`` others and return the record, with the keys KEYS."""
    ids = make_prompt(model, args.batch, args.prompt_tokens)
    times: dict[tuple[int, int], list[float]] = {}
    every = model.transformer.layers
    counts, lengths = sorted({1, layers}), sorted({1, args.new_tokens})
    ceilings = [read_ceiling()]
    for iteration in range(args.warmup_iters + args.iters):
        for count in counts:
            # A model of one layer: nothing else in it knows how many there are, but the config.
            model.transformer.layers, model.config.num_layers = every[:count], count
            for length in lengths:
                seconds = timed(functools.partial(run_once, model, ids, args.mode, length))
                if iteration >= args.warmup_iters:
                    times.setdefault((count, length), []).append(seconds)
        ceilings.append(read_ceiling(2))
    model.transformer.layers, model.config.num_layers = every, layers
    best = {key: min(seconds) for key, seconds in times.items()}
    others = max(1, args.new_tokens - 1)
    steps = {
        count: (best[count, args.new_tokens] - (best[count, 1] if args.new_tokens > 1 else 0)) / others
        for count in counts
    }
    if min(steps.values()) <= 0 or (layers > 1 and steps[layers] <= steps[1]):
        raise SystemExit("More layers or tokens took no longer than fewer: the machine is busy; give more --iters.")
    layer, step = extrapolated(steps[layers], steps[1], layers)
    keys = args.prompt_tokens + args.new_tokens / 2
    of_layer = sum(p.numel() * p.element_size() for p in every[0].parameters())
    moved = bytes_per_step(model, args.batch, keys * ALL_LAYERS / layers) + of_layer * (ALL_LAYERS - layers)
    ceiling = max(ceilings)
    values = (
        weights_of(model),
        args.dtype,
        args.group_size,
        head_of(model),
        args.prompt_tokens,
        args.new_tokens,
        args.mode,
        layers,
        round(steps[layers] * 1e3, 2),
        round(layer * 1e3, 3),
        layers != ALL_LAYERS,
        round(step * 1e3, 1),
        moved,
        round(moved / step / 1e9, 2),
        round(ceiling, 2),
        round(moved / step / 1e9 / ceiling, 3),
        torch.get_num_threads(),
        clock(),
        cpu_name(),
        _kernel(model.dtype),
        _peak_memory(),
        torch.__version__,
        datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        " ".join(["python", "examples/benchmark.py", *sys.argv[1:]]),
    )
    return dict(zip(KEYS, values, strict=True))


def _kernel(dtype: torch.dtype) -> str:
    """Return what served the products of integer weights with x in ``dtype``, with the reason."""
    import faster_chatglm_6b

    choices = faster_chatglm_6b.status().operators[f"cpu {str(dtype).removeprefix('torch.')}"]
    return "{} ({})".format(*choices["fused_linear_with_groupwise_quantized_weight"])


def _peak_memory() -> float | None:
    """Return the most GB that this process held, or None where the system does not say."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)
