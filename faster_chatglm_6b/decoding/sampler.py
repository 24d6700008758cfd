"""Run the sampling kernels that a plan names, on parameters in device memory."""

from typing import Any

import torch

from ..ops import triton as kernels
from .request import MOST_END_TOKENS, SamplingPlan


class Sampler:
    """Turn logits [B, V] into tokens by a plan; the buffers live as long as the graphs that read them."""

    def __init__(self, batch: int, vocab_size: int, device: torch.device):
        self._shape, self._device = (batch, vocab_size), device
        self._scores: torch.Tensor | None = None
        with torch.inference_mode(False):
            self._temperature, self._top_p, self._penalty = (torch.ones(1, device=device) for _ in range(3))
            self._top_k, self._ngram_size, self._minimum = (
                torch.ones(1, dtype=torch.int32, device=device) for _ in range(3)
            )
            self._minimum_eos = torch.full((MOST_END_TOKENS,), -1, dtype=torch.int64, device=device)

    def configure(self, plan: SamplingPlan) -> None:
        """Write the plan's values where the kernels read them."""
        self._temperature.fill_(1.0 if plan.temperature is None else plan.temperature)
        self._top_k.fill_(self._shape[1] if plan.top_k is None else min(plan.top_k, self._shape[1]))
        self._top_p.fill_(1.0 if plan.top_p is None else plan.top_p)
        self._penalty.fill_(1.0 if plan.penalty is None else plan.penalty)
        self._ngram_size.fill_(1 if plan.ngram_size is None else plan.ngram_size)
        self._minimum.fill_(0 if plan.minimum is None else plan.minimum)
        self._minimum_eos.fill_(-1)
        if plan.minimum_eos:
            self._minimum_eos[: len(plan.minimum_eos)] = torch.tensor(plan.minimum_eos)
        if plan.has_processors and self._scores is None:
            with torch.inference_mode(False):
                self._scores = torch.empty(self._shape, dtype=torch.float32, device=self._device)

    def run(self, plan: SamplingPlan, logits: torch.Tensor, state: Any, workspace: Any) -> None:
        """Choose the next tokens from logits [B, V] and advance ``state`` (a ``DecodeState``)."""
        scores = logits
        if plan.has_processors:
            scores = self._scores
            kernels.copy_scores(logits, scores)
        if plan.penalty is not None:
            kernels.repetition_penalty(logits, scores, state.ids, state.ids_length, self._penalty)
        if plan.ngram_size is not None:
            kernels.no_repeat_ngram(scores, state.ids, state.ids_length, self._ngram_size)
        if plan.minimum is not None:
            kernels.min_length(scores, state.ids_length, self._minimum, self._minimum_eos)
        options = {"invalid_rule": plan.invalid_rule, "invalid_token": plan.invalid_token, "workspace": workspace}
        if plan.kernel == "greedy":
            kernels.greedy_sample(scores, state, **options)
        elif plan.kernel == "top_k":
            kernels.top_k_sample(
                scores, state, self._temperature, self._top_k, self._top_p, capacity=plan.capacity, **options
            )
        else:
            top_k = None if plan.top_k is None else self._top_k
            top_p = None if plan.top_p is None else self._top_p
            kernels.full_sample(scores, state, self._temperature, top_k, top_p, **options)
