"""Scratch memory that kernels of one stream of work share: partial results and arrival counters."""

import torch
import triton

# Launch grids that the sizes below are made for.
MAX_SPLITS = 64
SAMPLING_BLOCK = 1024
CAPACITY = 128
# Distances from the largest score that ``sampling.threshold`` tells apart.
DISTANCES = 2048
COUNTERS = 8192
# Parts of keys in one launch of attention, unless there are more sequences times heads: those are not split.
ATTENTION_PARTS = 16384


class Workspace:
    """Scratch buffers for every kernel, allocated once.

    Kernels of one stream follow one another, so they may share one workspace; two streams must not. Allocate it before
    a CUDA graph is captured, and keep it as long as the graph.

    A prompt of one sequence has many rows too: products with integer weights split the columns into as many parts as
    ``partial`` has room for (with 256 rows and batch 1: four parts of 4096 weight rows, one of 16384).

    Args:
        device: where the kernels run.
        batch: most sequences per call.
        num_heads, head_size, vocab_size: of the model.
    """

    def __init__(
        self,
        device: torch.device | str,
        batch: int,
        num_heads: int = 32,
        head_size: int = 128,
        vocab_size: int = 130528,
    ):
        # At least 2: the top-k sampler merges pairs of chunks.
        chunks = max(triton.next_power_of_2(triton.cdiv(vocab_size, SAMPLING_BLOCK)), 2)
        # The tensor-core product: up to 16 splits of 16384 rows, or equivalently fewer splits of more rows.
        matmul = 16 * 16384 * min(max(triton.next_power_of_2(batch), 16), 64)
        attention = max(batch * num_heads, ATTENTION_PARTS) * (triton.next_power_of_2(head_size) + 2)
        self.batch = batch
        self.chunks = chunks
        self.partial = torch.empty(max(matmul, attention), dtype=torch.float32, device=device)
        self.candidates = torch.empty(batch * chunks * CAPACITY, dtype=torch.int64, device=device)
        self.maxima = torch.empty(batch * chunks, dtype=torch.int32, device=device)
        self.chunk_sums = torch.empty(2, batch * chunks, dtype=torch.float32, device=device)
        self.histogram = torch.empty(2 * batch * DISTANCES, dtype=torch.int64, device=device)
        self.thresholds = torch.empty(batch * 8, dtype=torch.int64, device=device)
        self.counters = torch.zeros(max(COUNTERS, batch * num_heads + batch + 1), dtype=torch.int32, device=device)


_default: dict[tuple[torch.device, int], Workspace] = {}


def default_workspace(device: torch.device, batch: int) -> Workspace:
    """Return the workspace that calls on the current stream share if they are given none; it grows, never shrinks."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    held = _default.get((device, stream))
    if held is None or held.batch < batch:
        held = _default[device, stream] = Workspace(device, max(batch, 8))
    return held
