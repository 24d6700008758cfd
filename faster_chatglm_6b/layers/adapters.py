"""Adapters of PEFT on integer weights: merge them although there is no float weight to add to, or say why not."""

import functools
import sys
import warnings
from typing import Any

import torch
from torch import nn

from .quantized import QuantizedLinear


class AdapterHost(nn.Module):
    """A module that notices when PEFT puts an adapter in the place of one of its quantised layers.

    PEFT takes a ``QuantizedLinear`` for an ``nn.Linear``, but its merging would add floats to integers. That fails or,
    checked with ``safe_merge``, silently rounds the whole adapter away.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        # PEFT may not be imported, or another thread may be importing it: then this is None.
        adapter_class = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", None)
        if adapter_class is not None and isinstance(value, adapter_class):
            _prepare(value)
        super().__setattr__(name, value)


def _prepare(adapter: Any) -> None:
    """Give an adapter over a quantised layer a way to merge, or an error that says why there is none.

    Raises:
        ValueError: DoRA, whose norms would be those of the integers.
    """
    from peft.tuners.lora.layer import Linear

    if not isinstance(adapter.get_base_layer(), QuantizedLinear):
        return
    if any(getattr(adapter, "use_dora", {}).values()):
        raise ValueError(
            "use_dora needs the norms of float weights, but this model is quantised; use LoRA without it, or the float "
            "model."
        )
    if type(adapter) is Linear:
        adapter.__class__ = _lora_over_integers()
    else:
        adapter.merge = functools.partial(_refuse_to_merge, f"{type(adapter).__module__}.{type(adapter).__name__}")


def _refuse_to_merge(kind: str, *args: Any, **kwargs: Any) -> None:
    raise ValueError(
        f"A {kind} cannot be merged into integer weights, only PEFT's linear LoRA layers can; merge into the float "
        "model and quantise that, or leave the adapter unmerged."
    )


@functools.cache
def _lora_over_integers() -> type:
    """Return PEFT's LoRA layer, which exists once PEFT is imported, with other ways to merge and unmerge."""
    from peft.tuners.lora.layer import Linear

    class LoraQuantizedLinear(Linear):
        """LoRA over a ``QuantizedLinear``; merging quantises the sum again, with the layer's bits and groups."""

        _before_merge: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            """Merge into the dequantised weight as PEFT does, then quantise it; arguments are PEFT's."""
            layer, already = self.base_layer, len(self.merged_adapters)
            self.base_layer = layer.dequantized()
            try:
                super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
                merged = QuantizedLinear.of(self.base_layer, layer.bits, layer.group_size)
            finally:
                self.base_layer = layer
            if len(self.merged_adapters) == already:
                return
            warnings.warn(
                f"An adapter was merged into {layer.bits}-bit integers, which rounds it; merging into the float model "
                "before quantize() keeps more of it.",
                stacklevel=2,
            )
            self._before_merge = self._before_merge or _values(layer)
            _set_values(layer, _values(merged))

        def unmerge(self) -> None:
            """Restore the integers and scales from before the first merge, exactly."""
            if self._before_merge is None:
                return super().unmerge()
            _set_values(self.base_layer, self._before_merge)
            self._before_merge = None
            self.merged_adapters.clear()

    # Pickles name the class by its place in this module, see __getattr__.
    LoraQuantizedLinear.__qualname__ = "LoraQuantizedLinear"
    return LoraQuantizedLinear


PROMPT_LEARNING = (
    "PEFT's prompt learning puts virtual tokens before the prompt, of which ChatGLM's positions know nothing; train "
    "P-Tuning v2 instead, by pre_seq_len in the config, or LoRA."
)


def refuse_prompt_learning(model: nn.Module) -> None:
    """Refuse a call of ``generate`` by PEFT for prompt tuning, prefix tuning or p-tuning.

    Raises:
        ValueError: it is such a call.
    """
    prepare = model.__dict__.get("prepare_inputs_for_generation")
    config = getattr(getattr(prepare, "__self__", None), "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        raise ValueError(PROMPT_LEARNING)


def __getattr__(name: str) -> type:
    if name == "LoraQuantizedLinear":
        return _lora_over_integers()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _values(layer: QuantizedLinear) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    return layer.weight.data, layer.weight_scale.data, None if layer.bias is None else layer.bias.data


def _set_values(layer: QuantizedLinear, values: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]) -> None:
    """Put values into the layer's parameters, in their dtypes and on their device."""
    for parameter, value in zip((layer.weight, layer.weight_scale, layer.bias), values, strict=True):
        if parameter is not None:
            parameter.data = value.to(parameter)
