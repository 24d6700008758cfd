"""The JSON files alone tell which checkpoints are ours."""

import pytest
import remote_code

from faster_chatglm_6b import recognition

CHATGLM_6B = {
    **{key: value for key, value in remote_code.OLD_VOCABULARY_CONFIG.items()},
    "vocab_size": 130528,
    "gmask_token_id": 130001,
    "auto_map": remote_code.auto_map(),
}


@pytest.mark.parametrize(
    ("config", "is_served", "reason"),
    [
        (CHATGLM_6B, True, ""),
        ({**CHATGLM_6B, "quantization_bit": 4}, True, ""),
        ({**CHATGLM_6B, "pre_seq_len": 128, "vocab_size": 704}, True, ""),
        ({"model_type": "chatglm", "vocab_size": 130528}, True, ""),
        ({key: value for key, value in CHATGLM_6B.items() if key != "model_type"}, True, ""),
        ({**CHATGLM_6B, "auto_map": remote_code.auto_map("THUDM/chatglm-6b")}, True, ""),
        ({**CHATGLM_6B, "model_type": "llama"}, False, ""),
        ({}, False, ""),
        ({"hidden_size": 4096}, False, ""),
        (remote_code.CHATGLM2_CONFIG, False, "as ChatGLM2, ChatGLM3 and GLM-4 do"),
        ({**CHATGLM_6B, "eva_config": {}}, False, "config.json has eva_config, as VisualGLM does"),
        (remote_code.OLD_VOCABULARY_CONFIG, True, ""),
        ({**remote_code.OLD_VOCABULARY_CONFIG, "gmask_token_id": 150001}, True, ""),
        ({**remote_code.OLD_VOCABULARY_CONFIG, "vocab_size": 150536}, True, ""),
        ({"model_type": "chatglm", "vocab_size": 150528}, True, ""),
        ({"model_type": "chatglm", "hidden_size": 4096}, False, "has none of inner_hidden_size"),
        (
            {**CHATGLM_6B, "auto_map": {"AutoModel": "modeling_x.ChatGLMWithImage"}},
            False,
            "its auto_map asks for ChatGLMWithImage",
        ),
    ],
)
def test_recognition_by_config(config, is_served, reason):
    verdict = recognition.judge_config(config)
    assert verdict.is_served is is_served
    assert reason in verdict.reason
    assert bool(reason) == bool(verdict.reason)


@pytest.mark.parametrize(
    ("config", "is_served", "reason"),
    [
        ({"tokenizer_class": "ChatGLMTokenizer", "num_image_tokens": 0}, True, ""),
        ({"tokenizer_class": "ChatGLMTokenizer", "end_token": "</s>", "gmask_token": "[gMASK]"}, True, ""),
        ({"tokenizer_class": "ChatGLMTokenizer", "num_image_tokens": 20000}, True, ""),
        ({"tokenizer_class": "ChatGLMTokenizer", "eop_token": "<eop>", "gmask_token": "[gMASK]"}, True, ""),
        (remote_code.CHATGLM2_TOKENIZER_CONFIG, False, "as ChatGLM2"),
        ({"tokenizer_class": "LlamaTokenizer", "num_image_tokens": 0}, False, ""),
        ({}, False, ""),
    ],
)
def test_recognition_by_tokenizer_config(config, is_served, reason):
    verdict = recognition.judge_tokenizer_config(config)
    assert verdict.is_served is is_served
    assert reason in verdict.reason
    assert bool(reason) == bool(verdict.reason)
