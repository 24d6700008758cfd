"""A stand-in for ``oneflow._C`` with the signatures of OneFlow 1.0.0, which has the kernels that 0.9.0 lacks.

Each function checks what OneFlow's functors check, records its arguments, and computes what the kernel computes: from
layouts and, for the rotary tables, from places in memory. Wrong names raise TypeError, as OneFlow's do.
"""

import math
from typing import Any

import torch
from torch.nn import functional


def heads_of(x: Any, layout: str, index: int, head_size: int | None) -> Any:
    """Return query (0), key (1) or value (2) of a tensor in one of OneFlow's layouts, as [B, M, H, K]."""
    if x.dim() == 4:
        assert layout in ("BMHK", "BHMK", "MBHK"), layout
        order = {"BMHK": (0, 1, 2, 3), "BHMK": (0, 2, 1, 3), "MBHK": (1, 0, 2, 3)}[layout]
        assert head_size in (None, x.shape[-1])
        return x.permute(*order)
    assert x.dim() == 3 and layout in ("BM(HK)", "BM(H2K)", "BM(H3K)"), (x.shape, layout)
    packed = {"BM(HK)": 1, "BM(H2K)": 2, "BM(H3K)": 3}[layout]
    batch, rows, width = x.shape
    assert head_size and width % (packed * head_size) == 0
    heads = x.reshape(batch, rows, width // (packed * head_size), packed, head_size)
    return heads[:, :, :, {1: 0, 2: index - 1, 3: index}[packed]]


def packed_as(heads: Any, layout: str) -> Any:
    """Return [B, M, H, K] in another layout, contiguous."""
    if layout == "BM(HK)":
        return heads.reshape(*heads.shape[:2], heads.shape[2] * heads.shape[3])
    order = {"BMHK": (0, 1, 2, 3), "BHMK": (0, 2, 1, 3), "MBHK": (1, 0, 2, 3)}[layout]
    return heads.permute(*order).contiguous()


class StandIn:
    """OneFlow's functions as attributes; ``calls`` lists (name, arguments by name) in their order."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def _record(self, name: str, arguments: dict[str, Any]) -> None:
        arguments.pop("self")
        self.calls.append((name, arguments))
        for argument, value in arguments.items():
            if isinstance(value, torch.Tensor):
                # Strides are not tested here, and kernels that do not know them would copy.
                assert value.is_contiguous(), (name, argument)

    def of(self, name: str) -> list[dict[str, Any]]:
        """Return the recorded calls of one function."""
        return [arguments for called, arguments in self.calls if called == name]

    def fast_gelu(self, x: Any) -> Any:
        self._record("fast_gelu", dict(locals()))
        return 0.5 * x * (1 + torch.tanh(0.7978845608028654 * (x + 0.044714998453855515 * x * x * x)))

    def fused_fast_gelu_mul(self, x: Any, multiplier: Any) -> Any:
        self._record("fused_fast_gelu_mul", dict(locals()))
        return StandIn().fast_gelu(x) * multiplier

    def fused_matmul_bias(
        self, x: Any, weight: Any, bias: Any, _add_to_output: Any = None, alpha: float = 1.0, beta: float = 1.0
    ) -> Any:
        self._record("fused_matmul_bias", dict(locals()))
        assert weight.dim() == 2 and tuple(bias.shape) == (weight.shape[0],)
        out = alpha * torch.matmul(x, weight.transpose(0, 1)) + bias
        return out if _add_to_output is None else out + beta * _add_to_output

    def fused_multi_head_attention_inference_v2(
        self,
        *,
        query: Any,
        query_layout: str,
        query_head_size: int | None = None,
        query_seq_start: Any = None,
        query_max_seq_len: int | None = None,
        key: Any = None,
        key_layout: str | None = None,
        key_seq_start: Any = None,
        key_seq_len: Any = None,
        key_max_seq_len: int | None = None,
        value: Any = None,
        value_layout: str | None = None,
        attn_bias: Any = None,
        output_layout: str = "BM(HK)",
        scale: float | None = None,
        causal: bool | None = None,
        attn_mask_type: str | None = None,
        causal_diagonal_offset: int = 0,
    ) -> Any:
        self._record("fused_multi_head_attention_inference_v2", dict(locals()))
        assert query_seq_start is None and not causal and attn_mask_type is None and causal_diagonal_offset == 0
        q = heads_of(query, query_layout, 0, query_head_size).permute(0, 2, 1, 3)
        k = heads_of(key, key_layout, 1, q.shape[-1]).permute(0, 2, 1, 3)
        v = heads_of(value, value_layout, 2, q.shape[-1]).permute(0, 2, 1, 3)
        assert q.shape[-1] % 8 == 0 and q.dtype == k.dtype == v.dtype
        scores = torch.matmul(q, k.transpose(2, 3)) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
        if attn_bias is not None:
            assert attn_bias.dtype == q.dtype and 1 <= attn_bias.dim() <= 4
            while attn_bias.dim() < 4:
                attn_bias = attn_bias.unsqueeze(0)
            assert attn_bias.shape[3] % 8 == 0 and attn_bias.shape[3] >= k.shape[2]
            assert attn_bias.shape[2] == 1 or attn_bias.shape[2] >= q.shape[2]
            assert attn_bias.shape[1] in (1, q.shape[1]) and attn_bias.shape[0] in (1, q.shape[0])
            scores = scores + attn_bias[:, :, : q.shape[2], : k.shape[2]]
        return packed_as(torch.matmul(torch.softmax(scores, dim=-1), v).permute(0, 2, 1, 3), output_layout)

    def fused_attention_concat_past_key_value(
        self,
        *,
        past_key: Any = None,
        past_key_layout: str,
        past_value: Any = None,
        past_value_layout: str,
        key: Any,
        key_layout: str,
        value: Any,
        value_layout: str,
        key_head_size: int | None = None,
    ) -> list[Any]:
        self._record("fused_attention_concat_past_key_value", dict(locals()))
        assert (past_key is None) == (past_value is None)
        grown = []
        for index, new, layout, past, past_layout in (
            (1, key, key_layout, past_key, past_key_layout),
            (2, value, value_layout, past_value, past_value_layout),
        ):
            heads = heads_of(new, layout, index, key_head_size)
            if past is not None:
                heads = torch.cat((heads_of(past, past_layout, index, key_head_size), heads), dim=1)
            grown.append(packed_as(heads, past_layout))
        return grown

    def fused_apply_rotary_emb(
        self,
        x: Any,
        *,
        cos: Any = None,
        sin: Any = None,
        position_ids: Any = None,
        x_layout: str = "BHMK",
        output_layout: str | None = None,
        mode: str = "plane",
        tensor_index: int | None = None,
        k_size: int | None = None,
        base: float = 1e4,
        rotary_size: int | None = None,
    ) -> Any:
        self._record("fused_apply_rotary_emb", dict(locals()))
        heads = heads_of(x, x_layout, tensor_index or 0, k_size)
        batch, rows, _, width = heads.shape
        assert mode == "plane" and rotary_size in (None, width)
        assert position_ids.dim() == 3 and position_ids.dtype in (torch.int64, torch.int32)
        assert position_ids.shape[0] == batch and position_ids.shape[2] == rows and position_ids.shape[1] in (1, 2)
        turned = width // position_ids.shape[1]
        assert cos.dim() == 2 and tuple(cos.shape) == tuple(sin.shape) and cos.shape[1] == turned
        parts = []
        for axis in range(position_ids.shape[1]):
            # PlaneKernel takes the element position * K + k of the table, where K is the width of the whole head.
            places = position_ids[:, axis, :, None] * width + torch.arange(turned)
            assert int(places.max()) < cos.numel()
            c, s = (table.reshape(-1)[places].unsqueeze(2) for table in (cos, sin))
            part = heads[..., axis * turned : (axis + 1) * turned]
            first, second = part[..., : turned // 2], part[..., turned // 2 :]
            parts.append(part * c + torch.cat((-second, first), dim=-1) * s)
        return packed_as(torch.cat(parts, dim=-1), output_layout or x_layout)

    def skip_layer_norm(
        self,
        x: Any,
        *,
        gamma: Any = None,
        beta: Any = None,
        bias: Any = None,
        skip: Any = None,
        epsilon: float = 1e-5,
        alpha: float = 1e1,
    ) -> Any:
        self._record("skip_layer_norm", dict(locals()))
        assert x.dim() >= 2 and (skip is None or tuple(skip.shape) == tuple(x.shape))
        x = x if bias is None else x + bias
        x = x if skip is None else x + alpha * skip
        return functional.layer_norm(x, (x.shape[-1],), gamma, beta, epsilon)

    def fused_linear_with_groupwise_quantized_weight(
        self,
        x: Any,
        w: Any,
        w_scale: Any,
        *,
        w_zero: Any = None,
        b: Any = None,
        num_bits: int = 8,
        symmetric: bool = True,
        group_dim: int = -1,
        group_size: int = -1,
    ) -> Any:
        self._record("fused_linear_with_groupwise_quantized_weight", dict(locals()))
        assert symmetric and w_zero is None and w.dtype == torch.int8 and group_dim in (1, -1)
        integers = w.numpy()
        if num_bits == 4:
            high, low = integers >> 4, (integers << 4) >> 4
            wide = integers.repeat(2, axis=1)
            wide[:, ::2], wide[:, 1::2] = high, low
            integers = wide
        columns = integers.shape[1]
        size = columns if group_size < 0 else group_size
        assert w_scale.dim() == 2 and tuple(w_scale.shape) == (w.shape[0], columns // size)
        assert w_scale.dtype == x.dtype
        weight = integers.astype("float32") * w_scale.numpy().repeat(size, axis=1)
        out = torch.matmul(x, torch.tensor(weight).transpose(0, 1))
        return out if b is None else out + b
