"""With ``quantization_bit``, other arguments of ``from_pretrained`` are honoured or refused before any reading."""

import pytest
import torch
from transformers import AutoModel

from faster_chatglm_6b.configuration_chatglm import ChatGLMConfig
from faster_chatglm_6b.layers.quantized import QuantizedLinear
from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration

LOADERS = (ChatGLMForConditionalGeneration, AutoModel)
ONE_LINEAR = "transformer.layers.0.mlp.dense_4h_to_h"


@pytest.fixture(params=LOADERS, ids=lambda loader: loader.__name__)
def load(request):
    return lambda folder, **kwargs: request.param.from_pretrained(folder, trust_remote_code=True, **kwargs)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("asked", ["float32", "bfloat16", torch.bfloat16, "auto"], ids=str)
def test_dtype(load, tiny_dir, name, asked):
    model = load(tiny_dir, quantization_bit=8, **{name: asked})
    expected = torch.float16 if asked == "auto" else getattr(torch, str(asked).split(".")[-1])
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.int8, expected}
    assert isinstance(model.get_submodule(ONE_LINEAR), QuantizedLinear)


@pytest.mark.parametrize("asked", ["float31", "int8", torch.int32])
def test_dtype_that_is_none(tiny_dir, asked):
    with pytest.raises(ValueError, match="dtype=.* but a model has one of float16, bfloat16, float32, float64"):
        ChatGLMForConditionalGeneration.from_pretrained(tiny_dir, quantization_bit=8, dtype=asked)


@pytest.mark.parametrize("settings", [{"quantization_group_size": 32}, {"quantization_head_bits": 8}], ids=str)
def test_companions_without_bits(load, tiny_dir, settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))}=.* without quantization_bit"):
        load(tiny_dir, **settings)


def test_companions_of_a_quantised_checkpoint(load, golden_dir, tiny_dir, tmp_path):
    with pytest.raises(ValueError, match="holds 4-bit weights with quantization_group_size=None, which cannot be"):
        load(golden_dir / "ckpt" / "tiny-int4", quantization_bit=4, quantization_group_size=32)
    ChatGLMForConditionalGeneration.from_pretrained(tiny_dir).quantize(4, 32).save_pretrained(tmp_path)
    for settings in ({}, {"quantization_bit": 4}, {"quantization_group_size": 32}):
        model = load(tmp_path, **settings)
        assert model.get_submodule(ONE_LINEAR).group_size == 32 and model.config.quantization_bit == 4


@pytest.mark.parametrize("empty_init", [True, False])
@pytest.mark.parametrize("bits", [0, 4, 8])
def test_stocks_empty_init(load, tiny_dir, bits, empty_init):
    model = load(tiny_dir, quantization_bit=bits, empty_init=empty_init)
    expected = ChatGLMForConditionalGeneration.from_pretrained(tiny_dir).quantize(bits)
    assert all(torch.equal(one, model.state_dict()[name]) for name, one in expected.state_dict().items())


def test_a_prefix_and_quantisation_at_once(load, tiny_dir):
    """The official P-Tuning script asks for both in one call."""
    model = load(tiny_dir, quantization_bit=4, pre_seq_len=4)
    assert model.transformer.prefix_encoder.embedding.weight.shape[0] == 4
    assert isinstance(model.get_submodule(ONE_LINEAR), QuantizedLinear)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"transformer.prefix_encoder.embedding.weight"}


def test_settings_beside_a_config(tiny_dir):
    config = ChatGLMConfig.from_pretrained(tiny_dir)
    model = ChatGLMForConditionalGeneration.from_pretrained(tiny_dir, config=config, quantization_bit=8)
    assert isinstance(model.get_submodule(ONE_LINEAR), QuantizedLinear) and model.config.quantization_bit == 8
    assert config.quantization_bit == 0


def test_what_does_not_go_together(tiny_dir):
    with pytest.raises(ValueError, match="quantise while loading and for gguf, which do not go together"):
        ChatGLMForConditionalGeneration.from_pretrained(tiny_dir, quantization_bit=8, gguf="x")
