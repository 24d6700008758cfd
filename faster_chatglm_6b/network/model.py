"""Define the network with and without its head, by the checkpoint's parameter names; every product is an operator."""

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from ..checkpoint.loading import CheckpointMixin
from ..configuration_chatglm import ChatGLMConfig
from ..layers.adapters import PROMPT_LEARNING, AdapterHost
from ..layers.linear import normalise, project
from ..layers.placement import execution_device
from ..layers.prefix_encoder import PrefixEncoder
from ..layers.rotary import RotaryTable
from ..ops import operators_for
from ..ops.caches import CACHE_NAME, CACHE_NAMES, Cache, as_cache, cache_in, check_cache, check_cached_batch
from .arguments import check_inputs, check_labels, highest_position
from .blocks import GLMBlock, Step
from .prompt_layout import PromptLayout, cached_tokens, causal_hidden
from .quantization import prepare_quantized
from .stock_names import StockModelNames, StockNetworkNames
from .training import TrainingMixin, batch_first, check_loss_arguments


class ChatGLMPreTrainedModel(CheckpointMixin, StockModelNames, PreTrainedModel):
    """Base of both models: what transformers' loaders need."""

    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GLMBlock"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$"]
    _supports_sdpa = True
    _supports_cache_class = True

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise only a P-Tuning prefix, which a checkpoint may lack, to be trained or loaded afterwards.

        Other weights come from the checkpoint, and a fresh model keeps PyTorch's own initialisation.
        """
        if isinstance(module, PrefixEncoder):
            module.reset_parameters()

    # Not reentrant unless the caller asks for it: gradients reach a P-Tuning prefix past the layers' inputs.
    def _checkpointing_arguments(self, given: dict | None) -> dict:
        if self.config.pre_seq_len and given and given.get("use_reentrant"):
            raise ValueError(
                "use_reentrant=True cannot train a P-Tuning prefix, whose gradients pass the layers' inputs by; leave "
                "it out or pass use_reentrant=False."
            )
        return given or {"use_reentrant": False}

    if hasattr(PreTrainedModel, "activation_checkpointing_enable"):

        def activation_checkpointing_enable(
            self, activation_checkpointing_kwargs: dict | None = None, every_n_layers: int = 1, offload: bool = False
        ) -> None:
            """Enable gradient checkpointing, under transformers' name since 5.24."""
            kwargs = self._checkpointing_arguments(activation_checkpointing_kwargs)
            super().activation_checkpointing_enable(kwargs, every_n_layers, offload)
            self.base_model.checkpointed_every = every_n_layers
    else:

        def gradient_checkpointing_enable(
            self, gradient_checkpointing_kwargs: dict | None = None, **kwargs: object
        ) -> None:
            """Enable gradient checkpointing."""
            checkpointing_kwargs = self._checkpointing_arguments(gradient_checkpointing_kwargs)
            super().gradient_checkpointing_enable(checkpointing_kwargs, **kwargs)
            self.base_model.checkpointed_every = kwargs.get("every_n_layers", 1)


class ChatGLMModel(StockNetworkNames, ChatGLMPreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: ChatGLMConfig, empty_init: bool = True):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(GLMBlock(config, layer_id) for layer_id in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.rotary = RotaryTable(config.head_size // 2 if config.position_encoding_2d else config.head_size)
        self.gradient_checkpointing, self.checkpointed_every = False, 1
        if config.pre_seq_len:
            self.prefix_encoder = PrefixEncoder(config)
        self.freeze_below_prefix()
        self.post_init()

    def freeze_below_prefix(self) -> None:
        """Leave only the P-Tuning prefix trainable, if there is one, as stock does."""
        if self.config.pre_seq_len:
            self.requires_grad_(False)
            self.prefix_encoder.requires_grad_(True)

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the embedding of the tokens."""
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding of the tokens."""
        self.word_embeddings = value

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | tuple | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | tuple | None = None,
    ) -> BaseModelOutputWithPast | tuple:
        """Run the network; outputs have stock's layouts.

        Args:
            input_ids: int64 [B, M]; may be left out if ``inputs_embeds``, ``position_ids`` and a 4-D mask are given.
            position_ids: int64 [B, 2, M] (or [B, M] without 2-D positions); derived from input_ids if left out.
            attention_mask: [B, T] with 0 for padding, or bool [B, 1, M, T] with True where hidden. If left out, it
                follows from input_ids, where a run of pad ids at the start of a row is padding.
            past_key_values: a transformers ``Cache``, or stock's tuple of (key, value) [T, B, H, K].
            cache: another name of past_key_values, since transformers 5.24.
            inputs_embeds: [B, M, hidden], used instead of the embedding of input_ids.

        Returns:
            ``last_hidden_state`` and each of ``hidden_states`` [M, B, hidden]; ``attentions`` [B * H, M, T].

        Raises:
            ValueError: arguments that do not fit together; see ``PromptLayout.of`` for bad ids.
        """
        use_cache = self.config.use_cache if use_cache is None else use_cache
        checkpointing = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        # A recomputed layer would append its keys a second time.
        use_cache = use_cache and not checkpointing
        return_dict = self.config.return_dict if return_dict is None else return_dict
        output_attentions = bool(self.config.output_attentions if output_attentions is None else output_attentions)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        given = cache_in({"past_key_values": past_key_values, "cache": cache})
        cache = as_cache(given, use_cache)
        if given is not None:
            check_cache(cache, self.config, len(self.layers))
        past_length = cached_tokens(cache, self.config)
        check_inputs(input_ids, inputs_embeds, position_ids, attention_mask, self.config, past_length)
        if past_length:
            check_cached_batch(cache, input_ids if inputs_embeds is None else inputs_embeds)
        # Deriving positions from the ids checks the ids.
        unchecked_ids = input_ids if inputs_embeds is None and position_ids is not None else None
        position_ids, hidden, layout = self._positions_and_mask(
            input_ids, position_ids, attention_mask, inputs_embeds, past_length
        )
        highest = highest_position(position_ids, unchecked_ids, self.config.vocab_size)
        hidden_states = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        device, dtype = hidden_states.device, hidden_states.dtype
        devices = [execution_device(layer, device) for layer in self.layers]
        differentiable = torch.is_grad_enabled()
        tables = {place: operators_for(place, dtype, self.config.head_size, differentiable) for place in set(devices)}
        context_length = None
        if layout is not None:
            needs_bias = output_attentions or not all(table.prompts_need_no_bias for table in tables.values())
            hidden, context_length = _mask_of_prompt(layout, position_ids.shape[-1], needs_bias)
        attended = cache
        if self.config.pre_seq_len:
            hidden = None if hidden is None else self.prefix_encoder.show(hidden)
            context_length = None if context_length is None else context_length + self.config.pre_seq_len
            if past_length == 0:
                attended = self.prefix_encoder.placed_in(cache, hidden_states.shape[0], dtype, devices)
        cos, sin = self.rotary.get(highest + 1, device, dtype)
        step = Step(
            position_ids=position_ids.to(device),
            cos=cos,
            sin=sin,
            attn_bias=None if hidden is None else _additive(hidden, device, dtype),
            prefix_length=context_length,
            past_key_values=attended,
            output_attentions=output_attentions,
        )
        all_hidden_states, all_attentions = [], []
        for index, (layer, place) in enumerate(zip(self.layers, devices, strict=True)):
            if output_hidden_states:
                all_hidden_states.append(hidden_states)
            # Its place, not the number that it was made with: users drop and move layers.
            own_step = Step(step, layer_id=index)
            if checkpointing and index % self.checkpointed_every == 0:
                hidden_states, probabilities = self._gradient_checkpointing_func(
                    layer.__call__, hidden_states, tables[place], own_step
                )
            else:
                hidden_states, probabilities = layer(hidden_states, tables[place], own_step)
            all_attentions.append(probabilities)
        hidden_states = normalise(self.final_layernorm, hidden_states, tables[devices[-1]])
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden_states if batch_first.get() else hidden_states.transpose(0, 1),
            **{CACHE_NAME: cache if use_cache else None},
            hidden_states=tuple(h.transpose(0, 1) for h in (*all_hidden_states, hidden_states))
            if output_hidden_states
            else None,
            attentions=tuple(all_attentions) if output_attentions else None,
        )
        return output if return_dict else output.to_tuple()

    def _positions_and_mask(
        self,
        input_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        past_length: int,
    ) -> tuple[torch.Tensor, torch.Tensor | None, PromptLayout | None]:
        """Return positions, the bool mask of hidden keys or None, and the layout if the mask follows from it."""
        length = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        is_dense = attention_mask is not None and attention_mask.dim() == 4
        if past_length:
            if position_ids is None:
                raise ValueError(
                    "position_ids are missing: with past_key_values they cannot be derived from the new tokens alone; "
                    f"pass them, or use generate(). {PROMPT_LEARNING}"
                )
            hidden = attention_mask.bool() if is_dense else causal_hidden(past_length, length, attention_mask)
            return position_ids, hidden, None
        if position_ids is not None and is_dense:
            return position_ids, attention_mask.bool(), None
        if input_ids is None:
            raise ValueError(
                "inputs_embeds alone do not tell where the context ends; pass input_ids with them, or position_ids "
                f"and a bool attention_mask of shape [batch, 1, length, length]. {PROMPT_LEARNING}"
            )
        layout = PromptLayout.of(input_ids, self.config, None if is_dense else attention_mask)
        if position_ids is None:
            position_ids = layout.position_ids(0, length, self.config.position_encoding_2d)
        if is_dense:
            return position_ids, attention_mask.bool(), None
        return position_ids, None, layout


class ChatGLMWithHead(TrainingMixin, AdapterHost, ChatGLMPreTrainedModel):
    """Network with its output head, and the loss."""

    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}

    def __init__(self, config: ChatGLMConfig, empty_init: bool = True):
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        prepare_quantized(self)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        """Return the output head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the output head."""
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | tuple | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        cache: Cache | tuple | None = None,
    ) -> CausalLMOutputWithPast | tuple:
        """Run the network and the head; arguments as in ``ChatGLMModel.forward``.

        Args:
            labels: int64 [B, M], -100 where the loss does not count; shifted by one inside.
            logits_to_keep: compute the logits of the last rows only; 0 for all.
            num_items_in_batch: divisor of the loss, the labels that count in all accumulated batches.

        Returns:
            ``logits`` [B, M, vocab_size]; ``loss``, the cross entropy of ``token_loss`` if labels are given.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        if labels is not None:
            check_labels(labels, input_ids if inputs_embeds is None else inputs_embeds, self.config.vocab_size)
        outputs = self.transformer(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=cache_in({"past_key_values": past_key_values, "cache": cache}),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        hidden_states = outputs.last_hidden_state.transpose(0, 1)[:, -logits_to_keep:]
        ops = operators_for(
            hidden_states.device, hidden_states.dtype, self.config.head_size, differentiable=torch.is_grad_enabled()
        )
        logits = project(self.lm_head, hidden_states, ops)
        check_loss_arguments(labels, num_items_in_batch)
        loss = None
        if labels is not None:
            loss = self.token_loss(logits, input_ids, labels, num_items_in_batch)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if return_dict else output.to_tuple()


def _mask_of_prompt(layout: PromptLayout, length: int, needs_bias: bool) -> tuple[torch.Tensor | None, int | None]:
    """Return the bool mask of hidden keys, and the context's length if all rows share it.

    The mask of a long prompt takes the host milliseconds. Operators that need no bias do without it if only the last
    row is not context.
    """
    context_length = layout.common_prefix
    if context_length == length - 1 and not needs_bias:
        return None, context_length
    return layout.hidden(0, length), context_length


def _additive(hidden: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return the bias that hides keys: the lowest finite value, and not -inf.

    So a row that sees nothing (a pad) attends evenly, as in stock, and never turns into NaN.
    """
    bias = torch.zeros(hidden.shape, dtype=dtype, device=device)
    return bias.masked_fill_(hidden.to(device), torch.finfo(dtype).min)
