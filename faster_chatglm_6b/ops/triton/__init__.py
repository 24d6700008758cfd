"""Triton kernels for NVIDIA GPUs and the functions that launch them. Importing this package needs Triton.

A CUDA graph can capture every function: none synchronises, and none allocates if ``out`` and ``workspace`` are given.
On compute capability 9.0 and later, kernels are launched before their predecessor ends and wait inside.
"""

from ..states import DecodeState, DraftState
from .decode_attention import decode_attention
from .embedding import embedding
from .fast_gelu import fast_gelu
from .fused_apply_rotary_emb import fused_apply_rotary_emb
from .fused_fast_gelu_mul import fused_fast_gelu_mul
from .linear.fused_matmul_bias import fused_matmul_bias, layer_norm_matmul_bias
from .packed.prompt_attention import packed_prompt_attention, packed_prompt_block
from .packed.rotary_concat import packed_rotary_concat
from .prompt_attention import prompt_attention
from .quantized.fused_linear_with_groupwise_quantized_weight import (
    fused_linear_with_groupwise_quantized_weight,
    layer_norm_quantized_linear,
)
from .rotary_concat_past_key_value import rotary_concat_past_key_value
from .sampling.full import full_sample
from .sampling.greedy import greedy_sample
from .sampling.penalties import logit_bias, token_count_penalty
from .sampling.processors import copy_scores, min_length, no_repeat_ngram, repetition_penalty
from .sampling.top_k import top_k_sample
from .skip_layer_norm import skip_layer_norm
from .speculation.accept import accept
from .speculation.draft_attention import draft_attention
from .speculation.propose import propose
from .workspace import Workspace

# Whether CUDA graphs may hold these functions: rows and prompts are then padded to a few sizes.
CAPTURES = True
# Whether steps of several positions pay where drafts come true now and then.
DRAFTS_PAY = True

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
    "fast_gelu",
    "full_sample",
    "fused_apply_rotary_emb",
    "fused_fast_gelu_mul",
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
