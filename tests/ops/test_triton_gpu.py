"""The kernels on a real GPU: odd shapes, batch 1 to 33, all dtypes, poisoned outputs, sampling distributions."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels to run")

import operator_checks as operators  # noqa: E402
import sampling_checks as sampling  # noqa: E402
import speculation_checks as speculation  # noqa: E402

from faster_chatglm_6b.ops import triton as kernels  # noqa: E402
from faster_chatglm_6b.ops.triton.configs import Dot, Gemv  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
DEVICE = "cuda"
HALF, BFLOAT, SINGLE = torch.float16, torch.bfloat16, torch.float32
DTYPES = pytest.mark.parametrize("dtype", [HALF, BFLOAT, SINGLE], ids=["fp16", "bf16", "fp32"])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@DTYPES
@pytest.mark.parametrize("shape", [(1,), (3, 701), (33, 16384)])
def test_gelu(dtype, shape):
    operators.check_fast_gelu(DEVICE, dtype, shape)
    operators.check_fused_fast_gelu_mul(DEVICE, dtype, shape)


@DTYPES
@pytest.mark.parametrize("rows, size", [(1, 4096), (33, 4096), (5, 100), (2, 512)])
def test_skip_layer_norm(dtype, rows, size):
    for with_skip in (False, True):
        operators.check_skip_layer_norm(DEVICE, dtype, rows, size, with_skip)


@DTYPES
@pytest.mark.parametrize("batch, rows, heads, size", [(1, 1, 32, 128), (33, 3, 4, 32), (2, 70, 3, 24)])
def test_rotary_and_concat(dtype, batch, rows, heads, size):
    for two in (True, False):
        operators.check_fused_apply_rotary_emb(DEVICE, dtype, batch, rows, heads, size, two)
        operators.check_rotary_concat_past_key_value(DEVICE, dtype, batch, rows, heads, size, two, prefix=rows)


@DTYPES
@pytest.mark.parametrize(
    "batch, rows, heads, size, prefix",
    [
        (1, 1, 32, 128, 0),
        (1, 20, 32, 128, 0),
        (1, 64, 32, 128, 128),
        (2, 65, 32, 128, 0),
        (3, 300, 4, 128, 128),
        (33, 77, 2, 64, 5),
        (2, 129, 3, 24, 0),
        (5, 40, 2, 8, 1),
        (1, 2047, 2, 128, 0),
    ],
)
def test_prompt_attention(dtype, batch, rows, heads, size, prefix):
    operators.check_prompt_attention(DEVICE, dtype, batch, rows, heads, size, prefix)


@DTYPES
@pytest.mark.parametrize(
    "batch, heads, size, length, splits",
    [
        (1, 32, 128, 0, None),
        (1, 32, 128, 31, None),
        (1, 32, 128, 127, None),
        (1, 32, 128, 240, None),
        (1, 32, 128, 1500, None),
        (1, 32, 128, 777, 64),
        (33, 4, 32, 130, None),
        (3, 4, 24, 200, 3),
        (2, 4, 128, 64, 1),
    ],
)
def test_attention(dtype, batch, heads, size, length, splits):
    operators.check_attention(DEVICE, dtype, batch, heads, size, length, splits)
    operators.check_decode_attention(DEVICE, dtype, batch, heads, size, length, splits)
    operators.check_decode_attention(DEVICE, dtype, batch, heads, size, length, splits, two=False)


@DTYPES
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 17, 33, 64, 65])
@pytest.mark.parametrize("n, k", [(37, 100), (384, 128), (704, 128), (1536, 512), (4096, 4096)])
def test_matmul(dtype, rows, n, k):
    for epilogue in ("plain", "gelu", "residual"):
        operators.check_fused_matmul_bias(DEVICE, dtype, rows, n, k, epilogue, with_bias=epilogue != "plain")


@pytest.mark.parametrize("n, k", [(12288, 4096), (16384, 4096), (4096, 16384), (130528, 4096)])
@pytest.mark.parametrize("rows", [1, 4, 8, 33])
def test_matmul_of_the_model(rows, n, k):
    operators.check_fused_matmul_bias(DEVICE, HALF, rows, n, k, "gelu" if n == 16384 else "residual")


@DTYPES
def test_matmul_configurations(dtype):
    for rows in (1, 2, 3, 4):
        for config in (Gemv(1, 4096, 4), Gemv(4, 256, 2), Gemv(2, 1024, 1)):
            operators.check_gemv_config(DEVICE, dtype, rows, 37, 1000, config)
    operators.check_gemv_config(DEVICE, dtype, 1, 3001, 1000, Gemv(2, 1024, 4, 2))
    if dtype != SINGLE:
        for config in (Dot(32, 128, 4, 4, 3), Dot(16, 64, 1, 5, 2), Dot(128, 64, 8, 3, 1)):
            for rows in (2, 9, 33, 64):
                operators.check_dot_config(DEVICE, dtype, rows, 300, 1000, config)


@DTYPES
@pytest.mark.parametrize("rows", [1, 2])
def test_layer_norm_matmul(dtype, rows):
    operators.check_layer_norm_matmul(DEVICE, dtype, rows, 700, 1000)
    operators.check_layer_norm_matmul(DEVICE, dtype, rows, 12288, 4096)
    if rows == 1:
        operators.check_layer_norm_matmul(DEVICE, dtype, 1, 1501, 1000, Gemv(1, 1024, 4, 4))


@DTYPES
def test_embedding(dtype):
    for batch in (1, 33):
        operators.check_embedding(DEVICE, dtype, batch, 704, 100)


@DTYPES
@pytest.mark.parametrize("batch, vocab", [(1, 130528), (33, 704), (2, 2500)])
def test_greedy_and_processors(dtype, batch, vocab):
    sampling.check_greedy(DEVICE, dtype, batch, vocab)
    sampling.check_processors(DEVICE, dtype, batch, vocab)
    sampling.check_invalid_rule(DEVICE, dtype, vocab)


@pytest.mark.parametrize("sampler", ["top_k", "full"])
def test_ties_and_seeds(sampler):
    sampling.check_ties(DEVICE, sampler, 64)
    sampling.check_repeatable(DEVICE, sampler, 704)
    sampling.check_rows_of_their_own(DEVICE, sampler, 33, 704)


@pytest.mark.parametrize(
    "sampler, vocab, temperature, top_k, top_p",
    [
        ("top_k", 130528, 0.95, 50, 0.7),
        ("top_k", 130528, 1.5, 50, 1.0),
        ("top_k", 704, 1.0, 7, 0.9),
        ("full", 130528, 0.95, None, 0.7),
        ("full", 130528, 1.0, 500, 0.8),
        ("full", 130528, 1.3, 1000, 1.0),
        ("full", 130528, 0.7, None, 1.0),
        ("full", 704, 1.0, 7, 0.9),
    ],
)
@DTYPES
def test_distribution(dtype, sampler, vocab, temperature, top_k, top_p):
    sampling.check_distribution(DEVICE, sampler, dtype, vocab, temperature, top_k, top_p, 256, 40)


@pytest.mark.parametrize("kind", ["normal", "equal", "few values", "far", "banned"])
@pytest.mark.parametrize(
    "temperature, top_k, top_p",
    [
        (0.95, None, 0.7),
        (2.0, None, 0.999),
        (1.0, 1000, None),
        (1.3, 1000, 0.9),
        (1.0, 130527, 0.05),
        (1.0, 200000, 1.0),
    ],
)
@DTYPES
def test_thresholds(dtype, temperature, top_k, top_p, kind):
    sampling.check_thresholds(DEVICE, dtype, 130528, kind, temperature, top_k, top_p)


def test_pinned_ring():
    """The chosen tokens reach pinned host memory."""
    state = sampling.make_state(DEVICE, 3)
    state.ring = torch.full((4, 3), -1).pin_memory()
    scores = torch.randn(3, 1000, device=DEVICE)
    kernels.greedy_sample(scores, state)
    torch.cuda.synchronize()
    assert torch.equal(state.ring[0], scores.argmax(-1).cpu())
    assert (state.ring[1:] == -1).all()


def test_captured_step_repeats():
    """A step in a CUDA graph that reads its state before the wait gives the same as eager launches at every replay."""
    hidden, heads, size, capacity = 512, 4, 128, 64
    weight, bias = operators.random(DEVICE, HALF, 3 * hidden, hidden) / 22, operators.random(DEVICE, HALF, 3 * hidden)
    dense = operators.random(DEVICE, HALF, hidden, hidden) / 22
    gamma, beta = operators.random(DEVICE, HALF, hidden), operators.random(DEVICE, HALF, hidden)
    head = operators.random(DEVICE, HALF, 704, hidden)
    cos, sin = operators.tables(DEVICE, HALF, 100, size // 4)
    zero = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    workspace = kernels.Workspace(DEVICE, 1, heads, size, 704)

    def make() -> tuple:
        state = sampling.make_state(DEVICE, 1, length=1, capacity=capacity)
        state.tokens.fill_(9)
        caches = [torch.zeros(1, heads, capacity, size, dtype=HALF, device=DEVICE) for _ in range(2)]

        def step(stable_state: bool = False) -> None:
            x = kernels.embedding(state.tokens, head)
            qkv, normed = kernels.layer_norm_matmul_bias(x, gamma, beta, 1e-5, weight, bias, workspace=workspace)
            context = kernels.decode_attention(
                qkv,
                *caches,
                state.cache_length,
                zero,
                zero,
                zero,
                zero,
                cos,
                sin,
                stable_state=stable_state,
                workspace=workspace,
            )
            x = kernels.fused_matmul_bias(context, dense, None, normed, operators.ALPHA, workspace=workspace)
            kernels.greedy_sample(kernels.fused_matmul_bias(x, head, workspace=workspace), state, workspace=workspace)

        return state, step

    state, step = make()
    for _ in range(30):
        step()
    captured, step = make()
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(stable_state=True)
    for _ in range(29):
        graph.replay()
    assert torch.equal(state.ids, captured.ids)
    assert int(captured.ids_length) == 31


@DTYPES
@pytest.mark.parametrize(
    "batch, rows, heads, size, length, splits",
    [
        (1, 8, 32, 128, 0, None),
        (1, 8, 32, 128, 31, None),
        (1, 8, 32, 128, 1500, None),
        (1, 4, 32, 128, 777, 8),
        (4, 8, 32, 128, 300, None),
        (16, 4, 4, 64, 130, 3),
        (3, 8, 4, 24, 200, 2),
        (2, 16, 3, 8, 65, 1),
    ],
)
def test_draft_attention(dtype, batch, rows, heads, size, length, splits):
    for two in (True, False):
        speculation.check_draft_attention(DEVICE, dtype, batch, rows, heads, size, length, splits, two)
    speculation.check_draft_attention(DEVICE, dtype, batch, rows, heads, size, length, splits, room=rows - 1)
    for page, padded in ((64, False), (128, True)):
        arguments = batch, rows, heads, size, length, splits, True, rows - 1, page, padded
        speculation.check_draft_attention(DEVICE, dtype, *arguments)


@pytest.mark.parametrize("rows", [4, 8])
def test_proposals_and_their_acceptance(rows):
    speculation.check_accept(DEVICE, rows)
    speculation.check_back_off(DEVICE)
    for length, tokens, spent in ((20, 3, False), (1500, 2, True), (2100, 30, True), (30, 2, False)):
        speculation.check_propose(DEVICE, rows, length, tokens, spent)
