"""Load the checkpoint that a command was asked for, with one sentence for everything that can go wrong."""

import argparse
from typing import Any

import torch

from .. import status
from ..checkpoint import by_name
from .errors import CommandError

# Pieces of ice_text.model have at most 16 characters; only runs of blanks are longer.
_CHARACTERS_PER_TOKEN = 16


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
    return load(name, arguments.bits, device)


def load(name: str | None, bits: int | None = None, device: torch.device | None = None) -> tuple[Any, Any]:
    """Load tokenizer and model of a checkpoint: half precision on a GPU and on a CPU that is fast in it, else float32.

    Args:
        name: hub id or directory; None is the tiny checkpoint.
        bits: 8 or 4 quantises while loading.
        device: the best one if None.

    Raises:
        CommandError: the weights cannot be had, or do not fit the options or the device.
    """
    if name is not None and (not name.strip() or "\0" in name):
        raise CommandError("The checkpoint's name is empty: give a hub id or a directory.", code=2)
    if not status().enabled:
        raise CommandError("faster_chatglm_6b is switched off: unset FASTER_CHATGLM_6B_DISABLE to run this command.")
    try:
        return by_name.load(by_name.tiny_checkpoint() if name is None else name, bits, device or device_of(None))
    except (OSError, ValueError, *out_of_memory()) as error:
        raise CommandError(str(error)) from error


def device_of(name: str | None) -> torch.device:
    """Return the device that was asked for, or the best one.

    Raises:
        CommandError: this machine has no such device.
    """
    try:
        return by_name.device_of(name)
    except ValueError as error:
        raise CommandError(str(error), 2) from error


def out_of_memory() -> tuple[type[Exception], ...]:
    """Return what is raised if memory runs out; OneFlow has no class of its own for it."""
    return (MemoryError, *filter(None, [getattr(torch.cuda, "OutOfMemoryError", None)]))


def too_long(query: str, model: Any) -> str | None:
    """Return a sentence for a message that is too long to be worth tokenizing, by its length alone; else None."""
    most = _CHARACTERS_PER_TOKEN * model.config.max_sequence_length
    if len(query) <= most:
        return None
    return f"The message has {len(query)} characters, but at most {most} can be asked at once: send a part of it."
