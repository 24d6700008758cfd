"""Shared fixtures: the golden data and the tiny model it was made with."""

import json
import os
import shutil
from pathlib import Path

import property_profiles  # noqa: F401 before the hypothesis plugin looks for the profile that was asked for
import pytest
import torch
from safetensors.torch import load_file

import faster_chatglm_6b  # noqa: F401

GOLDEN = Path(__file__).parent / "golden"
BEYOND_THE_REPO = Path(
    os.environ.get("FASTER_CHATGLM_6B_GOLDEN", Path(__file__).resolve().parents[2] / "shared" / "golden")
)

# One thread: the models are tiny, and float sums stay the same from run to run.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Return the folder of the reference data that the stock code made."""
    return GOLDEN


@pytest.fixture(scope="session")
def golden_tensors():
    """Return a function that reads ``golden/<model>/<name>.safetensors``."""
    return lambda name, model="tiny", root=GOLDEN: load_file(root / "golden" / model / f"{name}.safetensors")


@pytest.fixture(scope="session")
def golden_json():
    """Return a function that reads ``golden/<model>/<name>.json``."""
    return lambda name, model="tiny": json.loads((GOLDEN / "golden" / model / f"{name}.json").read_text("utf-8"))


@pytest.fixture(scope="session")
def large_golden_dir() -> Path:
    """Return the folder of the golden data that is too large for the repository."""
    if not (BEYOND_THE_REPO / "ckpt" / "tiny_hd128").is_dir():
        pytest.skip(
            f"no golden data with heads of 128 in {BEYOND_THE_REPO}; set FASTER_CHATGLM_6B_GOLDEN to the directory "
            "that holds ckpt/tiny_hd128 and golden/tiny_hd128"
        )
    return BEYOND_THE_REPO


@pytest.fixture(scope="session")
def tiny_dir(golden_dir) -> Path:
    """Return the folder of the tiny random checkpoint."""
    return golden_dir / "ckpt" / "tiny"


@pytest.fixture
def checkpoint(tiny_dir, tmp_path) -> Path:
    """Copy the tiny checkpoint, to tamper with or to save over."""
    return shutil.copytree(tiny_dir, tmp_path / "checkpoint")


@pytest.fixture(scope="session")
def tiny_model(tiny_dir):
    """Load the tiny checkpoint in float32; tests must not change it."""
    from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration

    return ChatGLMForConditionalGeneration.from_pretrained(tiny_dir).float().eval()


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_dir):
    """Load the tiny checkpoint's tokenizer."""
    from faster_chatglm_6b.tokenization_chatglm import ChatGLMTokenizer

    return ChatGLMTokenizer.from_pretrained(tiny_dir)


@pytest.fixture(scope="module", params=["tiny", "real"])
def stock(request):
    """Return our tokenizer and the stock answers, with the tiny and with THUDM's ``ice_text.model``."""
    from tokenizer_data import load_golden, load_tokenizer

    return load_tokenizer(request.param), load_golden(request.param)


@pytest.fixture
def tiny():
    """Load the tiny checkpoint's tokenizer for a test that changes it."""
    from tokenizer_data import load_tokenizer

    return load_tokenizer("tiny")


@pytest.fixture(scope="session")
def load_tuned(golden_dir, tiny_dir):
    """Return a function that builds the tiny model with a P-Tuning prefix, as the trainer's users do.

    It loads the base weights, then the prefix from its own file. Its argument is 1 for a projected prefix, otherwise 0.
    """
    from faster_chatglm_6b.configuration_chatglm import ChatGLMConfig
    from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration

    def load(projection):
        folder = golden_dir / "ckpt" / f"tiny-ptuning-proj{projection}"
        config = ChatGLMConfig.from_pretrained(folder)
        model = ChatGLMForConditionalGeneration.from_pretrained(tiny_dir, config=config).float().eval()
        begin = "transformer.prefix_encoder."
        state = {name.removeprefix(begin): value for name, value in load_file(folder / "model.safetensors").items()}
        model.transformer.prefix_encoder.load_state_dict(state)
        return model

    return load
