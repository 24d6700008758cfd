"""A CUDA graph's capture that leaves the process usable however it ends."""

import contextlib
import gc
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch

_idle_streams: defaultdict[torch.device, list[torch.cuda.Stream]] = defaultdict(list)


def capture_stream(owner: Any, device: torch.device) -> torch.cuda.Stream:
    """A stream for the owner's captures, its own for as long as it lives.

    torch keeps the cuBLAS workspace of each stream on which a product was captured (33 MiB on an H200), and two owners
    whose graphs may run side by side must not share one. So streams are taken up again, not made anew for each owner.
    """
    idle = _idle_streams[device]
    try:
        stream = idle.pop()
    except IndexError:
        stream = torch.cuda.Stream(device)
    weakref.finalize(owner, idle.append, stream).atexit = False
    return stream


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Hold Python's garbage collector off: what it finds may be an older graph, and torch (2.11 at least) destroys that
    with a call that CUDA forbids during a capture of the same thread, which spoils the capture."""
    enabled = gc.isenabled()
    try:
        gc.disable()
        yield
    finally:
        if enabled:
            gc.enable()


def capture(pool: tuple[int, int], run: Callable[[], None], counter: torch.Tensor) -> torch.cuda.CUDAGraph:
    """The graph of what ``run`` queues on the current stream, which must not be the default one.

    Args:
        pool: the graph's memory. counter: any tensor on the device; it is not written to.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        run()
    except BaseException:
        # The end of a spoilt capture has an error of its own, which would hide the cause.
        with contextlib.suppress(RuntimeError):
            _end(graph, pool, counter)
        raise
    _end(graph, pool, counter)
    return graph


def _end(graph: torch.cuda.CUDAGraph, pool: tuple[int, int], counter: torch.Tensor) -> None:
    try:
        graph.capture_end()
    except BaseException:
        _leave(pool, counter)
        raise


def _leave(pool: tuple[int, int], counter: torch.Tensor) -> None:
    """Undo what torch leaves where CUDA refuses to end a capture; the stream itself captures no more by then."""
    with contextlib.suppress(RuntimeError, AttributeError):
        # Only a pool that was still recorded to counts the failed graph among its users.
        torch._C._cuda_endAllocateToPool(counter.device.index, pool)
        torch._C._cuda_releasePool(counter.device.index, pool)
    # The default generator believes in the capture until the next one has ended well. This one is never replayed.
    with contextlib.suppress(RuntimeError):
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            counter.zero_()
        finally:
            graph.capture_end()
