"""The key-value cache between two steps: transformers' own, or a list of tensors where transformers has none yet; and
what the installed release calls it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, MutableMapping
from typing import Any, NamedTuple

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast


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


def _name_in(output_class: type) -> str:
    """The field of a class of model outputs that holds the cache: a known name, else what is annotated as one."""
    fields = dataclasses.fields(output_class)
    known = [name for name in ("cache", "past_key_values") if name in {field.name for field in fields}]
    annotated = [field.name for field in fields if "Cache" in str(field.type)]
    return [*known, *annotated, "past_key_values"][0]


# In the outputs of a model and in the arguments of generate(): "past_key_values", and "cache" since transformers 5.24.
CACHE_NAME = _name_in(CausalLMOutputWithPast)
CACHE_NAMES = tuple(dict.fromkeys((CACHE_NAME, "past_key_values", "cache")))


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The cache among keyword arguments: what goes by one of its names, else what is one; None without any.

    Raises:
        ValueError: two different caches.
    """
    named = [arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None]
    if any(cache is not named[0] for cache in named):
        raise ValueError("past_key_values and cache are both given, but are two names of one thing; pass one of them.")
    if named:
        return named[0]
    return next((value for value in arguments.values() if isinstance(value, Cache)), None)


def take_cache(arguments: MutableMapping[str, Any]) -> Any:
    """Take the cache out of keyword arguments, under whatever name; None without any. Raises as ``cache_in``."""
    cache = cache_in(arguments)
    names = [name for name, value in arguments.items() if value is not None and value is cache]
    for name in {*names, *CACHE_NAMES}:
        arguments.pop(name, None)
    return cache
