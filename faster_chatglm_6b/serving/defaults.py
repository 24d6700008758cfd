"""What a request leaves out, from ``chat`` and from the checkpoint; what a server's options leave out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# ``chat``'s own; the checkpoint's generation_config.json may have others for the last two.
_OF_CHAT = {"temperature": 0.95, "top_p": 0.7, "top_k": 50, "repetition_penalty": 1.0}
_FROM_THE_FILE = ("top_k", "repetition_penalty")
# Far apart, so that the seeds of a few answers are never those of another request's next number.
_STRIDE = 0x9E3779B97F4A7C15


def sampling_defaults(model: Any) -> dict[str, float]:
    """Return temperature, top_p, top_k and repetition_penalty for requests that do not name them."""
    given = {name: getattr(model.generation_config, name, None) for name in _FROM_THE_FILE}
    return {**_OF_CHAT, **{name: value for name, value in given.items() if value is not None}}


def most_rows(device_type: str) -> int:
    """Return how many answers run at once if nobody says; on a CPU each of them makes all others slower."""
    return 256 if device_type == "cuda" else 16


def end_ids(model: Any) -> tuple[int, ...]:
    """Return the ids that end an answer."""
    ends = model.generation_config.eos_token_id
    ends = model.config.eos_token_id if ends is None else ends
    return tuple(ends) if isinstance(ends, (list, tuple)) else (ends,)


def seed_of(seed: int, number: int) -> int:
    """Return the seed of an answer's number; the first has the seed itself, so that their number changes nothing."""
    return (seed + number * _STRIDE) % 2**64


def served_names(checkpoint: str | None) -> tuple[str, ...]:
    """Return by which names clients may call a model: its short one and the one that it was asked for by.

    Args:
        checkpoint: hub id or directory; None is the tiny one.
    """
    if checkpoint is None:
        return ("tiny_chatglm",)
    return tuple(dict.fromkeys((Path(checkpoint).name or checkpoint, checkpoint)))


def api_keys(given: Sequence[str] | None) -> tuple[str, ...]:
    """Return the keys of which clients must send one: those that are given, else the environment's; none is no key."""
    keys = given or os.environ.get("FASTER_CHATGLM_6B_API_KEY", "").split(",")
    return tuple(key.strip() for key in keys if key.strip())
