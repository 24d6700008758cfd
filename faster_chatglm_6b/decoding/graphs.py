"""Capture a session's steps as CUDA graphs, and leave the process usable however a capture ends."""

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

# An application needs few graphs: one or two lengths for each way of sampling that it uses, and those of its prompts.
_MOST_GRAPHS = 16

_idle_streams: defaultdict[torch.device, list[torch.cuda.Stream]] = defaultdict(list)


class StepGraphs:
    """Captured graphs, up to ``most``, one for each kind of step. The least recently used one is dropped first.

    Attributes:
        captures: whether steps are captured at all; in Triton's interpreter they are not.
        stream: where steps are captured, a stream of its own; only on a GPU.
        capture_failed: whether memory was too short for a capture. Later steps then run eagerly, which is only slower.
    """

    def __init__(self, device: torch.device, most: int = _MOST_GRAPHS):
        self._most = most
        self.captures, self.capture_failed = device.type == "cuda", False
        self._graphs: OrderedDict[tuple, torch.cuda.CUDAGraph] = OrderedDict()
        if self.captures:
            self._pool = torch.cuda.graph_pool_handle()
            self.stream = capture_stream(self, device)

    def __len__(self) -> int:
        return len(self._graphs)

    def __contains__(self, key: tuple) -> bool:
        return key in self._graphs

    def values(self) -> list[torch.cuda.CUDAGraph]:
        """Return the graphs, the most recently used one last."""
        return list(self._graphs.values())

    def run(self, key: tuple, step: Callable[[], object], counter: torch.Tensor) -> None:
        """Queue a step by replaying its graph. Without one, run it eagerly, which compiles its kernels, and capture it.

        Args:
            key: everything that the launches of ``step`` depend on.
            counter: any tensor on the device; it is not written to.
        """
        if not self.replay(key):
            step()
            self.keep(key, step, counter)

    def replay(self, key: tuple) -> bool:
        """Queue the step with this key if it was captured, and tell whether it was."""
        graph = self._graphs.get(key)
        if graph is None:
            return False
        self._graphs.move_to_end(key)
        graph.replay()
        return True

    def keep(self, key: tuple, step: Callable[[], object], counter: torch.Tensor) -> None:
        """Capture a step that ran before; arguments as of ``run``."""
        if not self.captures or self.capture_failed:
            return
        try:
            self._graphs[key] = self._capture(step, counter)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self.capture_failed = True
            _log.warning("Too little GPU memory to capture a step; this answer's tokens take longer.")
        if len(self._graphs) > self._most:
            self._graphs.popitem(last=False)

    def _capture(self, step: Callable[[], object], counter: torch.Tensor) -> torch.cuda.CUDAGraph:
        """Record the step without running it.

        Other threads and streams of the process go on, with one exception. torch includes its default CUDA generator in
        every capture: a thread that draws from it in these milliseconds gets an error.
        """
        with torch.cuda.stream(self.stream), no_collection():
            return capture(self._pool, step, counter)


def capture_stream(owner: Any, device: torch.device) -> torch.cuda.Stream:
    """Return a stream for the owner's captures, which belongs to the owner as long as it lives.

    torch keeps a cuBLAS workspace for each stream on which a product was captured (33 MiB on an H200). Two owners whose
    graphs may run side by side must not share one. So each owner takes an idle stream before a new one is made.
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
    """Pause Python's garbage collector, which may find an older graph.

    torch (2.11 at least) destroys a graph with a call that CUDA forbids while the same thread captures. That call
    would spoil the capture.
    """
    enabled = gc.isenabled()
    try:
        gc.disable()
        yield
    finally:
        if enabled:
            gc.enable()


def capture(pool: tuple[int, int], run: Callable[[], object], counter: torch.Tensor) -> torch.cuda.CUDAGraph:
    """Return the graph of what ``run`` queues on the current stream, which must not be the default one.

    Args:
        pool: the graph's memory.
        run: queues the kernels.
        counter: any tensor on the device; it is not written to.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        run()
    except BaseException:
        # Ending a spoilt capture raises an error of its own, which would hide the cause.
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
    """Undo what torch leaves if CUDA refuses to end a capture; the stream itself no longer captures by then."""
    with contextlib.suppress(RuntimeError, AttributeError):
        # The pool counts the failed graph among its users only if it was still recorded to.
        torch._C._cuda_endAllocateToPool(counter.device.index, pool)
        torch._C._cuda_releasePool(counter.device.index, pool)
    # The default generator stays in capture mode until a capture ends well. This one is never replayed.
    with contextlib.suppress(RuntimeError):
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            counter.zero_()
        finally:
            graph.capture_end()
