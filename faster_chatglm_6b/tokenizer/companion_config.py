"""Learn from the config.json in the same directory what tokenizer_config.json does not say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .ice_text import IceTextTokenizer

# Ids that the first checkpoints (150528 ids) keep for images, and the longest sequence that ChatGLM-6B was trained for.
FIRST_IMAGE_TOKENS = 20000
LONGEST_SEQUENCE = 2048
_MOST_BYTES = 2**20


def read_companion(vocab_file: str | Path) -> dict[str, Any]:
    """Read config.json beside ``vocab_file``; return an empty dict if there is none that can be read."""
    path = Path(vocab_file).parent / "config.json"
    try:
        if not path.is_file() or path.stat().st_size > _MOST_BYTES:
            return {}
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def image_tokens(config: dict[str, Any], pieces: IceTextTokenizer) -> int:
    """Return the number of image tokens before the ids of ``pieces``.

    The ids of <sop> and <eop> in the model's config tell it. Without a config the vocabulary file does: only that of
    the first checkpoints goes with image tokens.
    """
    places = [
        config[name] - pieces.model.PieceToId(token)
        for name, token in (("bos_token_id", "<sop>"), ("eos_token_id", "<eop>"))
        if type(config.get(name)) is int
    ]
    if len(places) == 2 and places[0] == places[1] and places[0] in (0, FIRST_IMAGE_TOKENS):
        return places[0]
    return FIRST_IMAGE_TOKENS if pieces.is_first_file else 0


def longest_sequence(config: dict[str, Any]) -> int:
    """Return the model's ``max_sequence_length``, or ChatGLM-6B's if it is no sensible number."""
    length = config.get("max_sequence_length")
    return length if type(length) is int and 0 < length < 2**24 else LONGEST_SEQUENCE
