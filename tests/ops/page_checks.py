"""Checks of kernels on pages, against the same kernels' definitions on contiguous caches."""

import math
from itertools import accumulate

import torch
from operator_checks import assert_close, attention64, poison, random, rotate64, tables

from faster_chatglm_6b.ops import triton as kernels


def paged(caches: list[torch.Tensor], page: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return poisoned pages in random order that hold caches [B, H, T, K], and the block table; T is whole pages."""
    batch, heads, capacity, size = caches[0].shape
    count = capacity // page
    # Two pages belong to nobody.
    order = torch.randperm(batch * count + 2)[: batch * count].to(caches[0].device)
    pools = [poison(caches[0].device, caches[0].dtype, batch * count + 2, heads, page, size) for _ in caches]
    for cache, pool in zip(caches, pools, strict=True):
        pool[order] = cache.view(batch, heads, count, page, size).transpose(1, 2).reshape(-1, heads, page, size)
    return pools, order.view(batch, count).int()


def contiguous(pool: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return the caches [B, H, T, K] that lie in pages."""
    batch, count = table.shape
    _, heads, page, size = pool.shape
    return pool[table.long()].transpose(1, 2).reshape(batch, heads, count * page, size)


def check_paged_decode_attention(
    device: str,
    dtype: torch.dtype,
    batch: int,
    heads: int,
    size: int,
    page: int,
    pages: int,
    splits: int | None,
    padded: bool = True,
) -> None:
    """Check rows that stand at different places, some at the ends of pages; every third one is done."""
    capacity = pages * page
    qkv = random(device, dtype, batch, 3 * heads * size)
    ends = torch.tensor([capacity - 1, 0, page - 1, page, page + 1, 2 * page], dtype=torch.int32, device=device)
    slot = torch.randint(0, capacity, (batch,), dtype=torch.int32, device=device)
    slot[: len(ends)] = ends[:batch].clamp(max=capacity - 1)
    finished = (torch.arange(batch, device=device) % 3 == 2).int()
    first_key = (torch.rand(batch, device=device) * (slot + 1)).int()
    first_key[0] = 0
    if not padded:
        first_key = first_key // page * page
    caches = [poison(device, dtype, batch, heads, capacity, size) for _ in range(2)]
    for row in range(batch):
        for cache in caches:
            # The keys of a row that is done stay poisoned.
            visible = cache[row, :, first_key[row] : 0 if finished[row] else slot[row]]
            visible.copy_(random(device, dtype, *visible.shape))
    pools, table = paged(caches, page)
    before = [pool.clone() for pool in pools]
    position = torch.randint(0, 40, (batch,), dtype=torch.int32, device=device)
    sop_index = (torch.rand(batch, device=device) * (slot + 1)).int()
    cos, sin = tables(device, dtype, capacity + 60, size // 4)
    workspace = kernels.Workspace(device, batch, heads, size, 1024)
    workspace.partial.fill_(float("nan"))
    out = poison(device, dtype, batch, heads * size)
    kernels.decode_attention(
        qkv, *pools, slot, finished, first_key, position, sop_index, cos, sin,
        block_table=table, padded=padded, splits=splits, workspace=workspace, out=out,
    )  # fmt: skip
    query, key, value = qkv.view(batch, heads, 3, size).unbind(2)
    places = [position.long()[:, None], (slot - sop_index + 1).long()[:, None]]
    query, key = rotate64(query, places, cos, sin).to(dtype), rotate64(key, places, cos, sin)
    runs = ~finished.bool()
    held = [contiguous(pool, table) for pool in pools]
    for pool, old, cache, new in zip(pools, before, held, (key, value.double()), strict=True):
        for row in torch.nonzero(runs).flatten().tolist():
            assert_close(cache[row, :, slot[row]], new[row])
            # Exactly one slot of every running row changes.
            pool[table[row, slot[row] // page], :, slot[row] % page] = 0
            old[table[row, slot[row] // page], :, slot[row] % page] = 0
        assert torch.equal(pool.isnan(), old.isnan()) and torch.equal(pool.nan_to_num(), old.nan_to_num())
    for row in range(batch):
        one = slice(row, row + 1)
        mine = [cache[one].nan_to_num() for cache in held]
        expected = attention64(query[one], *mine, first_key[one], int(slot[row])) if runs[row] else value[one].double()
        assert_close(out.view(batch, heads, size)[one], expected)
    assert not workspace.counters.any()


class Packed:
    """Prompts of these lengths, packed into ``rows`` rows, each in a place of its own among more of them."""

    def __init__(self, device: str, lengths: list[int], block: int, spare: int = 3):
        self.lengths, self.rows = lengths, sum(lengths) + spare
        self.places = (torch.randperm(len(lengths) + 2)[: len(lengths)]).tolist()
        self.starts = [0, *accumulate(lengths)]
        sequence, index = torch.full((self.rows,), -1), torch.zeros(self.rows)
        blocks = [[0, -1, 0, 0]]
        for place, start, length in zip(self.places, self.starts, lengths, strict=False):
            sequence[start : start + length] = place
            index[start : start + length] = torch.arange(length)
            blocks += [[start + first, place, first, length] for first in range(0, length, block)]
        self.sequence, self.index = sequence.int().to(device), index.int().to(device)
        self.blocks = torch.tensor(blocks, dtype=torch.int32, device=device)
        self.sop_slot = torch.zeros(len(lengths) + 2, dtype=torch.int32, device=device)
        for number, (place, length) in enumerate(zip(self.places, lengths, strict=True)):
            # The first prompt is all context, the next one has a token after it, and the others have any number.
            self.sop_slot[place] = length - number if number < 2 else torch.randint(0, length + 1, (1,)).item()


def check_packed_rotary_concat(
    device: str, dtype: torch.dtype, lengths: list[int], heads: int, size: int, two: bool, page: int, prefix: int = 0
) -> None:
    packed = Packed(device, lengths, 16)
    batch, pages = len(lengths) + 2, -(-(prefix + max(lengths)) // page)
    pools, table = paged([poison(device, dtype, batch, heads, pages * page, size) for _ in range(2)], page)
    qkv = poison(device, dtype, packed.rows, 3 * heads * size)
    real = packed.sequence >= 0
    qkv[real] = random(device, dtype, int(real.sum()), 3 * heads * size)
    position = torch.randint(0, 9, (batch,), dtype=torch.int32, device=device)
    cos, sin = tables(device, dtype, max(lengths) + 10, size // 4 if two else size // 2)
    out = poison(device, dtype, packed.rows, heads * size)
    kernels.packed_rotary_concat(
        qkv, *pools, table, packed.sequence, packed.index, packed.sop_slot, position, cos, sin, prefix=prefix, out=out
    )  # fmt: skip
    place, index = packed.sequence[real].long(), packed.index[real].long()
    sop = packed.sop_slot[place].long()
    positions = [torch.where(index < sop, index, position[place].long()), (index - sop + 1).clamp(min=0)]
    positions = [one[:, None].expand(-1, heads) for one in positions[: 2 if two else 1]]
    query, key, value = qkv.view(-1, heads, 3, size)[real].unbind(2)
    assert_close(out.view(-1, heads, size)[real], rotate64(query, positions, cos, sin))
    assert out[~real].isnan().all()
    for pool, expected in zip(pools, (rotate64(key, positions, cos, sin), value.double()), strict=True):
        cache = contiguous(pool, table)
        assert_close(cache[place, :, prefix + index], expected)
        # Nothing else was written.
        assert int((~pool.isnan()).sum()) == expected.numel()


def check_packed_prompt_attention(
    device: str, dtype: torch.dtype, lengths: list[int], heads: int, size: int, page: int, prefix: int = 0, pad: int = 0
) -> None:
    """Check prompts after a prefix of ``prefix`` slots, of which the first ``pad`` are empty."""
    packed = Packed(device, lengths, kernels.packed_prompt_block(max(lengths), torch.device(device), dtype.itemsize))
    batch, pages = len(lengths) + 2, -(-(prefix + max(lengths)) // page)
    caches = [poison(device, dtype, batch, heads, pages * page, size) for _ in range(2)]
    for place, length in zip(packed.places, lengths, strict=True):
        for cache in caches:
            # Only the visible keys hold numbers, so reading any other one shows.
            cache[place, :, pad : prefix + length] = random(device, dtype, heads, prefix + length - pad, size)
    pools, table = paged(caches, page)
    query = poison(device, dtype, packed.rows, heads * size)
    query[: sum(lengths)] = random(device, dtype, sum(lengths), heads * size)
    out = poison(device, dtype, packed.rows, heads * size)
    first_key = torch.full((batch,), pad, dtype=torch.int32, device=device)
    kernels.packed_prompt_attention(
        query, *pools, table, packed.blocks, first_key, packed.sop_slot, longest=max(lengths),
        prefix=prefix, padded=pad > 0, out=out,
    )  # fmt: skip
    for place, start, length in zip(packed.places, packed.starts, lengths, strict=False):
        keys, values = (cache[place, :, pad : prefix + length].double() for cache in caches)
        key, row = torch.arange(pad, prefix + length, device=device), torch.arange(length, device=device)
        seen = (key < prefix + packed.sop_slot[place])[None] | (key[None] <= prefix + row[:, None])
        q = query[start : start + length].view(length, heads, size).transpose(0, 1).double()
        scores = (q @ keys.transpose(1, 2) / math.sqrt(size)).masked_fill(~seen, float("-inf"))
        expected = (scores.softmax(-1) @ values).transpose(0, 1).reshape(length, -1)
        assert_close(out[start : start + length], expected)
    assert out[sum(lengths) :].isnan().all()
