"""Keep keys and values in preallocated memory, where the kernels write them in place."""

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
