"""A checkpoint whose answers do not end, so that a test has time to stop them."""

from pathlib import Path

import torch

from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration
from faster_chatglm_6b.tokenization_chatglm import ChatGLMTokenizer


def make_babbler(source: Path, folder: Path) -> Path:
    """Save ``source`` with a score of 0 for ``<eop>``, so that greedy search always finds a better token."""
    model = ChatGLMForConditionalGeneration.from_pretrained(source).float()
    with torch.no_grad():
        model.lm_head.weight[model.config.eos_token_id] = 0
    model.save_pretrained(folder)
    ChatGLMTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder
