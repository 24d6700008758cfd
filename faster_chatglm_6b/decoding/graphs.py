"""The captured graphs of a session, and a capture that leaves the process usable however it ends."""

import contextlib
import gc
import logging
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .shortage import is_out_of_memory

_log = logging.getLogger("faster_chatglm_6b")

# Graphs are few in practice: one or two lengths times the ways of sampling that an application uses.
_MOST_GRAPHS = 8

_idle_streams: defaultdict[torch.device, list[torch.cuda.Stream]] = defaultdict(list)


class StepGraphs:
    """One captured graph for each kind of step, told apart by a key; the kind used longest ago goes first.

    Attributes:
        captures: whether steps are captured at all; in Triton's interpreter they are not.
        capture_failed: whether memory was too short for a capture. Later steps then run eagerly, only slower.
    """

    def __init__(self, device: torch.device):
        self.captures, self.capture_failed = device.type == "cuda", False
        self._graphs: OrderedDict[tuple, torch.cuda.CUDAGraph] = OrderedDict()
        if self.captures:
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = capture_stream(self, device)

    def __len__(self) -> int:
        return len(self._graphs)

    def values(self) -> list[torch.cuda.CUDAGraph]:
        """Return the graphs, the one used last at the end."""
        return list(self._graphs.values())

    def run(self, key: tuple, step: Callable[[], None], counter: torch.Tensor) -> None:
        """Queue a step: replay its graph, or run it eagerly, which compiles its kernels, and capture it for later.

        Args:
            key: everything that the launches of ``step`` depend on.
            counter: any tensor on the device; it is not written to.
        """
        graph = self._graphs.get(key)
        if graph is not None:
            self._graphs.move_to_end(key)
            graph.replay()
            return
        step()
        if self.captures and not self.capture_failed:
            self._keep(key, step, counter)

    def _keep(self, key: tuple, step: Callable[[], None], counter: torch.Tensor) -> None:
        try:
            self._graphs[key] = self._capture(step, counter)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self.capture_failed = True
            _log.warning("Too little GPU memory to capture a decode step; this answer's tokens take longer.")
        if len(self._graphs) > _MOST_GRAPHS:
            self._graphs.popitem(last=False)

    def _capture(self, step: Callable[[], None], counter: torch.Tensor) -> torch.cuda.CUDAGraph:
        """Record the step without running it.

        Other threads and streams of the process go on undisturbed, but for one thing: torch takes its default CUDA
        generator into every capture, so that a thread that draws from it in these milliseconds gets an error.
        """
        with torch.cuda.stream(self._stream), no_collection():
            return capture(self._pool, step, counter)


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
