"""LoRA through PEFT over float and integer weights: generate, train, save, load, merge."""

import copy
import json
import pickle
import shutil
import warnings

import pytest
import torch

peft = pytest.importorskip("peft", reason="adapters need peft: pip install peft")

# PEFT 0.21 asks for it by name, and transformers 4.45 does not import it.
import torch.distributed.tensor  # noqa: E402, F401
from transformers import AutoModel  # noqa: E402

from faster_chatglm_6b import ops  # noqa: E402
from faster_chatglm_6b.layers import quantized  # noqa: E402
from faster_chatglm_6b.layers.quantized import QuantizedLinear  # noqa: E402
from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration  # noqa: E402

BASES = ("float", "int8", "int4", "int4 groups head")
PROMPT = torch.tensor([[20, 30, 40, 321, 324]])
EXAMPLE = {
    "input_ids": torch.tensor([[20, 30, 40, 321, 324, 50, 60, 70]]),
    "labels": torch.tensor([[-100] * 5 + [50, 60, 70]]),
}
TOLERANCE = {"rtol": 0, "atol": 1e-3}
ALL_LINEARS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]


def load(golden_dir, base):
    folder = golden_dir / "ckpt" / ("tiny" if base in ("float", "int4 groups head") else f"tiny-{base}")
    model = ChatGLMForConditionalGeneration.from_pretrained(folder)
    if "groups" in base:
        model.quantize(4, group_size=16, head_bits=8)
    return model.float().eval()


@pytest.fixture(params=BASES)
def base(request, golden_dir):
    return load(golden_dir, request.param)


def adapted(model, **options):
    """Give the model a random adapter that changes its answers."""
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 32, "target_modules": ALL_LINEARS, "init_lora_weights": False} | options
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))


def logits(model):
    with torch.no_grad():
        return model(input_ids=EXAMPLE["input_ids"]).logits


def tokens(model):
    return model.generate(input_ids=PROMPT, do_sample=False, max_new_tokens=6, eos_token_id=None).tolist()


def summed_by_hand(adapter_model):
    """Return a float copy of the model, with each adapter's product added to its weight."""
    model = copy.deepcopy(adapter_model).get_base_model()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not hasattr(child, "lora_A"):
                continue
            layer = child.get_base_layer()
            plain = layer.dequantized() if isinstance(layer, QuantizedLinear) else layer
            product = child.lora_B["default"].weight @ child.lora_A["default"].weight
            linear = torch.nn.Linear(plain.in_features, plain.out_features)
            linear.weight.data = plain.weight + child.scaling["default"] * product
            linear.bias.data = plain.bias.data
            setattr(parent, name, linear)
    return model


def test_unmerged_and_disabled(base, tiny_tokenizer):
    before, before_tokens = logits(base), tokens(base)
    model = adapted(base)
    expected = summed_by_hand(model)
    assert (logits(expected) - before).abs().max() > 1
    torch.testing.assert_close(logits(model), logits(expected), **TOLERANCE)
    assert tokens(model) == tokens(expected) != before_tokens
    settings = {"do_sample": False, "max_new_tokens": 5}
    response, _ = model.chat(tiny_tokenizer, "你好", **settings)
    assert response == expected.chat(tiny_tokenizer, "你好", **settings)[0]
    assert list(model.stream_chat(tiny_tokenizer, "你好", **settings))[-1][0] == response
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), before, **TOLERANCE)


@pytest.mark.parametrize("base", ["int8", "int4"], indirect=True)
def test_layers_under_an_adapter_use_the_models_operators(base, monkeypatch):
    """In inference alone: autograd cannot pass a kernel."""
    model, called = adapted(base), []
    logits(model)
    operator = ops.operators_chosen_for

    def spy(x):
        called.append(operator(x))
        return called[-1]

    monkeypatch.setattr(quantized, "operators_chosen_for", spy)
    logits(model)
    # Four linear layers in each layer; an adapter's wrapper calls its layer with x alone.
    assert len(called) == 4 * base.config.num_layers
    assert set(map(id, called)) == {
        id(ops.operators_for(torch.device("cpu"), torch.float32, base.config.head_size, False))
    }
    called.clear()
    model(**EXAMPLE)
    assert called and set(called) == {None}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training(base, checkpointing):
    """With PEFT's default targets for ChatGLM, a step moves only the adapter and lowers the loss."""
    model = adapted(base, target_modules=None, init_lora_weights=True)
    frozen = {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}
    assert frozen and all("lora_" not in name for name in frozen)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(**EXAMPLE).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]
    for name, value in model.named_parameters():
        assert name not in frozen or torch.equal(value, frozen[name]), name


def test_save_and_load(base, golden_dir, request, tmp_path):
    model = adapted(base)
    expected, expected_tokens = logits(model), tokens(model)
    model.save_pretrained(tmp_path)
    name = request.node.callspec.params["base"]
    again = peft.PeftModel.from_pretrained(load(golden_dir, name), tmp_path)
    assert torch.equal(logits(again), expected) and tokens(again) == expected_tokens
    through_transformers = load(golden_dir, name)
    through_transformers.load_adapter(str(tmp_path))
    assert torch.equal(logits(through_transformers), expected)


@pytest.mark.parametrize("settings", [{}, {"quantization_bit": 8}])
@pytest.mark.parametrize("by_auto_class", [False, True])
def test_an_adapter_directory_and_its_base_quantised_or_not(golden_dir, tmp_path, by_auto_class, settings):
    """Either class loads the adapter, also if its base is quantised while it is read."""
    adapted(load(golden_dir, "float")).save_pretrained(tmp_path)
    kwargs = {"torch_dtype": torch.float32, **settings}
    expected = ChatGLMForConditionalGeneration.from_pretrained(golden_dir / "ckpt" / "tiny", **kwargs).eval()
    expected.load_adapter(str(tmp_path))
    if by_auto_class:
        model = AutoModel.from_pretrained(tmp_path, trust_remote_code=True, **kwargs).eval()
    else:
        model = ChatGLMForConditionalGeneration.from_pretrained(tmp_path, **kwargs).eval()
    assert any("lora_A" in name for name in model.state_dict())
    assert torch.equal(logits(model), logits(expected))


def test_an_adapter_beside_a_model_leads_to_no_other_directory(golden_dir, tmp_path):
    base = shutil.copytree(golden_dir / "ckpt" / "tiny", tmp_path / "base")
    (base / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(golden_dir / "ckpt" / "tiny")})
    )
    # transformers 4 would read the named directory; 5 stays here, and PEFT refuses an adapter without a kind.
    with pytest.raises(ValueError, match="was not checked|does not support None"):
        ChatGLMForConditionalGeneration.from_pretrained(base)


def test_auto_model_of_an_adapter_directory(golden_dir, tmp_path):
    """``AutoModel`` loads the base checkpoint that adapter_config.json names, still without running its code."""
    model = adapted(load(golden_dir, "float"))
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path, trust_remote_code=True, torch_dtype=torch.float32).eval()
    assert type(again) is ChatGLMForConditionalGeneration
    torch.testing.assert_close(logits(again), logits(model), **TOLERANCE)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge(base, safe_merge, tmp_path):
    model = adapted(base)
    unmerged, by_hand = logits(model), summed_by_hand(model)
    integers = {name for name, layer in base.named_modules() if isinstance(layer, QuantizedLinear)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        merged = model.merge_and_unload(safe_merge=safe_merge)
    assert type(merged) is ChatGLMForConditionalGeneration
    assert any("-bit integers, which rounds it" in str(warning.message) for warning in caught) == bool(integers)
    if integers:
        # The float sum is quantised again: PEFT alone would fail, or would drop the adapter if it checks.
        for name, layer in merged.named_modules():
            if isinstance(layer, QuantizedLinear) and name != "lm_head":
                expected = QuantizedLinear.of(by_hand.get_submodule(name), layer.bits, layer.group_size)
                # A product that rounds in another order may cross the border between two integers.
                assert (layer.weight == expected.weight).float().mean() > 0.999, name
                torch.testing.assert_close(layer.weight_scale.float(), expected.weight_scale.float())
    else:
        torch.testing.assert_close(logits(merged), unmerged, **TOLERANCE)
    merged.save_pretrained(tmp_path)
    again = ChatGLMForConditionalGeneration.from_pretrained(tmp_path).float().eval()
    torch.testing.assert_close(logits(again), logits(merged), **TOLERANCE)
    assert tokens(again) == tokens(merged)


def test_unmerge_restores_integers_exactly(golden_dir):
    model = adapted(load(golden_dir, "int8"))
    before, unmerged = {name: value.clone() for name, value in model.state_dict().items()}, logits(model)
    with pytest.warns(UserWarning, match="8-bit integers"):
        model.merge_adapter()
    assert not torch.equal(logits(model), unmerged)
    model.unmerge_adapter()
    assert torch.equal(logits(model), unmerged)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.merge_adapter()
    with model.disable_adapter():
        logits(model)
    assert torch.equal(logits(model), unmerged)


def test_other_adapters_are_not_merged_into_integers(golden_dir):
    base = load(golden_dir, "int8")
    config = peft.IA3Config(target_modules=["query_key_value"], feedforward_modules=[], init_ia3_weights=False)
    model = peft.get_peft_model(base, config)
    before = logits(model)
    with pytest.raises(ValueError, match="A peft.tuners.ia3.layer.Linear cannot be merged into integer weights"):
        model.merge_and_unload(safe_merge=True)
    assert torch.equal(logits(model), before)


def test_dora_over_integers_is_refused(golden_dir):
    base = load(golden_dir, "int8")
    before = logits(base)
    with pytest.raises(ValueError, match="use_dora needs the norms of float weights, but this model is quantised"):
        adapted(base, use_dora=True)
    assert torch.equal(logits(base), before)
    assert type(base.transformer.layers[0].attention.dense) is QuantizedLinear


def test_an_adapted_model_can_be_pickled(golden_dir):
    model = adapted(load(golden_dir, "int8"))
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(again), logits(model))
