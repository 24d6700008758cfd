"""What one call of ``generate`` asks of the captured loop."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList

from ..generation.reading import pad_token, unfollowed_arguments, unfollowed_settings
from ..network.prompt_layout import PromptLayout
from ..ops.caches import cache_in
from .refusal import check_ends
from .sampler import MOST_END_TOKENS, CannotServe, SamplingPlan, plan_sampling

MOST_SEQUENCES = 128


@dataclass(frozen=True)
class Request:
    """A request that the captured loop can serve.

    Attributes:
        input_ids: int64 [B, L] on the model's device. attention_mask: [B, L] or None. layout: of the prompts.
        plan: what follows the logits.
        max_length: ids per sequence at which generation ends, prompt included.
        eos_ids: the end tokens. pad_id: what a sequence gets once it ended.
        has_end: whether ended sequences are padded, as transformers does where there are end tokens.
        others: the stopping criteria that only the host can evaluate.
        generator: source of the seed, or None for torch's default generator.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    layout: PromptLayout
    plan: SamplingPlan
    max_length: int
    eos_ids: tuple[int, ...]
    pad_id: int
    has_end: bool
    others: StoppingCriteriaList
    do_sample: bool
    generator: torch.Generator | None

    @classmethod
    def of(
        cls,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        model_kwargs: dict[str, Any],
    ) -> "Request":
        """Read the request off the arguments of transformers' ``_sample``.

        Raises:
            CannotServe: for what the loop cannot do; the message says why.
        """
        _check_mode(model, input_ids, generation_config, model_kwargs)
        check_ends(model)
        mask = model_kwargs.get("attention_mask")
        layout = PromptLayout.of(input_ids, model.config, mask)
        if layout.hidden_slots is not None:
            raise CannotServe("attention_mask hides tokens behind the start of a row")
        processors = [] if logits_processor is None else logits_processor
        plan = plan_sampling(processors, bool(generation_config.do_sample), layout, model.lm_head.weight.shape[0])
        limits = [c.max_length for c in stopping_criteria if type(c) is MaxLengthCriteria]
        if not limits:
            raise CannotServe("there is no max_length")
        ends = [c for c in stopping_criteria if type(c) is EosTokenCriteria]
        eos_ids = tuple(dict.fromkeys(int(token) for c in ends for token in c.eos_token_id.reshape(-1)))
        if len(eos_ids) > MOST_END_TOKENS:
            raise CannotServe(f"there are more than {MOST_END_TOKENS} end tokens")
        pad = pad_token(generation_config)
        return cls(
            input_ids=input_ids.to(model.lm_head.weight.device),
            attention_mask=mask if layout.is_padded else None,
            layout=layout,
            plan=plan,
            max_length=min(limits),
            eos_ids=eos_ids,
            pad_id=0 if pad is None else int(pad),
            has_end=any(hasattr(c, "eos_token_id") for c in stopping_criteria) and pad is not None,
            others=StoppingCriteriaList(
                c for c in stopping_criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)
            ),
            do_sample=bool(generation_config.do_sample),
            generator=model_kwargs.get("generator"),
        )

    def history(self) -> torch.Tensor:
        """The ids that the processors look at, int64 [B, L].

        Where the penalty leaves the padding out, a pad becomes the row's first token: a token that occurs twice is
        penalised once.
        """
        first_slot = self.plan.penalised_from
        if first_slot is None or not bool(first_slot.any()):
            return self.input_ids
        first_slot = first_slot[:, None].to(self.input_ids.device)
        slots = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        return torch.where(slots < first_slot, self.input_ids.gather(1, first_slot), self.input_ids)

    def seed(self) -> torch.Tensor:
        """A seed for the random numbers, int64 [1], drawn from the generator; greedy search draws none."""
        if not self.do_sample:
            return torch.zeros(1, dtype=torch.int64)
        device = "cpu" if self.generator is None else self.generator.device
        return torch.randint(2**62, (1,), generator=self.generator, device=device)


def _check_mode(model: Any, input_ids: torch.Tensor, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
    """Raise CannotServe for arguments that ask for something else than tokens from ids."""
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
