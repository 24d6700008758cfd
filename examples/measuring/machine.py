"""Look at the machine: its name, its clocks, and how fast it reads its memory."""

import contextlib
import importlib.util
import platform
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
    """

    device: str
    name: str
    clocks: str
    read_ceiling: float | None


def look() -> Machine:
    """Measure this machine; takes seconds and leaves the GPU's memory free."""
    if not torch.cuda.is_available():
        return Machine("cpu", f"CPU ({platform.processor() or platform.machine()})", "unknown", None)
    ceiling = read_ceiling() if importlib.util.find_spec("triton") is not None else None
    machine = Machine("cuda", torch.cuda.get_device_name(), clocks(), ceiling)
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
