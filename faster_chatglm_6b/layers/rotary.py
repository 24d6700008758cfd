"""Cosine and sine tables of ChatGLM-6B's rotary positions (RoFormer, Su et al. 2021; stock's ``RotaryEmbedding``)."""

import torch

_BASE = 10000.0
# Tables grow by this many positions, so that decoding does not remake them at every token.
_ROWS = 2048


class RotaryTable:
    """Tables of cos and sin by position, made on first use and kept per device and dtype.

    The frequencies are rounded to float16 first, whatever the model's dtype. Stock builds the model in float16, so the
    trained weights and all published outputs rest on the rounded values. A float16 model rounds the angle too, as stock
    does. bfloat16 keeps float32 angles: stock's bfloat16 angles are wrong by radians on long prompts.

    The table is no ``nn.Module`` and has no buffer: transformers 5 leaves non-persistent buffers uninitialised.

    Args:
        dim: rotated width, in values; it has ``dim / 2`` frequencies.
    """

    def __init__(self, dim: int):
        self.dim = dim
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}

    def get(self, positions: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin, each [at least ``positions``, dim / 2], in ``dtype`` on ``device``."""
        table = self._tables.get((device, dtype))
        if table is None or table[0].shape[0] < positions:
            rows = -(-positions // _ROWS) * _ROWS
            table = tuple(t.to(device) for t in self._make(rows, dtype))
            self._tables[device, dtype] = table
        return table

    def _make(self, positions: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        # The CPU by name: a model built under a "meta" default device needs real values too.
        exponent = torch.arange(0, self.dim, 2, dtype=torch.float32, device="cpu") / self.dim
        frequency = (1.0 / _BASE**exponent).half()
        angle_dtype = torch.float16 if dtype == torch.float16 else torch.float32
        position = torch.arange(positions, dtype=torch.float32, device="cpu")
        angle = torch.outer(position, frequency.float()).to(angle_dtype).float()
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def __deepcopy__(self, memo: dict) -> "RotaryTable":
        return RotaryTable(self.dim)

    def __reduce__(self) -> tuple:
        return RotaryTable, (self.dim,)
