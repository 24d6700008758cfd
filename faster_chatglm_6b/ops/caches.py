"""Read, make and check the key-value cache between two steps, under the names of the installed transformers.

It is transformers' own cache, or a list of tensors if transformers has none yet.
"""

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
    """The part of transformers' ``DynamicCache`` that the model and beam search need, for transformers before 4.36.

    Attributes:
        layers: one ``CacheLayer`` per layer that was filled.
    """

    def __init__(self) -> None:
        self.layers: list[CacheLayer] = []

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Append key and value [B, H, M, K] to a layer, and return all keys and values of that layer."""
        if layer < len(self.layers):
            past = self.layers[layer]
            key, value = torch.cat((past.keys, key), dim=2), torch.cat((past.values, value), dim=2)
        self.put(layer, key, value)
        return key, value

    def put(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Replace all keys and values [B, H, T, K] of a layer; layers are filled in their order."""
        self.layers[layer : layer + 1] = [CacheLayer(key, value)]

    def get_seq_length(self, layer: int = 0) -> int:
        """Count the keys that a layer holds."""
        return self.layers[layer].keys.shape[2] if layer < len(self.layers) else 0

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keep the rows with which beam search continues, int64 [B]."""
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
    """Find the field of a class of model outputs that holds the cache, by a known name, else by its annotation."""
    fields = dataclasses.fields(output_class)
    known = [name for name in ("cache", "past_key_values") if name in {field.name for field in fields}]
    annotated = [field.name for field in fields if "Cache" in str(field.type)]
    return [*known, *annotated, "past_key_values"][0]


# The name in a model's outputs and generate()'s arguments: "past_key_values", and "cache" since transformers 5.24.
CACHE_NAME = _name_in(CausalLMOutputWithPast)
CACHE_NAMES = tuple(dict.fromkeys((CACHE_NAME, "past_key_values", "cache")))


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """Find the cache among keyword arguments, by one of its names, else by its class; None if there is none.

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
    """Take the cache out of keyword arguments, under whatever name; None if there is none.

    Raises:
        ValueError: two different caches.
    """
    cache = cache_in(arguments)
    names = [name for name, value in arguments.items() if value is not None and value is cache]
    for name in {*names, *CACHE_NAMES}:
        arguments.pop(name, None)
    return cache


def as_cache(past_key_values: Any, use_cache: bool) -> Any:
    """Make a transformers cache of what was given.

    Args:
        past_key_values: a cache, stock's tuple of (key, value) [T, B, H, K] per layer, or None.
        use_cache: make an empty cache of None.

    Raises:
        ValueError: a tuple of anything else.
    """
    if past_key_values is None:
        return DynamicCache() if use_cache else None
    if not isinstance(past_key_values, (tuple, list)):
        return past_key_values
    cache = DynamicCache()
    for layer, pair in enumerate(past_key_values):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or any(getattr(one, "ndim", 0) != 4 for one in pair):
            raise ValueError(
                "past_key_values is a tuple, but not one of (key, value) [length, batch, heads, head size] for each "
                "layer; pass that, or a DynamicCache."
            )
        key, value = pair
        cache.update(key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3), layer)
    return cache


def check_cache(cache: Any, config: Any, layers: int) -> None:
    """Check that a model can append to a cache, filled or empty.

    Args:
        config: the model's.
        layers: the number of the model's layers.

    Raises:
        ValueError: the model cannot.
    """
    kind, prefix = type(cache).__name__, config.pre_seq_len or 0
    of_two = hasattr(cache, "cross_attention_cache")
    if of_two or not (hasattr(cache, "update") and hasattr(cache, "get_seq_length")):
        raise ValueError(
            f"past_key_values is of the class {kind}, but this model reads one cache of keys and values; pass a "
            "DynamicCache, or leave it out."
        )
    parts = getattr(cache, "layers", None)
    places = (cache,) if parts is None else parts
    if any(getattr(part, name, None) for part in places for name in _FIXED_SIZE):
        raise ValueError(
            f"past_key_values is of the class {kind}, whose size is fixed, which cannot follow the mask of a prefix "
            "LM; pass a DynamicCache, or leave it out."
        )
    length = cache.get_seq_length()
    held = len(parts) if parts is not None else layers
    others = (cache.get_seq_length(layer) for layer in range(layers, held))
    if any(cache.get_seq_length(layer) != length for layer in range(1, layers)) or any(others):
        raise ValueError(
            f"The cache holds {held} layers, and not all equally long, but this model has {layers}; pass a cache that "
            "this model filled, or an empty one."
        )
    if 0 < length < prefix:
        raise ValueError(
            f"The cache holds {length} tokens, but those of this model begin with its P-Tuning prefix of {prefix}; "
            "pass a cache that this model filled, or an empty one."
        )
    keys = _first_keys(cache)
    if length and keys is not None and (keys.shape[1], keys.shape[3]) != (config.num_attention_heads, config.head_size):
        raise ValueError(
            f"The cache holds {keys.shape[1]} heads of {keys.shape[3]} values, but this model has "
            f"{config.num_attention_heads} of {config.head_size}; pass a cache that this model filled."
        )


def check_cached_batch(cache: Any, inputs: torch.Tensor) -> None:
    """Check that a filled cache holds as many sequences as ``inputs`` [batch, length, ...].

    Raises:
        ValueError: it holds more or fewer.
    """
    keys = _first_keys(cache)
    if keys is not None and keys.shape[0] != inputs.shape[0]:
        raise ValueError(
            f"The cache holds {keys.shape[0]} sequences, but {inputs.shape[0]} are to follow; pass a cache that was "
            "filled with this batch."
        )


# By one of these names a cache, or its layers, tells the length to which it is cut or filled up.
_FIXED_SIZE = ("max_cache_len", "sliding_window", "window_length")


def _first_keys(cache: Any) -> torch.Tensor | None:
    """Return keys [B, H, T, K] of the first layer; None if there are none: a quantised cache keeps other tensors."""
    layers = getattr(cache, "layers", None)
    keys = getattr(layers[0], "keys", None) if layers else next(iter(getattr(cache, "key_cache", ())), None)
    return keys if isinstance(keys, torch.Tensor) and keys.dim() == 4 else None
