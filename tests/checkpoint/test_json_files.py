"""JSON files that are damaged or too large, and settings without effect, end in one sentence that names the file."""

import json
import shutil

import pytest
import torch

from faster_chatglm_6b.configuration_chatglm import ChatGLMConfig
from faster_chatglm_6b.disk import json_files as checkpoint_json
from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration

DEPTH = 200_000
DAMAGES = {
    "empty": (lambda content: b"", "is empty"),
    "blank": (lambda content: b" \n ", "is empty"),
    "cut": (lambda content: content[: len(content) // 2], "is not a valid JSON file"),
    "byte order mark": (lambda content: b"\xef\xbb\xbf" + content, "begins with a byte order mark"),
    "UTF-16": (lambda content: content.decode().encode("utf-16"), "is not a valid JSON file"),
    "not UTF-8": (lambda content: content[:-2] + b', "a": "\xff"}', "is not a valid JSON file"),
    "deep": (lambda content: b'{"a": ' * DEPTH + b"1" + b"}" * DEPTH, "is nested too deeply|is not a valid JSON file"),
    "a key twice": (lambda content: b'{"num_layers": 1, "num_layers": 2}', "gives 'num_layers' twice"),
    "a key twice inside": (lambda content: b'{"a": [{"b": 1, "b": 1}]}', "gives 'b' twice"),
    "a number of 5000 digits": (lambda content: b'{"a": ' + b"9" * 5000 + b"}", "is not a valid JSON file"),
    "text after it": (lambda content: content + b"x", "is not a valid JSON file"),
}
FILES = ("config.json", "generation_config.json", "pytorch_model.bin.index.json")


@pytest.fixture
def checkpoint(golden_dir, tmp_path):
    """Return a copy of the tiny checkpoint in shards, with every JSON file that a model is loaded with."""
    checkpoint = shutil.copytree(golden_dir / "ckpt" / "tiny-sharded", tmp_path / "checkpoint")
    (checkpoint / "generation_config.json").write_text(json.dumps({"top_p": 0.7}))
    return checkpoint


@pytest.mark.parametrize("settings", [{}, {"quantization_bit": 8}], ids=["float", "quantised while loading"])
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_json_is_named(checkpoint, file, damage, settings):
    change, message = DAMAGES[damage]
    path = checkpoint / file
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises((OSError, ValueError), match=message) as caught:
        ChatGLMForConditionalGeneration.from_pretrained(checkpoint, **settings)
    assert file in str(caught.value) and str(caught.value).count("\n") == 0 and len(str(caught.value)) < 500


@pytest.mark.parametrize("file", FILES)
def test_large_json_is_not_read(checkpoint, file):
    """The file is sparse: it has no content, but reading it would take all memory."""
    with open(checkpoint / file, "r+b") as opened:
        opened.truncate(64 << 30)
    with pytest.raises(OSError, match=rf"{file} has 68719476736 bytes, but more than {checkpoint_json.MOST_BYTES} are"):
        ChatGLMForConditionalGeneration.from_pretrained(checkpoint)


@pytest.mark.parametrize("content", ["[]", "null", "3", '"text"'])
def test_a_generation_config_that_is_no_object(checkpoint, content):
    """transformers would skip such a file or fail with an error of its own."""
    (checkpoint / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"generation_config\.json is no JSON object with settings"):
        ChatGLMForConditionalGeneration.from_pretrained(checkpoint)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", '{"__float__": "NaN"}'])
def test_numbers_that_are_none(checkpoint, value):
    path = checkpoint / "config.json"
    path.write_text(path.read_text("utf-8").replace('"use_cache"', f'"my_rate": {value}, "use_cache"'))
    tagged_and_kept = "__float__" in value and not hasattr(ChatGLMConfig, "_decode_special_floats")
    if tagged_and_kept:
        pytest.skip("this transformers writes no such tags, and reads them as an object")
    with pytest.raises(ValueError, match="config.json gives my_rate=-?(nan|inf), but a finite number is needed"):
        ChatGLMForConditionalGeneration.from_pretrained(checkpoint)


# The settings below would have no effect, so they are refused.

COMPANIONS = [{"quantization_group_size": 32}, {"quantization_head_bits": 8}, {"quantization_embeddings": True}]


@pytest.mark.parametrize("settings", COMPANIONS, ids=lambda settings: next(iter(settings)))
def test_companions_of_quantisation_without_bits(checkpoint, settings):
    message = f"{next(iter(settings))}=.* without quantization_bit"
    with pytest.raises(ValueError, match=message):
        ChatGLMForConditionalGeneration.from_pretrained(checkpoint, **settings)
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **settings}))
    with pytest.raises(ValueError, match=message):
        ChatGLMForConditionalGeneration.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match=message):
        ChatGLMConfig(**json.loads(path.read_text("utf-8")))


@pytest.mark.parametrize("bits", [0, None])
def test_bits_of_nothing_for_a_quantised_checkpoint(golden_dir, bits):
    """The files hold integers, whatever the caller asks for."""
    with pytest.raises(ValueError, match="as torch.int8, which does not go with quantization_bit=None"):
        ChatGLMForConditionalGeneration.from_pretrained(golden_dir / "ckpt" / "tiny-int8", quantization_bit=bits)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "torch.float32", torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"quantization_bit": 8}], ids=["float", "quantised while loading"])
def test_a_dtype_in_words_is_honoured(checkpoint, name, dtype, settings):
    model = ChatGLMForConditionalGeneration.from_pretrained(checkpoint, **{name: dtype}, **settings)
    wanted = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype.removeprefix("torch."))
    assert {value.dtype for value in model.parameters()} - {torch.int8} == {wanted}


@pytest.mark.parametrize("dtype", ["float99", "int8", "load", "", torch.int8, torch.bool])
@pytest.mark.parametrize("settings", [{}, {"quantization_bit": 8}], ids=["float", "quantised while loading"])
def test_another_dtype_is_refused(checkpoint, dtype, settings):
    with pytest.raises(ValueError, match=r"was asked for, but a model has one of float16, bfloat16, float32, float64"):
        ChatGLMForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype, **settings)
