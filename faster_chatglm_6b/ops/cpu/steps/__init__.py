"""The kernels of the captured loop's steps on a CPU, under the names and with the meaning of ``ops.triton``.

They run when they are called. C kernels serve where they can be compiled, PyTorch's own otherwise.
"""

from ...states import DecodeState, DraftState
from .attention import decode_attention, draft_attention
from .drafts import accept, propose
from .packed import packed_prompt_attention, packed_prompt_block, packed_rotary_concat
from .processors import copy_scores, logit_bias, min_length, no_repeat_ngram, repetition_penalty, token_count_penalty
from .products import (
    fused_linear_with_groupwise_quantized_weight,
    fused_matmul_bias,
    layer_norm_matmul_bias,
    layer_norm_quantized_linear,
)
from .prompt import prompt_attention, rotary_concat_past_key_value
from .rows import Workspace, embedding, skip_layer_norm
from .sampling import full_sample, greedy_sample, top_k_sample

# Nothing is captured, so rows and prompts are not padded either.
CAPTURES = False
# Four rows cost two to five times one row: a draft that fails now and then is a loss.
DRAFTS_PAY = False

__all__ = [
    "CAPTURES",
    "DRAFTS_PAY",
    "DecodeState",
    "DraftState",
    "Workspace",
    "accept",
    "copy_scores",
    "decode_attention",
    "draft_attention",
    "embedding",
    "full_sample",
    "fused_linear_with_groupwise_quantized_weight",
    "fused_matmul_bias",
    "greedy_sample",
    "layer_norm_matmul_bias",
    "layer_norm_quantized_linear",
    "logit_bias",
    "min_length",
    "no_repeat_ngram",
    "packed_prompt_attention",
    "packed_prompt_block",
    "packed_rotary_concat",
    "prompt_attention",
    "propose",
    "repetition_penalty",
    "rotary_concat_past_key_value",
    "skip_layer_norm",
    "token_count_penalty",
    "top_k_sample",
]
