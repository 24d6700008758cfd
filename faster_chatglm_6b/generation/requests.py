"""Read the arguments of transformers' ``_sample`` as a ``Request`` to the captured loop, or say why not."""

from collections.abc import Iterable
from typing import Any

import torch
from transformers.generation import logits_process
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList

from ..decoding.refusal import CannotServe, check_ends
from ..decoding.request import MOST_END_TOKENS, SPECULATE, Request, SamplingPlan, drafts_for
from ..network.prompt_layout import PromptLayout
from ..ops.caches import cache_in
from .processors import InvalidScoreLogitsProcessor
from .reading import layout_of, pad_token, unfollowed_arguments, unfollowed_settings

MOST_SEQUENCES = 256
# Candidates that the one-launch sampler keeps, by the largest top_k that leaves room for ties.
_CAPACITIES = {50: 64, 100: 128}


def read_request(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    model_kwargs: dict[str, Any],
) -> Request:
    """Read the arguments of transformers' ``_sample`` as a request to the captured loop.

    Raises:
        CannotServe: the loop cannot do what they ask; the message says why.
    """
    _check_mode(model, input_ids, generation_config, model_kwargs)
    check_ends(model)
    mask = model_kwargs.get("attention_mask")
    layout = layout_of(input_ids, model.config, mask)
    if layout.hidden_slots is not None:
        raise CannotServe("attention_mask hides tokens after the start of a row")
    # The kernels would read before their tables of positions; the model's own forward refuses such positions.
    if min(layout.mask_position.tolist()) < 0:
        raise CannotServe("attention_mask hides the mask token of a row")
    processors = [] if logits_processor is None else logits_processor
    plan = plan_sampling(processors, bool(generation_config.do_sample), layout, model.lm_head.weight.shape[0])
    limits = [c.max_length for c in stopping_criteria if type(c) is MaxLengthCriteria]
    if not limits:
        raise CannotServe("there is no max_length")
    ends = [c for c in stopping_criteria if type(c) is EosTokenCriteria]
    pad = pad_token(generation_config)
    end_ids, pad_id = _read_together([c.eos_token_id for c in ends], pad)
    eos_ids = tuple(dict.fromkeys(end_ids))
    if len(eos_ids) > MOST_END_TOKENS:
        raise CannotServe(f"there are more than {MOST_END_TOKENS} end tokens")
    drafted, always = drafts_for(_speculate(generation_config, model_kwargs), len(input_ids), plan)
    others = StoppingCriteriaList(c for c in stopping_criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria))
    return Request(
        input_ids=input_ids.to(model.lm_head.weight.device),
        layout=layout,
        plan=plan,
        max_length=min(limits),
        eos_ids=eos_ids,
        pad_id=pad_id,
        has_end=any(hasattr(c, "eos_token_id") for c in stopping_criteria) and pad is not None,
        host_criteria=others if len(others) else None,
        do_sample=bool(generation_config.do_sample),
        generator=model_kwargs.get("generator"),
        # The caller's criteria look at one token after the other.
        draft_tokens=0 if len(others) else drafted,
        draft_always=always,
    )


def _speculate(generation_config: Any, model_kwargs: dict[str, Any]) -> int | str | None:
    """Return what is asked for by ``speculate``, else by transformers' ``prompt_lookup_num_tokens``."""
    given, looked_up = model_kwargs.get("speculate"), getattr(generation_config, "prompt_lookup_num_tokens", None)
    if given is None and looked_up is not None:
        given = min((k for k in SPECULATE[:3] if k >= looked_up), default=SPECULATE[2])
    return given


def _read_together(end_tokens: list[torch.Tensor], pad: torch.Tensor | None) -> tuple[list[int], int]:
    """Read all end tokens and the pad id, 0 if there is none; they may lie on a device, which one reading waits for."""
    given = [*end_tokens, *([] if pad is None else [pad])]
    if not given:
        return [], 0
    ids = torch.cat([one.reshape(-1).to(given[0].device) for one in given]).tolist()
    return (ids, 0) if pad is None else (ids[:-1], ids[-1])


def _check_mode(model: Any, input_ids: torch.Tensor, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
    """Raise CannotServe for arguments that ask for anything but tokens from ids."""
    if generation_config.return_dict_in_generate:
        raise CannotServe("return_dict_in_generate asks for what the loop does not keep")
    if not model_kwargs.get("use_cache", True):
        raise CannotServe("use_cache is False")
    if getattr(generation_config, "cache_implementation", None) not in (None, "dynamic"):
        raise CannotServe(f"cache_implementation is {generation_config.cache_implementation!r}")
    if getattr(generation_config, "is_assistant", False):
        raise CannotServe("the model is the assistant of another one")
    if not model.config.position_encoding_2d:
        raise CannotServe("position_encoding_2d is False")
    unfollowed = [*unfollowed_arguments(model, model_kwargs), *unfollowed_settings(generation_config)]
    if unfollowed:
        raise CannotServe(f"{', '.join(unfollowed)} given")
    cache = cache_in(model_kwargs)
    if cache is not None and (getattr(cache, "_is_user_defined", False) or cache.get_seq_length() > 0):
        raise CannotServe("past_key_values given")
    if input_ids.shape[0] > MOST_SEQUENCES:
        raise CannotServe(f"{input_ids.shape[0]} sequences; the loop takes up to {MOST_SEQUENCES} at once")


def _repetition_penalty(processor: Any, layout: PromptLayout) -> dict[str, Any]:
    ignored = getattr(processor, "prompt_ignore_length", None)
    if ignored is not None:
        # transformers 5 leaves each row's left padding out by a tensor; a number is the caller's choice.
        if not isinstance(ignored, torch.Tensor) or not torch.equal(ignored.cpu(), layout.first_slot):
            raise CannotServe("RepetitionPenaltyLogitsProcessor ignores a part of the prompt")
    return {"penalty": processor.penalty, "penalised_from": ignored if ignored is None else layout.first_slot}


def _min_length(processor: Any, layout: PromptLayout) -> dict[str, Any]:
    return {"minimum": processor.min_length, "minimum_eos": _ids(processor.eos_token_id)}


def _min_new_tokens(processor: Any, layout: PromptLayout) -> dict[str, Any]:
    return {
        "minimum": processor.prompt_length_to_skip + processor.min_new_tokens,
        "minimum_eos": _ids(processor.eos_token_id),
    }


def _top_k(processor: Any, layout: PromptLayout) -> dict[str, Any]:
    _check_filter(processor)
    return {"top_k": processor.top_k}


def _top_p(processor: Any, layout: PromptLayout) -> dict[str, Any]:
    _check_filter(processor)
    return {"top_p": processor.top_p}


def _invalid_rule(processor: Any, layout: PromptLayout) -> dict[str, Any]:
    return {"invalid_rule": True, "invalid_token": processor.token_id}


def _known() -> dict[type, Any]:
    """Map each known processor, by exact type, to its reader, in the order in which transformers applies them."""
    readers = {
        "RepetitionPenaltyLogitsProcessor": _repetition_penalty,
        "NoRepeatNGramLogitsProcessor": lambda processor, layout: {"ngram_size": processor.ngram_size},
        "MinLengthLogitsProcessor": _min_length,
        "MinNewTokensLengthLogitsProcessor": _min_new_tokens,
        "InvalidScoreLogitsProcessor": _invalid_rule,
        "TemperatureLogitsWarper": lambda processor, layout: {"temperature": processor.temperature},
        "TopKLogitsWarper": _top_k,
        "TopPLogitsWarper": _top_p,
    }
    # By name: a release without one of them is no reason to fail.
    classes = {name: getattr(logits_process, name, None) for name in readers}
    classes["InvalidScoreLogitsProcessor"] = InvalidScoreLogitsProcessor
    return {classes[name]: reader for name, reader in readers.items() if classes[name] is not None}


def plan_sampling(processors: Iterable[Any], do_sample: bool, layout: PromptLayout, vocab_size: int) -> SamplingPlan:
    """Return the plan that does what ``processors`` do.

    Raises:
        CannotServe: an unknown processor, another order than transformers' own, or a parameter that no kernel knows.
    """
    known = _known()
    order = list(known)
    values: dict[str, Any] = {}
    last = -1
    for processor in processors:
        name = type(processor).__name__
        if type(processor) not in known:
            raise CannotServe(f"{name} is not among the processors that have a kernel")
        rank = order.index(type(processor))
        if rank <= last:
            raise CannotServe(f"{name} stands in another place of the processors than transformers puts it")
        last = rank
        try:
            read = known[type(processor)](processor, layout)
        except AttributeError as error:
            raise CannotServe(f"{name} of this transformers keeps its parameters in another way ({error})") from error
        if "minimum" in read and "minimum" in values:
            if read["minimum_eos"] != values["minimum_eos"]:
                raise CannotServe("min_length and min_new_tokens forbid different end tokens")
            read["minimum"] = max(read["minimum"], values["minimum"])
        values |= read
    if max(values.get("minimum", 0), values.get("ngram_size", 0)) >= 2**31:
        raise CannotServe("a length is asked for that no kernel counts to")
    if len(values.get("minimum_eos", ())) > MOST_END_TOKENS:
        raise CannotServe(f"there are more than {MOST_END_TOKENS} end tokens")
    if values.get("penalised_from") is not None and "ngram_size" in values:
        raise CannotServe("the repetition penalty leaves the padding out and the n-gram rule does not")
    return SamplingPlan(**values, **_kernel_for(values, do_sample, vocab_size))


def _kernel_for(values: dict[str, Any], do_sample: bool, vocab_size: int) -> dict[str, Any]:
    if not do_sample:
        if {"temperature", "top_k", "top_p"} & set(values):
            raise CannotServe("greedy search with a temperature, top_k or top_p warper")
        return {"kernel": "greedy"}
    top_k = min(values.get("top_k", vocab_size), vocab_size)
    for most, capacity in _CAPACITIES.items():
        if top_k <= most:
            return {"kernel": "top_k", "capacity": capacity}
    return {"kernel": "full"}


def _check_filter(warper: Any) -> None:
    if getattr(warper, "filter_value", None) != -float("inf") or getattr(warper, "min_tokens_to_keep", 1) != 1:
        raise CannotServe(f"{type(warper).__name__} has a filter_value or min_tokens_to_keep of the caller's own")


def _ids(tokens: Any) -> tuple[int, ...]:
    return tuple(torch.as_tensor(tokens).reshape(-1).tolist())
