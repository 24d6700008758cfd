"""Adapt the settings of a ``GenerationConfig`` that this model follows in its own way.

They may come from an argument, a config given to ``generate``, or the checkpoint's generation_config.json.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

_log = logging.getLogger("faster_chatglm_6b")

# Caches that save time or memory in a way that a prefix LM cannot follow; the tokens are the same without them.
_FIXED_SIZES = ("static", "offloaded_static", "sliding_window", "hybrid", "hybrid_chunked")
_FIXED_SIZES += ("offloaded_hybrid", "offloaded_hybrid_chunked")


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
