"""Shared data of the tokenizer tests: both vocabularies and the stock tokenizer's answers."""

import json
import os
from pathlib import Path

import pytest

from faster_chatglm_6b.tokenization_chatglm import ChatGLMTokenizer

TESTS = Path(__file__).parent
GOLDEN = TESTS / "golden"
TINY = GOLDEN / "ckpt" / "tiny"
REAL_VARIABLE = "FASTER_CHATGLM_6B_TOKENIZER_REAL"
TEXTS = ["你好", "晚上睡不着应该怎么办", "hello world this is a test"]


def real_tokenizer_folder() -> Path:
    """Return the folder with THUDM's ice_text.model, which this repository lacks; skip the test without one."""
    given = os.environ.get(REAL_VARIABLE)
    folder = Path(given) if given else TESTS.parents[1] / "shared" / "golden" / "tokenizer_real"
    if not (folder / "ice_text.model").is_file():
        pytest.skip(
            f"no ice_text.model of THUDM/chatglm-6b in {folder}: set {REAL_VARIABLE} to a folder that has it "
            "(2706249 bytes) and tokenizer_config.json"
        )
    return folder


def load_tokenizer(which: str) -> ChatGLMTokenizer:
    """Load our tokenizer with the "tiny" or the "real" vocabulary."""
    return ChatGLMTokenizer.from_pretrained(TINY if which == "tiny" else real_tokenizer_folder())


def load_golden(which: str) -> dict:
    """Read the stock tokenizer's answers, made on transformers 4.27.1."""
    return json.loads((GOLDEN / "golden" / f"tokenizer_{which}.json").read_text(encoding="utf-8"))


def text_of(case: dict) -> str:
    """Return the text of a golden case; a very long one is stored as [unit, count]."""
    if case.get("text_repeat"):
        unit, count = case["text_repeat"]
        return unit * count
    return case["text"]
