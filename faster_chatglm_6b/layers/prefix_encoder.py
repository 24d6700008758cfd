"""P-Tuning v2: trained keys and values that stand before every prompt (Liu et al. 2022; stock's ``PrefixEncoder``)."""

from typing import Any

import torch
from torch import nn

from ..configuration_chatglm import ChatGLMConfig
from .placement import execution_device


class PrefixEncoder(nn.Module):
    """Keys and values of ``pre_seq_len`` virtual tokens for all layers, from an embedding with or without an MLP.

    Parameter names are the checkpoint's. Keys are not rotated, and no prompt position moves.
    """

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.length, self.layers = config.pre_seq_len, config.num_layers
        self.heads, self.head_size = config.num_attention_heads, config.head_size
        width = config.num_layers * config.hidden_size * 2
        self.dropout = nn.Dropout(0.1)
        if config.prefix_projection:
            self.embedding = nn.Embedding(self.length, config.hidden_size)
            self.trans = nn.Sequential(
                nn.Linear(config.hidden_size, config.hidden_size), nn.Tanh(), nn.Linear(config.hidden_size, width)
            )
        else:
            self.embedding = nn.Embedding(self.length, width)
            self.trans = nn.Identity()

    def forward(self, prefix: torch.Tensor) -> torch.Tensor:
        """Map virtual tokens int64 [B, N] to their keys and values [B, N, layers * 2 * hidden], as stock does."""
        return self.trans(self.embedding(prefix))

    def packed(self, dtype: torch.dtype) -> torch.Tensor:
        """Return keys and values of all layers in one tensor, a view [layers, 2, H, pre_seq_len, K] in ``dtype``."""
        # Call modules, never read weights: accelerate may keep weights elsewhere until their module is called.
        device = execution_device(self.embedding, self.embedding.weight.device)
        packed = self(torch.arange(self.length, device=device)[None])[0].to(dtype)
        packed = self.dropout(packed.view(self.length, self.layers, 2, self.heads, self.head_size))
        return packed.permute(1, 2, 3, 0, 4)

    def keys_and_values(self, batch: int, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return (key, value) of each layer, [batch, H, pre_seq_len, K] in ``dtype``."""
        packed = self.packed(dtype)[:, :, None].expand(-1, -1, batch, -1, -1, -1)
        return [(key, value) for key, value in packed]

    def placed_in(self, cache: Any, batch: int, dtype: torch.dtype, devices: list[torch.device]) -> Any:
        """Put the prefix into the empty cache and return it.

        Args:
            cache: None returns a stand-in that puts the prefix before each layer's keys.
            devices: that of each layer's keys.
        """
        prefix = self.keys_and_values(batch, dtype)
        prefix = [(key.to(device), value.to(device)) for (key, value), device in zip(prefix, devices, strict=True)]
        if cache is None:
            return _PrefixOnly(prefix)
        for layer, (key, value) in enumerate(prefix):
            cache.update(key, value, layer)
        return cache

    def show(self, hidden: torch.Tensor) -> torch.Tensor:
        """Widen the mask [B, 1, M, T] of hidden keys by the prefix, which is never hidden."""
        return nn.functional.pad(hidden, (self.length, 0))

    def reset_parameters(self) -> None:
        """Initialise as PyTorch does, for a prefix that no checkpoint fills."""
        for module in (self.embedding, *self.trans.children()):
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()


class _PrefixOnly:
    """Stand-in for a cache that stores nothing, so that a recomputed layer sees the same keys again."""

    def __init__(self, prefix: list[tuple[torch.Tensor, torch.Tensor]]):
        self._prefix = prefix

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the prefix's keys and values with the given ones after them."""
        prefix_key, prefix_value = self._prefix[layer]
        return torch.cat((prefix_key, key), dim=2), torch.cat((prefix_value, value), dim=2)
