"""Keep the small numbers of a request in one piece of device memory, so that a single copy sends them all."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .request import MOST_END_TOKENS

# Every tensor starts at a multiple of this, so that kernels see the same alignment whatever the batch.
_ALIGNMENT = 16


# These are one for all rows.
_OF_ALL_ROWS = ("turn", "last_row", "reported", "pad_id")
# A number for every row, of this many entries.
Field = tuple[torch.dtype, int]


def _fields(rows: int, end_tokens: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    whole = "top_k ngram_size minimum finished ids_length cache_length step limit lane".split()
    whole += "first_key sop_index sop_slot position".split()
    whole += "seen draft_count streak need balance price".split()
    fields = {name: (torch.int32, (rows,)) for name in whole}
    fields |= {name: (torch.float32, (rows,)) for name in ("temperature", "top_p", "penalty")}
    fields |= {name: (torch.int64, (rows, end_tokens)) for name in ("minimum_eos", "eos_ids")}
    fields |= {name: (torch.int32, (1,)) for name in ("turn", "last_row", "reported")}
    return fields | {"seed": (torch.int64, (rows,)), "pad_id": (torch.int64, (1,))}


class RequestNumbers:
    """The numbers that kernels read from device memory: how to sample, where the prompts lie, how far the answers are.

    ``numbers[name]`` is the tensor on the device, which kernels may change. ``set`` writes its counterpart on the host,
    and ``send`` copies all of them at once.

    Attributes by name, each int32 [B], one for every row, unless said:
        temperature, top_p, penalty: float32. top_k, ngram_size, minimum. minimum_eos: int64 [B, E]. As in
            ``SamplingPlan``.
        finished, ids_length, cache_length, step, limit, lane. eos_ids: int64 [B, E]. seed: int64. turn: int32 [1],
            pad_id: int64 [1]. As in ``DecodeState``.
        first_key, sop_index, position: as in ``decode_attention``. sop_slot, and last_row: int32 [1], as in
            ``prompt_attention``.
        seen, draft_count, streak, need, balance, price, and reported: int32 [1]. As in ``DraftState``, whose ``count``
            and ``turn`` are the second and the last.

    Args:
        rows: B.
        more: further numbers, each a dtype of four or eight bytes and its entries N: a tensor [B, N], or [B] if N is 1.
        end_tokens: E.
    """

    def __init__(
        self,
        rows: int,
        device: torch.device,
        more: Mapping[str, Field] | None = None,
        end_tokens: int = MOST_END_TOKENS,
    ):
        fields, places, size = _fields(rows, end_tokens), {}, 0
        for name, (dtype, entries) in (more or {}).items():
            fields[name] = (dtype, (rows, entries) if entries > 1 else (rows,))
        for name, (dtype, shape) in fields.items():
            taken = math.prod(shape) * dtype.itemsize
            places[name] = slice(size, size + taken)
            size += -(-taken // _ALIGNMENT) * _ALIGNMENT
        with torch.inference_mode(False):
            self._sent = torch.zeros(size, dtype=torch.uint8)
            self._there = torch.zeros(size, dtype=torch.uint8, device=device)
            here, self._tensors = (
                {name: memory[places[name]].view(dtype).view(shape) for name, (dtype, shape) in fields.items()}
                for memory in (self._sent, self._there)
            )
        self._here = {name: tensor.numpy() for name, tensor in here.items()}
        self._words = _words_of_a_row({name: fields[name] for name in fields if name not in _OF_ALL_ROWS}, places)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def set(self, **values: Any) -> None:
        """Write numbers on the host: one for all rows, or one for each of the first rows."""
        for name, value in values.items():
            count = len(value) if hasattr(value, "__len__") else None
            self._here[name][:count] = value

    def set_row(self, row: int, **values: Any) -> None:
        """Write numbers of one row on the host: one, or the first of its entries."""
        for name, value in values.items():
            here = self._here[name]
            if here.ndim == 1:
                here[row] = value
            else:
                here[row, : len(value)] = value

    def set_ids(self, name: str, ids: tuple[int, ...], row: int | slice = slice(None)) -> None:
        """Write up to E ids for a row, or for every row, on the host, and -1 for those that are missing."""
        self._here[name][row] = -1
        self._here[name][row, ..., : len(ids)] = ids

    def send(self) -> None:
        """Queue the copy to the device. It does not wait: the bytes lie in pinned memory of their own until then."""
        sent = self._sent.pin_memory() if self._there.is_cuda else self._sent
        self._there.copy_(sent, non_blocking=True)

    def send_rows(self, rows: Sequence[int]) -> None:
        """Queue the copy of the numbers of some rows; kernels may be changing those of others."""
        first, step = self._words
        words = torch.from_numpy((first + step * np.asarray(rows)[:, None]).ravel())
        values = self._sent.view(torch.int32)[words]
        if self._there.is_cuda:
            words, values = words.pin_memory(), values.pin_memory()
        there = self._there.view(torch.int32)
        words, values = (tensor.to(there.device, non_blocking=True) for tensor in (words, values))
        there.index_copy_(0, words, values)


def _words_of_a_row(
    fields: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], places: Mapping[str, slice]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the four-byte words that hold the numbers of row 0, and how far those of the next row lie behind."""
    first, step = [], []
    for name, (dtype, shape) in fields.items():
        words = math.prod(shape[1:]) * dtype.itemsize // 4
        first.append(places[name].start // 4 + np.arange(words))
        step.append(np.full(words, words))
    return np.concatenate(first), np.concatenate(step)
