"""The operators call OneFlow's kernels with the right arguments, give the right results, and refuse the rest."""

import math
import re

import pytest
import torch
from golden_checks import assert_close, check_batch, check_decode, check_prefill
from stand_in import StandIn

from faster_chatglm_6b import ops
from faster_chatglm_6b.ops import OPERATOR_NAMES, oneflow, reference

CPU = torch.device("cpu")
ATTENTION = "fused_multi_head_attention_inference_v2"
ROTARY = "fused_apply_rotary_emb"
CONCAT = "fused_attention_concat_past_key_value"
QUANTIZED = "fused_linear_with_groupwise_quantized_weight"
ALL = oneflow.Capabilities("1.0.0", frozenset(OPERATOR_NAMES), True)
HEAD_SIZE = 32


@pytest.fixture
def native(monkeypatch):
    """Put OneFlow 1.0.0's functions in the place of the installed ones, for models in float32 on the CPU."""
    stand_in = StandIn()
    monkeypatch.setattr(oneflow, "capabilities", lambda: ALL)
    monkeypatch.setattr(oneflow, "refusal", lambda *arguments: None)
    table = oneflow.build(oneflow.NativeOperators(stand_in, True), CPU, torch.float32, HEAD_SIZE, (8, 6))
    # Every operator passed its trial.
    assert set(table.choices.values()) == {("oneflow", "OneFlow 1.0.0")}
    assert {name for name, _ in stand_in.calls} == set(OPERATOR_NAMES)
    stand_in.calls.clear()
    monkeypatch.setattr(ops, "_choose", lambda device, dtype, head_size: table)
    monkeypatch.setattr(ops, "_chosen", {})
    return stand_in


def test_prefill_through_the_recorded_arguments(native, tiny_model, golden_tensors):
    check_prefill(tiny_model, golden_tensors("prefill"))
    layers = tiny_model.config.num_layers
    prompts = len(native.of("fast_gelu")) // layers
    assert prompts > 10
    for name, per_layer in {
        "fast_gelu": 1,
        ROTARY: 2,
        CONCAT: 1,
        ATTENTION: 1,
        "fused_matmul_bias": 4,
    }.items():
        assert len(native.of(name)) == per_layer * layers * prompts, name
    assert len(native.of("skip_layer_norm")) == (2 * layers + 1) * prompts


def test_decode_through_the_recorded_arguments(native, tiny_model, golden_tensors):
    check_decode(tiny_model, golden_tensors("decode"), some=4)


def test_padded_batch_through_the_recorded_arguments(native, tiny_model, golden_tensors):
    check_batch(tiny_model, golden_tensors("batch"))


def test_a_prompt_and_a_decode_step(native, tiny_model):
    """Names, layouts, positions, alpha, beta and the padded bias are right, argument by argument."""
    prompt = torch.tensor([[5, 143, 97, 321, 324]])
    with torch.no_grad():
        past = tiny_model(prompt, use_cache=True).past_key_values
    rotary = native.of(ROTARY)
    assert [call["tensor_index"] for call in rotary] == [0, 1] * 3
    for call in rotary:
        assert tuple(call["x"].shape) == (1, 5, 3 * 4 * HEAD_SIZE)
        assert call["x_layout"] == "BM(H3K)" and call["output_layout"] == "BHMK" and call["mode"] == "plane"
        assert call["k_size"] == call["rotary_size"] == HEAD_SIZE
        assert call["position_ids"].tolist() == [[[0, 1, 2, 3, 3], [0, 0, 0, 0, 1]]]
    frequency = 1.0 / 10000 ** (torch.arange(0, 16, 2, dtype=torch.float32) / 16)
    angle = 3 * frequency.half().float()
    # Position 3 is in row 6: the kernel steps by the head's 32 values through rows of 16.
    assert_close(rotary[0]["cos"][6], torch.cat((angle.cos(), angle.cos())))
    assert_close(rotary[0]["sin"][6], torch.cat((angle.sin(), angle.sin())))

    for call in native.of(CONCAT):
        assert call["past_key"] is None and call["past_value"] is None and call["key_head_size"] == HEAD_SIZE
        layouts = [call[f"{name}_layout"] for name in ("past_key", "past_value", "key", "value")]
        assert layouts == ["BHMK"] * 4

    for call in native.of(ATTENTION):
        assert [call[f"{name}_layout"] for name in ("query", "key", "value")] == ["BHMK"] * 3
        assert call["output_layout"] == "BM(HK)" and call["query_head_size"] == HEAD_SIZE
        assert call["scale"] == pytest.approx(1 / math.sqrt(HEAD_SIZE))
        assert tuple(call["attn_bias"].shape) == (1, 1, 5, 8)
        hidden = call["attn_bias"][0, 0, :, :5] < 0
        assert hidden.int().tolist() == [[0, 0, 0, 0, 1]] * 4 + [[0] * 5]

    alpha = math.sqrt(2 * 28)
    products = native.of("fused_matmul_bias")
    for packed, dense, up, down in zip(*[iter(products)] * 4, strict=True):
        assert packed["_add_to_output"] is None and up["_add_to_output"] is None
        for call in (dense, down):
            assert call["alpha"] == 1.0 and call["beta"] == pytest.approx(alpha)
            assert tuple(call["_add_to_output"].shape) == (1, 5, 128)
        assert tuple(packed["weight"].shape) == (384, 128) and tuple(down["weight"].shape) == (128, 512)

    for call in native.of("skip_layer_norm"):
        assert call["alpha"] == 1.0 and call["skip"] is None and call["epsilon"] == pytest.approx(1e-5)

    native.calls.clear()
    with torch.no_grad():
        tiny_model(torch.tensor([[97]]), position_ids=torch.tensor([[[3], [2]]]), past_key_values=past)
    assert [call["position_ids"].tolist() for call in native.of(ROTARY)] == [[[[3], [2]]]] * 6
    for call in native.of(CONCAT):
        assert tuple(call["past_key"].shape) == tuple(call["past_value"].shape) == (1, 4, 5, HEAD_SIZE)
    for call in native.of(ATTENTION):
        assert call["attn_bias"] is None and tuple(call["key"].shape) == (1, 4, 6, HEAD_SIZE)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights(native, load, golden_dir, golden_tensors, bits):
    model = load(golden_dir / "ckpt" / f"tiny-int{bits}").float()
    tensors = golden_tensors("quant")
    for i in range(3):
        with torch.no_grad():
            logits = model(tensors[f"input_ids.{i}"].view(1, -1)).logits[0]
        assert_close(logits, tensors[f"int{bits}_from_half.exact_f32.logits.{i}"], i)
    calls = native.of(QUANTIZED)
    assert len(calls) == 3 * 4 * 3 and not native.of("fused_matmul_bias")
    for call in calls:
        assert call["num_bits"] == bits and call["symmetric"] and call["group_dim"] == 1 and call["group_size"] == -1
        assert tuple(call["w_scale"].shape) == (call["w"].shape[0], 1) and call["w_scale"].dtype == torch.float32
        assert tuple(call["b"].shape) == (call["w"].shape[0],)


def test_groups_of_quantised_columns(native, load, tiny_dir):
    model = load(tiny_dir).float().quantize(4, group_size=32)
    with torch.no_grad():
        model(torch.tensor([[5, 143, 321, 324]]))
    first = native.of(QUANTIZED)[0]
    assert first["group_size"] == 32 and tuple(first["w_scale"].shape) == (384, 128 // 32)


def test_one_dimensional_positions(native, load, tiny_dir, golden_tensors):
    tensors = golden_tensors("pos1d")
    model = load(tiny_dir, position_encoding_2d=False).float()
    name = sorted(key.removesuffix(".position_ids") for key in tensors if key.endswith(".position_ids"))[0]
    with torch.no_grad():
        assert_close(model(tensors[f"{name}.input_ids"][None]).logits[0], tensors[f"{name}.logits"], name)
    assert native.of(ROTARY)[0]["position_ids"].shape[1] == 1


def test_fused_fast_gelu_mul(native):
    x, multiplier = torch.randn(2, 3), torch.randn(2, 3)
    operators = oneflow.NativeOperators(native, True)
    assert_close(operators.fused_fast_gelu_mul(x, multiplier), reference.fused_fast_gelu_mul(x, multiplier))


def test_an_older_matmul_without_beta_gets_the_residual_scaled(native):
    x, weight, bias, residual = torch.randn(2, 8), torch.randn(4, 8), torch.randn(4), torch.randn(2, 4)
    out = oneflow.NativeOperators(native, False).fused_matmul_bias(x, weight, bias, residual, 2.5)
    assert_close(out, reference.fused_matmul_bias(x, weight, bias, residual, 2.5))
    (call,) = native.of("fused_matmul_bias")
    assert_close(call["_add_to_output"], residual * 2.5)
    assert call["beta"] == 1.0


def test_the_matmul_of_the_installed_oneflow():
    """0.9.0 also has it on the CPU, without beta: the real function is called as a GPU's is."""
    import oneflow as flow

    assert not oneflow.capabilities().has_beta or flow.__version__ != "0.9.0"
    operators = oneflow.NativeOperators(flow._C, oneflow.capabilities().has_beta)
    assert oneflow.failure_of("fused_matmul_bias", operators.fused_matmul_bias, CPU, torch.float32, 32) is None
    assert oneflow.failure_of("fast_gelu", operators.fast_gelu, CPU, torch.float32, 32) is None


class Fatal(StandIn):
    """An attention that ends the process, as OneFlow's does on a GPU that it is not made for."""

    def fused_multi_head_attention_inference_v2(self, **_):
        raise SystemExit("OneFlow's attention was reached")


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (12, 0), (6, 1), None])
def test_attention_is_never_reached_on_other_gpus(capability, monkeypatch, tiny_model, golden_tensors):
    """Neither the trial nor the model reaches it, while OneFlow's other operators serve."""
    native, tried = Fatal(), []
    real_refusal, real_failure = oneflow.refusal, oneflow.failure_of

    def as_if_on_a_gpu(name, found, device_type, *rest):
        return real_refusal(name, found, "cuda", *rest)

    def trial(name, *arguments):
        tried.append(name)
        return real_failure(name, *arguments)

    monkeypatch.setattr(oneflow, "capabilities", lambda: ALL)
    monkeypatch.setattr(oneflow, "refusal", as_if_on_a_gpu)
    monkeypatch.setattr(oneflow, "failure_of", trial)
    table = oneflow.build(oneflow.NativeOperators(native, True), CPU, torch.float32, HEAD_SIZE, capability)
    assert ATTENTION not in tried and len(tried) == 7
    implementation, reason = table.choices[ATTENTION]
    assert implementation == "reference" and "compute capability 7.x and 8.x" in reason
    assert {name for name, (what, _) in table.choices.items() if what == "oneflow"} == set(OPERATOR_NAMES) - {ATTENTION}
    monkeypatch.setattr(ops, "_choose", lambda device, dtype, head_size: table)
    monkeypatch.setattr(ops, "_chosen", {})
    check_prefill(tiny_model, golden_tensors("prefill"), some=2)
    check_decode(tiny_model, golden_tensors("decode"), some=1)


def test_choose_asks_the_gpu(monkeypatch):
    """The device's own compute capability decides."""
    import oneflow as flow

    asked = []

    def capability_of(device):
        asked.append(device)
        return (9, 0)

    monkeypatch.setattr(flow.cuda, "get_device_capability", capability_of)
    monkeypatch.setattr(oneflow, "capabilities", lambda: ALL)
    monkeypatch.setattr(oneflow, "failure_of", lambda *arguments: None)
    device = torch.device("cuda:0")
    table = oneflow.choose(device, torch.float16, 128)
    assert asked == [device]
    assert table.choices[ATTENTION][0] == "reference" and table.choices["skip_layer_norm"][0] == "oneflow"


@pytest.mark.parametrize(
    ("name", "device", "dtype", "head_size", "capability", "reason"),
    [
        ("fast_gelu", "cuda", torch.bfloat16, 128, (8, 0), None),
        ("fast_gelu", "cpu", torch.float32, 128, None, "no such kernel for cpu"),
        (ATTENTION, "cuda", torch.float16, 128, (7, 0), None),
        (ATTENTION, "cuda", torch.float32, 128, (8, 9), None),
        (ATTENTION, "cuda", torch.bfloat16, 128, (8, 0), "knows no bfloat16"),
        (ATTENTION, "cuda", torch.float16, 20, (8, 0), "a multiple of 8 values, not 20"),
        (ATTENTION, "cuda", torch.float16, 128, (9, 0), "this GPU has 9.0"),
        (QUANTIZED, "cuda", torch.bfloat16, 128, (8, 0), "knows no bfloat16"),
        (ROTARY, "cuda", torch.bfloat16, 128, (9, 0), None),
        (ROTARY, "cuda", torch.float64, 128, (8, 0), "knows no (float64|double)"),
    ],
)
def test_contracts(name, device, dtype, head_size, capability, reason):
    found = oneflow.refusal(name, ALL, device, dtype, head_size, capability)
    if reason is None:
        assert found is None
    else:
        assert re.search(reason, found)


def test_what_is_missing_is_composed():
    """Every operator of the installed 0.9.0 is composed on the CPU."""
    import oneflow as flow

    if flow.__version__ != "0.9.0":
        pytest.skip(f"says what 0.9.0 has; this is {flow.__version__}")
    found = oneflow.capabilities()
    assert found.names == {"fast_gelu", "fused_fast_gelu_mul", "fused_matmul_bias"} and not found.has_beta
    table = oneflow.choose(CPU, torch.float32, 128)
    assert all(getattr(table, name) is getattr(reference, name) for name in OPERATOR_NAMES)


@pytest.mark.parametrize("how", ["raises", "differs", "nan"])
def test_a_kernel_that_fails_its_trial_is_not_used(how, monkeypatch):
    class Faulty(StandIn):
        def fast_gelu(self, x):
            if how == "raises":
                raise RuntimeError("no kernel image is available")
            return x * float("nan") if how == "nan" else x

    monkeypatch.setattr(oneflow, "capabilities", lambda: ALL)
    monkeypatch.setattr(oneflow, "refusal", lambda *arguments: None)
    table = oneflow.build(oneflow.NativeOperators(Faulty(), True), CPU, torch.float32, HEAD_SIZE, (8, 0))
    implementation, reason = table.choices["fast_gelu"]
    assert implementation == "reference" and table.fast_gelu is reference.fast_gelu
    assert ("no kernel image" in reason) if how == "raises" else ("other values than its definition" in reason)
    assert table.choices["skip_layer_norm"][0] == "oneflow"
