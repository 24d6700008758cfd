"""PEFT's virtual tokens before a prompt are refused with an alternative, and the model stays as it was."""

import pytest
import torch

from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration

IDS = torch.tensor([[20, 30, 40, 50, 60, 321, 324, 70, 80]])
GREEDY = {"do_sample": False, "max_new_tokens": 3, "eos_token_id": None, "pad_token_id": 3}


@pytest.fixture(params=["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"])
def wrapped(request, tiny_dir):
    """Return PEFT's model and ours inside it."""
    peft = pytest.importorskip("peft", reason="prompt learning needs peft: pip install peft")
    model = ChatGLMForConditionalGeneration.from_pretrained(tiny_dir).float().eval()
    config = getattr(peft, request.param)(task_type="CAUSAL_LM", num_virtual_tokens=4)
    return peft.get_peft_model(model, config).eval(), model


def test_virtual_tokens_are_refused(wrapped, tiny_model):
    adapted, model = wrapped
    calls = [
        lambda: adapted.generate(input_ids=IDS, **GREEDY),
        lambda: adapted.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **GREEDY),
        lambda: adapted(input_ids=IDS),
        lambda: adapted(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"prompt learning puts virtual tokens .* P-Tuning v2 .* or LoRA"):
            call()
    assert model.generate(IDS, **GREEDY).tolist() == tiny_model.generate(IDS, **GREEDY).tolist()
