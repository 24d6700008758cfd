"""Describe what one generation asks of the captured loop, whatever arguments it was read from."""

# OneFlow's stand-in for torch.Generator is a function, which cannot stand in an annotation that is evaluated.
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..network.prompt_layout import PromptLayout

MOST_END_TOKENS = 16
# What ``speculate`` may be, and what it is if nobody says: ids of a draft at every step, or "auto", where they pay.
SPECULATE, SPECULATE_DEFAULT = (0, 3, 7, "auto"), "auto"
# The longest draft for up to so many sequences; more rows than these in all take longer than reading the weights.
MOST_DRAFTED = {4: 7, 16: 3}


@dataclass(frozen=True)
class SamplingPlan:
    """The steps from logits to tokens: processors, warpers and the sampler.

    A captured graph depends on which kernels run (``graph_key``). Their parameters are read from device memory. None
    stands for no such processor or warper.

    Attributes:
        kernel: "greedy", "top_k" (at most ``capacity`` candidates) or "full".
        capacity: of the "top_k" kernel, else 0.
        invalid_rule: whether rows with NaN or +inf become ``invalid_token``.
        invalid_token: the id that they become.
        penalty: repetition penalty.
        ngram_size: length of the n-grams that may not repeat.
        minimum: fewest ids of a sequence, prompt included.
        minimum_eos: the end tokens that ``minimum`` forbids.
        temperature: divides the scores.
        top_k: most candidates.
        top_p: probability that the candidates reach together.
        penalised_from: first slot per row that the penalty counts, int64 [B]; None for all.
        has_bias: whether rows add numbers to the scores of some ids.
        has_counts: whether rows subtract from the scores of tokens in their answers (OpenAI's penalties).
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
    has_bias: bool = False
    has_counts: bool = False

    @property
    def graph_key(self) -> tuple:
        """The part that a captured graph depends on."""
        processors = (self.penalty is not None, self.ngram_size is not None, self.minimum is not None)
        processors += (self.has_bias, self.has_counts)
        warpers = (self.top_k is not None, self.top_p is not None) if self.kernel == "full" else ()
        return self.kernel, self.capacity, self.invalid_rule, self.invalid_token, processors, warpers

    @property
    def has_processors(self) -> bool:
        """Whether the scores differ from the logits before the sampler."""
        return any(self.graph_key[4])


def check_speculate(speculate: object) -> None:
    """Raise ValueError unless ``speculate`` is None or one of ``SPECULATE``."""
    if speculate is None or (isinstance(speculate, (int, str)) and speculate in SPECULATE):
        return
    raise ValueError(
        f"speculate is {speculate!r}, but a step drafts 0, 3 or 7 ids; pass one of those, or 'auto' to draft where it "
        "pays."
    )


def drafts_for(speculate: int | str | None, batch: int, plan: SamplingPlan) -> tuple[int, bool]:
    """Return ``draft_tokens`` and ``draft_always`` of a request of ``batch`` sequences that asks for ``speculate``.

    Processors look at the ids before each token, which a draft does not have yet, so such requests get no drafts.
    """
    speculate = SPECULATE_DEFAULT if speculate is None else speculate
    most = next((drafted for rows, drafted in MOST_DRAFTED.items() if batch <= rows), 0)
    if plan.has_processors:
        most = 0
    return (most, False) if speculate == "auto" else (min(speculate, most), True)


@dataclass(frozen=True)
class Request:
    """A request that the captured loop can serve.

    Attributes:
        input_ids: int64 [B, L] on the model's device.
        layout: of the prompts.
        plan: the steps from logits to tokens.
        max_length: ids per sequence at which generation ends, prompt included.
        eos_ids: the end tokens.
        pad_id: fills sequences that ended.
        has_end: whether ended sequences are padded, as transformers does if there are end tokens.
        host_criteria: stopping criteria that only the host can evaluate, or None. Called with the ids, int64 [B, L],
            and None, they return the rows that end, bool [B].
        do_sample: whether tokens are drawn at random.
        generator: source of the seed, or None for torch's default generator.
        draft_tokens: ids of a draft, from ``drafts_for``; 0 for none.
        draft_always: whether every step verifies a draft, instead of those only where drafts have come true.
    """

    input_ids: torch.Tensor
    layout: PromptLayout
    plan: SamplingPlan
    max_length: int
    eos_ids: tuple[int, ...]
    pad_id: int
    has_end: bool
    host_criteria: Callable[[torch.Tensor, None], torch.Tensor] | None
    do_sample: bool
    generator: torch.Generator | None
    draft_tokens: int = 0
    draft_always: bool = False

    def history(self) -> torch.Tensor:
        """Return the ids that the processors look at, int64 [B, L].

        If the penalty leaves the padding out, a pad becomes the row's first token: a token that occurs twice is
        penalised once.
        """
        first_slot = self.plan.penalised_from
        if first_slot is None or not bool(first_slot.any()):
            return self.input_ids
        first_slot = first_slot[:, None].to(self.input_ids.device)
        slots = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        return torch.where(slots < first_slot, self.input_ids.gather(1, first_slot), self.input_ids)

    def seed(self) -> torch.Tensor:
        """Draw a seed for the random numbers from the generator, int64 [1]; greedy search draws none."""
        if not self.do_sample:
            return torch.zeros(1, dtype=torch.int64)
        device = "cpu" if self.generator is None else self.generator.device
        return torch.randint(2**62, (1,), generator=self.generator, device=device)
