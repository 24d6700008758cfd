"""Define the layers of the network with the checkpoint's parameter names: attention, MLP and block."""

import math
from typing import Any

import torch
from torch import nn

from ..configuration_chatglm import ChatGLMConfig
from ..layers.adapters import AdapterHost
from ..layers.linear import is_hooked, normalise, project, with_residual
from ..ops import Operators, operators_for
from ..ops.reference import attention_probabilities
from .stock_names import StockAttentionNames

# The residual weight of every checkpoint, whatever its num_layers: stock never overrides GLMBlock's default depth, 28.
RESIDUAL_ALPHA = math.sqrt(2 * 28)


class Step(dict):
    """Arguments that all layers of one forward share, and layer_id, the layer's place.

    The shared ones are position_ids, cos, sin, attn_bias, prefix_length, past_key_values and output_attentions. It is a
    dict, so that accelerate moves its tensors to each layer's device.
    """

    def __getattr__(self, name: str) -> object:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class SelfAttention(StockAttentionNames, AdapterHost):
    """Multi-head attention over a packed projection that holds [q k v] head by head."""

    def __init__(self, config: ChatGLMConfig, layer_id: int):
        super().__init__()
        self.layer_id = layer_id
        self.head_size, self.num_attention_heads = config.head_size, config.num_attention_heads
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, ops: Operators, step: Step, residual: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return attention over hidden_states [B, M, hidden], and its probabilities [B * H, M, T] or None.

        The first includes RESIDUAL_ALPHA * residual, if there is one.
        """
        packed = project(self.query_key_value, hidden_states, ops)
        batch, rows, width = packed.shape
        rotary = {"position_ids": step.position_ids, "cos": step.cos, "sin": step.sin, "k_size": self.head_size}
        query = ops.fused_apply_rotary_emb(packed, tensor_index=0, **rotary)
        key = ops.fused_apply_rotary_emb(packed, tensor_index=1, **rotary)
        value = packed.view(batch, rows, width // (3 * self.head_size), 3, self.head_size)[:, :, :, 2].transpose(1, 2)
        key, value = ops.fused_attention_concat_past_key_value(step.past_key_values, key, value, step.layer_id)
        context = ops.fused_multi_head_attention_inference_v2(
            query=query, key=key, value=value, attn_bias=step.attn_bias, prefix_length=step.prefix_length
        )
        probabilities = None
        if step.output_attentions:
            # Computed apart, because the operator's fused implementations never form the probabilities.
            probabilities = attention_probabilities(query, key, step.attn_bias).flatten(0, 1)
        return project(self.dense, context, ops, residual, RESIDUAL_ALPHA), probabilities

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
        # Stock's checkpoints hold it, although stock computes it again. ``state_dict`` is a copy.
        state_dict.pop(f"{prefix}rotary_emb.inv_freq", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class GLU(AdapterHost):
    """The MLP, not gated despite its name in the checkpoint's code."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.head_size = config.head_size
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, ops: Operators | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Map hidden_states [B, M, hidden] to MLP(hidden_states) + RESIDUAL_ALPHA * residual, if there is one.

        A wrapper calls it without ``ops``: they are then those of hidden_states' device and dtype.
        """
        if ops is None:
            ops = operators_for(
                hidden_states.device, hidden_states.dtype, self.head_size, differentiable=torch.is_grad_enabled()
            )
        inner = ops.fast_gelu(project(self.dense_h_to_4h, hidden_states, ops))
        return project(self.dense_4h_to_h, inner, ops, residual, RESIDUAL_ALPHA)


class GLMBlock(nn.Module):
    """One layer. The residuals start from the normalised input, as in DeepNorm (Wang et al. 2022)."""

    def __init__(self, config: ChatGLMConfig, layer_id: int):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = SelfAttention(config, layer_id)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = GLU(config)

    def forward(
        self, hidden_states: torch.Tensor, ops: Operators, step: Step
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Map hidden_states [B, M, hidden] to the same shape, and the attention's probabilities or None.

        Attention and MLP add the residual in their last product, unless a hook or a wrapper must see their own output.
        """
        normed = normalise(self.input_layernorm, hidden_states, ops)
        if _adds_residual(self.attention, SelfAttention):
            hidden_states, probabilities = self.attention(normed, ops, step, normed)
        else:
            hidden_states, probabilities = self.attention(normed, ops, step)
            hidden_states = with_residual(hidden_states, normed, RESIDUAL_ALPHA)
        normed = normalise(self.post_attention_layernorm, hidden_states, ops)
        if _adds_residual(self.mlp, GLU):
            return self.mlp(normed, ops, normed), probabilities
        # Called with one argument, which every MLP takes.
        return with_residual(self.mlp(normed), normed, RESIDUAL_ALPHA), probabilities


def _adds_residual(module: nn.Module, kind: type) -> bool:
    return type(module) is kind and not is_hooked(module)
