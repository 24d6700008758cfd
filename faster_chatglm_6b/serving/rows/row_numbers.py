"""What the kernels are told about the rows of a running batch, in device memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ...decoding.numbers import RequestNumbers
from ...decoding.request import SamplingPlan
from ...decoding.steps.kv_cache import PagedKVCache
from ...network.prompt_layout import PromptLayout
from .choice import LOWEST_TEMPERATURE
from .interface import NewRow, RowRequest

MOST_END_TOKENS = 128
_MOST_BIASES = 300
# A row whose scores are not finite gets this token. It ends the row: places without an end token hold it too.
INVALID = -1


def write_row(
    numbers: RequestNumbers, new: NewRow, prompt: int, layout: PromptLayout, cache: PagedKVCache, vocab_size: int
) -> None:
    """Write a new row's numbers on the host.

    Args:
        prompt: its tokens without padding.
        layout: of its prompt with padding.

    Raises:
        ValueError: too many end tokens or biases, or a bias for an id that is out of the vocabulary.
    """
    request = new.request
    _check(request, vocab_size)
    padding = int(layout.first_slot)
    sop_slot = int(layout.sop_slot) - padding
    numbers.set_row(
        new.row,
        tokens=request.ids[-1],
        finished=0,
        ids_length=prompt,
        answer_start=prompt,
        # The last token goes through the next step.
        cache_length=cache.prefix_slots + prompt - 1,
        step=0,
        limit=prompt + request.max_tokens,
        seed=_signed(request.seed),
        sop_slot=sop_slot,
        sop_index=sop_slot + cache.prefix_slots,
        position=int(layout.mask_position),
        block_table=cache.row_of_pages(new.pages),
        temperature=request.temperature if _draws(request) else 0.0,
        top_k=min(request.top_k, vocab_size) if request.top_k else vocab_size,
        top_p=request.top_p,
        penalty=request.repetition_penalty,
        minimum=prompt + request.min_tokens,
        presence=request.presence_penalty,
        frequency=request.frequency_penalty,
        bias_values=[value for _, value in request.logit_bias],
    )
    numbers.set_ids("eos_ids", request.end_ids, new.row)
    numbers.set_ids("minimum_eos", request.end_ids if request.min_tokens else (), new.row)
    numbers.set_ids("bias_ids", tuple(token for token, _ in request.logit_bias), new.row)


def _check(request: RowRequest, vocab_size: int) -> None:
    wrong = [token for token, _ in request.logit_bias if not 0 <= token < vocab_size]
    if wrong:
        raise ValueError(f"logit_bias names the id {wrong[0]}; ids are from 0 to {vocab_size - 1}.")
    if len(request.end_ids) >= MOST_END_TOKENS or len(request.logit_bias) > _MOST_BIASES:
        raise ValueError(
            f"A row takes fewer than {MOST_END_TOKENS} end tokens and up to {_MOST_BIASES} biases, not "
            f"{len(request.end_ids)} and {len(request.logit_bias)}."
        )


def _draws(request: RowRequest) -> bool:
    return request.temperature >= LOWEST_TEMPERATURE


def more_numbers(pages_per_row: int) -> dict[str, tuple[torch.dtype, int]]:
    """Return the numbers of a row beside those of a request; names as of ``Sampler`` and ``PagedKVCache``."""
    return {
        "tokens": (torch.int64, 1),
        "block_table": (torch.int32, pages_per_row),
        "answer_start": (torch.int32, 1),
        "presence": (torch.float32, 1),
        "frequency": (torch.float32, 1),
        "bias_ids": (torch.int32, _MOST_BIASES),
        "bias_values": (torch.float32, _MOST_BIASES),
    }


def _signed(seed: int) -> int:
    """Return the signed number of 64 bits with the seed's bits."""
    seed %= 2**64
    return seed - 2**64 if seed >= 2**63 else seed


def sampling_plan(requests: Sequence[RowRequest]) -> SamplingPlan:
    """Return the kernels that these rows need together; what a row does not ask for does not change it.

    Rows that draw use one sampler, whatever they draw from: another one would take other random numbers.
    """
    plan = SamplingPlan(
        invalid_rule=True,
        invalid_token=INVALID,
        penalty=1.0 if any(request.repetition_penalty != 1 for request in requests) else None,
        minimum=0 if any(request.min_tokens for request in requests) else None,
        has_bias=any(request.logit_bias for request in requests),
        has_counts=any(request.presence_penalty or request.frequency_penalty for request in requests),
    )
    if not any(map(_draws, requests)):
        return plan
    return replace(plan, kernel="full", top_k=1, top_p=1.0)
