"""The memory that a quantised model leaves free on a GPU."""

import gc

import pytest
import torch

from faster_chatglm_6b.configuration_chatglm import ChatGLMConfig
from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
# Two layers as wide as ChatGLM-6B's, so that every weight has its real size, and a small vocabulary.
SETTINGS = {
    "num_layers": 2,
    "vocab_size": 6000,
    "bos_token_id": 5004,
    "eos_token_id": 5005,
    "mask_token_id": 5000,
    "gmask_token_id": 5001,
    "pad_token_id": 3,
}
# PyTorch takes memory from the driver in pieces of up to 20 MiB.
SLACK = 60 << 20


@pytest.mark.parametrize("bits", [8, 4])
def test_the_float_weights_go_back_to_the_driver(bits):
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    model = ChatGLMForConditionalGeneration(ChatGLMConfig(**SETTINGS)).half().cuda()
    held = torch.cuda.memory_reserved() - before
    model.quantize(bits)
    left = torch.cuda.memory_reserved() - before
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    print(f"{held / 1e6:.0f} MB in float16, {left / 1e6:.0f} MB in int{bits}, of them {weights / 1e6:.0f} MB weights")
    assert left <= weights + SLACK
