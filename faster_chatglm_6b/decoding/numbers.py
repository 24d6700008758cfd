"""Keep the small numbers of a request in one piece of device memory, so that a single copy sends them all."""

from typing import Any

import torch

from .request import MOST_END_TOKENS

# Every tensor starts at a multiple of this, so that kernels see the same alignment whatever the batch.
_ALIGNMENT = 16


def _fields(batch: int) -> dict[str, tuple[torch.dtype, int]]:
    sampling = {name: (torch.float32, 1) for name in ("temperature", "top_p", "penalty")}
    sampling |= {name: (torch.int32, 1) for name in ("top_k", "ngram_size", "minimum")}
    ends = {name: (torch.int64, MOST_END_TOKENS) for name in ("minimum_eos", "eos_ids")}
    counters = {name: (torch.int32, 1) for name in ("ids_length", "cache_length", "step", "last_row")}
    places = {name: (torch.int32, batch) for name in ("finished", "first_key", "sop_index", "sop_slot", "position")}
    return sampling | ends | counters | places | {"seed": (torch.int64, 1)}


class RequestNumbers:
    """The numbers that kernels read from device memory: how to sample, where the prompts lie, how far the answer is.

    ``numbers[name]`` is the tensor on the device, which kernels may change. ``set`` writes its counterpart on the host,
    and ``send`` copies all of them at once.

    Attributes by name, each int32 [1] unless said:
        temperature, top_p, penalty: float32 [1]. top_k, ngram_size, minimum. minimum_eos: int64 [E]. As in
            ``SamplingPlan``.
        finished: int32 [B]. ids_length, cache_length, step. eos_ids: int64 [E]. seed: int64 [1]. As in ``DecodeState``.
        first_key, sop_index, position: int32 [B], as in ``decode_attention``. sop_slot: int32 [B], last_row: as in
            ``prompt_attention``.
    """

    def __init__(self, batch: int, device: torch.device):
        fields, places, size = _fields(batch), {}, 0
        for name, (dtype, count) in fields.items():
            places[name] = slice(size, size + count * dtype.itemsize)
            size += -(-count * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        with torch.inference_mode(False):
            self._sent = torch.zeros(size, dtype=torch.uint8)
            self._there = torch.zeros(size, dtype=torch.uint8, device=device)
        self._here = {name: self._sent[places[name]].view(dtype).numpy() for name, (dtype, _) in fields.items()}
        self._tensors = {name: self._there[places[name]].view(dtype) for name, (dtype, _) in fields.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def set(self, **values: Any) -> None:
        """Write numbers on the host: one for the whole tensor, or as many as it has."""
        for name, value in values.items():
            self._here[name][:] = value

    def set_ids(self, name: str, ids: tuple[int, ...]) -> None:
        """Write up to ``MOST_END_TOKENS`` ids on the host, and -1 for those that are missing."""
        self._here[name][:] = -1
        self._here[name][: len(ids)] = ids

    def send(self) -> None:
        """Queue the copy to the device. It does not wait: the bytes lie in pinned memory of their own until then."""
        sent = self._sent.pin_memory() if self._there.is_cuda else self._sent
        self._there.copy_(sent, non_blocking=True)
