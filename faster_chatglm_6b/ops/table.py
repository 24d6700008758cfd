"""Define the table of operators that a model calls, and make the one that serves each by its definition."""

from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields

from . import reference


@dataclass(frozen=True)
class Operators:
    """One callable per operator, and why it was chosen.

    Attributes:
        choices: {operator: (implementation, reason)}, for ``faster_chatglm_6b.status()``.
        prompts_need_no_bias: attention follows ``prefix_length`` alone if all rows but the last are context.
    """

    fast_gelu: Callable
    fused_apply_rotary_emb: Callable
    fused_attention_concat_past_key_value: Callable
    fused_multi_head_attention_inference_v2: Callable
    fused_fast_gelu_mul: Callable
    fused_matmul_bias: Callable
    skip_layer_norm: Callable
    fused_linear_with_groupwise_quantized_weight: Callable
    choices: dict[str, tuple[str, str]] = field(default_factory=dict, compare=False)
    prompts_need_no_bias: bool = False


OPERATOR_NAMES = tuple(
    one.name for one in fields(Operators) if one.default is MISSING and one.default_factory is MISSING
)


def reference_operators(reason: str) -> Operators:
    """Return the table that serves every operator by its definition; ``reason`` says why nothing faster does."""
    return Operators(
        **{name: getattr(reference, name) for name in OPERATOR_NAMES},
        choices={name: ("reference", reason) for name in OPERATOR_NAMES},
    )
