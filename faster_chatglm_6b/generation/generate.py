"""Adapt transformers' ``generate()`` to a prefix LM, and stream its tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from transformers.generation.utils import GenerationMixin

from ..decoding.early import start_early
from ..decoding.request import check_speculate
from ..decoding.shortage import memory_returned
from ..layers.adapters import refuse_prompt_learning
from ..layers.placement import input_device
from ..network.arguments import check_embeddings, check_ids, check_mask, check_positions, highest_position
from ..network.prompt_layout import PromptLayout, cached_tokens
from ..ops.caches import CACHE_NAME, Cache, as_cache, cache_in, check_cache, check_cached_batch, take_cache
from .guidance import guided
from .reading import keep_layout, layout_of, prompt_kept, steps_watched, unnamed_arguments, watch_step
from .settings import GatheredSettings, asked_of, follow_settings, no_continuous_batching
from .streaming import no_single_next_token, streaming

if hasattr(GenerationMixin, "greedy_search") and not hasattr(GenerationMixin, "_sample"):  # transformers 4.27 to 4.29
    from .search_legacy import SearchMixin
else:
    from .search import SearchMixin


class PrefixGenerationMixin(SearchMixin):
    """Overrides of ``GenerationMixin``; stands before it among a model's bases."""

    def generate(self, inputs: torch.Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """Run transformers' ``generate`` after a check of the prompt.

        ``generator``, a ``torch.Generator``, makes sampling repeatable; the default is torch's own. The mask may be
        transformers' 2-D one or a stock tokenizer's 4-D one, with its position ids. A cache may be given as
        ``past_key_values`` or as ``cache``, whatever the installed transformers calls it. Hidden states and attentions
        have stock's layouts, see ``ChatGLMModel.forward``.

        The captured loop drafts ids from the prompt and the answer so far and verifies several in one step. By
        ``speculate`` it does so in every step (3 or 7 ids), in none (0), or, by default ("auto"), as many as pay and
        only where earlier drafts came true. The answer is the same, sampled ones too, up to near-ties. transformers'
        ``prompt_lookup_num_tokens`` asks for drafts in every step. Processors that look at earlier ids, criteria of the
        caller's own and more than 16 sequences go without.

        Raises:
            ValueError: no room for an answer, ids that are no ChatGLM prompt, a mask that ``generate`` cannot follow,
                a cache of another model or two caches, ``speculate`` of another value, or a search that cannot follow
                a prefix LM.
        """
        refuse_prompt_learning(self)
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        if input_ids is None:
            raise ValueError(
                "generate() needs input_ids of shape [batch, length] that hold the prompt (inputs_embeds may be given "
                "as well)."
            )
        check_ids(input_ids)
        check_speculate(kwargs.get("speculate"))
        if kwargs.get("cache_implementation") == "paged":
            raise no_continuous_batching()
        # If memory runs out, this frame stays with the exception, so it names only the caller's own tensors.
        # The caller's own decoding loop is not watched: it may begin again at every step.
        watched = steps_watched() if kwargs.get("custom_generate") is None else nullcontext()
        with memory_returned(), watched, prompt_kept():
            return super().generate(
                inputs,
                generation_config=generation_config,
                **self._prompt_arguments(input_ids, generation_config, kwargs),
            )

    def stream_generate(self, input_ids: torch.Tensor, **kwargs: Any) -> Iterator[torch.Tensor]:
        """Yield the sequences so far, int64 [B, prompt + tokens], once per token; arguments as in ``generate``.

        Rows that ended are filled with the pad id; the last item equals what ``generate`` returns.
        """
        tokens = self.stream_tokens(input_ids, **kwargs)
        return self._grow(input_ids, tokens)

    @staticmethod
    def _grow(input_ids: torch.Tensor, tokens: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        for token in tokens:
            input_ids = torch.cat((input_ids, token.to(input_ids.device)[:, None]), dim=1)
            yield input_ids

    def stream_tokens(self, input_ids: torch.Tensor, **kwargs: Any) -> Iterator[torch.Tensor]:
        """Return an iterator over the new tokens, int64 [B] on the CPU each; the call itself checks the arguments.

        Raises:
            ValueError: a search that does not go one token at a time (beams, assisted decoding); else as ``generate``.
        """
        reset = streaming.set(True)
        try:
            tokens = self.generate(input_ids, **kwargs)
        finally:
            streaming.reset(reset)
        if not isinstance(tokens, Iterator):
            raise no_single_next_token()
        return tokens

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        prompt_position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | None = None,
        generator: torch.Generator | None = None,
        speculate: int | str | None = None,
        cache: Cache | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the next forward's inputs: the ids of [B, L] that the cache does not hold, their positions and mask.

        They lie on the model's device, even if the ids do not.

        Args:
            past_key_values: the cache; one under a third name is found among ``kwargs``.
            cache: another name of ``past_key_values``.
            prompt_position_ids: the caller's own positions of the prompt; later tokens count on from them.
            generator, speculate: of ``generate``, named here so that transformers lets them through.
        """
        past_key_values = cache_in({"past_key_values": past_key_values, "cache": cache, **kwargs})
        past_length = cached_tokens(past_key_values, self.config)
        length = input_ids.shape[1]
        watch_step(length, past_length, self.config.use_cache if use_cache is None else use_cache)
        layout = layout_of(input_ids, self.config, attention_mask)
        position_ids = layout.position_ids(past_length, length, self.config.position_encoding_2d)
        if prompt_position_ids is not None:
            position_ids = _continued(prompt_position_ids, past_length, length)
        one_free_row = past_length == length - 1 and not layout.is_padded
        device = input_device(self, input_ids.device)
        model_inputs = {
            "input_ids": input_ids[:, past_length:].contiguous().to(device),
            "position_ids": position_ids.to(device),
            "attention_mask": None if one_free_row else layout.hidden(past_length, length).to(device),
            "past_key_values": past_key_values,
            "use_cache": use_cache,
        }
        if inputs_embeds is not None and past_length == 0 and inputs_embeds.shape[1] == length:
            model_inputs["inputs_embeds"] = inputs_embeds
        optional = {
            "logits_to_keep": logits_to_keep,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        model_inputs.update((name, value) for name, value in optional.items() if value is not None)
        return model_inputs

    def has_own_inputs(self) -> bool:
        """Tell whether a subclass or a library replaced ``prepare_inputs_for_generation``."""
        prepare = self.prepare_inputs_for_generation
        return getattr(prepare, "__func__", prepare) is not PrefixGenerationMixin.prepare_inputs_for_generation

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: transformers' continuous batching cannot follow a prefix LM.

        Raises:
            ValueError: always.
        """
        raise no_continuous_batching()

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse, as ``generate_batch`` does; transformers' servers call this."""
        raise no_continuous_batching()

    def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> Any:
        """Gather the settings of one call as transformers does, and adapt them to this model."""
        asked = asked_of(self, args, kwargs)
        gathered = self.__dict__.get("_gathered_settings")
        if gathered is not None and gathered.asked == asked:
            config, model_kwargs = gathered.again(kwargs)
        else:
            config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)
            self._gathered_settings = GatheredSettings.of(asked, kwargs, config, model_kwargs)
        follow_settings(config)
        return config, model_kwargs

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Add the cache of one call as transformers does.

        A default cache fills itself with layers, for which transformers 5 reads the configuration once per layer.
        """
        asked = generation_config.cache_implementation is not None or generation_config.use_cache is False
        if asked or cache_in(model_kwargs) is not None:
            return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        model_kwargs[CACHE_NAME] = as_cache(None, True)
        return None

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:
        """Gather the processors of one call as transformers does, but with our guidance."""
        processors = super()._get_logits_processor(*args, **kwargs)
        prompts = kwargs.get("encoder_input_ids")
        return guided(processors, self, 1 if prompts is None else prompts.shape[0])

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Prepare the arguments of the next step as transformers does, but always with the cache."""
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        cache = getattr(outputs, CACHE_NAME, None)
        if cache is not None and cache_in(model_kwargs) is None:
            model_kwargs[CACHE_NAME] = cache
        return model_kwargs

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """Refuse unused arguments as transformers does, but accept a cache under any of its names."""
        model_kwargs = dict(model_kwargs)
        take_cache(model_kwargs)
        if unnamed_arguments(self, model_kwargs):
            super()._validate_model_kwargs(model_kwargs)

    def _prepare_position_ids_for_generation(self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]) -> None:
        """Return None: the ids give the positions at every step (transformers 5 would count all axes on by one)."""
        return None

    def _prompt_arguments(
        self, input_ids: torch.Tensor, generation_config: Any, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Check and start the prompt, and translate stock's mask and positions for transformers' ``generate``."""
        kwargs = dict(kwargs)
        mask, position_ids = kwargs.get("attention_mask"), kwargs.pop("position_ids", None)
        if getattr(generation_config, "is_assistant", False):
            # A main model of another class passes on positions of its own kind.
            position_ids = None
        cache = take_cache(kwargs)
        if cache is not None:
            kwargs[CACHE_NAME] = cache = as_cache(cache, True)
            self._check_cache(cache, input_ids)
        if isinstance(cache, Cache):
            # Newer transformers set the mark themselves: the caller expects to find the cache filled.
            cache._is_user_defined = True
        if kwargs.get("inputs_embeds") is not None:
            check_embeddings(kwargs["inputs_embeds"], input_ids, self.config.hidden_size)
        if mask is not None:
            check_mask(mask, *input_ids.shape, input_ids.shape[1])
        if mask is not None and mask.dim() == 4:
            kwargs["attention_mask"] = _padding_of(mask, input_ids, self.config)
        layout = PromptLayout.of(input_ids, self.config, kwargs.get("attention_mask"))
        if kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = layout.attention_mask(input_ids)
        keep_layout(input_ids, kwargs["attention_mask"], layout)
        if position_ids is not None:
            check_positions(position_ids, *input_ids.shape, self.config.position_encoding_2d)
            derived = layout.position_ids(0, input_ids.shape[1], self.config.position_encoding_2d)
            position_ids = position_ids.expand(derived.shape)
            highest_position(position_ids, None, self.config.vocab_size)
            if not torch.equal(position_ids.long().cpu(), derived):
                kwargs["prompt_position_ids"] = position_ids
        self._check_trained_length(input_ids.shape[1] - min(layout.first_slot.tolist()))
        _check_room(input_ids.shape[1], generation_config, kwargs)
        # A stream computes nothing before its first token is asked for.
        if not streaming.get():
            start_early(self, input_ids, layout)
        return kwargs

    def _check_cache(self, cache: Any, input_ids: torch.Tensor) -> None:
        layers = getattr(self.transformer, "layers", None)
        check_cache(cache, self.config, self.config.num_layers if layers is None else len(layers))
        length = cached_tokens(cache, self.config)
        if length:
            check_cached_batch(cache, input_ids)
        if length >= input_ids.shape[1]:
            raise ValueError(
                f"The cache holds {length} tokens, but input_ids have only {input_ids.shape[1]}; pass the whole "
                "sequence, with at least one token that the cache does not hold yet."
            )

    def _check_trained_length(self, length: int) -> None:
        limit = self.config.max_sequence_length
        if length > limit:
            raise ValueError(
                f"The prompt has {length} tokens, but this model was trained for at most {limit}; shorten the "
                "query or drop the oldest rounds of the history."
            )


def _check_room(length: int, generation_config: Any, kwargs: dict[str, Any]) -> None:
    """Raise ValueError if prompts of ``length`` slots fill the call's ``max_length``."""
    max_length, max_new_tokens = (
        getattr(generation_config, name, None) if kwargs.get(name) is None else kwargs[name]
        for name in ("max_length", "max_new_tokens")
    )
    if max_length is None or max_new_tokens is not None or length < max_length:
        return
    # Nobody asked for a config's max_length that is the default of its class.
    if kwargs.get("max_length") is not None or max_length != type(generation_config)().max_length:
        raise no_room(length, max_length)


def no_room(length: int, max_length: int) -> ValueError:
    """Return the error for a prompt of ``length`` tokens that fills ``max_length``."""
    return ValueError(
        f"The prompt has {length} tokens and max_length is {max_length}, which leaves no room for an answer; "
        "raise max_length, shorten the query or drop the oldest rounds of the history."
    )


def _continued(prompt_position_ids: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Return positions of the slots ``start`` to ``stop``; after the prompt's given ones, the last axis counts on."""
    given = prompt_position_ids.cpu()
    steps = torch.arange(1, stop - given.shape[-1] + 1)
    later = given[..., -1:].repeat(*[1] * (given.dim() - 1), steps.shape[0])
    if given.dim() == 3:
        later[:, 1] += steps
    else:
        later += steps
    return torch.cat((given, later), dim=-1)[..., start:stop]


def _padding_of(mask: torch.Tensor, input_ids: torch.Tensor, config: Any) -> torch.Tensor:
    """Return the 2-D mask that corresponds to the stock tokenizer's 4-D one.

    Raises:
        ValueError: the 4-D mask does not follow from the ids and a left padding.
    """
    length = input_ids.shape[1]
    if mask.shape == (input_ids.shape[0], 1, length, length):
        padding = (~mask[:, 0, -1].bool()).long()
        layout = PromptLayout.of(input_ids, config, padding)
        rows = torch.arange(length) >= layout.first_slot[:, None]
        expected = layout.hidden(0, length)[:, 0]
        if torch.equal(mask[:, 0].bool().cpu()[rows], expected[rows]):
            return padding.to(input_ids.device)
    raise ValueError(
        f"attention_mask has shape {list(mask.shape)} and is not the mask that the tokenizer makes for these ids; "
        "generate() follows padding only: pass a mask [batch, length] with 0 for padding."
    )
