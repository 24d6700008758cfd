"""Override the searches of transformers 4.27 to 4.29, the versions that OneFlow's mock of torch can carry."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from transformers.generation.logits_process import LogitsProcessorList

from .. import report
from .plain import plain_tokens
from .streaming import no_single_next_token, streaming

# Arguments of a search that are no model inputs.
_SETTINGS = (
    "max_length",
    "pad_token_id",
    "eos_token_id",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "return_dict_in_generate",
    "synced_gpus",
)


class SearchMixin:
    """Overrides of the searches. There is no captured loop: transformers' own loops run, or a stream of tokens."""

    # Checkpoints that newer versions saved hold no tied head; these versions would warn of that.
    _keys_to_ignore_on_load_missing = [r"^lm_head\.weight$"]

    @classmethod
    def can_generate(cls) -> bool:
        """Return True; by its functions' names, transformers would take the class for one that cannot generate."""
        return True

    def greedy_search(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run transformers' greedy search, or return an iterator over its tokens."""
        return self._one_by_one("greedy search", super().greedy_search, input_ids, *args, **kwargs)

    def sample(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run transformers' sampling, or return an iterator over its tokens."""
        return self._one_by_one("sampling", super().sample, input_ids, *args, **kwargs)

    def _one_by_one(
        self,
        name: str,
        search: Any,
        input_ids: torch.Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        logits_warper: Any = None,
        streamer: Any = None,
        **kwargs: Any,
    ) -> Any:
        report.record_generation("plain", f"{name}; the captured loop needs PyTorch")
        generator = kwargs.get("generator")
        if generator is None and not streaming.get():
            given = {"logits_warper": logits_warper, "streamer": streamer}
            kwargs |= {argument: value for argument, value in given.items() if value is not None}
            return search(input_ids, logits_processor=logits_processor, stopping_criteria=stopping_criteria, **kwargs)
        settings = {argument: kwargs.pop(argument) for argument in _SETTINGS if argument in kwargs}
        tokens = plain_tokens(
            self,
            input_ids,
            LogitsProcessorList([*(logits_processor or []), *(logits_warper or [])]),
            _PerRow(stopping_criteria, settings.get("eos_token_id")),
            SimpleNamespace(
                do_sample=name == "sampling", _pad_token_tensor=_as_tensor(settings.get("pad_token_id"), input_ids)
            ),
            streamer,
            kwargs,
        )
        if streaming.get():
            return tokens
        return torch.cat((input_ids, torch.stack(list(tokens), dim=1).to(input_ids.device)), dim=1)

    def beam_search(self, *args: Any, **kwargs: Any) -> Any:
        """Run transformers' beam search, unless the caller asks for a stream."""
        return self._many_at_once("beam search", super().beam_search, *args, **kwargs)

    def beam_sample(self, *args: Any, **kwargs: Any) -> Any:
        """Run transformers' beam sampling, as in ``beam_search``."""
        return self._many_at_once("beam sampling", super().beam_sample, *args, **kwargs)

    def group_beam_search(self, *args: Any, **kwargs: Any) -> Any:
        """Run transformers' group beam search, as in ``beam_search``."""
        return self._many_at_once("group beam search", super().group_beam_search, *args, **kwargs)

    def constrained_beam_search(self, *args: Any, **kwargs: Any) -> Any:
        """Run transformers' constrained beam search, as in ``beam_search``."""
        return self._many_at_once("constrained beam search", super().constrained_beam_search, *args, **kwargs)

    def contrastive_search(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: transformers 4.27's own takes the cache apart in a way that only its own layouts allow."""
        raise ValueError(
            "Contrastive search (penalty_alpha) cannot follow ChatGLM's cache on this transformers; leave it out."
        )

    def _many_at_once(self, name: str, search: Any, *args: Any, **kwargs: Any) -> Any:
        if streaming.get():
            raise no_single_next_token()
        report.record_generation("plain", name)
        return search(*args, **kwargs)

    @staticmethod
    def _reorder_cache(past_key_values: Any, beam_idx: torch.Tensor) -> Any:
        """Return the cache with the rows that beam search continues."""
        past_key_values.reorder_cache(beam_idx)
        return past_key_values

    def release_cache(self) -> None:
        """Do nothing: without the captured loop, generation keeps no memory between calls."""


class _PerRow:
    """Stopping criteria that answer for each row, as in later versions of transformers."""

    def __init__(self, criteria: Any, eos_token_id: int | list[int] | None):
        self._criteria = criteria if criteria is not None else []
        ids = [] if eos_token_id is None else eos_token_id
        self._eos_ids = ids if isinstance(ids, (list, tuple)) else [ids]

    def __call__(self, input_ids: torch.Tensor, scores: Any) -> torch.Tensor:
        """Return the rows that have ended, bool [B]."""
        last = input_ids[:, -1]
        ended = torch.zeros(last.shape, dtype=torch.bool, device=last.device)
        for eos_id in self._eos_ids:
            ended = ended | (last == eos_id)
        if any(bool(criterion(input_ids, scores)) for criterion in self._criteria):
            ended = torch.ones(last.shape, dtype=torch.bool, device=last.device)
        return ended


def _as_tensor(pad_token_id: int | None, input_ids: torch.Tensor) -> torch.Tensor | None:
    return None if pad_token_id is None else torch.tensor(pad_token_id, device=input_ids.device)
