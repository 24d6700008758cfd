"""int8 and int4 weights: stock's formula and storage, and groups of columns with a scale each for better quality."""

from typing import Any

import torch
from torch import nn

from ..ops import Operators, operators_chosen_for
from ..ops.reference import fused_linear_with_groupwise_quantized_weight, unpack_int4
from .linear import OperatorLinear


def quantize_weight(weight: torch.Tensor, bits: int, group_size: int = -1) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a weight symmetrically; bit for bit as stock's ``QuantizedLinear`` if every row is one group.

    scale = fp16(absmax / (2^(bits - 1) - 1)); integer = round-half-even(weight / scale), divided in the weight's dtype.
    A group of zeros gets scale 0 and zeros.

    Args:
        weight: [out, in], float16, bfloat16 or float32.
        bits: 8 or 4.
        group_size: columns that share a scale; -1 for the whole row.

    Returns:
        int8 [out, in] for 8 bits, or [out, in / 2] with the even column in the high nibble for 4.
        Scales, float16 [out], or [out, in / group_size] with groups.
    """
    limit = 2 ** (bits - 1) - 1
    rows, columns = weight.shape
    # Allocate the integers first: in memory that floats freed they would keep it from going back to the driver.
    give_back(weight.device)
    integers = torch.empty(rows, columns * bits // 8, dtype=torch.int8, device=weight.device)
    # Compute in float32 and round to the weight's dtype: a device without half-precision arithmetic does the same.
    groups = weight.float().view(weight.shape[0], -1, weight.shape[1] if group_size < 0 else group_size)
    scale = (groups.abs().amax(dim=-1) / limit).to(weight.dtype).half()
    quotients = groups / scale.float()[..., None]
    if weight.dtype == torch.float16:
        quotients = quotients.half().float()
    rounded = torch.round(quotients).nan_to_num_(0).clamp_(-limit - 1, limit)
    rounded = rounded.to(torch.int8).view(weight.shape)
    if bits == 4:
        rounded = (rounded[:, ::2] << 4) | (rounded[:, 1::2] & 0xF)
    # A statement of its own: OneFlow's copy_ returns nothing.
    integers.copy_(rounded)
    return integers, scale.squeeze(1) if group_size < 0 else scale


def give_back(device: torch.device) -> None:
    """Give the driver the memory that freed tensors leave in PyTorch's cache; do nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


class QuantizedLinear(OperatorLinear):
    """A linear layer with an int8 or packed int4 ``weight`` and its ``weight_scale``, stored as stock stores them.

    It is an ``nn.Linear`` to adapters such as LoRA, and takes the place of one in the model.

    Args:
        in_features, out_features, bias: as in ``nn.Linear``.
        bits: 8 or 4.
        group_size: columns per scale; -1 for one scale per row.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool, bits: int, group_size: int = -1, device: Any = None
    ):
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size = bits, group_size
        scale_shape = (out_features,) if group_size < 0 else (out_features, in_features // group_size)
        self.weight = frozen(torch.empty(out_features, in_features * bits // 8, dtype=torch.int8, device=device))
        self.weight_scale = frozen(torch.empty(scale_shape, dtype=torch.float16, device=device))
        # The default dtype, which a loader sets to the model's: the bias is added to the model's floats.
        self.bias = nn.Parameter(torch.empty(out_features, device=device)) if bias else None

    @classmethod
    def of(cls, linear: nn.Linear, bits: int, group_size: int = -1) -> "QuantizedLinear":
        """Quantise a float layer, on its device."""
        integers, scale = quantize_weight(linear.weight.detach(), bits, group_size)
        # Both tensors are replaced. On the CPU, memory that nobody writes costs nothing.
        layer = cls(linear.in_features, linear.out_features, False, bits, group_size, device="cpu")
        layer.weight, layer.weight_scale, layer.bias = frozen(integers), frozen(scale), linear.bias
        return layer

    def forward(
        self,
        x: torch.Tensor,
        ops: Operators | None = None,
        residual: torch.Tensor | None = None,
        alpha: float = 1.0,
    ) -> torch.Tensor:
        """Return x weight^T + bias + alpha * residual, residual [..., out] or None.

        Args:
            ops: None takes those of a model that ran on x's device and dtype before, as under an adapter of PEFT, which
                calls its layer with x alone. Without one, and with autograd, the operator's definition computes.
        """
        ops = operators_chosen_for(x) if ops is None else ops
        operator = fused_linear_with_groupwise_quantized_weight
        if ops is not None:
            operator = ops.fused_linear_with_groupwise_quantized_weight
        return operator(
            x,
            self.weight,
            self.weight_scale,
            b=self.bias,
            num_bits=self.bits,
            group_size=self.group_size,
            _add_to_output=residual,
            beta=alpha,
        )

    def dequantized(self) -> nn.Linear:
        """Return the float32 layer with the same products, on the same device."""
        integers = unpack_int4(self.weight.data) if self.bits == 4 else self.weight.data
        weight = integers.view(self.out_features, -1, self.in_features if self.group_size < 0 else self.group_size)
        weight = weight.float() * self.weight_scale.data.float().view(self.out_features, -1, 1)
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        linear.weight = frozen(weight.view(self.out_features, self.in_features))
        if self.bias is not None:
            linear.bias = frozen(self.bias.data.float().clone())
        return linear

    def extra_repr(self) -> str:
        """Describe the layer in ``repr``, as ``nn.Linear`` does."""
        groups = "" if self.group_size < 0 else f", group_size={self.group_size}"
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}{groups}"


class QuantizedEmbedding(nn.Embedding):
    """An embedding with integer rows and a scale per row, as older quantised checkpoints store it."""

    def __init__(self, num_embeddings: int, embedding_dim: int, bits: int):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.bits = num_embeddings, embedding_dim, bits
        self.padding_idx = None
        self.weight = frozen(torch.empty(num_embeddings, embedding_dim * bits // 8, dtype=torch.int8))
        self.weight_scale = frozen(torch.empty(num_embeddings, dtype=torch.float16))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return rows [..., hidden] for int64 ids [...], in the scales' dtype."""
        rows = self.weight[input_ids]
        rows = unpack_int4(rows) if self.bits == 4 else rows
        return rows.to(self.weight_scale.dtype) * self.weight_scale[input_ids][..., None]


def frozen(tensor: torch.Tensor) -> nn.Parameter:
    """Make a parameter that is not trained, as stock stores integers and scales."""
    return nn.Parameter(tensor, requires_grad=False)
