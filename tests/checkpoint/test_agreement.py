"""``config.json`` and the weight files must agree exactly, and only files that were checked are loaded.

Both hold for a checkpoint that is loaded unchanged and for one that is quantised while loading.
"""

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tampering import BOTH_PATHS, DENSE, EMBEDDING, HEAD, edit_config, edit_weights, refused

from faster_chatglm_6b.configuration_chatglm import ChatGLMConfig
from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration, ChatGLMModel

CONTRADICTIONS = {
    "no head": (
        {"tie_word_embeddings": False},
        lambda tensors: tensors.pop(HEAD),
        "lack lm_head.weight, which its config.json asks for",
    ),
    "fewer layers": ({"num_layers": 2}, None, r"hold transformer\.layers\.2\.\S+, which its config.json does not"),
    "more layers": ({"num_layers": 4}, None, "lack transformer.layers.3"),
    "a scale beside floats": (
        {},
        lambda tensors: tensors.update({f"{DENSE}_scale": torch.ones(128).half()}),
        "hold transformer.layers.1.attention.dense.weight_scale, which its config.json does not ask for",
    ),
    "a tensor of another model": (
        {},
        lambda tensors: tensors.update({"transformer.image_encoder.weight": torch.ones(2, 2).half()}),
        "hold transformer.image_encoder.weight, which its config.json does not ask for",
    ),
    "a prefix that config.json does not have": (
        {},
        lambda tensors: tensors.update({"transformer.prefix_encoder.embedding.weight": torch.ones(4, 768).half()}),
        "hold transformer.prefix_encoder.embedding.weight, which",
    ),
    "no bias": ({}, lambda tensors: tensors.pop(DENSE.replace("weight", "bias")), "lack transformer.layers.1.att"),
    "no embedding and no head": (
        {},
        lambda tensors: (tensors.pop(HEAD), tensors.pop(EMBEDDING)),
        "lack lm_head.weight, transformer.word_embeddings.weight",
    ),
    "another width": ({"inner_hidden_size": 256}, None, "have other shapes than its config.json says"),
    "another vocabulary": ({"vocab_size": 600}, None, "have other shapes than its config.json says"),
    "an empty tensor": ({}, lambda tensors: tensors.update({DENSE: tensors[DENSE][:0]}), "other shapes than"),
    "a flat tensor": ({}, lambda tensors: tensors.update({DENSE: tensors[DENSE].flatten()}), "other shapes than"),
    "integers": ({}, lambda tensors: tensors.update({DENSE: tensors[DENSE].to(torch.int32)}), "as torch.int32"),
    "bytes": ({}, lambda tensors: tensors.update({DENSE: tensors[DENSE].to(torch.int8)}), "as torch.int8"),
    "integers in a norm": (
        {},
        lambda tensors: tensors.update({"transformer.final_layernorm.weight": torch.ones(128, dtype=torch.int64)}),
        "final_layernorm.weight as torch.int64",
    ),
    "floats of one byte": (
        {},
        lambda tensors: tensors.update({DENSE: tensors[DENSE].to(torch.float8_e4m3fn)}),
        "dense.weight as ",
    ),
}


@BOTH_PATHS
@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_contradictions_are_refused(checkpoint, kind, settings):
    config, change, message = CONTRADICTIONS[kind]
    if config.get("vocab_size"):
        config = {**config, "gmask_token_id": 321}
    edit_config(checkpoint, **config)
    if change:
        edit_weights(checkpoint, change)
    refused(checkpoint, message, **settings)


@pytest.mark.parametrize("bits", [8, 4])
def test_contradictions_of_quantised_checkpoints_are_refused(golden_dir, tmp_path, bits):
    folder = golden_dir / "ckpt" / f"tiny-int{bits}"
    for name, config, change, message in (
        ("fewer layers", {"num_layers": 2}, None, "hold transformer.layers.2"),
        ("other bits", {"quantization_bit": 12 - bits}, None, "other shapes than its config.json says"),
        ("no scale", {}, lambda tensors: tensors.pop(f"{DENSE}_scale"), f"lack {DENSE}_scale"),
        ("floats", {}, lambda tensors: tensors.update({DENSE: tensors[DENSE].half()}), "as torch.float16, which"),
        ("a scale of integers", {}, lambda t: t.update({f"{DENSE}_scale": torch.ones(128).char()}), "as torch.int8"),
        ("groups", {"quantization_group_size": 32}, None, "other shapes than its config.json says"),
        ("a quantised head", {"quantization_head_bits": 8, "tie_word_embeddings": False}, None, "lm_head"),
        ("a quantised embedding", {"quantization_embeddings": True}, None, "lm_head.weight as torch.float16"),
    ):
        checkpoint = shutil.copytree(folder, tmp_path / name)
        edit_config(checkpoint, **config)
        if change:
            edit_weights(checkpoint, change)
        refused(checkpoint, message)


def test_what_may_be_missing_or_there_in_vain(checkpoint, tiny_model):
    """A tied head may be missing, rotary frequencies may be stored, and a model without a head loads."""
    edit_weights(checkpoint, lambda tensors: tensors.pop(HEAD))
    edit_weights(checkpoint, lambda tensors: tensors.update({"transformer.rotary_emb.inv_freq": torch.ones(16)}))
    for settings in ({}, {"quantization_bit": 8}):
        model = ChatGLMForConditionalGeneration.from_pretrained(checkpoint, **settings)
        assert model.lm_head.weight is model.transformer.word_embeddings.weight
    assert torch.equal(
        ChatGLMModel.from_pretrained(checkpoint).word_embeddings.weight.float(),
        tiny_model.transformer.word_embeddings.weight,
    )
    refused(checkpoint, "hold layers.2", model_class=ChatGLMModel, **fewer_layers(checkpoint))


def fewer_layers(checkpoint):
    edit_config(checkpoint, num_layers=2)
    return {}


def test_a_base_model_of_its_own_and_its_head(tiny_dir, tiny_model, tmp_path):
    """A base model is saved without the prefix of names that the whole model has, and loads with it."""
    ChatGLMModel.from_pretrained(tiny_dir).save_pretrained(tmp_path)
    assert "word_embeddings.weight" in load_file(tmp_path / "model.safetensors")
    model = ChatGLMForConditionalGeneration.from_pretrained(tmp_path).float()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny_model.parameters(), strict=True))
    edit_weights(tmp_path, lambda tensors: tensors.pop("layers.0.mlp.dense_h_to_4h.bias"))
    refused(tmp_path, "lack transformer.layers.0.mlp.dense_h_to_4h.bias")


def test_a_caller_may_leave_out_layers_and_a_prefix(golden_dir, tiny_dir, tmp_path):
    """A caller may ask for fewer layers or for no prefix; ``config.json`` itself may not."""
    model = ChatGLMForConditionalGeneration.from_pretrained(tiny_dir, num_layers=2)
    assert len(model.transformer.layers) == 2
    config = ChatGLMConfig.from_pretrained(tiny_dir, num_layers=1)
    assert len(ChatGLMForConditionalGeneration.from_pretrained(tiny_dir, config=config).transformer.layers) == 1
    tuned = ChatGLMForConditionalGeneration.from_pretrained(tiny_dir, pre_seq_len=4)
    tuned.save_pretrained(tmp_path)
    assert ChatGLMForConditionalGeneration.from_pretrained(tmp_path).config.pre_seq_len == 4
    assert ChatGLMForConditionalGeneration.from_pretrained(tmp_path, pre_seq_len=None).config.pre_seq_len is None
    config = ChatGLMConfig.from_pretrained(tiny_dir)
    assert not hasattr(
        ChatGLMForConditionalGeneration.from_pretrained(tmp_path, config=config).transformer, "prefix_encoder"
    )


def test_a_files_own_prefix_alone_names_what_is_missing(golden_dir):
    """The P-Tuning trainer saves no whole model: its users load the file with ``load_state_dict``."""
    refused(golden_dir / "ckpt" / "tiny-ptuning-proj0", "lack lm_head.weight, transformer.final_layernorm.bias")


def test_a_derived_model_may_say_what_it_ignores(checkpoint):
    class Derived(ChatGLMForConditionalGeneration):
        _keys_to_ignore_on_load_unexpected = [r"^value_head\."]

    edit_weights(checkpoint, lambda tensors: tensors.update({"value_head.weight": torch.ones(1, 128).half()}))
    Derived.from_pretrained(checkpoint)
    refused(checkpoint, "hold value_head.weight")


# The tests below show which files are read.


@BOTH_PATHS
@pytest.mark.parametrize("weights", ["other.safetensors", "../other.safetensors", "absolute"])
def test_a_file_that_config_json_names_is_not_read(checkpoint, settings, weights):
    """The named file holds other weights: those of ``model.safetensors`` are loaded."""
    stored = load_file(checkpoint / "model.safetensors")
    for other in (checkpoint / "other.safetensors", checkpoint.parent / "other.safetensors"):
        save_file({name: torch.zeros_like(tensor) for name, tensor in stored.items()}, other, {"format": "pt"})
    edit_config(checkpoint, transformers_weights=str(other) if weights == "absolute" else weights)
    model = ChatGLMForConditionalGeneration.from_pretrained(checkpoint, **settings)
    assert torch.equal(model.transformer.word_embeddings.weight, stored[EMBEDDING])
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        ChatGLMForConditionalGeneration.from_pretrained(checkpoint, **settings)


def test_a_file_that_a_callers_configuration_names_is_not_read_unchecked(checkpoint):
    """Only a file that was checked is loaded, whoever names it."""
    config = ChatGLMConfig.from_pretrained(checkpoint)
    config.transformers_weights = "other.safetensors"
    shutil.copy(checkpoint / "model.safetensors", checkpoint / "other.safetensors")
    message = r"would load \S+other\.safetensors, which is none of the checkpoint's usual weight files \(model\."
    try:
        model = ChatGLMForConditionalGeneration.from_pretrained(checkpoint, config=config)
    except ValueError as error:
        assert re.search(message, str(error))
    else:
        assert not hasattr(model.config, "transformers_weights"), "this transformers reads it"


@BOTH_PATHS
@pytest.mark.parametrize(
    "shard", ["../outside.safetensors", "/absolute.safetensors", "a\\b.safetensors", "c:x.safetensors", "..",
              "pytorch_model.bin", ".safetensors", "", None, 3],
)  # fmt: skip
def test_an_index_stays_beside_its_files(checkpoint, settings, shard):
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    path.rename(checkpoint.parent / "outside.safetensors")
    torch.save(tensors, checkpoint / "pytorch_model.bin")
    if shard == "/absolute.safetensors":
        shard = str(checkpoint.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, shard)}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(
        checkpoint, r"must hold metadata and a weight_map from tensors to \.safetensors files beside it", **settings
    )


@BOTH_PATHS
def test_links_as_in_the_hubs_cache(checkpoint, settings):
    blobs = checkpoint.parent / "blobs"
    blobs.mkdir()
    for number, name in enumerate(("config.json", "model.safetensors")):
        (checkpoint / name).rename(blobs / str(number))
        (checkpoint / name).symlink_to(Path("..", "blobs", str(number)))
    ChatGLMForConditionalGeneration.from_pretrained(checkpoint, **settings)
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors").symlink_to("nowhere")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        ChatGLMForConditionalGeneration.from_pretrained(checkpoint, **settings)


@BOTH_PATHS
def test_a_second_family_of_files(golden_dir, checkpoint, settings):
    """safetensors come first and must be whole; .bin files next to them are neither checked nor loaded."""
    sharded = golden_dir / "ckpt" / "tiny-sharded"
    for path in sharded.glob("pytorch_model*"):
        shutil.copy(path, checkpoint)
    (checkpoint / "pytorch_model-00001-of-00002.bin").write_bytes(b"damaged")
    ChatGLMForConditionalGeneration.from_pretrained(checkpoint, **settings)
    shutil.copy(sharded / "pytorch_model-00001-of-00002.bin", checkpoint)
    edit_weights(checkpoint, lambda tensors: tensors.update({k: v.char() for k, v in tensors.items()}))
    refused(checkpoint, "as torch.int8, which does not go with quantization_bit=None", **settings)
    ChatGLMForConditionalGeneration.from_pretrained(checkpoint, use_safetensors=False, **settings)


def test_two_files_with_the_same_tensor(golden_dir, tmp_path):
    """Two files with one tensor are refused: which one transformers takes depends on its release."""
    checkpoint = shutil.copytree(golden_dir / "ckpt" / "tiny-sharded", tmp_path / "checkpoint")
    path = checkpoint / "pytorch_model-00002-of-00002.bin"
    other = torch.load(checkpoint / "pytorch_model-00001-of-00002.bin", weights_only=True)
    name = "transformer.layers.0.attention.dense.weight"
    assert name in other
    torch.save(torch.load(path, weights_only=True) | {name: other[name] + 1}, path)
    refused(checkpoint, f"Two weight files of .* hold {name}")


def test_a_variant_is_looked_into(checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint / "model.fp16.safetensors")
    ChatGLMForConditionalGeneration.from_pretrained(checkpoint, variant="fp16")
    edit_config(checkpoint, num_layers=2)
    refused(checkpoint, "hold transformer.layers.2", variant="fp16")


def test_distributed_checkpoints_are_not_opened(checkpoint, tmp_path):
    """Distributed checkpoints are refused unopened, because their index is a pickle."""
    tripwire = tmp_path / "tripwire"

    class Tripwire:
        def __reduce__(self):
            return os.mkdir, (str(tripwire),)

    (checkpoint / "model.safetensors").unlink()
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Tripwire()))
    (checkpoint / "__0_0.distcp").write_bytes(b"")
    with pytest.raises((ValueError, OSError)):
        ChatGLMForConditionalGeneration.from_pretrained(checkpoint)
    assert not tripwire.exists()
