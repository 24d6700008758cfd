"""Each wrong input ends in one clear sentence before any work."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from faster_chatglm_6b.configuration_chatglm import ChatGLMConfig
from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration
from faster_chatglm_6b.tokenization_chatglm import ChatGLMTokenizer


@pytest.mark.parametrize("query", ["", "  \n", None, ["你好"]])
def test_empty_query(tiny_model, tiny_tokenizer, query):
    for call in (tiny_model.chat, tiny_model.stream_chat):
        with pytest.raises(ValueError, match="needs a text that is not empty"):
            call(tiny_tokenizer, query)


def test_prompt_longer_than_the_model_was_trained_for(tiny_model, tiny_tokenizer):
    with pytest.raises(ValueError, match=r"trained for at most 2048; shorten"):
        tiny_model.chat(tiny_tokenizer, "你好 " * 1500, max_length=8000)


def test_prompt_longer_than_max_length(tiny_model):
    with pytest.raises(ValueError, match="The prompt has 4 tokens and max_length is 4, which leaves no room"):
        tiny_model.generate(torch.tensor([[5, 143, 321, 324]]), max_length=4)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[10, 11, 324]], r"neither \[gMASK\] \(321\) nor \[MASK\] \(320\)"),
        ([[10, 11, 321]], r"no <sop> \(324\)"),
        ([[10, 704, 321, 324]], "the id 704, but this model's vocabulary goes from 0 to 703"),
        ([[-1, 10, 321, 324]], "the id -1"),
        ([[]], "length"),
    ],
)
def test_ids_that_are_no_prompt(tiny_model, ids, message):
    ids = torch.tensor(ids, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        tiny_model.generate(ids, max_new_tokens=2)
    with pytest.raises(ValueError, match=message):
        tiny_model(ids)


def test_wrong_tokenizer(tiny_model, tiny_tokenizer, tiny_dir):
    with pytest.raises(ValueError, match="needs a ChatGLMTokenizer"):
        tiny_model.chat(lambda text: text, "你好")
    other = ChatGLMConfig.from_pretrained(tiny_dir, gmask_token_id=319, num_layers=1)
    with pytest.raises(ValueError, match="load both from the same checkpoint"):
        ChatGLMForConditionalGeneration(other).chat(tiny_tokenizer, "你好")


def test_arguments_of_forward_that_do_not_fit(tiny_model):
    ids = torch.tensor([[5, 143, 321, 324]])
    with pytest.raises(ValueError, match="pass one of them"):
        tiny_model()
    with pytest.raises(ValueError, match="position_ids are missing"):
        tiny_model(ids[:, :1], past_key_values=tiny_model(ids, use_cache=True).past_key_values)
    with pytest.raises(ValueError, match="attention_mask has shape"):
        tiny_model(ids, attention_mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match="position_ids have shape"):
        tiny_model.generate(ids, position_ids=torch.arange(4)[None], max_new_tokens=2)
    with pytest.raises(ValueError, match="not the mask that the tokenizer makes"):
        tiny_model.generate(ids, attention_mask=torch.zeros(1, 1, 4, 4, dtype=torch.bool), max_new_tokens=2)
    for nothing in (torch.zeros(1, 4), torch.ones(1, 1, 4, 4, dtype=torch.bool)):
        with pytest.raises(ValueError, match="hides every token of a row"):
            tiny_model.generate(ids, attention_mask=nothing, max_new_tokens=2)


@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 2}])
def test_streaming_of_what_has_no_single_next_token(tiny_model, tiny_tokenizer, settings):
    with pytest.raises(ValueError, match="Streaming yields one token at a time"):
        tiny_model.stream_chat(tiny_tokenizer, "你好", do_sample=False, max_length=12, **settings)


def edit_config(checkpoint, **changes):
    path = checkpoint / "config.json"
    config = json.loads(path.read_text("utf-8"))
    for name, value in changes.items():
        if value is ...:
            del config[name]
        else:
            config[name] = value
    path.write_text(json.dumps(config), "utf-8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": ...}, "config.json lacks hidden_size"),
        ({"num_layers": ..., "vocab_size": ...}, "config.json lacks vocab_size, num_layers"),
        ({"num_attention_heads": 5}, "the heads must divide the hidden size"),
        ({"hidden_size": -128}, "hidden_size=-128, but a positive integer is needed"),
        ({"num_layers": "3"}, "num_layers='3', but a positive integer is needed"),
        ({"gmask_token_id": 704}, "gmask_token_id=704, but an id from 0 to 703"),
        ({"layernorm_epsilon": -1.0}, "layernorm_epsilon"),
        ({"quantization_bit": 3}, "only 0, 4 and 8 exist"),
        ({"inner_hidden_size": 256}, "other shapes than its config.json says"),
        ({"num_layers": 4}, "lack transformer.layers.3"),
    ],
)
def test_config_that_is_incomplete_or_contradicts_itself_or_the_weights(checkpoint, changes, message):
    edit_config(checkpoint, **changes)
    with pytest.raises(ValueError, match=message):
        ChatGLMForConditionalGeneration.from_pretrained(checkpoint)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("keep", [0, 4, 1000, -1000])
def test_truncated_safetensors(checkpoint, keep):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(OSError, match="truncated or corrupt"):
        ChatGLMForConditionalGeneration.from_pretrained(checkpoint)


@pytest.mark.parametrize("keep", [0, 4, 1000, -1000])
def test_truncated_bin_shard(golden_dir, tmp_path, keep):
    checkpoint = shutil.copytree(golden_dir / "ckpt" / "tiny-sharded", tmp_path / "checkpoint")
    path = checkpoint / "pytorch_model-00002-of-00002.bin"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(OSError, match="truncated or corrupt"):
        ChatGLMForConditionalGeneration.from_pretrained(checkpoint)


@pytest.mark.parametrize("settings", [{}, {"quantization_bit": 8}])
def test_bin_file_whose_table_of_tensors_has_changed(golden_dir, tmp_path, settings):
    """If one storage took another's name, torch would map the file and read the bytes that it finds there."""
    checkpoint = shutil.copytree(golden_dir / "ckpt" / "tiny-sharded", tmp_path / "checkpoint")
    path = checkpoint / "pytorch_model-00002-of-00002.bin"
    content = path.read_bytes()
    assert content.count(b"X\x02\x00\x00\x0010") == 1
    path.write_bytes(content.replace(b"X\x02\x00\x00\x0010", b"X\x02\x00\x00\x0012"))
    with pytest.raises(OSError, match="truncated or corrupt"):
        ChatGLMForConditionalGeneration.from_pretrained(checkpoint, **settings)


def test_bin_file_without_checksums(tiny_dir, tmp_path):
    try:
        torch.serialization.set_crc32_options(False)
    except AttributeError:
        pytest.skip("this torch always writes checksums")
    try:
        torch.save(load_file(tiny_dir / "model.safetensors"), tmp_path / "pytorch_model.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    shutil.copy(tiny_dir / "config.json", tmp_path)
    ChatGLMForConditionalGeneration.from_pretrained(tmp_path)


def test_missing_shard(golden_dir, tmp_path):
    checkpoint = shutil.copytree(golden_dir / "ckpt" / "tiny-sharded", tmp_path / "checkpoint")
    (checkpoint / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(OSError, match="pytorch_model-00002-of-00002.bin"):
        ChatGLMForConditionalGeneration.from_pretrained(checkpoint)


def test_missing_tensor(checkpoint):
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    del tensors["transformer.layers.1.mlp.dense_h_to_4h.bias"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match="lack transformer.layers.1.mlp.dense_h_to_4h.bias"):
        ChatGLMForConditionalGeneration.from_pretrained(checkpoint)


@pytest.mark.parametrize("bits", [8, 4])
def test_integers_of_a_config_without_quantisation(golden_dir, tmp_path, bits):
    """Integers need ``quantization_bit``: at 8 bits their shapes fit, and transformers would cast them."""
    checkpoint = shutil.copytree(golden_dir / "ckpt" / f"tiny-int{bits}", tmp_path / "checkpoint")
    edit_config(checkpoint, quantization_bit=...)
    with pytest.raises(ValueError, match="as torch.int8, which does not go with quantization_bit=None"):
        ChatGLMForConditionalGeneration.from_pretrained(checkpoint)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quantization_bit": 5}, "or an argument gives quantization_bit=5, but only 0, 4 and 8 exist; give one"),
        ({"quantization_bit": 4, "quantization_head_bits": 4}, "or an argument gives quantization_head_bits=4, but"),
        ({"quantization_bit": 4, "quantization_group_size": 12}, "group_size=12, but it must be even and divide both"),
    ],
)
def test_wrong_settings_of_quantisation_while_loading(checkpoint, arguments, message):
    with pytest.raises(ValueError, match=message):
        ChatGLMForConditionalGeneration.from_pretrained(checkpoint, **arguments)


def test_scales_that_are_not_finite(golden_dir, tmp_path):
    checkpoint = shutil.copytree(golden_dir / "ckpt" / "tiny-int8", tmp_path / "checkpoint")
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["transformer.layers.1.mlp.dense_4h_to_h.weight_scale"][3] = torch.nan
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="not finite in transformer.layers.1.mlp.dense_4h_to_h.weight_scale"):
        ChatGLMForConditionalGeneration.from_pretrained(checkpoint)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (..., "must hold metadata and a weight_map"),
        ({}, "must hold metadata and a weight_map"),
        ({"lm_head.weight": "../elsewhere.bin"}, "files beside it"),
        ({"lm_head.weight": 3}, "files beside it"),
        ({"no.such.tensor": "pytorch_model-00001-of-00002.bin"}, "holds no.such.tensor, but it does not"),
    ],
)
@pytest.mark.parametrize("settings", [{}, {"quantization_bit": 8}])
def test_index_that_does_not_fit_its_files(golden_dir, tmp_path, weight_map, message, settings):
    """transformers 4.57 left parameters empty if a file lacked what the index promised."""
    checkpoint = shutil.copytree(golden_dir / "ckpt" / "tiny-sharded", tmp_path / "checkpoint")
    path = checkpoint / "pytorch_model.bin.index.json"
    index = json.loads(path.read_text("utf-8"))
    if weight_map is ...:
        del index["weight_map"]
    else:
        index["weight_map"] = weight_map
    path.write_text(json.dumps(index), "utf-8")
    with pytest.raises(ValueError, match=message):
        ChatGLMForConditionalGeneration.from_pretrained(checkpoint, **settings)


@pytest.mark.parametrize("content", ["[]", "null", '{"added_tokens_decoder": 7}', '{"model_max_length": "long"}'])
def test_tokenizer_config_with_a_wrong_type(checkpoint, content):
    (checkpoint / "tokenizer_config.json").write_text(content)
    with pytest.raises(ValueError, match="from the checkpoint again"):
        ChatGLMTokenizer.from_pretrained(checkpoint)


@pytest.mark.parametrize("content", ["[]", "null", "3"])
def test_config_that_is_no_object(checkpoint, content):
    (checkpoint / "config.json").write_text(content)
    with pytest.raises(ValueError, match="is no JSON object"):
        ChatGLMForConditionalGeneration.from_pretrained(checkpoint)
