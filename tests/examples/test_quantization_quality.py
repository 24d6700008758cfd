"""int8 keeps the answers of the tiny trained checkpoint, and the quality script tells int8 and int4 apart."""

import runpy
from pathlib import Path

import pytest
from transformers import AutoModel, AutoTokenizer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TINY = str(EXAMPLES / "tiny_chatglm")
QUERIES = ("你好", "用英文再说一遍", "How do I install it?", "And in int4?", "Thank you")


def conversation(**settings) -> list[tuple[str, str]]:
    tokenizer = AutoTokenizer.from_pretrained(TINY, trust_remote_code=True)
    model = AutoModel.from_pretrained(TINY, trust_remote_code=True)
    model = (model.quantize(**settings) if settings else model).float()
    history: list[tuple[str, str]] = []
    for query in QUERIES:
        _, history = model.chat(tokenizer, query, history=history, do_sample=False)
    return history


@pytest.mark.parametrize("settings", [{"bits": 8}, {"bits": 8, "head_bits": 8}], ids=str)
def test_the_demos_answers_survive_int8(settings):
    assert conversation(**settings) == conversation()


def test_the_quality_script_tells_variants_apart(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    rows = {name: values for name, *values in runpy.run_path(str(EXAMPLES / "quantization_quality.py"))["measure"](40)}
    perplexity, changed = rows["float"]
    assert 1 < perplexity < 1.5 and changed == 0
    assert rows["int8"][0] == pytest.approx(perplexity, rel=1e-3) and rows["int8"][1] == 0
    assert rows["int4"][0] != perplexity and rows["int4"][0] == pytest.approx(perplexity, rel=0.05)
