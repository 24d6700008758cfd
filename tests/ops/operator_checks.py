"""Checks of the operators' kernels against float64, shared by the interpreter's and the GPU's tests.

Each check takes a device and a dtype, draws random inputs, fills what the kernel must write with NaN, and asserts.
"""

import math

import torch

from faster_chatglm_6b.ops import triton as kernels
from faster_chatglm_6b.ops.triton import configs

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
ALPHA = math.sqrt(2 * 28)


def random(device: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def poison(device: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.full(shape, float("nan"), device=device, dtype=dtype)


def assert_close(out: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """Compare by norm and by the largest difference, so that a single wrong value shows among many."""
    assert out.shape == expected.shape
    difference = (out.double() - expected).abs()
    assert not difference.isnan().any(), "some outputs were not written"
    tolerance = TOLERANCE[dtype or out.dtype]
    scale = expected.norm() / math.sqrt(max(expected.numel(), 1)) + 1e-30
    assert difference.norm() <= tolerance * expected.norm() + 1e-12, difference.norm() / expected.norm()
    assert difference.max() <= 8 * tolerance * (scale + expected.abs().max()), difference.max()


def gelu64(x: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return 0.5 * x * (1 + torch.tanh(0.79788456 * (x + 0.044715 * x**3)))


def layer_norm64(x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, epsilon: float) -> torch.Tensor:
    x = x.double()
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + epsilon) * gamma.double() + beta.double()


def rotate64(x: torch.Tensor, positions: list[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [..., K] in ``len(positions)`` equal blocks of columns; each entry of ``positions`` is [...]."""
    blocks = []
    for block, position in zip(x.double().chunk(len(positions), -1), positions, strict=True):
        first, second = block.chunk(2, -1)
        c, s = cos.double()[position], sin.double()[position]
        blocks.append(torch.cat((first * c - second * s, second * c + first * s), -1))
    return torch.cat(blocks, -1)


def tables(device: str, dtype: torch.dtype, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.rand(rows, columns, device=device) * 6.28
    return angle.cos().to(dtype), angle.sin().to(dtype)


def check_fast_gelu(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = random(device, dtype, *shape) * 4
    assert_close(kernels.fast_gelu(x, out=poison(device, dtype, *shape)), gelu64(x))


def check_fused_fast_gelu_mul(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, y = random(device, dtype, *shape), random(device, dtype, *shape)
    assert_close(kernels.fused_fast_gelu_mul(x, y, out=poison(device, dtype, *shape)), gelu64(x) * y.double())


def check_skip_layer_norm(device: str, dtype: torch.dtype, rows: int, size: int, with_skip: bool) -> None:
    # A mean far from zero shows a variance that loses digits by cancellation.
    x, skip = random(device, dtype, rows, size) + 3, random(device, dtype, rows, size)
    gamma, beta = random(device, dtype, size), random(device, dtype, size)
    out = kernels.skip_layer_norm(
        x,
        gamma,
        beta,
        skip=skip if with_skip else None,
        epsilon=1e-5,
        alpha=ALPHA,
        out=poison(device, dtype, rows, size),
    )
    summed = x.double() + ALPHA * skip.double() if with_skip else x
    assert_close(out, layer_norm64(summed, gamma, beta, 1e-5))


def check_fused_apply_rotary_emb(
    device: str, dtype: torch.dtype, batch: int, rows: int, heads: int, size: int, two: bool
) -> None:
    x = random(device, dtype, batch, rows, heads * 3 * size)
    cos, sin = tables(device, dtype, 50, size // 4 if two else size // 2)
    shape = (batch, 2, rows) if two else (batch, rows)
    position_ids = torch.randint(0, 50, shape, device=device)
    positions = [position_ids[:, 0], position_ids[:, 1]] if two else [position_ids]
    for index in (0, 1):
        out = kernels.fused_apply_rotary_emb(
            x,
            position_ids=position_ids,
            cos=cos,
            sin=sin,
            tensor_index=index,
            k_size=size,
            out=poison(device, dtype, batch, heads, rows, size),
        )
        head = x.view(batch, rows, heads, 3, size)[:, :, :, index].transpose(1, 2)
        assert_close(out, rotate64(head, [p[:, None] for p in positions], cos, sin))


def prompts(device: str, batch: int, rows: int) -> dict[str, torch.Tensor]:
    """Draw places of left-padded prompts: the first one has no padding, and all its rows but the last are context."""
    sop = torch.randint(min(1, rows - 1), rows, (batch,), dtype=torch.int32, device=device)
    first = (torch.rand(batch, device=device) * (sop + 1)).int()
    first[0], sop[0] = 0, rows - 1
    return {"first_slot": first.to(device), "sop_slot": sop.to(device)}


def check_rotary_concat_past_key_value(
    device: str, dtype: torch.dtype, batch: int, rows: int, heads: int, size: int, two: bool, prefix: int = 0
) -> None:
    # Two rows past the last one are neither read nor written, nor are the rows of padding.
    padded, capacity = rows + 2, prefix + rows + 3
    places = prompts(device, batch, rows)
    first, sop = (place.long()[:, None] for place in places.values())
    row = torch.arange(rows, device=device)[None]
    real = row >= first
    qkv = poison(device, dtype, batch, padded, 3 * heads * size)
    qkv[:, :rows][real] = random(device, dtype, int(real.sum()), 3 * heads * size)
    position = torch.randint(0, 9, (batch,), dtype=torch.int32, device=device)
    cos, sin = tables(device, dtype, rows + 10, size // 4 if two else size // 2)
    caches = [poison(device, dtype, batch, heads, capacity, size) for _ in range(2)]
    out = poison(device, dtype, batch, padded, heads * size)
    kernels.rotary_concat_past_key_value(
        qkv, *caches, *places.values(), position, torch.tensor([rows - 1], dtype=torch.int32, device=device), cos, sin,
        prefix=prefix, out=out,
    )  # fmt: skip
    positions = [torch.where(row < sop, row - first, position.long()[:, None]), row - sop + 1]
    positions = [p.clamp(min=0)[:, :, None].expand(-1, -1, heads)[real] for p in positions[: 2 if two else 1]]
    query, key, value = qkv[:, :rows].view(batch, rows, heads, 3, size)[real].unbind(2)
    written = [cache.transpose(1, 2)[:, prefix : prefix + rows] for cache in caches]
    assert_close(out[:, :rows].view(batch, rows, heads, size)[real], rotate64(query, positions, cos, sin))
    assert_close(written[0][real], rotate64(key, positions, cos, sin))
    assert torch.equal(written[1][real], value)
    assert out[:, rows:].isnan().all() and out[:, :rows][~real].isnan().all()
    for cache, part in zip(caches, written, strict=True):
        assert part[~real].isnan().all()
        assert cache[:, :, :prefix].isnan().all() and cache[:, :, prefix + rows :].isnan().all()


def check_prompt_attention(
    device: str, dtype: torch.dtype, batch: int, rows: int, heads: int, size: int, prefix: int = 0
) -> None:
    padded, capacity = rows + 2, prefix + rows + 3
    places = prompts(device, batch, rows)
    first, sop = (place.long()[:, None] for place in places.values())
    row, key = torch.arange(rows, device=device)[None], torch.arange(capacity, device=device)[None]
    real, there = row >= first, (key >= first) & (key < prefix + rows)
    query = poison(device, dtype, batch, padded, heads * size)
    query[:, :rows][real] = random(device, dtype, int(real.sum()), heads * size)
    # Only the visible keys hold numbers, so reading any other one shows.
    caches = [poison(device, dtype, batch, heads, capacity, size) for _ in range(2)]
    for cache in caches:
        cache.transpose(1, 2)[there] = random(device, dtype, int(there.sum()), heads, size)
    out = poison(device, dtype, batch, padded, heads * size)
    kernels.prompt_attention(
        query, *caches, *places.values(), torch.tensor([rows - 1], dtype=torch.int32, device=device),
        prefix=prefix, out=out,
    )  # fmt: skip
    seen = (key < prefix + sop)[:, None] | (key[:, None] <= prefix + row[:, :, None])
    seen = (seen & there[:, None])[:, None]
    keys, values = (cache.nan_to_num().double() for cache in caches)
    q = query[:, :rows].view(batch, rows, heads, size).transpose(1, 2).nan_to_num().double()
    scores = (q @ keys.transpose(2, 3) / math.sqrt(size)).masked_fill(~seen, float("-inf"))
    expected = (scores.softmax(-1).nan_to_num() @ values).transpose(1, 2)
    assert_close(out[:, :rows].view(batch, rows, heads, size)[real], expected[real])
    assert out[:, rows:].isnan().all() and out[:, :rows][~real].isnan().all()


def attention64(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, first_key: torch.Tensor, length: int
) -> torch.Tensor:
    """Attend from query [B, H, K] to the keys ``first_key[b] <= j <= length`` of [B, H, T, K]; return [B, H, K]."""
    key, value = key[:, :, : length + 1].double(), value[:, :, : length + 1].double()
    scores = (query.double()[:, :, None] * key).sum(-1) / math.sqrt(query.shape[-1])
    hidden = torch.arange(length + 1, device=key.device)[None, None] < first_key[:, None, None]
    return (scores.masked_fill(hidden, float("-inf")).softmax(-1)[..., None] * value).sum(2)


def check_attention(
    device: str, dtype: torch.dtype, batch: int, heads: int, size: int, length: int, splits: int | None
) -> None:
    """Check attention alone: angles of zero leave query and key as they are, so the newest key is stored unchanged."""
    capacity = length + 6
    query = random(device, dtype, batch, heads, 1, size)
    key_cache, value_cache = (poison(device, dtype, batch, heads, capacity, size) for _ in range(2))
    first_key = torch.randint(0, length + 1, (batch,), dtype=torch.int32, device=device)
    first_key[0] = 0
    for row in range(batch):
        # Only the visible keys hold numbers, so reading any other one shows.
        for cache in (key_cache, value_cache):
            visible = cache[row, :, first_key[row] : length + 1]
            visible.copy_(random(device, dtype, *visible.shape))
    newest = [cache[:, :, length].clone() for cache in (key_cache, value_cache)]
    qkv = torch.stack((query[:, :, 0], *newest), 2).view(batch, 3 * heads * size)
    for cache in (key_cache, value_cache):
        cache[:, :, length] = float("nan")
    cos = torch.ones(length + 2, size // 4, dtype=dtype, device=device)
    workspace = kernels.Workspace(device, batch, heads, size, 1024)
    workspace.partial.fill_(float("nan"))
    nothing = torch.zeros_like(first_key)
    slot = nothing + length
    out = poison(device, dtype, batch, heads * size)
    for _ in range(2):
        kernels.decode_attention(
            qkv, key_cache, value_cache, slot, nothing, first_key, nothing, nothing, cos, torch.zeros_like(cos),
            splits=splits, workspace=workspace, out=out,
        )  # fmt: skip
    for cache, stored in zip((key_cache, value_cache), newest, strict=True):
        assert torch.equal(cache[:, :, length], stored)
    expected = attention64(query[:, :, 0], key_cache.nan_to_num(), value_cache.nan_to_num(), first_key, length)
    assert_close(out.view(batch, heads, size), expected)
    assert not workspace.counters.any()


def check_decode_attention(
    device: str,
    dtype: torch.dtype,
    batch: int,
    heads: int,
    size: int,
    length: int,
    splits: int | None,
    two: bool = True,
) -> None:
    """Check rows that stand at different places, the first at ``length``; every third one is done."""
    capacity = length + 6
    qkv = random(device, dtype, batch, 3 * heads * size)
    slot = torch.randint(0, length + 1, (batch,), dtype=torch.int32, device=device)
    slot[0] = length
    finished = (torch.arange(batch, device=device) % 3 == 1).int()
    longer = [poison(device, dtype, batch, heads, capacity + 3, size) for _ in range(2)]
    caches = [cache[:, :, :capacity] for cache in longer]
    first_key = (torch.rand(batch, device=device) * (slot + 1)).int()
    first_key[0] = 0
    for row in range(batch):
        for cache in caches:
            # The keys of a row that is done stay poisoned.
            visible = cache[row, :, first_key[row] : 0 if finished[row] else slot[row]]
            visible.copy_(random(device, dtype, *visible.shape))
    before = [cache.clone() for cache in longer]
    position = torch.randint(0, 40, (batch,), dtype=torch.int32, device=device)
    sop_index = (torch.rand(batch, device=device) * (slot + 1)).int()
    cos, sin = tables(device, dtype, length + 60, size // 4 if two else size // 2)
    workspace = kernels.Workspace(device, batch, heads, size, 1024)
    workspace.partial.fill_(float("nan"))
    out = poison(device, dtype, batch, heads * size)
    kernels.decode_attention(
        qkv, *caches, slot, finished, first_key, position, sop_index, cos, sin,
        splits=splits, workspace=workspace, out=out,
    )  # fmt: skip
    query, key, value = qkv.view(batch, heads, 3, size).unbind(2)
    places = [position.long()[:, None], (slot - sop_index + 1).long()[:, None]][: 2 if two else 1]
    query, key = rotate64(query, places, cos, sin).to(dtype), rotate64(key, places, cos, sin)
    runs, there = ~finished.bool(), torch.arange(batch, device=device)
    # Exactly one slot of every running row changes.
    for cache, old, new in zip(longer, before, (key, value.double()), strict=True):
        assert_close(cache[there, :, slot.long()][runs], new[runs])
        cache_rest, old_rest = cache.clone(), old.clone()
        cache_rest[there[runs], :, slot[runs].long()] = 0
        old_rest[there[runs], :, slot[runs].long()] = 0
        assert torch.equal(cache_rest.isnan(), old_rest.isnan())
        assert torch.equal(cache_rest.nan_to_num(), old_rest.nan_to_num())
    for row in range(batch):
        one = slice(row, row + 1)
        held = [cache[one].nan_to_num() for cache in caches]
        expected = attention64(query[one], *held, first_key[one], int(slot[row])) if runs[row] else value[one].double()
        assert_close(out.view(batch, heads, size)[one], expected)
    assert not workspace.counters.any()


def check_fused_matmul_bias(
    device: str, dtype: torch.dtype, rows: int, n: int, k: int, epilogue: str, with_bias: bool = True
) -> None:
    """Check the product with an ``epilogue``: plain, gelu or residual."""
    x, weight = random(device, dtype, rows, k), (random(device, torch.float32, n, k) / math.sqrt(k)).to(dtype)
    bias = random(device, dtype, n) if with_bias else None
    residual = random(device, dtype, rows, n) if epilogue == "residual" else None
    workspace = kernels.Workspace(device, rows, 4, 32, 1024)
    workspace.partial.fill_(float("nan"))
    expected = x.double() @ weight.double().T + (bias.double() if with_bias else 0)
    if epilogue == "gelu":
        expected = gelu64(expected)
    if residual is not None:
        expected = expected + ALPHA * residual.double()
    for _ in range(2):
        out = kernels.fused_matmul_bias(
            x,
            weight,
            bias,
            residual,
            ALPHA,
            gelu=epilogue == "gelu",
            out=poison(device, dtype, rows, n),
            workspace=workspace,
        )
        assert_close(out, expected)
    assert not workspace.counters.any()


def check_gemv_config(device: str, dtype: torch.dtype, rows: int, n: int, k: int, config: configs.Gemv) -> None:
    """Check one configuration, whatever the tables say."""
    from faster_chatglm_6b.ops.triton.linear.gemv import launch_gemv

    x, weight, bias = random(device, dtype, rows, k), random(device, dtype, n, k), random(device, dtype, n)
    residual = random(device, dtype, rows, n)
    out = poison(device, dtype, rows, n)
    launch_gemv(x, weight, bias, residual, ALPHA, False, out, config)
    assert_close(out, x.double() @ weight.double().T + bias.double() + ALPHA * residual.double())


def check_dot_config(device: str, dtype: torch.dtype, rows: int, n: int, k: int, config: configs.Dot) -> None:
    """Check one configuration, whatever the tables say."""
    from faster_chatglm_6b.ops.triton.linear.small_batch_matmul import launch_small_batch_matmul

    x, weight, bias = random(device, dtype, rows, k), random(device, dtype, n, k), random(device, dtype, n)
    out = poison(device, dtype, rows, n)
    workspace = kernels.Workspace(device, rows, 4, 32, 1024)
    workspace.partial.fill_(float("nan"))
    for _ in range(2):
        out.fill_(float("nan"))
        launch_small_batch_matmul(x, weight, bias, None, 1.0, True, out, config, workspace.partial, workspace.counters)
        assert_close(out, gelu64(x.double() @ weight.double().T + bias.double()))
    assert not workspace.counters.any()


def check_layer_norm_matmul(
    device: str, dtype: torch.dtype, rows: int, n: int, k: int, config: configs.Gemv | None = None
) -> None:
    """Check LayerNorm before a product; with ``config``, inside the GEMV of one row, whatever the tables say."""
    from faster_chatglm_6b.ops.triton.linear.gemv import launch_persistent_gemv

    x, weight = random(device, dtype, rows, k) + 2, (random(device, torch.float32, n, k) / math.sqrt(k)).to(dtype)
    gamma, beta, bias = random(device, dtype, k), random(device, dtype, k), random(device, dtype, n)
    out, normed = poison(device, dtype, rows, n), poison(device, dtype, rows, k)
    if config is None:
        kernels.layer_norm_matmul_bias(x, gamma, beta, 1e-5, weight, bias, gelu=True, normed_out=normed, out=out)
    else:
        launch_persistent_gemv(x, gamma, beta, 1e-5, weight, bias, None, 1.0, True, normed, out, config)
    assert_close(normed, layer_norm64(x, gamma, beta, 1e-5))
    assert_close(out, gelu64(normed.double() @ weight.double().T + bias.double()))


def check_embedding(device: str, dtype: torch.dtype, batch: int, vocab: int, size: int) -> None:
    weight = random(device, dtype, vocab, size)
    tokens = torch.randint(0, vocab, (batch,), device=device)
    tokens[-1] = vocab - 1
    assert torch.equal(kernels.embedding(tokens, weight, out=poison(device, dtype, batch, size)), weight[tokens])
