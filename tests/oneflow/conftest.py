"""Tests on real OneFlow without PyTorch, run by ``make test-oneflow``; everywhere else they are skipped.

They run with ``--confcutdir=tests/oneflow``, because the conftest of ``tests/`` imports PyTorch.
"""

import json
from pathlib import Path

import pytest

import faster_chatglm_6b  # noqa: F401 before torch: it lets torch mean OneFlow
from faster_chatglm_6b import backend

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "golden"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if backend.is_oneflow():
        return
    skip = pytest.mark.skip(reason="needs OneFlow in an environment of its own: make test-oneflow")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Return the folder of reference data made with the stock code; its README says how."""
    return GOLDEN


@pytest.fixture(scope="session")
def golden_tensors():
    """Read golden/tiny/<name>.safetensors as OneFlow's tensors."""
    from safetensors.torch import load_file

    return lambda name: load_file(GOLDEN / "golden" / "tiny" / f"{name}.safetensors")


@pytest.fixture(scope="session")
def golden_json():
    """Read golden/tiny/<name>.json."""
    return lambda name: json.loads((GOLDEN / "golden" / "tiny" / f"{name}.json").read_text("utf-8"))


@pytest.fixture(scope="session")
def tiny_dir() -> Path:
    """Return the tiny random checkpoint of the golden data."""
    return GOLDEN / "ckpt" / "tiny"


@pytest.fixture(scope="session")
def load():
    """Load a checkpoint through our class, in the dtype of its file."""
    from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration

    return ChatGLMForConditionalGeneration.from_pretrained


@pytest.fixture(scope="session")
def tiny_model(load, tiny_dir):
    """Return the tiny checkpoint in float32; tests must not change it."""
    return load(tiny_dir).float().eval()


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_dir):
    """Return the tiny checkpoint's tokenizer."""
    from faster_chatglm_6b.tokenization_chatglm import ChatGLMTokenizer

    return ChatGLMTokenizer.from_pretrained(tiny_dir)
