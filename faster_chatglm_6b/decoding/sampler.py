"""Run the sampling kernels that a plan names, on parameters in device memory."""

from typing import Any

import torch

from ..ops.steps import step_kernels
from .numbers import RequestNumbers
from .request import SamplingPlan


class Sampler:
    """Turn logits [B, V] into tokens by a plan; the buffers live as long as the graphs that read them."""

    def __init__(self, batch: int, vocab_size: int, device: torch.device, numbers: RequestNumbers):
        self._shape, self._device, self._numbers = (batch, vocab_size), device, numbers
        self._kernels = step_kernels(device)
        self._scores: torch.Tensor | None = None
        self._biased: torch.Tensor | None = None

    def configure(self, plan: SamplingPlan) -> None:
        """Set the plan's values, which go to the device with the request's other numbers."""
        vocab_size = self._shape[1]
        self._numbers.set(
            temperature=1.0 if plan.temperature is None else plan.temperature,
            top_k=vocab_size if plan.top_k is None else min(plan.top_k, vocab_size),
            top_p=1.0 if plan.top_p is None else plan.top_p,
            penalty=1.0 if plan.penalty is None else plan.penalty,
            ngram_size=1 if plan.ngram_size is None else plan.ngram_size,
            minimum=0 if plan.minimum is None else plan.minimum,
        )
        self._numbers.set_ids("minimum_eos", plan.minimum_eos)
        self.reserve(plan)

    def reserve(self, plan: SamplingPlan) -> None:
        """Allocate what the plan's kernels write, before they are captured."""
        with torch.inference_mode(False):
            if plan.has_processors and self._scores is None:
                self._scores = torch.empty(self._shape, dtype=torch.float32, device=self._device)
            if plan.has_bias and self._biased is None:
                self._biased = torch.empty(self._shape, dtype=torch.float32, device=self._device)

    def run(self, plan: SamplingPlan, logits: torch.Tensor, state: Any, workspace: Any) -> None:
        """Choose the next tokens from logits [B, V] and advance ``state`` (a ``DecodeState``)."""
        batch, numbers, kernels = logits.shape[0], self._numbers, self._kernels
        if plan.has_bias:
            biased = self._biased[:batch]
            kernels.copy_scores(logits, biased)
            kernels.logit_bias(biased, numbers["bias_ids"], numbers["bias_values"])
            logits = biased
        scores = logits
        if plan.has_processors:
            scores = self._scores[:batch]
            kernels.copy_scores(logits, scores)
        if plan.penalty is not None:
            kernels.repetition_penalty(logits, scores, state.ids, state.ids_length, numbers["penalty"])
        if plan.ngram_size is not None:
            kernels.no_repeat_ngram(scores, state.ids, state.ids_length, numbers["ngram_size"])
        if plan.minimum is not None:
            kernels.min_length(scores, state.ids_length, numbers["minimum"], numbers["minimum_eos"])
        if plan.has_counts:
            places = state.ids, numbers["answer_start"], state.ids_length
            kernels.token_count_penalty(scores, *places, numbers["presence"], numbers["frequency"])
        options = {"invalid_rule": plan.invalid_rule, "invalid_token": plan.invalid_token, "workspace": workspace}
        if plan.kernel == "greedy":
            kernels.greedy_sample(scores, state, **options)
        elif plan.kernel == "top_k":
            kernels.top_k_sample(
                scores,
                state,
                numbers["temperature"],
                numbers["top_k"],
                numbers["top_p"],
                capacity=plan.capacity,
                **options,
            )
        else:
            top_k = None if plan.top_k is None else numbers["top_k"]
            top_p = None if plan.top_p is None else numbers["top_p"]
            kernels.full_sample(scores, state, numbers["temperature"], top_k, top_p, **options)
