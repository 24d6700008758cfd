"""Apply classifier-free guidance (``guidance_scale``; Sanchez et al. 2023) to the prompts of a prefix LM.

transformers' own processor feeds only the prompt's last token, and later one token at a time without positions. That
breaks every ChatGLM prompt.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.generation import logits_process
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

from ..network.arguments import check_ids
from ..network.prompt_layout import PromptLayout
from ..ops.caches import CACHE_NAME

# transformers 4.27 has none.
_THEIRS = getattr(logits_process, "UnbatchedClassifierFreeGuidanceLogitsProcessor", ())


class PrefixGuidanceLogitsProcessor(LogitsProcessor):
    """Compute scores ``g * log p(x | prompt) + (1 - g) * log p(x | negative prompt)``.

    Args:
        guidance_scale: g; above 1, answers keep closer to the prompt.
        model: a ``ChatGLMForConditionalGeneration``.
        negative_prompt_ids: int64 [B or 1, N], prompts of the model. None: the prompt without its context, that is
            [gMASK] or [MASK], <sop> and the rest.
        negative_prompt_attention_mask: [B or 1, N], 0 for padding.
        use_cache: keep the keys of the negative prompt from token to token.

    Raises:
        ValueError: ``negative_prompt_ids`` that are no prompts, or of another batch.
    """

    def __init__(
        self,
        guidance_scale: float,
        model: Any,
        negative_prompt_ids: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        use_cache: bool = True,
    ):
        self.guidance_scale, self._model, self._use_cache = guidance_scale, model, use_cache
        self._negative, self._mask = negative_prompt_ids, negative_prompt_attention_mask
        self._prompt_length = None
        self._cache, self._cached_ids = None, None
        if negative_prompt_ids is not None:
            check_ids(negative_prompt_ids)
            PromptLayout.of(negative_prompt_ids, model.config, negative_prompt_attention_mask)

    def check_batch(self, batch: int) -> None:
        """Raise ValueError unless there is one negative prompt, or one for each of ``batch`` prompts."""
        if self._negative is not None and self._negative.shape[0] not in (1, batch):
            raise ValueError(
                f"There are {self._negative.shape[0]} negative prompts, but {batch} prompts; pass one, or one for each."
            )

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the guided log probabilities [B, vocab_size] for the next token of input_ids [B, L]."""
        if self._prompt_length is None:
            self._begin(input_ids)
        scores = torch.log_softmax(scores, dim=-1)
        answer = input_ids[:, self._prompt_length :]
        other = torch.log_softmax(self._logits(answer).to(scores), dim=-1)
        return self.guidance_scale * (scores - other) + other

    def _begin(self, prompt: torch.Tensor) -> None:
        self._prompt_length = prompt.shape[1]
        if self._negative is None:
            self._negative, self._mask = _without_context(prompt, self._model.config)
        if self._mask is None:
            self._mask = (torch.arange(self._negative.shape[1]) >= self._first_slots()[:, None]).long()
        # Beams and several answers to one prompt are neighbouring rows.
        repeats = prompt.shape[0] // self._negative.shape[0]
        self._negative, self._mask = (
            one.to(prompt.device).repeat_interleave(repeats, dim=0) for one in (self._negative, self._mask)
        )

    def _first_slots(self) -> torch.Tensor:
        return PromptLayout.of(self._negative, self._model.config).first_slot

    def _logits(self, answer: torch.Tensor) -> torch.Tensor:
        """Compute logits [B, vocab_size] after the negative prompt and the answer so far."""
        ids = torch.cat((self._negative, answer), dim=1)
        mask = torch.cat((self._mask, self._mask.new_ones(answer.shape)), dim=1)
        # Beam search changes the rows, and assisted decoding takes tokens back: the cache is of no use then.
        if self._cached_ids is None or not torch.equal(self._cached_ids, ids[:, :-1]):
            self._cache = None
        with torch.no_grad():
            inputs = self._model.prepare_inputs_for_generation(
                ids, past_key_values=self._cache, attention_mask=mask, use_cache=self._use_cache, logits_to_keep=1
            )
            outputs = self._model(**inputs, return_dict=True)
        if self._use_cache:
            self._cache, self._cached_ids = getattr(outputs, CACHE_NAME), ids
        return outputs.logits[:, -1]


def _without_context(prompt: torch.Tensor, config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask [B, N], padded on the left, of the prompts without their context."""
    layout = PromptLayout.of(prompt, config)
    rows = []
    for ids, sop, has_gmask in zip(prompt.tolist(), layout.sop_slot.tolist(), layout.has_gmask.tolist(), strict=True):
        rows.append([config.gmask_token_id if has_gmask else config.mask_token_id, *ids[sop:]])
    longest = max(map(len, rows))
    padded = [[config.pad_token_id] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(padded), torch.tensor(mask)


def guided(processors: Any, model: Any, batch: int) -> LogitsProcessorList:
    """Return the processors with ours in the place of transformers' own guidance of this model.

    Raises:
        ValueError: as in ``PrefixGuidanceLogitsProcessor``.
    """
    return LogitsProcessorList(_ours(one, model, batch) if isinstance(one, _THEIRS) else one for one in processors)


def _ours(theirs: Any, model: Any, batch: int) -> Any:
    if theirs.model is not model:
        return theirs
    given = theirs.unconditional_context
    ours = PrefixGuidanceLogitsProcessor(
        theirs.guidance_scale, model, given["input_ids"], given["attention_mask"], given["use_cache"]
    )
    ours.check_batch(batch)
    return ours
