"""Keep keys and values in preallocated memory, where the kernels write them in place."""

from collections.abc import Sequence

import torch


class KVCache:
    """Preallocated keys and values of all layers.

    Args:
        layers: number of layers.
        batch: B, sequences.
        heads: H.
        capacity: T, most tokens per sequence.
        head_size: K.
    """

    block_table: torch.Tensor | None = None
    is_padded = False

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

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of one layer, [B, H, T, K] each, filled or not."""
        return self.storage[index, 0], self.storage[index, 1]

    def place_prefix(self, prefix: torch.Tensor, first_slots: list[int]) -> None:
        """Copy a P-Tuning prefix to the slots from ``first_slots[b]`` on of every sequence b.

        The order of keys does not matter to attention, and those of a prefix carry no position. So the prefix of a
        padded prompt stands over its padding, and the keys that a sequence sees lie together.

        Args:
            prefix: [layers, 2, H, P, K].
        """
        length = prefix.shape[3]
        if not any(first_slots):
            self.storage[..., :length, :].copy_(prefix[:, :, None])
            return
        for row, slot in enumerate(first_slots):
            self.storage[:, :, row, :, slot : slot + length].copy_(prefix)


class PagedKVCache:
    """Keys and values of all layers in pages, which belong to one sequence each.

    Those of a P-Tuning prefix belong to all: they come first in every row of the block table. The prefix stands at the
    end of its pages, so that each sequence's own tokens begin with a page.

    Args:
        layers: number of layers.
        pages: pages that sequences may hold.
        heads: H.
        page_tokens: S.
        head_size: K.
        block_table: int32 [B, N], which the owner fills: row b holds ``row_of_pages`` of sequence b.
        prefix: tokens of a P-Tuning prefix.

    Attributes:
        prefix_slots: slots before a sequence's own first token.
        first_key: the first of them that holds a key.
        is_padded: whether it lies within a page.
    """

    def __init__(
        self,
        layers: int,
        pages: int,
        heads: int,
        page_tokens: int,
        head_size: int,
        dtype: torch.dtype,
        block_table: torch.Tensor,
        prefix: int = 0,
    ):
        shared = -(-prefix // page_tokens)
        self.block_table, self._shared = block_table, range(pages, pages + shared)
        self.prefix_slots = shared * page_tokens
        self.first_key = self.prefix_slots - prefix
        self.is_padded = self.first_key > 0
        with torch.inference_mode(False):
            shape = (layers, 2, pages + shared, heads, page_tokens, head_size)
            self.storage = torch.empty(shape, dtype=dtype, device=block_table.device)

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return pages of keys and of values of one layer, [pages, H, S, K] each, filled or not."""
        return self.storage[index, 0], self.storage[index, 1]

    def row_of_pages(self, own: Sequence[int]) -> list[int]:
        """Return all pages of a sequence: those of the prefix and its own."""
        return [*self._shared, *own]

    def place_prefix(self, prefix: torch.Tensor) -> None:
        """Copy a P-Tuning prefix [layers, 2, H, P, K] to the pages of all sequences."""
        page_tokens = self.storage.shape[4]
        padded = torch.nn.functional.pad(prefix, (0, 0, self.first_key, 0))
        for page, part in zip(self._shared, padded.split(page_tokens, dim=3), strict=True):
            self.storage[:, :, page].copy_(part)
