"""Checks of the operators' table for NVIDIA GPUs against the definitions, on tensors with and without a kernel."""

import torch

from faster_chatglm_6b.ops import reference
from faster_chatglm_6b.ops.cuda import choose


def _close(actual, expected, dtype):
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-12, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    scale = expected.double().abs().max().clamp(min=1)
    error = ((actual.double() - expected.double()).abs().max() / scale).item()
    assert error < tolerance, error


def _random(device, dtype, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64).to(
        device, dtype
    )


def pointwise_and_products(device, dtype):
    """Check contiguous, transposed and strided tensors, and a dtype without a kernel."""
    table = choose(device)
    for kind in (dtype, torch.float64):
        x, other = _random(device, kind, 6, 10), _random(device, kind, 6, 10) + 1
        weight, bias, residual = (_random(device, kind, *shape) for shape in ((7, 10), (7,), (6, 7)))
        gamma, beta = _random(device, kind, 10), _random(device, kind, 10)
        for view in (lambda t: t, lambda t: t.t().contiguous().t(), lambda t: torch.stack((t, t), dim=1)[:, 0]):
            _close(table.fast_gelu(view(x)), reference.fast_gelu(x), kind)
            _close(table.fused_fast_gelu_mul(view(x), other), reference.fused_fast_gelu_mul(x, other), kind)
            _close(
                table.skip_layer_norm(view(x), gamma=gamma, beta=beta, skip=view(other), alpha=0.5),
                reference.skip_layer_norm(x, gamma=gamma, beta=beta, skip=other, alpha=0.5),
                kind,
            )
            for arguments in ((view(weight), bias, view(residual), 1.5), (view(weight), None)):
                expected = reference.fused_matmul_bias(
                    x, weight, *[a if a is bias else residual if torch.is_tensor(a) else a for a in arguments[1:]]
                )
                _close(table.fused_matmul_bias(view(x), *arguments), expected, kind)


def rotary_positions(device, dtype):
    """Check 2-D and 1-D positions, in both integer types."""
    table = choose(device)
    packed = _random(device, dtype, 2, 3, 2 * 3 * 8)
    for width, positions in ((2, torch.arange(12).view(2, 2, 3)), (4, torch.arange(6).view(2, 3))):
        angle = torch.rand(16, width, generator=torch.Generator().manual_seed(0)).to(device)
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        for kind in (torch.int64, torch.int32):
            arguments = {"position_ids": positions.to(device, kind), "cos": cos, "sin": sin, "k_size": 8}
            for index in (0, 1):
                _close(
                    table.fused_apply_rotary_emb(packed, tensor_index=index, **arguments),
                    reference.fused_apply_rotary_emb(packed, tensor_index=index, **arguments),
                    dtype,
                )


def attention(device, dtype):
    """Check a prompt with a prefix length or a bias, also after a key; a row that sees nothing gives no NaN."""
    table = choose(device)
    for rows in (1, 2, 9, 33):
        query, key, value = (_random(device, dtype, 2, 3, rows, 16) + i for i in range(3))
        lowest = torch.finfo(dtype).min
        hidden = torch.zeros(1, 1, rows, rows, dtype=dtype, device=device)
        hidden[..., :-1, -1] = lowest
        expected = reference.fused_multi_head_attention_inference_v2(
            query=query, key=key, value=value, attn_bias=hidden
        )
        arguments = {"query": query, "key": key, "value": value}
        for prefix in (rows - 1, None):
            output = table.fused_multi_head_attention_inference_v2(**arguments, attn_bias=hidden, prefix_length=prefix)
            _close(output, expected, dtype)
        if rows > 1:
            later = {"query": query[:, :, 1:], "key": key, "value": value, "attn_bias": hidden[:, :, 1:]}
            output = table.fused_multi_head_attention_inference_v2(**later, prefix_length=rows - 1)
            _close(output, reference.fused_multi_head_attention_inference_v2(**later), dtype)
        nothing = hidden.expand(2, 1, rows, rows).clone()
        nothing[1] = lowest
        output = table.fused_multi_head_attention_inference_v2(**arguments, attn_bias=nothing)
        assert not output.isnan().any()


def quantized_products(device, dtype):
    """Check integer weights with and without groups, contiguous or not, and a dtype without a kernel."""
    table = choose(device)
    for kind in (dtype, torch.float64):
        x, bias, residual = (_random(device, kind, *shape) for shape in ((3, 64), (7,), (3, 7)))
        for bits, groups in ((8, 1), (8, 4), (4, 1), (4, 4)):
            weight = torch.randint(-128, 128, (7, 8 * bits), generator=torch.Generator().manual_seed(bits))
            weight = weight.to(device, torch.int8)
            scale = _random(device, kind, 7, groups).abs() / 2**bits
            settings = {"b": bias, "num_bits": bits, "group_size": 64 // groups if groups > 1 else -1, "beta": 1.5}
            expected = reference.fused_linear_with_groupwise_quantized_weight(
                x, weight, scale, _add_to_output=residual, **settings
            )
            for w in (weight, weight.t().contiguous().t()):
                actual = table.fused_linear_with_groupwise_quantized_weight(
                    x, w, scale, _add_to_output=residual, **settings
                )
                _close(actual, expected, kind)


EVERYWHERE = (pointwise_and_products, quantized_products, rotary_positions, attention)
