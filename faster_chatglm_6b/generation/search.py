"""Override the searches that ``generate()`` ends in, and send greedy search and sampling to the captured loop."""

import functools
from typing import Any

import torch
from transformers.generation.utils import GenerationMixin

from .. import report
from ..decoding.refusal import CannotServe
from ..decoding.shortage import memory_explained
from .paths import captured_ids, generate_ids, generate_tokens
from .reading import check_searches
from .states import take_states, with_states
from .streaming import no_single_next_token, streaming

check_searches(GenerationMixin)


class SearchMixin:
    """Overrides of the searches of transformers 4.45 and later."""

    def _beam_search(self, *args: Any, **kwargs: Any) -> Any:
        """Run transformers' beam search, unless the caller asks for a stream."""
        if streaming.get():
            raise no_single_next_token()
        report.record_generation("plain", "beam search")
        with memory_explained(self, args[0], kwargs["generation_config"].max_length):
            return super()._beam_search(*args, **kwargs)

    def _assisted_decoding(self, *args: Any, **kwargs: Any) -> Any:
        """Run assisted decoding, unless the caller asks for a stream.

        The captured loop drafts from the prompt itself, as ``prompt_lookup_num_tokens`` asks. If it cannot serve, and
        for other drafts, transformers' own search runs.
        """
        if not streaming.get() and _looks_up_only(kwargs):
            try:
                return self._look_up(*args, **kwargs)
            except CannotServe:
                pass
        if streaming.get():
            raise no_single_next_token()
        if self.config.pre_seq_len:
            raise ValueError(
                "Assisted decoding cuts the cache to the length of the sequence, which a P-Tuning prefix shifts; leave "
                "prompt_lookup_num_tokens and assistant_model out."
            )
        early_exit = getattr(kwargs["generation_config"], "assistant_early_exit", None)
        if early_exit is not None:
            raise ValueError(
                f"assistant_early_exit is {early_exit}, but this model has no early exits; leave it out, or draft with "
                "prompt_lookup_num_tokens or assistant_model."
            )
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                "Assisted decoding reads prompt and draft together, for which inputs_embeds hold no draft; leave "
                "inputs_embeds out, or prompt_lookup_num_tokens and assistant_model."
            )
        report.record_generation("plain", "assisted decoding")
        states = take_states(kwargs)
        with memory_explained(self, args[0], kwargs["generation_config"].max_length):
            output = super()._assisted_decoding(*args, **kwargs)
            return with_states(self, output, args[0].shape[1], states, kwargs) if states else output

    def _look_up(
        self,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        """Run the captured loop for the arguments of ``_assisted_decoding``.

        Raises:
            CannotServe: before the first token.
        """
        kept = {name: value for name, value in model_kwargs.items() if name not in _OF_ASSISTED_DECODING}
        arguments = (input_ids, logits_processor, stopping_criteria, generation_config, streamer)
        with memory_explained(self, input_ids, generation_config.max_length):
            return captured_ids(self, *arguments, _with_sync(kept, synced_gpus))

    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Run greedy search or sampling, which transformers sends here after it prepared and checked everything.

        The captured loop serves it if it can, else transformers' own; ``status()`` tells which and why.
        """
        arguments = (self, input_ids, logits_processor, stopping_criteria, generation_config, streamer)
        if streaming.get():
            return generate_tokens(*arguments, _with_sync(model_kwargs, synced_gpus))

        # No closure: when memory runs out, its frame could not release what it closes over.
        plain = functools.partial(
            super()._sample,
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **model_kwargs,
        )
        with memory_explained(self, input_ids, generation_config.max_length):
            return generate_ids(*arguments, _with_sync(model_kwargs, synced_gpus), plain)

    def release_cache(self) -> None:
        """Free the GPU memory that generation keeps between calls: key-value cache, buffers and captured graphs.

        A running generation ends first. The next one allocates them again.
        """
        # Without kernels there is no engine.
        engine = self.__dict__.get("_decode_engine")
        if engine is not None:
            engine.release()


# Arguments of transformers' assisted decoding that only its own drafts need.
_OF_ASSISTED_DECODING = {"assistant_model", "assistant_tokenizer", "candidate_generator", "inputs_tensor", "tokenizer"}


def _looks_up_only(arguments: dict[str, Any]) -> bool:
    """Tell whether drafts are to come from the ids alone."""
    config = arguments["generation_config"]
    others = (arguments.get("assistant_model"), getattr(config, "assistant_early_exit", None))
    return getattr(config, "prompt_lookup_num_tokens", None) is not None and others == (None, None)


def _with_sync(model_kwargs: dict[str, Any], synced_gpus: bool) -> dict[str, Any]:
    return {**model_kwargs, "synced_gpus": True} if synced_gpus else model_kwargs
