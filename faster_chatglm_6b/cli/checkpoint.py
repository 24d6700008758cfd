"""Load the checkpoint that a command was asked for: plain Hugging Face code below one import."""

import argparse
import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from transformers import AutoModel, AutoTokenizer

from .. import backend, recognition, revision, status
from ..ops.cpu import serves_half_precision
from .errors import CommandError
from .options import HUB_ID

# setup.py puts the copy of examples/ into the wheel; in a clone there is only that one.
_TINY = (
    Path(__file__).parents[1] / "tiny_chatglm",
    Path(__file__).parents[2] / "examples" / "tiny_chatglm",
)
# Pieces of ice_text.model have at most 16 characters; only runs of blanks are longer.
_CHARACTERS_PER_TOKEN = 16


def tiny_checkpoint() -> Path:
    """Find the directory of the tiny trained checkpoint that comes with this package.

    Raises:
        CommandError: this installation has none.
    """
    for folder in _TINY:
        if (folder / "config.json").is_file():
            return folder
    raise CommandError(f"The tiny checkpoint is not where it was installed, {_TINY[0]}: install the package again.")


def load_asked(arguments: argparse.Namespace, default: str | None) -> tuple[Any, Any]:
    """Load the tokenizer and the model that the command line asks for.

    Args:
        arguments: what ``add_model_options`` added, and ``word`` if ``add_checkpoint_argument`` was called too.
        default: hub id or directory if the arguments name no checkpoint; None is the tiny one.

    Raises:
        CommandError: two checkpoints are named, or what ``device_of`` and ``load`` raise.
    """
    named = [name for name in (getattr(arguments, "word", None), arguments.model) if name is not None]
    if len(named) + arguments.tiny > 1:
        raise CommandError("More than one checkpoint is named: give MODEL, --model MODEL or --tiny.", code=2)
    name = named[0] if named else None if arguments.tiny else default
    device = device_of(arguments.device)
    return load(_short(tiny_checkpoint()) if name is None else name, arguments.bits, device)


def load(name: str, bits: int | None = None, device: torch.device | None = None) -> tuple[Any, Any]:
    """Load tokenizer and model of a checkpoint: half precision on a GPU and on a CPU that is fast in it, else float32.

    Args:
        name: hub id or directory.
        bits: 8 or 4 quantises while loading.
        device: the best one if None.

    Raises:
        CommandError: the weights cannot be had, or do not fit the options or the device.
    """
    if not name.strip() or "\0" in name:
        raise CommandError("The checkpoint's name is empty: give a hub id or a directory.", code=2)
    if not status().enabled:
        raise CommandError("faster_chatglm_6b is switched off: unset FASTER_CHATGLM_6B_DISABLE to run this command.")
    hub_logging.set_verbosity_error()  # no warning per attempt without a network: it is said once, below
    _check_that_it_is_served(name)
    try:
        return _load(name, bits, device or device_of(None))
    except (OSError, ValueError, *out_of_memory()) as error:
        raise CommandError(str(error)) from error


def device_of(name: str | None) -> torch.device:
    """Return the device that was asked for, or the best one.

    Raises:
        CommandError: this machine has no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
        return device
    except Exception as error:  # each type of device has an error of its own for a machine without it
        there = "cpu, cuda" if torch.cuda.is_available() else "cpu"
        raise CommandError(
            f"--device {name}: this machine has no such device that PyTorch can use; there is {there}.", 2
        ) from error


def out_of_memory() -> tuple[type[Exception], ...]:
    """Return what is raised if memory runs out; OneFlow has no class of its own for it."""
    return (MemoryError, *filter(None, [getattr(torch.cuda, "OutOfMemoryError", None)]))


def too_long(query: str, model: Any) -> str | None:
    """Return a sentence for a message that is too long to be worth tokenizing, by its length alone; else None."""
    most = _CHARACTERS_PER_TOKEN * model.config.max_sequence_length
    if len(query) <= most:
        return None
    return f"The message has {len(query)} characters, but at most {most} can be asked at once: send a part of it."


def _check_that_it_is_served(name: str) -> None:
    """Refuse what is not ChatGLM-6B: ``trust_remote_code`` would run its own code."""
    verdict = recognition.judge_checkpoint(name, _source(name))
    if verdict is None and not Path(name).is_dir():
        raise CommandError(
            f"{name} is neither on this machine nor to be had from the hub: connect to the network, pass a local "
            "directory with --model, or try the toy checkpoint with --tiny."
        )
    if verdict is None:
        raise CommandError(f"{name} is not a checkpoint of ChatGLM-6B: it holds no config.json that can be read.")
    if not verdict.is_served:
        reason = verdict.reason or "its config.json is that of another model"
        raise CommandError(f"{name} is not a checkpoint of ChatGLM-6B that is served here: {reason}.")


def _source(name: str) -> dict[str, str]:
    return {"revision": revision} if name == HUB_ID else {}


def _load(name: str, bits: int | None, device: torch.device) -> tuple[Any, Any]:
    source = _source(name)
    quantization = {"quantization_bit": bits} if bits else {}
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True, **source)
    model = AutoModel.from_pretrained(name, trust_remote_code=True, **source, **quantization)
    halved = device.type == "cuda" or (device.type == "cpu" and not backend.is_oneflow() and serves_half_precision())
    return tokenizer, (model.half() if halved else model.float()).to(device)


def _short(folder: Path) -> str:
    """Return the path relative to the working directory if it lies below it, as in a clone."""
    with contextlib.suppress(ValueError):
        return str(folder.relative_to(os.getcwd()))
    return str(folder)
