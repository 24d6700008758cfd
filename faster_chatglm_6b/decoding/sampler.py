"""Which of the sampling kernels do what a list of transformers' logits processors does, and their device parameters."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation import logits_process

from ..network.prompt_layout import PromptLayout

# Candidates that the one-launch sampler keeps, by the largest top_k that leaves it room for ties.
_CAPACITIES = {50: 64, 100: 128}
MOST_END_TOKENS = 16


class CannotServe(Exception):
    """The captured loop cannot do what is asked; the message says why."""


@dataclass(frozen=True)
class SamplingPlan:
    """What follows the logits in every step.

    Which kernels run is part of a captured graph (``graph_key``); the values are read from device memory.

    Attributes:
        kernel: "greedy", "top_k" (at most ``capacity`` candidates) or "full".
        capacity: of the "top_k" kernel, else 0.
        invalid_rule, invalid_token: rows with NaN or +inf become that token.
        penalty, ngram_size, minimum: repetition penalty, n-gram size and fewest ids; None for no such processor.
        minimum_eos: the tokens that ``minimum`` forbids.
        temperature, top_k, top_p: of the samplers; None where there is no such warper.
        penalised_from: first slot per row that the penalty counts, int64 [B]; None for all.
    """

    kernel: str = "greedy"
    capacity: int = 0
    invalid_rule: bool = False
    invalid_token: int = 5
    penalty: float | None = None
    ngram_size: int | None = None
    minimum: int | None = None
    minimum_eos: tuple[int, ...] = ()
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    penalised_from: torch.Tensor | None = None

    @property
    def graph_key(self) -> tuple:
        """What a captured graph depends on."""
        processors = (self.penalty is not None, self.ngram_size is not None, self.minimum is not None)
        warpers = (self.top_k is not None, self.top_p is not None) if self.kernel == "full" else ()
        return self.kernel, self.capacity, self.invalid_rule, self.invalid_token, processors, warpers

    @property
    def has_processors(self) -> bool:
        """Whether the scores differ from the logits before the sampler."""
        return self.penalty is not None or self.ngram_size is not None or self.minimum is not None


def _repetition_penalty(processor: Any, layout: PromptLayout) -> dict[str, Any]:
    ignored = getattr(processor, "prompt_ignore_length", None)
    if ignored is not None:
        # transformers 5 leaves a row's left padding out; a number is what the caller chose himself.
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
    """Reader of each known processor, by exact type, in the order in which transformers applies them."""
    from ..conversation.chat import InvalidScoreLogitsProcessor

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
    classes = {**vars(logits_process), "InvalidScoreLogitsProcessor": InvalidScoreLogitsProcessor}
    return {classes[name]: reader for name, reader in readers.items() if classes.get(name) is not None}


def plan_sampling(processors: Iterable[Any], do_sample: bool, layout: PromptLayout, vocab_size: int) -> SamplingPlan:
    """The plan that does what ``processors`` do.

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


class Sampler:
    """Runs a plan on logits [B, V]; its buffers live as long as the graphs that read them."""

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
        from ..ops import triton as kernels

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
