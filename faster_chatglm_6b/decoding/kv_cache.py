"""Keep keys and values in preallocated memory, and write them in place."""

import torch

from ..ops.triton import fused_attention_concat_past_key_value


class KVCache:
    """Keys and values of every layer in one tensor; a new token costs no copy of the old ones.

    It offers what the model's forward calls of transformers' ``Cache``: ``update`` and ``get_seq_length``.

    Args:
        layers: L of the storage [L, 2, B, H, T, K].
        batch: B.
        heads: H.
        capacity: T, most tokens per sequence.
        head_size: K.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int,
        capacity: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        # A tensor made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            self.storage = torch.empty(layers, 2, batch, heads, capacity, head_size, dtype=dtype, device=device)
        self._lengths = [0] * layers

    @property
    def capacity(self) -> int:
        """Most tokens per sequence."""
        return self.storage.shape[4]

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of one layer, [B, H, T, K] each, filled or not."""
        return self.storage[index, 0], self.storage[index, 1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens that ``update`` has stored so far."""
        return self._lengths[layer_idx]

    def reset(self) -> None:
        """Empty the cache; its memory stays allocated."""
        self._lengths = [0] * len(self._lengths)

    def move_head(self, row: int, length: int, slot: int) -> None:
        """Copy the first ``length`` keys and values of one sequence to the slots from ``slot`` on, in every layer."""
        head = self.storage[:, :, row, :, :length].clone()
        self.storage[:, :, row, :, slot : slot + length].copy_(head)

    def grow(self, layer_idx: int, rows: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        """Make room for ``rows`` more tokens in a layer.

        Returns:
            The slot of the first new token, and the layer's keys and values up to the last new one, views
            [B, H, length + rows, K].

        Raises:
            ValueError: the cache is full.
        """
        start = self._lengths[layer_idx]
        stop = start + rows
        if stop > self.capacity:
            raise ValueError(
                f"The cache holds {start} of {self.capacity} tokens and {rows} more do not fit; make a longer one."
            )
        self._lengths[layer_idx] = stop
        keys, values = self.layer(layer_idx)
        return start, keys[:, :, :stop], values[:, :, :stop]

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, cache_kwargs: dict | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append key and value [B, H, M, K] to a layer and return all that it holds, [B, H, length, K] each."""
        start, keys, values = self.grow(layer_idx, key.shape[2])
        fits = all(one.dtype == self.storage.dtype and one.device == self.storage.device for one in (key, value))
        if fits and key.stride(3) == value.stride(3) == 1:
            fused_attention_concat_past_key_value(key, value, *self.layer(layer_idx), start)
        else:
            keys[:, :, start:].copy_(key)
            values[:, :, start:].copy_(value)
        return keys, values
