"""What stands between the CPU's products against the definitions in float64: rotary positions, attention, the ends."""

import pytest
import torch

from faster_chatglm_6b.ops import reference
from faster_chatglm_6b.ops.cpu import between, native

ERRORS = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", list(ERRORS), ids=str)


@pytest.fixture
def kernel():
    found = native.load()
    if isinstance(found, str):
        pytest.skip(found)
    torch.manual_seed(0)
    return found


def check(out, exact, dtype):
    assert out.dtype == dtype and out.shape == exact.shape
    assert float((out.double() - exact).norm() / exact.norm()) < ERRORS[dtype]


@DTYPES
@pytest.mark.parametrize("width", [8, 72, 128, 12])
def test_attention(kernel, dtype, width):
    for rows in (1, 2, 8, 9):
        for batch, keys in ((1, 1), (3, 130)):
            query = torch.randn(batch, rows, 5, 3, width).to(dtype)[:, :, :, 1].transpose(1, 2)
            key, value = torch.randn(2, batch, 5, keys + 3, width).to(dtype)[..., :keys, :]
            bias = torch.randn(batch, 1, rows, keys).to(dtype)
            bias[..., :1] = 0
            bias[:, :, 0, 1:] = torch.finfo(dtype).min
            for one in (None, bias, bias[:1], bias[:, :, :1].expand(-1, -1, rows, -1).float()):
                tensors = {"query": query, "key": key, "value": value}
                out = between.fused_multi_head_attention_inference_v2(kernel, **tensors, attn_bias=one)
                exact = reference.fused_multi_head_attention_inference_v2(
                    **{name: tensor.double() for name, tensor in tensors.items()},
                    attn_bias=None if one is None else one.double(),
                )
                check(out, exact, dtype)


@DTYPES
@pytest.mark.parametrize("parts", [1, 2])
def test_rotary_positions(kernel, dtype, parts):
    for batch, rows, heads, width in ((1, 1, 3, 16), (2, 7, 2, 128), (3, 2, 1, 12)):
        packed = torch.randn(batch, rows, heads * 3 * width).to(dtype)
        positions = torch.randint(0, 9, (batch, 2, rows) if parts == 2 else (batch, rows))
        cos, sin = torch.rand(2, 9, width // parts // 2).to(dtype)
        for index in (0, 1):
            settings = {"position_ids": positions, "tensor_index": index, "k_size": width}
            out = between.fused_apply_rotary_emb(kernel, packed, cos=cos, sin=sin, **settings)
            exact = reference.fused_apply_rotary_emb(packed.double(), cos=cos.double(), sin=sin.double(), **settings)
            check(out, exact, dtype)


@pytest.mark.parametrize("position", [-10, 9])
def test_a_position_that_the_tables_lack_is_refused_as_by_the_definition(kernel, position):
    cos = torch.rand(9, 4)
    with pytest.raises(IndexError):
        between.fused_apply_rotary_emb(
            kernel,
            torch.randn(1, 1, 48),
            position_ids=torch.tensor([[[position], [0]]]),
            cos=cos,
            sin=cos,
            tensor_index=0,
            k_size=16,
        )


@DTYPES
@pytest.mark.parametrize("columns", [3, 8, 67])
def test_the_end_of_a_product(kernel, dtype, columns):
    for rows in (1, 5):
        product, x = torch.randn(rows, columns), torch.empty(rows, 1, 4, dtype=dtype)
        for bias in (None, torch.randn(columns).to(dtype), torch.randn(columns).half()):
            for residual in (None, torch.randn(rows, 1, columns).to(dtype)):
                exact = product.double().view(rows, 1, columns)
                exact = exact if bias is None else exact + bias.double()
                exact = exact if residual is None else exact + 0.5 * residual.double()
                check(between.finish(kernel, product.clone(), x, bias, residual, 0.5), exact, dtype)


@DTYPES
def test_numbers_that_are_not_finite_stay_so(kernel, dtype):
    product = torch.tensor([[float("nan"), float("inf"), -float("inf"), 3.0e38] * 3])
    out = between.finish(kernel, product.clone(), torch.empty(1, 4, dtype=dtype), None, None, 1.0)
    torch.testing.assert_close(out, product.to(dtype), rtol=0, atol=0, equal_nan=True)


@DTYPES
def test_gelu_is_rounded_once(kernel, dtype):
    """A tail of less than a vector, numbers beyond where it is x or 0, and those that are not finite."""
    x = torch.cat((torch.linspace(-6, 6, 200), torch.tensor([-1e4, 1e4, 0, -0.0, float("inf")]))).to(dtype)
    exact = reference.fast_gelu(x.double()).to(dtype)
    for one in (kernel, None):
        error = (between.fast_gelu(one, x)[:-1].double() - exact[:-1].double()).abs()
        assert bool((error <= torch.finfo(dtype).eps * exact[:-1].double().abs() + 1e-6).all())
        assert between.fast_gelu(one, x)[-1].isinf() and between.fast_gelu(one, x * float("nan")).isnan().all()
    many = torch.randn(3, 70001, generator=torch.Generator().manual_seed(1)).to(dtype)
    check(between.fast_gelu(kernel, many), reference.fast_gelu(many.double()), dtype)


def test_sizes_of_attention_that_do_not_fit_are_refused_as_by_the_definition(kernel):
    query, key = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 16)
    with pytest.raises(RuntimeError):
        between.fused_multi_head_attention_inference_v2(kernel, query=query, key=key, value=key)
