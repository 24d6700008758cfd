"""Damage a checkpoint or let it contradict itself, and see it refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration

PATHS = {"float": {}, "quantised while loading": {"quantization_bit": 8}}
BOTH_PATHS = pytest.mark.parametrize("settings", PATHS.values(), ids=PATHS.keys())
HEAD, EMBEDDING = "lm_head.weight", "transformer.word_embeddings.weight"
DENSE = "transformer.layers.1.attention.dense.weight"


def edit_config(checkpoint, **changes):
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


def edit_weights(checkpoint, change):
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})


def as_bin(checkpoint, **changes):
    """Turn the weights into a ``.bin`` file, with changes."""
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    torch.save(tensors | changes, checkpoint / "pytorch_model.bin")
    return checkpoint / "pytorch_model.bin"


def refused(checkpoint, message, error=ValueError, model_class=ChatGLMForConditionalGeneration, **settings):
    """Check that loading is refused in one sentence, before a model takes memory."""
    built = []
    initialise = model_class.__init__

    def noting(self, *args, **kwargs):
        built.append(torch.empty(0).device.type)
        initialise(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(error, match=message) as caught:
        patch.setattr(model_class, "__init__", noting)
        model_class.from_pretrained(checkpoint, **settings)
    assert set(built) <= {"meta"} and torch.get_default_dtype() == torch.float32
    assert str(checkpoint) in str(caught.value) and "\n" not in str(caught.value)
