"""int8 and int4: integers, scales and logits of the stock formula, groups, the quantised head, and bad requests."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from faster_chatglm_6b import ops
from faster_chatglm_6b.layers.quantized import QuantizedLinear, quantize_weight
from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration
from faster_chatglm_6b.ops import availability

TOLERANCE = {"rtol": 0, "atol": 1e-3}
PROMPT = torch.tensor([[5, 143, 321, 324]])


def load(directory, **kwargs):
    return ChatGLMForConditionalGeneration.from_pretrained(directory, **kwargs)


def check_logits(model, tensors, case):
    for i in range(3):
        with torch.no_grad():
            logits = model(tensors[f"input_ids.{i}"].view(1, -1)).logits[0]
        torch.testing.assert_close(logits, tensors[f"{case}.exact_f32.logits.{i}"], **TOLERANCE)


@pytest.mark.parametrize("bits", [8, 4])
def test_checkpoint_in_stocks_layout(golden_dir, golden_tensors, golden_json, bits):
    model = load(golden_dir / "ckpt" / f"tiny-int{bits}")
    layout = golden_json("quant_layout")[f"int{bits}_from_half"]
    state = {
        name: [str(value.dtype).removeprefix("torch."), list(value.shape)] for name, value in model.state_dict().items()
    }
    assert state == {name: kind for name, kind in layout.items() if not name.endswith("inv_freq")}
    check_logits(model.float(), golden_tensors("quant"), f"int{bits}_from_half")


@pytest.mark.parametrize("bits", [8, 4])
def test_quantize_from_half_gives_the_integers_of_the_checkpoint(golden_dir, tiny_dir, bits):
    model = load(tiny_dir).quantize(bits)
    stored = load_file(golden_dir / "ckpt" / f"tiny-int{bits}" / "model.safetensors")
    state = model.state_dict()
    assert {name for name in stored if not name.endswith("inv_freq")} == set(state)
    for name, value in state.items():
        assert value.dtype == stored[name].dtype and torch.equal(value, stored[name]), name


@pytest.mark.parametrize("bits", [8, 4])
def test_quantize_from_float32(tiny_dir, golden_tensors, bits):
    """Integers equal stock's from float32 too; some differ from those of half weights, whose division rounds."""
    tensors, case = golden_tensors("quant"), f"int{bits}_from_float32"
    model = load(tiny_dir).float().quantize(bits)
    state = model.state_dict()
    names = [key.removeprefix(f"{case}.") for key in tensors if key.startswith(f"{case}.transformer")]
    assert len(names) == 24
    for name in names:
        assert torch.equal(state[name], tensors[f"{case}.{name}"]), name
    check_logits(model, tensors, case)


def test_small_matrix(golden_json):
    golden = golden_json("quant_micro")
    weight = torch.tensor(golden["weight"])
    for bits in (8, 4):
        for dtype in (torch.float32, torch.float16):
            expected = golden[f"int{bits}_{str(dtype).removeprefix('torch.')}"]
            integers, scale = quantize_weight(weight.to(dtype), bits)
            assert integers.tolist() == expected["weight_int8_storage"] and integers.dtype == torch.int8
            assert scale.tolist() == expected["weight_scale_fp16"] and scale.dtype == torch.float16


@pytest.mark.parametrize("bits", [8, 4])
def test_checkpoint_of_older_code_with_quantised_embeddings(golden_dir, golden_tensors, tmp_path, bits):
    tensors = golden_tensors("quant")
    state = load_file(golden_dir / "ckpt" / f"tiny-int{bits}" / "model.safetensors")
    for name in ("transformer.word_embeddings", "lm_head"):
        for part in ("weight", "weight_scale"):
            embedding = tensors[f"int{bits}_qe1_from_half.transformer.word_embeddings.{part}"]
            state[f"{name}.{part}"] = embedding.clone()
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((golden_dir / "ckpt" / f"tiny-int{bits}" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_embeddings": True}))
    model = load(tmp_path)
    check_logits(model.float(), tensors, f"int{bits}_qe1_from_half")
    assert model.lm_head.weight is model.transformer.word_embeddings.weight


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 8},
        {"bits": 4},
        {"bits": 4, "group_size": 32},
        {"bits": 8, "group_size": 128, "head_bits": 8},
        {"bits": 4, "head_bits": 8},
    ],
)
def test_round_trip(tiny_dir, tmp_path, settings):
    model = load(tiny_dir).quantize(**settings)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    for (name, a), (other, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other and a.dtype == b.dtype and torch.equal(a, b), name
    with torch.no_grad():
        assert torch.equal(model.float()(PROMPT).logits, again.float()(PROMPT).logits)


def test_groups_come_closer_to_the_float_weights(tiny_model):
    linear = tiny_model.transformer.layers[0].mlp.dense_h_to_4h
    eye = torch.eye(linear.in_features)
    errors = []
    for group_size in (-1, 64, 16):
        layer = QuantizedLinear.of(linear, 4, group_size).float()
        errors.append(float((layer(eye) - linear(eye)).norm()))
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_quantised_linear_against_float64(bits, dtype):
    torch.manual_seed(0)
    linear = torch.nn.Linear(96, 40).to(dtype)
    for group_size in (-1, 32):
        layer = QuantizedLinear.of(linear, bits, group_size)
        x, residual = torch.randn(3, 5, 96, dtype=dtype), torch.randn(3, 5, 40, dtype=dtype)
        layer.weight_scale.data = layer.weight_scale.data.to(dtype)
        integers = layer.weight.long()
        if bits == 4:
            high, low = integers >> 4, ((integers & 0xF) ^ 8) - 8
            integers = torch.stack((high, low), -1).flatten(1)
        scale = layer.weight_scale.double().view(40, -1).repeat_interleave(96 if group_size < 0 else group_size, dim=1)
        expected = x.double() @ (integers * scale).T + layer.bias.double() + 0.5 * residual.double()
        out = layer(x, residual=residual, alpha=0.5)
        error = (out.double() - expected).norm() / expected.norm()
        assert error < {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]


@pytest.mark.parametrize("settings", [{"bits": 8}, {"bits": 4}, {"bits": 4, "group_size": 64, "head_bits": 8}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_cpus_products_answer_as_the_definitions(tiny_dir, monkeypatch, settings, dtype):
    """Whatever serves this CPU: logits within the dtype's rounding, equal greedy ids, untouched bytes."""
    model = load(tiny_dir).quantize(**settings).to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    greedy = model.generate(PROMPT, do_sample=False, max_new_tokens=8)
    with torch.no_grad():
        logits = model(PROMPT).logits
        monkeypatch.setenv(availability.SWITCH, "off")
        monkeypatch.setattr(ops, "_chosen", {})
        wide = model.float()
        assert {what for what, _ in ops.operators_for(wide.device, torch.float32, 32, False).choices.values()} == {
            "reference"
        }
        expected = wide(PROMPT).logits
        error = float((logits.float() - expected).norm() / expected.norm())
        assert error < {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
        if dtype == torch.float32:
            assert greedy.tolist() == wide.generate(PROMPT, do_sample=False, max_new_tokens=8).tolist()
    after = model.to(dtype).state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], value) for name, value in before.items())


def test_bad_requests_leave_the_model_unchanged(tiny_dir):
    model = load(tiny_dir)
    before = copy.deepcopy(model.state_dict())
    for settings, message in (
        ({"bits": 3}, "asked for with 3 bits, but only 8 and 4 exist"),
        ({"bits": 4, "group_size": 48}, "group_size=48, but it must be even and divide both 128"),
        ({"bits": 4, "group_size": 0}, "group_size=0"),
        ({"bits": 8, "head_bits": 4}, "head_bits=4, but the head takes 8 bits"),
    ):
        with pytest.raises(ValueError, match=message):
            model.quantize(**settings)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.quantize(8)
    with pytest.raises(ValueError, match="quantised to 8 bits already"):
        model.quantize(4)


@pytest.mark.parametrize("name", ["weight", "weight_scale"])
def test_checkpoint_with_a_wrong_shape(golden_dir, tmp_path, name):
    source = golden_dir / "ckpt" / "tiny-int4"
    state = load_file(source / "model.safetensors")
    key = f"transformer.layers.1.mlp.dense_4h_to_h.{name}"
    state[key] = state[key][..., :-2].contiguous()
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises(ValueError, match="other shapes than its config.json says"):
        load(tmp_path)


def test_quantised_generation_and_chat(golden_dir, tiny_tokenizer):
    model = load(golden_dir / "ckpt" / "tiny-int8").float()
    greedy = model.generate(PROMPT, do_sample=False, max_new_tokens=8)
    ids = PROMPT
    for _ in range(8):
        with torch.no_grad():
            ids = torch.cat((ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert greedy.tolist() == ids.tolist()
    response, _ = model.chat(tiny_tokenizer, "你好", do_sample=False, max_new_tokens=8)
    assert response


@pytest.mark.parametrize("source", ["tiny", "tiny-sharded"])
@pytest.mark.parametrize("settings", [{"bits": 8}, {"bits": 4, "group_size": 32, "head_bits": 8}])
def test_quantising_while_loading_equals_quantising_after(golden_dir, tiny_dir, source, settings):
    directory = golden_dir / "ckpt" / source
    names = {"bits": "quantization_bit", "group_size": "quantization_group_size", "head_bits": "quantization_head_bits"}
    model = load(directory, **{names[name]: value for name, value in settings.items()})
    expected = load(tiny_dir).quantize(**settings)
    for (name, a), (other, b) in zip(model.state_dict().items(), expected.state_dict().items(), strict=True):
        assert name == other and a.dtype == b.dtype and torch.equal(a, b), name
    assert not model.training
    auto = AutoModel.from_pretrained(
        directory, trust_remote_code=True, **{names[name]: value for name, value in settings.items()}
    )
    assert all(torch.equal(a, b) for a, b in zip(auto.state_dict().values(), model.state_dict().values(), strict=True))
    ids = model.float().generate(PROMPT, do_sample=False, max_new_tokens=4)
    assert ids.tolist() == expected.float().generate(PROMPT, do_sample=False, max_new_tokens=4).tolist()


def test_quantising_while_loading_refuses_what_it_cannot_do(golden_dir, tiny_dir, tmp_path):
    with pytest.raises(ValueError, match="holds 4-bit weights, which cannot be turned into 8-bit"):
        load(golden_dir / "ckpt" / "tiny-int4", quantization_bit=8)
    with pytest.raises(ValueError, match="can fill one device only"):
        load(tiny_dir, quantization_bit=8, device_map={"transformer": "cpu", "lm_head": "cpu"})
    with pytest.raises(ValueError, match="5 bits, but only 8 and 4 exist|only 0, 4 and 8 exist"):
        load(tiny_dir, quantization_bit=5)
    tensors = load_file(tiny_dir / "model.safetensors")
    del tensors["transformer.layers.2.mlp.dense_4h_to_h.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((tiny_dir / "config.json").read_bytes())
    with pytest.raises(ValueError, match="lack transformer.layers.2.mlp.dense_4h_to_h.weight"):
        load(tmp_path, quantization_bit=8)
