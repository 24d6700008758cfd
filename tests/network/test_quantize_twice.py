"""``quantize`` after an interrupt, on a quantised model, with stock's arguments, and over layers of other kinds."""

import copy
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from faster_chatglm_6b.layers.quantized import QuantizedLinear
from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration
from faster_chatglm_6b.network import quantization as model_quantization

IDS = torch.tensor([[5, 143, 321, 324]])


@pytest.fixture
def model(tiny_model):
    return copy.deepcopy(tiny_model)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def interrupted(model, after, error, *arguments, **settings):
    """Call ``quantize`` and let its layer ``after``, counted from 0, fail."""
    of, calls = QuantizedLinear.of, []

    def fail(*given):
        calls.append(1)
        if len(calls) > after:
            raise error
        return of(*given)

    with mock.patch.object(model_quantization.QuantizedLinear, "of", fail), pytest.raises(type(error)):
        model.quantize(*arguments, **settings)


SETTINGS = [{"bits": 8}, {"bits": 4, "group_size": 32}, {"bits": 4, "head_bits": 8}]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.cuda.OutOfMemoryError("CUDA out of memory")], ids=repr)
@pytest.mark.parametrize(
    ("settings", "after"), [*((one, after) for one in SETTINGS for after in (0, 1, 6, 11)), (SETTINGS[2], 12)], ids=str
)
def test_interrupted_and_called_again(tiny_model, model, error, settings, after):
    """A second call finishes an interrupted one with the integers of a single call; none is quantised twice."""
    expected = copy.deepcopy(tiny_model).quantize(**settings)
    before = logits(model)
    interrupted(model, after, error, **settings)
    half = logits(model)
    assert torch.isfinite(half).all() and torch.equal(half, before) == (after == 0)
    # A second interrupt leaves the half-quantised model as it is.
    interrupted(model, 0, error, **settings)
    assert torch.equal(logits(model), half)
    assert model.quantize(**settings) is model
    assert equal(model.state_dict(), expected.state_dict())
    assert model.config.to_dict() == expected.config.to_dict()
    assert torch.equal(logits(model), logits(expected))


def test_half_quantised_is_neither_saved_nor_quantised_otherwise(model, tmp_path):
    interrupted(model, 5, KeyboardInterrupt(), 4, group_size=32)
    before = copy.deepcopy(model.state_dict())
    for arguments in ((8,), (4,), (4, 64)):
        with pytest.raises(ValueError, match=r"left 5 of 12 layers as integers; call quantize\(4, group_size=32\)"):
            model.quantize(*arguments)
    with pytest.raises(ValueError, match=r"call quantize\(4, group_size=32\) to finish it"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir()) and equal(model.state_dict(), before)
    model.quantize(4, 32).save_pretrained(tmp_path)
    again = ChatGLMForConditionalGeneration.from_pretrained(tmp_path)
    assert equal(again.state_dict(), model.state_dict())


def test_half_quantised_with_a_head(model):
    interrupted(model, 0, KeyboardInterrupt(), 8, head_bits=8)
    interrupted(model, 12, KeyboardInterrupt(), 8, head_bits=8)
    model.lm_head = QuantizedLinear.of(model.lm_head, 8)
    with pytest.raises(ValueError, match=r"call quantize\(8, head_bits=8\)"):
        model.quantize(8)
    assert model.quantize(8, head_bits=8).config.quantization_head_bits == 8
    assert not model.config.tie_word_embeddings


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        ((4,), {}),
        ((), {"bits": 4, "kernel_file": "quantization_kernels.so"}),
        ((4, False), {}),
        ((4, True), {}),
        ((4,), {"empty_init": True, "use_quantization_cache": True}),
        ((0,), {}),
    ],
)
def test_stocks_calls_on_a_quantised_model(golden_dir, arguments, settings):
    """A quantised model is returned unchanged, because stock's examples quantise it again."""
    model = ChatGLMForConditionalGeneration.from_pretrained(golden_dir / "ckpt" / "tiny-int4")
    before = copy.deepcopy(model.state_dict())
    assert model.quantize(*arguments, **settings) is model
    assert equal(model.state_dict(), before) and model.config.quantization_bit == 4


@pytest.mark.parametrize("empty_init", [False, True])
def test_stocks_second_argument_is_no_group_size(model, tiny_model, empty_init):
    assert model.quantize(4, empty_init) is model
    assert model.config.quantization_group_size is None
    assert equal(model.state_dict(), copy.deepcopy(tiny_model).quantize(4).state_dict())


def test_zero_bits_leave_the_model(model):
    before = copy.deepcopy(model.state_dict())
    assert model.quantize(0) is model and model.config.quantization_bit == 0
    assert equal(model.state_dict(), before)


def test_a_quantised_model_is_not_quantised_differently(model):
    model.quantize(4, group_size=32)
    before = copy.deepcopy(model.state_dict())
    for arguments, message in (((8,), "bits=4 and not 8"), ((4, 64), "group_size=32 and not 64")):
        with pytest.raises(ValueError, match=f"quantised to 4 bits already, with {message}"):
            model.quantize(*arguments)
    with pytest.raises(ValueError, match="head_bits=None and not 8"):
        model.quantize(4, head_bits=8)
    assert model.quantize(4) is model.quantize(4, 32) is model and equal(model.state_dict(), before)


def test_an_unknown_argument_is_an_error(model):
    with pytest.raises(TypeError, match="no groupsize"):
        model.quantize(4, groupsize=32)
    assert model.config.quantization_bit == 0


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *arguments, **settings):
        return self.inner(*arguments, **settings)


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def parametrised(linear):
    parametrize.register_parametrization(linear, "weight", nn.Identity())
    return linear


def hooked(linear):
    linear.register_forward_hook(lambda module, arguments, output: 2 * output)
    return linear


def on_meta(linear):
    return linear.to("meta")


BAD = {
    "wrapped": (Wrapper, "is a .*Wrapper; put the linear layer itself there"),
    "a class of its own": (lambda linear: Scaled(linear.in_features, linear.out_features), "is a .*Scaled"),
    "parametrised": (parametrised, "is a .*ParametrizedLinear"),
    "hooked": (hooked, "has a hook or a replaced forward, which would be lost"),
    "without memory": (on_meta, "is offloaded to the CPU or the disk"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_plain_layer_is_not_thrown_away(model, case):
    """A module of another kind is refused before any layer is quantised, even if it is in the last layer."""
    put, message = BAD[case]
    mlp = model.transformer.layers[-1].mlp
    mlp.dense_4h_to_h = put(mlp.dense_4h_to_h)
    modules = list(model.modules())
    with pytest.raises(ValueError, match=f"transformer.layers.2.mlp.dense_4h_to_h {message}"):
        model.quantize(8)
    assert modules == list(model.modules()) and model.config.quantization_bit == 0
    with pytest.raises(ValueError, match="dense_4h_to_h"):
        model.quantize(4, group_size=32, head_bits=8)
    assert modules == list(model.modules()) and model.config.tie_word_embeddings


def test_a_wrapped_head_is_left_alone_or_refused(model):
    model.lm_head = Wrapper(model.lm_head)
    modules = list(model.modules())
    with pytest.raises(ValueError, match="but lm_head is a .*Wrapper"):
        model.quantize(8, head_bits=8)
    assert modules == list(model.modules())
    assert model.quantize(8).config.quantization_bit == 8 and isinstance(model.lm_head, Wrapper)


@pytest.mark.parametrize("target", ["block", "attention", "mlp", "word_embeddings", "input_layernorm"])
def test_other_wrapped_modules_are_quantised_inside(model, tiny_model, target):
    layer = model.transformer.layers[1]
    if target == "block":
        model.transformer.layers[1] = Wrapper(layer)
    elif target == "word_embeddings":
        model.transformer.word_embeddings = Wrapper(model.transformer.word_embeddings)
    else:
        setattr(layer, target, Wrapper(getattr(layer, target)))
    model.quantize(8)
    # A wrapped module's layers compute by definition, and not by the CPU's own kernel.
    torch.testing.assert_close(logits(model), logits(copy.deepcopy(tiny_model).quantize(8)), rtol=0, atol=1e-3)


def test_a_foreign_block_is_refused(model):
    model.transformer.layers[0] = nn.Identity()
    with pytest.raises(ValueError, match="looks for 12 linear layers named .* but the model has 8"):
        model.quantize(8)


def test_adapters_that_are_not_merged_are_not_lost(model):
    peft = pytest.importorskip("peft", reason="adapters need peft: pip install peft")
    import torch.distributed.tensor  # noqa: F401 PEFT asks for it by name

    torch.manual_seed(0)
    settings = {"r": 4, "target_modules": ["query_key_value"], "init_lora_weights": False}
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    before = logits(model)
    with pytest.raises(ValueError, match=r"query_key_value carries an adapter of PEFT .* call merge_and_unload\(\)"):
        model.quantize(8)
    assert torch.equal(logits(model), before) and model.config.quantization_bit == 0
    merged = adapted.merge_and_unload()
    expected = copy.deepcopy(merged)
    for layer in expected.transformer.layers:
        layer.attention.query_key_value = QuantizedLinear.of(layer.attention.query_key_value, 8)
    merged.quantize(8)
    for one, other in zip(merged.transformer.layers, expected.transformer.layers, strict=True):
        assert torch.equal(one.attention.query_key_value.weight, other.attention.query_key_value.weight)
