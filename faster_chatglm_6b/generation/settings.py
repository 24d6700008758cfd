"""Adapt the settings of a ``GenerationConfig`` that this model follows in its own way.

They may come from an argument, a config given to ``generate``, or the checkpoint's generation_config.json.
"""

from __future__ import annotations

import copy
import functools
import logging
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

_log = logging.getLogger("faster_chatglm_6b")

# Caches that save time or memory in a way that a prefix LM cannot follow; the tokens are the same without them.
_FIXED_SIZES = ("static", "offloaded_static", "sliding_window", "hybrid", "hybrid_chunked")
_FIXED_SIZES += ("offloaded_hybrid", "offloaded_hybrid_chunked")


@dataclass(frozen=True)
class GatheredSettings:
    """What transformers gathered for one ``generate`` call, for later calls that ask for the very same.

    Gathering copies and checks every field several times. It depends on nothing but the values in ``asked``, all of
    which are numbers, texts or None, as are those that it gave. A call with anything else is gathered anew.

    Attributes:
        asked: from ``asked_of``.
        config: the gathered ``GenerationConfig``; handed out as copies.
        others: the names of the call's arguments that are no settings.
    """

    asked: tuple
    config: Any
    others: tuple[str, ...]

    @classmethod
    def of(cls, asked: tuple | None, arguments: dict[str, Any], config: Any, others: dict[str, Any]) -> Any:
        """Return what was gathered from the arguments of a call, or None if it cannot stand for another call."""
        if asked is None or _values(vars(config)) is None:
            return None
        if any(name not in arguments or value is not arguments[name] for name, value in others.items()):
            return None
        return cls(asked, copy.copy(config), tuple(others))

    def again(self, arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Return a config, and the arguments that are no settings, of a call that asks for the same."""
        return copy.copy(self.config), {name: arguments[name] for name in self.others}


def asked_of(model: Any, positional: tuple, arguments: dict[str, Any]) -> tuple | None:
    """Return every value that decides which settings a call gets; None if one is no number, text or None.

    Args:
        positional: arguments of ``_prepare_generation_config``, above all a given ``GenerationConfig``.
        arguments: those by name, of which some are settings.
    """
    given = vars(model.generation_config)
    names = _fields() | given.keys()
    # transformers refuses or follows settings in the model's configuration.
    of_the_model = {name: value for name, value in vars(model.config).items() if name in names}
    settings = {name: value for name, value in arguments.items() if name in names}
    parts = [_values(one) for one in (dict(enumerate(positional)), given, of_the_model, settings)]
    kinds = type(model.generation_config), type(model.config)
    return None if None in parts else (*parts, *kinds, tuple(arguments))


def _values(fields: dict[Any, Any]) -> list | None:
    """Return the items with their types, as 1 equals True and 1.0; None if a value could change in its place."""
    items = [(name, type(value), value) for name, value in fields.items()]
    return items if all(kind in _UNCHANGING for _, kind, _ in items) else None


_UNCHANGING = {int, float, str, bool, type(None)}


@functools.cache
def _fields() -> frozenset[str]:
    return frozenset(vars(GenerationConfig()))


def follow_settings(config: Any) -> None:
    """Change settings in the ``config`` of one ``generate`` call that only ask for speed or memory.

    Raises:
        ValueError: a search that needs what this model lacks or gives in another layout.
    """
    _refuse_searches(config)
    if getattr(config, "stop_strings", None) in ([], ()):  # transformers would ask for a tokenizer to find none of them
        config.stop_strings = None
    cache = getattr(config, "cache_implementation", None)
    if cache == "paged":
        raise no_continuous_batching()
    if cache in _FIXED_SIZES:
        _log.info("cache_implementation=%r cannot follow a prefix mask; the default cache is used.", cache)
        config.cache_implementation = None
    if cache == "offloaded" and not torch.cuda.is_available():
        _log.info("cache_implementation='offloaded' needs a GPU to offload from; the default cache is used.")
        config.cache_implementation = None
    if getattr(config, "return_legacy_cache", False) is None:
        # transformers 4.45 and 4.46 would return a tuple [batch, heads, ...], but stock's is [length, batch, ...].
        config.return_legacy_cache = False
    if getattr(config, "prefill_chunk_size", None) is not None:
        _log.info(
            "prefill_chunk_size=%r is not followed: a prompt is attended in both directions and read at once.",
            config.prefill_chunk_size,
        )
        config.prefill_chunk_size = None


def _refuse_searches(config: Any) -> None:
    asked = {name: getattr(config, name, None) for name in ("penalty_alpha", "dola_layers", "use_mtp", "token_healing")}
    greedy = not config.do_sample and (config.num_beams or 1) == 1
    if asked["penalty_alpha"] and (getattr(config, "top_k", None) or 0) > 1 and greedy:
        raise ValueError(
            f"penalty_alpha is {asked['penalty_alpha']}, but contrastive search compares hidden states [batch, length, "
            "hidden], and this model gives stock's [length, batch, hidden]; leave it out, or pass repetition_penalty."
        )
    if asked["dola_layers"] is not None and (config.num_beams or 1) == 1:
        raise ValueError(
            f"dola_layers is {asked['dola_layers']!r}, but DoLa reads hidden states [batch, length, hidden], and this "
            "model gives stock's [length, batch, hidden]; leave it out."
        )
    if asked["use_mtp"]:
        raise ValueError("use_mtp is set, but this model has no heads that predict several tokens; leave it out.")
    if asked["token_healing"]:
        raise ValueError(
            "token_healing is set, but a ChatGLM prompt ends in <sop>, which has nothing to heal; leave it out."
        )


def no_continuous_batching() -> ValueError:
    """Return the error for reading prompts in pieces, into pages of keys that many requests share."""
    return ValueError(
        "Continuous batching (generate_batch, cache_implementation='paged') packs tokens of many prompts into one row, "
        "which the mask of a prefix LM does not allow; call generate() with a padded batch, or chat_batch()."
    )
