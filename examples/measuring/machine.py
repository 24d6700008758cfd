"""Look at the machine: its name, its clocks, how fast it reads its memory, and how fast it multiplies."""

import contextlib
import importlib.util
import platform
import statistics
import subprocess
from typing import NamedTuple

import torch


class Machine(NamedTuple):
    """What records say of the machine.

    Attributes:
        device: "cuda" or "cpu".
        name: of the GPU, or of the CPU's architecture.
        clocks: SM and memory clock under load, "unknown" if nvidia-smi does not tell.
        read_ceiling: GB/s, or None on a CPU and without Triton.
        matrix_rate: TFLOP/s of large float16 products, or None on a CPU.
    """

    device: str
    name: str
    clocks: str
    read_ceiling: float | None
    matrix_rate: float | None


def look() -> Machine:
    """Measure this machine; takes seconds and leaves the GPU's memory free."""
    if not torch.cuda.is_available():
        return Machine("cpu", f"CPU ({platform.processor() or platform.machine()})", "unknown", None, None)
    ceiling = read_ceiling() if importlib.util.find_spec("triton") is not None else None
    # Before clocks(), whose half second of products would heat the GPU: a prompt is a short burst, too.
    rate = matrix_rate()
    machine = Machine("cuda", torch.cuda.get_device_name(), clocks(), ceiling, rate)
    torch.cuda.empty_cache()
    return machine


def synchronize() -> None:
    """Wait until the GPU has done everything; nothing to wait for on a CPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def read_ceiling() -> float:
    """Measure the GB/s of a read-only stream of 8 GiB (half of a smaller GPU's memory), the best of 20."""
    import triton
    import triton.language as tl

    @triton.jit
    def read(source, sink, BLOCK: tl.constexpr, ROUNDS: tl.constexpr):
        start = tl.program_id(0).to(tl.int64) * BLOCK * ROUNDS
        total = tl.zeros([BLOCK], tl.int32)
        for i in range(ROUNDS):
            total += tl.load(source + start + i * BLOCK + tl.arange(0, BLOCK), eviction_policy="evict_first")
        # Never true, but the compiler cannot know.
        if tl.sum(total) == 123456789:
            tl.store(sink, 1)

    half = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory // 2
    per_program = 4096 * 8
    programs = min(8 << 30, half) // 4 // per_program
    data = torch.zeros(programs * per_program, dtype=torch.int32, device="cuda")
    sink = torch.zeros(1, dtype=torch.int32, device="cuda")
    times = []
    for _ in range(22):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        read[(programs,)](data, sink, BLOCK=4096, ROUNDS=8, num_warps=8)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return data.numel() * 4 / min(times[2:]) / 1e6


def matrix_rate() -> float:
    """Measure the TFLOP/s of PyTorch's float16 products of two 8192 x 8192 matrices, the median of 20."""
    size, warm_up = 8192, 10
    rows, weight = (torch.randn(size, size, device="cuda", dtype=torch.float16) for _ in range(2))
    events = []
    for _ in range(warm_up + 20):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.nn.functional.linear(rows, weight)
        stop.record()
        events.append((start, stop))
    torch.cuda.synchronize()
    times = [start.elapsed_time(stop) for start, stop in events[warm_up:]]
    return 2 * size**3 / statistics.median(times) / 1e9


def clocks() -> str:
    """Read the SM and memory clock from nvidia-smi right after work was queued."""
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    for _ in range(300):
        x @ x
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        out = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip().splitlines()
        if out:
            return out[0]
    return "unknown"
