"""The key-value cache between two steps: transformers' own, or a list of tensors where transformers has none yet."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class CacheLayer(NamedTuple):
    """Keys and values of one layer, [B, H, T, K] each."""

    keys: torch.Tensor
    values: torch.Tensor


class ListCache:
    """What the model and beam search need of transformers' ``DynamicCache``, for transformers before 4.36.

    Attributes:
        layers: one ``CacheLayer`` per layer that was filled.
    """

    def __init__(self) -> None:
        self.layers: list[CacheLayer] = []

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Append key and value [B, H, M, K] to a layer and return all of the layer's."""
        if layer < len(self.layers):
            past = self.layers[layer]
            key, value = torch.cat((past.keys, key), dim=2), torch.cat((past.values, value), dim=2)
        self.put(layer, key, value)
        return key, value

    def put(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Replace all keys and values [B, H, T, K] of a layer; layers are filled in their order."""
        self.layers[layer : layer + 1] = [CacheLayer(key, value)]

    def get_seq_length(self, layer: int = 0) -> int:
        """How many keys a layer holds."""
        return self.layers[layer].keys.shape[2] if layer < len(self.layers) else 0

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take the rows that beam search goes on with, int64 [B]."""
        self.layers = [
            CacheLayer(*(tensor.index_select(0, beam_idx.to(tensor.device)) for tensor in layer))
            for layer in self.layers
        ]

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: int) -> Any:
        return self.layers[layer]


try:
    from transformers.cache_utils import Cache, DynamicCache
except ImportError:
    Cache = DynamicCache = ListCache
