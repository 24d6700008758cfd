"""The operators on OneFlow's fused kernels (``oneflow._C``), as far as the installed OneFlow can be trusted with them.

OneFlow 0.9.0 has three of the eight, builds from 2023-04-09 on and 1.0 have all; their kernels run on CUDA only. Two
guards stand before a kernel. The table of its contract covers presence, device, dtype, and for attention the GPU,
because it ends the process on others. One small trial against the definition is made with a model's table.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from ..oneflow_compat import ATTENTION_CAPABILITIES
from . import reference
from .caches import ListCache
from .oneflow_trials import failure_of
from .table import OPERATOR_NAMES, Operators

_HALF, _BFLOAT16, _FLOAT, _DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
# The dtypes that the kernels are compiled for, by the registrations in OneFlow 1.0.0's sources.
DTYPES = {
    "fast_gelu": (_HALF, _BFLOAT16, _FLOAT, _DOUBLE),
    "fused_apply_rotary_emb": (_HALF, _BFLOAT16, _FLOAT),
    "fused_attention_concat_past_key_value": (_HALF, _BFLOAT16, _FLOAT, _DOUBLE),
    "fused_multi_head_attention_inference_v2": (_HALF, _FLOAT),
    "fused_fast_gelu_mul": (_HALF, _BFLOAT16, _FLOAT, _DOUBLE),
    "fused_matmul_bias": (_HALF, _BFLOAT16, _FLOAT, _DOUBLE),
    "skip_layer_norm": (_HALF, _BFLOAT16, _FLOAT, _DOUBLE),
    "fused_linear_with_groupwise_quantized_weight": (_HALF, _FLOAT),
}
ATTENTION = "fused_multi_head_attention_inference_v2"


class Capabilities(NamedTuple):
    """The fused operators that the installed OneFlow has; ``has_beta``: fused_matmul_bias takes ``beta``."""

    version: str
    names: frozenset[str]
    has_beta: bool


@functools.cache
def capabilities() -> Capabilities:
    """Read the capabilities of the real module once; a lazy mock of torch would claim to have everything."""
    import oneflow

    native = oneflow._C
    return Capabilities(
        oneflow.__version__, frozenset(name for name in OPERATOR_NAMES if hasattr(native, name)), _takes_beta(native)
    )


def _takes_beta(native: Any) -> bool:
    one = torch.ones(1, 1)
    try:
        native.fused_matmul_bias(one, one, torch.ones(1), _add_to_output=one, alpha=1.0, beta=2.0)
    except TypeError:
        return False
    except Exception:
        # It knows the argument and lacks a kernel for the CPU.
        return True
    return True


def refusal(
    name: str,
    found: Capabilities,
    device_type: str,
    dtype: torch.dtype,
    head_size: int,
    compute_capability: tuple[int, int] | None,
) -> str | None:
    """Say why OneFlow's kernel of operator ``name`` must not be called, from its contract alone; None if it may."""
    if name not in found.names:
        return f"OneFlow {found.version} has no such operator; 1.0 and builds since April 2023 have"
    if device_type != "cuda":
        return f"OneFlow has no such kernel for {device_type}"
    if dtype not in DTYPES[name]:
        return f"OneFlow's kernel knows no {str(dtype).split('.')[-1]}"
    if name == ATTENTION:
        if compute_capability is None or compute_capability[0] not in ATTENTION_CAPABILITIES:
            shown = "an unknown one" if compute_capability is None else "{}.{}".format(*compute_capability)
            return f"OneFlow's attention runs on compute capability 7.x and 8.x; this GPU has {shown}"
        if head_size % 8:
            return f"OneFlow's attention takes heads of a multiple of 8 values, not {head_size}"
    return None


def choose(device: torch.device, dtype: torch.dtype, head_size: int) -> Operators:
    """Return the table for models on ``device`` in ``dtype``.

    Raises:
        ValueError: half precision on a CPU, which OneFlow has no kernels for.
    """
    if device.type == "cpu" and dtype in (_HALF, _BFLOAT16):
        raise ValueError(
            f"The model is in {str(dtype).split('.')[-1]} on the CPU, which OneFlow has no kernels for; call "
            "model.float()."
        )
    import oneflow

    capability = tuple(oneflow.cuda.get_device_capability(device)) if device.type == "cuda" else None
    return build(NativeOperators(oneflow._C, capabilities().has_beta), device, dtype, head_size, capability)


def build(
    fused: "NativeOperators",
    device: torch.device,
    dtype: torch.dtype,
    head_size: int,
    compute_capability: tuple[int, int] | None,
) -> Operators:
    """Build a table of ``fused`` if a kernel's contract allows it and its trial succeeds, else of the definitions."""
    served, choices = {}, {}
    for name in OPERATOR_NAMES:
        reason = refusal(name, capabilities(), device.type, dtype, head_size, compute_capability)
        if reason is None:
            reason = failure_of(name, getattr(fused, name), device, dtype, head_size)
        if reason is None:
            served[name], choices[name] = getattr(fused, name), ("oneflow", f"OneFlow {capabilities().version}")
        else:
            served[name], choices[name] = getattr(reference, name), ("reference", reason)
    return Operators(**served, choices=choices)


class _Last:
    """Remember the result for the last argument: all layers of a step pass the same table or bias."""

    def __init__(self, function: Any):
        self._function, self._last = function, (None, None)

    def __call__(self, argument: torch.Tensor, *more: Any) -> torch.Tensor:
        key, result = self._last
        if key is None or key[0] is not argument or key[1] != more:
            result = self._function(argument, *more)
            self._last = ((argument, more), result)
        return result


class NativeOperators:
    """The operators of ``ops.reference`` on ``native``, which is ``oneflow._C``, with OneFlow's names and layouts.

    Args:
        native: holds OneFlow's functions.
        has_beta: its fused_matmul_bias takes ``alpha`` and ``beta``.
    """

    def __init__(self, native: Any, has_beta: bool):
        self._native, self._has_beta = native, has_beta
        self._cos, self._sin, self._bias = _Last(_plane_table), _Last(_plane_table), _Last(_padded)

    def fast_gelu(self, x: torch.Tensor) -> torch.Tensor:
        """See ``reference.fast_gelu``."""
        return self._native.fast_gelu(x)

    def fused_fast_gelu_mul(self, x: torch.Tensor, multiplier: torch.Tensor) -> torch.Tensor:
        """See ``reference.fused_fast_gelu_mul``."""
        return self._native.fused_fast_gelu_mul(x, multiplier)

    def fused_apply_rotary_emb(
        self,
        x: torch.Tensor,
        *,
        position_ids: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        tensor_index: int,
        k_size: int,
    ) -> torch.Tensor:
        """Pass the tables, because OneFlow's own angles lack the rounding that the weights were trained with."""
        if position_ids.dim() == 2:
            position_ids = position_ids.unsqueeze(1)
        axes = position_ids.shape[1]
        return self._native.fused_apply_rotary_emb(
            x,
            cos=self._cos(cos, axes),
            sin=self._sin(sin, axes),
            position_ids=position_ids,
            x_layout="BM(H3K)",
            output_layout="BHMK",
            mode="plane",
            tensor_index=tensor_index,
            k_size=k_size,
            rotary_size=k_size,
        )

    def fused_attention_concat_past_key_value(
        self, past_key_values: Any, key: torch.Tensor, value: torch.Tensor, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Use OneFlow's kernel for a ``ListCache``; leave any other cache, and none, to the definition."""
        if not isinstance(past_key_values, ListCache):
            return reference.fused_attention_concat_past_key_value(past_key_values, key, value, layer)
        past = past_key_values[layer] if layer < len(past_key_values) else None
        key, value = self._native.fused_attention_concat_past_key_value(
            past_key=None if past is None else past.keys,
            past_key_layout="BHMK",
            past_value=None if past is None else past.values,
            past_value_layout="BHMK",
            key=key.contiguous(),
            key_layout="BHMK",
            value=value.contiguous(),
            value_layout="BHMK",
            key_head_size=key.shape[-1],
        )
        past_key_values.put(layer, key, value)
        return key, value

    def fused_multi_head_attention_inference_v2(
        self,
        *,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_bias: torch.Tensor | None = None,
        prefix_length: int | None = None,
        scale: float | None = None,
    ) -> torch.Tensor:
        """See ``reference.fused_multi_head_attention_inference_v2``."""
        return self._native.fused_multi_head_attention_inference_v2(
            query=query.contiguous(),
            query_layout="BHMK",
            query_head_size=query.shape[-1],
            key=key.contiguous(),
            key_layout="BHMK",
            value=value.contiguous(),
            value_layout="BHMK",
            attn_bias=None if attn_bias is None else self._bias(attn_bias),
            output_layout="BM(HK)",
            scale=1.0 / math.sqrt(query.shape[-1]) if scale is None else scale,
        )

    def fused_matmul_bias(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        _add_to_output: torch.Tensor | None = None,
        beta: float = 1.0,
    ) -> torch.Tensor:
        """Use OneFlow's kernel, which needs a bias; without one (the head) its plain product serves."""
        if bias is None:
            return reference.fused_matmul_bias(x, weight, bias, _add_to_output, beta)
        if _add_to_output is None:
            return self._native.fused_matmul_bias(x, weight, bias)
        if not self._has_beta:
            return self._native.fused_matmul_bias(x, weight, bias, _add_to_output=_add_to_output * beta)
        return self._native.fused_matmul_bias(x, weight, bias, _add_to_output=_add_to_output, alpha=1.0, beta=beta)

    def skip_layer_norm(
        self,
        x: torch.Tensor,
        *,
        gamma: torch.Tensor,
        beta: torch.Tensor,
        skip: torch.Tensor | None = None,
        epsilon: float = 1e-5,
        alpha: float = 1.0,
    ) -> torch.Tensor:
        """Pass ``alpha`` always: OneFlow's default is 10."""
        return self._native.skip_layer_norm(x, gamma=gamma, beta=beta, skip=skip, epsilon=epsilon, alpha=alpha)

    def fused_linear_with_groupwise_quantized_weight(
        self,
        x: torch.Tensor,
        w: torch.Tensor,
        w_scale: torch.Tensor,
        *,
        b: torch.Tensor | None = None,
        num_bits: int = 8,
        group_size: int = -1,
        _add_to_output: torch.Tensor | None = None,
        beta: float = 1.0,
    ) -> torch.Tensor:
        """Give the scales two axes and the dtype of x, as OneFlow asks; add the residual here, as it adds none."""
        out = self._native.fused_linear_with_groupwise_quantized_weight(
            x,
            w,
            w_scale.to(x.dtype).reshape(w.shape[0], -1),
            b=b,
            num_bits=num_bits,
            symmetric=True,
            group_dim=1,
            group_size=group_size,
        )
        return out if _add_to_output is None else out + beta * _add_to_output


def _plane_table(table: torch.Tensor, axes: int) -> torch.Tensor:
    """Lay cos or sin [P, D / 2] out as OneFlow's kernel reads it: [axes * P, D] with position p in row axes * p.

    Both halves of D turn by the same angles. The kernel steps through the table by the head's width K = axes * D, so
    with two axes only every other row is read.
    """
    positions, half = table.shape
    rows = torch.cat((table, table), dim=-1).unsqueeze(1)
    if axes > 1:
        rows = torch.cat((rows, *[torch.zeros_like(rows)] * (axes - 1)), dim=1)
    return rows.reshape(positions * axes, 2 * half).contiguous()


def _padded(attn_bias: torch.Tensor) -> torch.Tensor:
    """Pad the last axis of attn_bias to a multiple of 8, as OneFlow asks; the padding belongs to no key."""
    missing = -attn_bias.shape[-1] % 8
    return (functional.pad(attn_bias, (0, missing)) if missing else attn_bias).contiguous()
