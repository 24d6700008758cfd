"""Every operator in plain framework calls: the definition of its meaning, and the fallback if nothing faster serves.

B is the batch, M the query rows, T the key rows, H the heads, K the head size. Names and meaning are OneFlow's; a
packed projection "BM(H3K)" holds, head by head, the K values of the query, of the key and of the value.
"""

import math

import torch
from torch.nn import functional


def fast_gelu(x: torch.Tensor) -> torch.Tensor:
    """Return tanh GELU, 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).

    By Hendrycks and Gimpel 2016; stock's ``gelu_impl``.

    Args:
        x: any shape and floating dtype.
    """
    return functional.gelu(x, approximate="tanh")


def fused_fast_gelu_mul(x: torch.Tensor, multiplier: torch.Tensor) -> torch.Tensor:
    """Return ``fast_gelu(x) * multiplier``; both have one shape and dtype."""
    return fast_gelu(x) * multiplier


def _rotate(x: torch.Tensor, position_ids: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [B, M, H, D] by positions [B, M] with tables [P, D / 2]."""
    cos, sin = cos[position_ids].unsqueeze(2), sin[position_ids].unsqueeze(2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def fused_apply_rotary_emb(
    x: torch.Tensor,
    *,
    position_ids: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    tensor_index: int,
    k_size: int,
) -> torch.Tensor:
    """Rotate the query (0) or key (1) straight from the packed projection (RoFormer, in 2-D).

    With [B, 2, M] positions the first half of each head turns by position and the second by block position; with
    [B, M] positions the whole head turns by position.

    Args:
        x: [B, M, H * 3 * K], layout "BM(H3K)".
        position_ids: int64 [B, 2, M] or [B, M], each below the tables' length.
        cos, sin: [P, D / 2] with D the width that one position turns: K / 2 in 2-D, K in 1-D; dtype of x.
        tensor_index: 0 for the query, 1 for the key.
        k_size: K.

    Returns:
        [B, H, M, K], layout "BHMK".
    """
    batch, rows, width = x.shape
    heads = x.view(batch, rows, width // (3 * k_size), 3, k_size)[:, :, :, tensor_index]
    if position_ids.dim() == 2:
        rotated = _rotate(heads, position_ids, cos, sin)
    else:
        by_position, by_block = heads.chunk(2, dim=-1)
        rotated = torch.cat(
            (_rotate(by_position, position_ids[:, 0], cos, sin), _rotate(by_block, position_ids[:, 1], cos, sin)),
            dim=-1,
        )
    return rotated.transpose(1, 2)


def fused_attention_concat_past_key_value(
    past_key_values: object, key: torch.Tensor, value: torch.Tensor, layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Append this step's key and value to the cache and return all keys and values of the layer.

    Args:
        past_key_values: an object with transformers' ``Cache.update(key, value, layer)``, or None for no cache.
        key, value: [B, H, M, K].
        layer: index of the layer.

    Returns:
        key and value, [B, H, T, K] each.
    """
    return (key, value) if past_key_values is None else past_key_values.update(key, value, layer)


def attention_probabilities(
    query: torch.Tensor, key: torch.Tensor, attn_bias: torch.Tensor | None, scale: float | None = None
) -> torch.Tensor:
    """Return softmax(scale * query key^T + attn_bias) in float32, [B, H, M, T]; arguments as in the operator below."""
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = torch.matmul(query * scale, key.transpose(-1, -2)).float()
    if attn_bias is not None:
        scores = scores + attn_bias.float()
    return torch.softmax(scores, dim=-1)


def fused_multi_head_attention_inference_v2(
    *,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: torch.Tensor | None = None,
    prefix_length: int | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Return softmax(scale * query key^T + attn_bias) value.

    Args:
        query: [B, H, M, K].
        key, value: [B, H, T, K].
        attn_bias: floating [B or 1, 1, M, T], added to the scaled scores; None lets every row see every key.
        prefix_length: for implementations that need no bias. If given, the rows belong to the last M keys, and
            ``attn_bias`` says no more than this: every row sees the first ``prefix_length`` keys, and any other key is
            seen by its own row and the later ones.
        scale: default 1 / sqrt(K).

    Returns:
        [B, M, H * K], layout "BM(HK)".
    """
    probabilities = attention_probabilities(query, key, attn_bias, scale).to(value.dtype)
    context = torch.matmul(probabilities, value).transpose(1, 2)
    return context.reshape(*context.shape[:2], -1)


def fused_matmul_bias(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    _add_to_output: torch.Tensor | None = None,
    beta: float = 1.0,
) -> torch.Tensor:
    """Return x weight^T + bias + beta * _add_to_output.

    Args:
        x: [..., in]. weight: [out, in]. bias: [out] or None. _add_to_output: [..., out] or None.
    """
    out = functional.linear(x, weight, bias)
    return out if _add_to_output is None else out + beta * _add_to_output


def skip_layer_norm(
    x: torch.Tensor,
    *,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    skip: torch.Tensor | None = None,
    epsilon: float = 1e-5,
    alpha: float = 1.0,
) -> torch.Tensor:
    """Return LayerNorm(x + alpha * skip) over the last axis (Ba et al. 2016).

    Args:
        x, skip: [..., hidden]. gamma, beta: [hidden].
    """
    if skip is not None:
        x = x + alpha * skip
    return functional.layer_norm(x, x.shape[-1:], gamma, beta, epsilon)


def fused_linear_with_groupwise_quantized_weight(
    x: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    *,
    b: torch.Tensor | None = None,
    num_bits: int = 8,
    group_size: int = -1,
    _add_to_output: torch.Tensor | None = None,
    beta: float = 1.0,
) -> torch.Tensor:
    """Return x times a symmetric int8 or int4 weight, + b + beta * _add_to_output.

    An int4 byte holds the even column in its high nibble and the odd column in its low one, two's complement (stock's
    ``compress_int4_weight``).

    Args:
        x: [..., in]. w: int8 [out, in * num_bits / 8]. w_scale: [out, in / group_size] in the dtype of x, or [out] or
            [out, 1] for one group per row. b: [out] or None. num_bits: 8 or 4.
        group_size: columns that share a scale, -1 for all.
        _add_to_output: [..., out] or None.
    """
    w = unpack_int4(w) if num_bits == 4 else w
    groups = 1 if group_size < 0 else w.shape[1] // group_size
    weight = w.to(x.dtype).view(w.shape[0], groups, -1) * w_scale.to(x.dtype).view(w.shape[0], groups, 1)
    out = functional.linear(x, weight.view(w.shape), b)
    return out if _add_to_output is None else out + beta * _add_to_output


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """Unpack int8 [..., n] to int8 [..., 2 n] in -8..7: the high nibble is the even column, the low one the odd."""
    return torch.stack((packed >> 4, (packed << 4) >> 4), dim=-1).flatten(-2)
