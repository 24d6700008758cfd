"""Report memory that ran out, with what was asked for and would fit, and release what the failure holds."""

import contextlib
import traceback
from collections.abc import Iterator
from typing import Any

import torch

from . import memory

# How allocators other than CUDA's, and CUDA's own calls, say that memory ran out.
_WORDS = (
    "CUDA error: out of memory",
    "CUDA out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator",
    "MPS backend out of memory",
    # More bytes than can be counted.
    "Storage size calculation overflowed",
    "multiplication overflow",
)
# OneFlow's torch has no such error.
_OutOfMemoryError = getattr(torch.cuda, "OutOfMemoryError", MemoryError)


class GenerationOutOfMemoryError(_OutOfMemoryError):
    """Memory ran out in a generation of ``batch`` sequences; the message says what it needed and what would fit.

    It is a ``torch.cuda.OutOfMemoryError``, on a CPU too.

    Args:
        batch: sequences or beams.
        prompt: tokens of each sequence without its answer.
        total: tokens of each sequence with the longest answer.
    """

    def __init__(self, model: Any, batch: int, prompt: int, total: int):
        self._asked = (model, batch, prompt, total)
        super().__init__(_sentence(*self._asked))

    def measure_again(self) -> None:
        """Update the message to what is free after the failed frames are cleared, and drop the model."""
        asked, self._asked = self._asked, None
        if asked is not None:
            self.args = (_sentence(*asked),)

    def __reduce__(self) -> tuple:
        # Another process gets an error that it can read without the model.
        return _OutOfMemoryError, self.args


def is_out_of_memory(error: BaseException | None) -> bool:
    """Tell whether the exception says that memory of any device ran out."""
    if isinstance(error, (_OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


@contextlib.contextmanager
def memory_explained(model: Any, input_ids: torch.Tensor, max_length: int | None) -> Iterator[None]:
    """If memory runs out inside, free what the failed generation held and say what was asked for and would fit.

    Args:
        input_ids: int64 [B, L], one row for every sequence or beam.
        max_length: tokens per sequence, prompt included, at which generation would have ended.

    Raises:
        GenerationOutOfMemoryError: memory ran out, on a GPU or a CPU.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reclaim(model, error)
        raise GenerationOutOfMemoryError(model, *input_ids.shape, int(max_length)) from error


@contextlib.contextmanager
def memory_returned() -> Iterator[None]:
    """If memory runs out inside, release what the failed frames still reference, above all the cache.

    Otherwise the traceback keeps the cache for as long as somebody holds the exception.
    """
    try:
        yield
    except _OutOfMemoryError as error:
        _clear_frames(error)
        # Only now is the plain path's cache free, which transformers' frames held.
        if isinstance(error, GenerationOutOfMemoryError):
            error.measure_again()
        raise


def reclaim(model: Any, error: BaseException) -> None:
    """Free what generation keeps between calls, and what the failed frames hold."""
    _clear_frames(error)
    model.release_cache()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()


def _clear_frames(error: BaseException | None) -> None:
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def _sentence(model: Any, batch: int, prompt: int, total: int) -> str:
    cache, workspace = memory.cache_bytes(model, batch, total), memory.workspace_bytes(model, batch, prompt)
    asked = f"{batch} sequence{'s' if batch > 1 else ''} of up to {total} tokens ({prompt} of them the prompt)"
    asked += " need" if batch > 1 else " needs"
    needed = f"{memory.shown(cache)} for keys and values and up to {memory.shown(workspace)} to compute with"
    free = memory.free_bytes(model.device)
    if free is None:
        return f"Out of memory on {model.device}: {asked} {needed} beside the weights; ask for less of them."
    return (
        f"Out of memory on {model.device}: {asked} {needed} beside the weights, and {memory.shown(free)} are free; "
        f"{memory.what_fits(model, batch, prompt, total, free)}."
    )
