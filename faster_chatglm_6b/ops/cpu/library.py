"""PyTorch's own int4 and int8 kernels, which are fast with bfloat16 alone: what serves without the C kernel.

The int4 one needs its own layout, which differs between CPUs: a weight is packed at its first product, and the copy
lives as long as the weight. It is in no state dict, so stock's bytes are what is saved.
"""

import torch

from ..reference import unpack_int4

# Columns that share a scale in the packed layout.
_GROUPS = (256, 128, 64, 32)
# The int8 kernel reads past the end of weights with other columns, the int4 one packs this many rows together.
_BLOCK = 64


def serves(x: torch.Tensor, w: torch.Tensor, bits: int, group: int) -> bool:
    """Tell whether PyTorch has a fast kernel for x [rows, in] and w [out, in * bits / 8] in groups of columns."""
    columns = x.shape[-1]
    if x.dtype != torch.bfloat16 or w.shape[0] % _BLOCK or columns % _BLOCK:
        return False
    if bits == 8:
        return group == columns and hasattr(torch, "_weight_int8pack_mm")
    return _packed_group(group) is not None and hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu")


def product(x: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Return [rows, out] of x and w for which ``serves`` is true; w_scale is [out, in / group].

    The scales of whole rows multiply the sums afterwards, so that bfloat16 does not round them.
    """
    columns, rows_of_w = x.shape[-1], w.shape[0]
    if bits == 8:
        return torch._weight_int8pack_mm(x, w, x.new_ones(rows_of_w)).float() * w_scale.view(-1).float()
    packed, scales = _packed(w, w_scale, group, columns)
    out = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, _packed_group(group), scales)
    return out.float() * w_scale.view(-1).float() if group == columns else out


def _packed_group(group: int) -> int | None:
    return next((size for size in _GROUPS if group % size == 0), None)


_packs = None


def _packed(w: torch.Tensor, w_scale: torch.Tensor, group: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the packed integers and scales [in / size, out, 2] of a weight, from the cache if it has not changed."""
    global _packs
    if _packs is None:
        from torch.utils.weak import WeakTensorKeyDictionary

        _packs = WeakTensorKeyDictionary()
    state = (*_state(w), *_state(w_scale), group)
    found = _packs.get(w)
    if found is None or found[0] != state:
        with torch.inference_mode(False), torch.no_grad():
            found = _packs[w] = (state, *_pack(w, w_scale, group, columns))
    return found[1:]


def _state(tensor: torch.Tensor) -> tuple[int, int, float]:
    """Tell a tensor from what it was before its content changed.

    Writes through ``tensor.data`` count no version, so a sample of the content is looked at too.
    """
    flat = tensor.detach().view(-1)
    sample = flat[:: max(1, flat.shape[0] // 64)].double().sum().item()
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version, sample


def _pack(w: torch.Tensor, w_scale: torch.Tensor, group: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu((unpack_int4(w.detach()) + 8).int(), 2)
    # Each pair is a scale and what a digit of 8 means.
    scales = torch.zeros(columns // _packed_group(group), w.shape[0], 2, dtype=torch.bfloat16, device=w.device)
    if group == columns:
        scales[..., 0] = 1
    else:
        scales[..., 0] = w_scale.detach().T.repeat_interleave(group // _packed_group(group), dim=0)
    return packed, scales
