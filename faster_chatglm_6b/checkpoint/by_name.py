"""Load a checkpoint by its hub id or directory: plain Hugging Face code below one import."""

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from transformers import AutoModel, AutoTokenizer

from .. import backend, recognition, revision
from ..ops.cpu import serves_half_precision
from ..recognition import HUB_ID

# setup.py puts the copy of examples/ into the wheel; in a clone there is only that one.
TINY = (
    Path(__file__).parents[1] / "tiny_chatglm",
    Path(__file__).parents[2] / "examples" / "tiny_chatglm",
)


def tiny_checkpoint() -> Path:
    """Find the directory of the tiny trained checkpoint that comes with this package.

    Raises:
        FileNotFoundError: this installation has none.
    """
    for folder in TINY:
        if (folder / "config.json").is_file():
            return folder
    raise FileNotFoundError(f"The tiny checkpoint is not where it was installed, {TINY[0]}: install the package again.")


def device_of(name: str | None) -> torch.device:
    """Return the device that was asked for, or the best one.

    Raises:
        ValueError: this machine has no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
        return device
    except Exception as error:  # each type of device has an error of its own for a machine without it
        there = "cpu, cuda" if torch.cuda.is_available() else "cpu"
        raise ValueError(
            f"--device {name}: this machine has no such device that PyTorch can use; there is {there}."
        ) from error


def load(name: str | Path, bits: int | None, device: torch.device) -> tuple[Any, Any]:
    """Load tokenizer and model: half precision on a GPU and on a CPU that is fast in it, else float32.

    Args:
        name: hub id or directory.
        bits: 8 or 4 quantises while loading.

    Raises:
        ValueError: the checkpoint is not ChatGLM-6B, is damaged, or does not fit the bits.
        OSError: the weights cannot be had.
    """
    name = _short(name) if isinstance(name, Path) else name
    hub_logging.set_verbosity_error()  # no warning per attempt without a network: it is said once, below
    _check_that_it_is_served(name)
    source = _source(name)
    quantization = {"quantization_bit": bits} if bits else {}
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True, **source)
    model = AutoModel.from_pretrained(name, trust_remote_code=True, **source, **quantization)
    halved = device.type == "cuda" or (device.type == "cpu" and not backend.is_oneflow() and serves_half_precision())
    return tokenizer, (model.half() if halved else model.float()).to(device)


def _check_that_it_is_served(name: str) -> None:
    """Refuse what is not ChatGLM-6B: ``trust_remote_code`` would run its own code."""
    verdict = recognition.judge_checkpoint(name, _source(name))
    if verdict is None and not Path(name).is_dir():
        raise ValueError(
            f"{name} is neither on this machine nor to be had from the hub: connect to the network, pass a local "
            "directory with --model, or try the toy checkpoint with --tiny."
        )
    if verdict is None:
        raise ValueError(f"{name} is not a checkpoint of ChatGLM-6B: it holds no config.json that can be read.")
    if not verdict.is_served:
        reason = verdict.reason or "its config.json is that of another model"
        raise ValueError(f"{name} is not a checkpoint of ChatGLM-6B that is served here: {reason}.")


def _source(name: str) -> dict[str, str]:
    return {"revision": revision} if name == HUB_ID else {}


def _short(folder: Path) -> str:
    """Return the path relative to the working directory if it lies below it, as in a clone."""
    with contextlib.suppress(ValueError):
        return str(folder.relative_to(os.getcwd()))
    return str(folder)
