"""Loading opens each JSON file once (the Auto classes open ``config.json`` twice) and uses what was checked."""

import builtins
import json
import os
import sys
from collections import Counter

import pytest
from transformers import AutoModel

from faster_chatglm_6b.checkpoint import loading
from faster_chatglm_6b.disk.json_files import each_read_once, read_json
from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sharded(tiny_dir, tmp_path_factory):
    """Return the tiny checkpoint in several files, with an index."""
    folder = tmp_path_factory.mktemp("sharded")
    ChatGLMForConditionalGeneration.from_pretrained(tiny_dir).save_pretrained(folder, max_shard_size="100KB")
    assert (folder / INDEX).is_file()
    return folder


@pytest.fixture
def opened(monkeypatch):
    """Count how often this package opens each file, by name."""
    counts, real = Counter(), builtins.open

    def counting(file, *arguments, **settings):
        if sys._getframe(1).f_globals.get("__name__", "").startswith("faster_chatglm_6b."):
            counts[os.path.basename(file)] += 1
        return real(file, *arguments, **settings)

    monkeypatch.setattr(builtins, "open", counting)
    return counts


@pytest.mark.parametrize(
    "settings", [{}, {"quantization_bit": 8}, {"quantization_bit": 4, "quantization_head_bits": 8}], ids=str
)
def test_each_json_file_is_opened_once(sharded, opened, settings):
    ChatGLMForConditionalGeneration.from_pretrained(sharded, **settings)
    assert opened == {"config.json": 1, INDEX: 1, "generation_config.json": 1}


@pytest.mark.parametrize("settings", [{}, {"quantization_bit": 8}], ids=str)
def test_the_auto_classes_read_the_configuration_once_more(sharded, opened, settings):
    """AutoConfig reads the configuration before we do, and the model is loaded with what it found."""
    AutoModel.from_pretrained(sharded, trust_remote_code=True, **settings)
    assert opened == {"config.json": 2, INDEX: 1, "generation_config.json": 1}


@pytest.mark.parametrize("settings", [{}, {"quantization_bit": 8}], ids=str)
def test_a_config_that_changes_after_the_check_is_not_read(checkpoint, monkeypatch, settings):
    """The model is the one that was checked, not the one that ``config.json`` describes by then."""
    check = loading.check_checkpoint
    path = checkpoint / "config.json"
    layers = json.loads(path.read_text("utf-8"))["num_layers"]

    def then_changed(*arguments):
        checked = check(*arguments)
        path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "num_layers": layers + 1}), "utf-8")
        return checked

    monkeypatch.setattr(loading, "check_checkpoint", then_changed)
    model = ChatGLMForConditionalGeneration.from_pretrained(checkpoint, **settings)
    assert model.config.num_layers == len(model.transformer.layers) == layers


def test_nothing_is_kept_after_loading(tmp_path):
    path = tmp_path / "settings.json"
    path.write_text('{"a": [1]}', "utf-8")
    with each_read_once():
        read_json(path)["a"].append(2)
        path.write_text('{"a": [3]}', "utf-8")
        with each_read_once():
            assert read_json(path) == {"a": [1]}
        assert read_json(str(path)) == {"a": [1]}
    assert read_json(path) == {"a": [3]}
