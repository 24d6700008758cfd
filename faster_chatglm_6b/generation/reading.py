"""Read what transformers passes to a decoding loop, all in one place.

Releases rename arguments and add new ones. None of that is an error here or costs the cache: what this version does not
know becomes a line in ``status()`` and in the log.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from inspect import Parameter, signature
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.utils import GenerationMixin

from .. import report, versions
from ..network.prompt_layout import PromptLayout
from ..ops.caches import CACHE_NAMES, Cache

# Arguments of transformers' loop that the captured loop follows or does not need. Outputs other than tokens also take
# return_dict_in_generate, which the captured loop leaves to the plain one.
_FOLLOWED = {"attention_mask", "use_cache", "logits_to_keep", "cache_position", "generator", "tokenizer"}
_FOLLOWED |= {"output_attentions", "output_hidden_states", "speculate"}

# The fields of GenerationConfig from transformers 4.45 to 5.24. Each acts through a logits processor or a stopping
# criterion, which are read one by one, or is read into a ``Request``, or chooses another search than ``_sample``.
_KNOWN_SETTINGS = frozenset(
    """
    assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight assistant_lookbehind bad_words_ids
    begin_suppress_tokens bos_token_id cache_config cache_implementation compile_config constraints
    continuous_batching_config decoder_start_token_id disable_compile diversity_penalty do_sample dola_layers
    early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty eos_token_id epsilon_cutoff eta_cutoff
    exponential_decay_length_penalty force_words_ids forced_bos_token_id forced_decoder_ids forced_eos_token_id
    generation_kwargs guidance_scale is_assistant length_penalty low_memory max_cache_len max_length
    max_matching_ngram_size max_new_tokens max_time min_length min_new_tokens min_p no_repeat_ngram_size
    num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_logits output_scores pad_token_id penalty_alpha prefill_chunk_size
    prompt_lookup_num_tokens remove_invalid_values renormalize_logits repetition_penalty return_dict_in_generate
    return_legacy_cache sequence_bias speculation_type stop_strings suppress_tokens target_lookbehind temperature
    token_healing top_h top_k top_p transformers_version typical_p use_cache use_mtp watermarking_config
    """.split()
)


def unfollowed_arguments(model: Any, model_kwargs: Mapping[str, Any]) -> list[str]:
    """Return the names of arguments of ``_sample`` that ask for something that the captured loop does not do.

    An argument that neither transformers' loop nor the model names is read on neither path: it is only recorded.
    """
    known = _defaults(GenerationMixin._sample) | _defaults(type(model).forward)
    of_the_instance = model.__dict__.get("prepare_inputs_for_generation")
    # A function on the instance may hold the model, so it is not kept in a cache.
    known |= _named(of_the_instance) if of_the_instance else _defaults(type(model).prepare_inputs_for_generation)
    unfollowed = []
    for name, value in model_kwargs.items():
        if name in _FOLLOWED or name in CACHE_NAMES or isinstance(value, Cache):
            continue
        default = known.get(name)
        if _is_default(value, default) or (value is False and default is None):
            continue
        if name in known:
            unfollowed.append(name)
        else:
            report.record_notice(
                f"The argument {name} reaches the decoding loop of transformers {_release()}, and the model does not "
                "read it."
            )
    return sorted(unfollowed)


def unnamed_arguments(model: Any, model_kwargs: Mapping[str, Any]) -> list[str]:
    """Return the names of arguments that neither ``forward`` nor ``prepare_inputs_for_generation`` names.

    If one of them is replaced, all names are returned.
    """
    if model.has_own_inputs() or "forward" in model.__dict__:
        return list(model_kwargs)
    named = _defaults(type(model).forward), _defaults(type(model).prepare_inputs_for_generation)
    return [name for name in model_kwargs if not any(name in names for names in named)]


def unfollowed_settings(generation_config: Any) -> list[str]:
    """Return the names of fields of a ``GenerationConfig`` that only newer releases have and that are set."""
    return sorted(
        name
        for name, values in _setting_defaults().items()
        if not any(_is_default(getattr(generation_config, name, None), value) for value in values)
    )


def pad_token(generation_config: Any) -> torch.Tensor | None:
    """Return the id for rows that ended, a tensor without axes that ``generate`` derived, or None if they go on."""
    if hasattr(generation_config, "_pad_token_tensor"):
        return generation_config._pad_token_tensor
    report.record_notice(
        f"transformers {_release()} keeps the derived pad token in another place; pad_token_id is taken instead."
    )
    pad_token_id = getattr(generation_config, "pad_token_id", None)
    return None if pad_token_id is None else torch.tensor(pad_token_id)


# For the generate() call of this context: the length of the sequences at the last step (0 before the first), and the
# number of later steps that had no cache.
_steps: ContextVar[list[int] | None] = ContextVar("faster_chatglm_6b_steps", default=None)


@contextmanager
def steps_watched() -> Iterator[None]:
    """Let ``watch_step`` tell the first step from later ones, during one call of ``generate``."""
    token = _steps.set([0, 0])
    try:
        yield
    finally:
        _steps.reset(token)


def watch_step(length: int, past_length: int, use_cache: bool) -> None:
    """Record if later steps read the whole sequences, of ``length`` tokens, although a cache is wanted.

    One such step is no sign: transformers 5.0 prepares the first step of assisted decoding twice.
    """
    steps = _steps.get()
    if steps is None:
        return
    last_length, without_cache = steps
    if 0 < last_length < length and past_length == 0 and use_cache:
        without_cache += 1
        if without_cache == 2:
            report.record_notice(
                f"No cache comes back to the model from step to step (transformers {_release()}), so that each token "
                "reads its whole sequence again."
            )
    steps[:] = length, without_cache


# For the generate() call of this context: what generate() read from the prompt and handed to transformers, as (ids,
# mask, layout), or nothing yet.
_prompt: ContextVar[list[tuple[torch.Tensor, torch.Tensor, PromptLayout]] | None] = ContextVar(
    "faster_chatglm_6b_prompt", default=None
)


@contextmanager
def prompt_kept() -> Iterator[None]:
    """Let ``layout_of`` find what ``keep_layout`` was given, during one call of ``generate``."""
    token = _prompt.set([])
    try:
        yield
    finally:
        _prompt.reset(token)


def keep_layout(input_ids: torch.Tensor, attention_mask: torch.Tensor, layout: PromptLayout) -> None:
    """Keep the layout of a prompt, so that its ids are read from the device once."""
    kept = _prompt.get()
    if kept is not None:
        kept[:] = [(input_ids, attention_mask, layout)]


def layout_of(input_ids: torch.Tensor, config: Any, attention_mask: torch.Tensor | None) -> PromptLayout:
    """Return the layout of ids [B, L] as ``PromptLayout.of`` does: the kept one if these are the very tensors.

    Newer transformers drop a mask that hides nothing. Without a mask, a leading pad is padding, so the kept layout
    stands for that too unless a row begins with a pad that its mask shows.
    """
    for ids, mask, layout in _prompt.get() or ():
        dropped = attention_mask is None and not layout.is_padded and not layout.begins_with_pad
        if input_ids is ids and (attention_mask is mask or dropped):
            return layout
    return PromptLayout.of(input_ids, config, attention_mask)


def check_searches(owner: type) -> None:
    """Record which functions that ``generate`` calls, and that we extend, transformers no longer has."""
    for name in ("_sample", "_beam_search", "_assisted_decoding"):
        if not hasattr(owner, name):
            report.record_notice(
                f"transformers {_release()} has no {name} any more; what it did takes transformers' own way, uncounted."
            )
    for name in ("_prepare_generation_config", "_get_logits_processor"):
        if not hasattr(owner, name):
            report.record_notice(
                f"transformers {_release()} has no {name} any more; cache_implementation, prefill_chunk_size and "
                "guidance_scale are not adapted to a prefix LM."
            )


def _release() -> str | None:
    return versions.installed_version("transformers")


@functools.cache
def _defaults(function: Callable) -> dict[str, Any]:
    """Return ``_named`` of a function that lives as long as the process."""
    return _named(function)


def _named(function: Callable) -> dict[str, Any]:
    """Return the default of each named parameter; ``Parameter.empty`` if it has none."""
    kinds = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    return {name: one.default for name, one in signature(function).parameters.items() if one.kind not in kinds}


@functools.cache
def _setting_defaults() -> dict[str, tuple]:
    """Return the defaults of each field that we do not know: in a new object, and as ``generate`` fills it."""
    filled = getattr(GenerationConfig, "_get_default_generation_params", dict)()
    return {
        name: (value, filled.get(name, value))
        for name, value in vars(GenerationConfig()).items()
        if not name.startswith("_") and name not in _KNOWN_SETTINGS
    }


def _is_default(value: Any, default: Any) -> bool:
    if value is None or value is default:
        return True
    return type(value) is type(default) and not isinstance(value, torch.Tensor) and value == default
