"""The tiny golden model on a GPU."""

from collections.abc import Callable

import pytest
import torch


@pytest.fixture(scope="session")
def load_on_gpu(tiny_dir) -> Callable[[torch.dtype], torch.nn.Module]:
    """Return a function that loads the tiny checkpoint anew, for tests that change the model or count its memory."""
    from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration

    def load(dtype):
        return ChatGLMForConditionalGeneration.from_pretrained(tiny_dir, torch_dtype=dtype).cuda().eval()

    return load


@pytest.fixture(scope="module")
def single(load_on_gpu):
    """Load the tiny checkpoint in float32."""
    return load_on_gpu(torch.float32)


@pytest.fixture(scope="module")
def half(load_on_gpu):
    """Load the tiny checkpoint in float16."""
    return load_on_gpu(torch.float16)
