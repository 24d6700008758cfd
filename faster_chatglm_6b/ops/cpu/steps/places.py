"""Rotary positions of rows, whose keys and values go to given places of a cache."""

import torch

from .. import native


def rotated(
    heads: torch.Tensor, first: torch.Tensor, second: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Rotate heads [M, H, K] of rows by positions [M], which the tables have, in float32; the result is float32."""
    turned = 2 * cos.shape[1]
    blocks = []
    for block, place in zip(heads.float().split(turned, dim=-1), (first, second), strict=False):
        c, s = cos[place].float()[:, None], sin[place].float()[:, None]
        one, other = block.chunk(2, dim=-1)
        blocks.append(torch.cat((one * c - other * s, other * c + one * s), dim=-1))
    return torch.cat(blocks, dim=-1)


def run(
    kernel: native.Kernel | None,
    qkv: torch.Tensor,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    offsets: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> None:
    """Rotate queries and keys of rows, and write keys and values to the cache.

    Args:
        kernel: the compiled one, or None for PyTorch.
        qkv: [M, 3 * H * K], per head [q k v], contiguous.
        query: [M, H * K], contiguous, is filled.
        keys, values: of equal strides, [..., H, slots, K].
        offsets: int64 [M], numbers from the start of the cache to a row's slot of the first head; rows below 0 are
            neither read nor written.
        first, second: int32 [M], positions of the two halves of a head, or of all of it by the first one.
        cos, sin: [P, K / 4] or [P, K / 2]; positions beyond them count as their last one.
    """
    width = keys.shape[-1]
    heads, stride = qkv.shape[-1] // (3 * width), keys.stride(-3)
    if kernel is not None and qkv.dtype == keys.dtype == cos.dtype and qkv.dtype in native.KINDS:
        pointers = (query, keys, values, offsets, first, second, cos, sin)
        kernel.library.rotate_append(
            qkv.data_ptr(),
            native.KINDS[qkv.dtype],
            *(tensor.data_ptr() for tensor in pointers),
            *(len(cos), cos.shape[1], qkv.shape[0], heads, width, stride, torch.get_num_threads()),
        )
        return
    real = torch.nonzero(offsets >= 0).flatten()
    parts = qkv.view(-1, heads, 3, width)[real]
    turns = [place[real].long().clamp(0, len(cos) - 1) for place in (first, second)]
    query.view(-1, heads, width)[real] = rotated(parts[:, :, 0], *turns, cos, sin).to(query.dtype)
    places = offsets[real, None] + torch.arange(heads, device=offsets.device) * stride
    for cache, rows in ((keys, rotated(parts[:, :, 1], *turns, cos, sin)), (values, parts[:, :, 2])):
        flat = cache.as_strided((_span(cache) - width + 1, width), (1, 1))
        flat[places] = rows.to(cache.dtype)


def _span(cache: torch.Tensor) -> int:
    """Return how many numbers lie between the first and the last of a cache, both included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(cache.shape, cache.stride(), strict=True))
