"""Quantise a whole model, at its construction or afterwards; ``quantize()`` resumes after an interrupt."""

from typing import Any

from torch import nn

from ..configuration_chatglm import ChatGLMConfig
from ..layers.linear import is_hooked, is_plain_tensor
from ..layers.quantized import QuantizedEmbedding, QuantizedLinear, give_back

_LINEAR_NAMES = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
# Arguments of the published versions of stock's quantize(), other than the bits.
_STOCK_ARGUMENTS = {"empty_init", "kernel_file", "use_quantization_cache", "parallel_num"}


def _linears(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """List (owner, attribute) of the linear layers to quantise, layer by layer, in wrapped blocks too."""
    return [
        (module, name)
        for layer in model.transformer.layers
        for module in layer.modules()
        for name in _LINEAR_NAMES
        if isinstance(module._modules.get(name), nn.Module)
    ]


def prepare_quantized(model: nn.Module) -> None:
    """Give a model under construction the layers that its config's quantised checkpoint fills."""
    config = model.config
    if not config.quantization_bit:
        return
    group_size = config.quantization_group_size or -1
    check_quantization(config, config.quantization_bit, config.quantization_group_size, config.quantization_head_bits)
    for owner, name in _linears(model):
        linear = getattr(owner, name)
        setattr(
            owner,
            name,
            QuantizedLinear(linear.in_features, linear.out_features, True, config.quantization_bit, group_size),
        )
    vocabulary, hidden = config.vocab_size, config.hidden_size
    if config.quantization_embeddings:
        model.transformer.word_embeddings = QuantizedEmbedding(vocabulary, hidden, config.quantization_bit)
        model.lm_head = QuantizedLinear(hidden, vocabulary, False, config.quantization_bit)
    elif config.quantization_head_bits:
        model.lm_head = QuantizedLinear(hidden, vocabulary, False, config.quantization_head_bits)


def check_quantization(config: ChatGLMConfig, bits: int, group_size: int | None, head_bits: int | None) -> None:
    """Raise ValueError, in one sentence, for impossible settings."""
    if bits not in (4, 8) or not isinstance(bits, int):
        raise ValueError(f"Quantisation was asked for with {bits!r} bits, but only 8 and 4 exist.")
    if head_bits not in (None, 8):
        raise ValueError(
            f"Quantisation was asked for with head_bits={head_bits!r}, but the head takes 8 bits, or None to stay as "
            "it is."
        )
    widths = (config.hidden_size, config.inner_hidden_size)
    if group_size is not None and (group_size < 1 or group_size % 2 or any(width % group_size for width in widths)):
        raise ValueError(
            f"Quantisation was asked for with group_size={group_size}, but it must be even and divide both "
            f"{widths[0]} (hidden_size) and {widths[1]} (inner_hidden_size); 128 suits ChatGLM-6B."
        )
    if bits == 4 and any(width % 2 for width in widths):
        raise ValueError(
            f"4 bits are stored in pairs, which the odd width of {widths} cannot be split into; use 8 bits."
        )


def check_linear(linear: nn.Module, name: str, bits: int) -> None:
    """Raise ValueError, in one sentence, for a layer that would lose something as integers."""
    kind = f"{type(linear).__module__}.{type(linear).__name__}"
    asked = f"quantize({bits}) needs float weights in plain linear layers, but {name} "
    if hasattr(linear, "get_base_layer"):
        raise ValueError(
            f"{asked}carries an adapter of PEFT ({kind}), which would be lost; call merge_and_unload() of the PEFT "
            "model first, or add the adapter after quantize()."
        )
    if type(linear) is not nn.Linear or not is_plain_tensor(linear.weight):
        kind = kind if type(linear) is not nn.Linear else f"linear layer with a weight of {type(linear.weight)}"
        raise ValueError(
            f"{asked}is a {kind}; put the linear layer itself there, or load the float checkpoint with "
            f"quantization_bit={bits}."
        )
    if is_hooked(linear) and "_hf_hook" not in linear.__dict__:
        raise ValueError(f"{asked}has a hook or a replaced forward, which would be lost; remove it first.")
    if linear.weight.device.type == "meta":
        raise ValueError(
            f"{asked}is offloaded to the CPU or the disk; load the checkpoint with quantization_bit={bits} and without "
            "device_map."
        )
    if not linear.weight.is_floating_point():
        raise ValueError(f"{asked}holds {linear.weight.dtype}; load the float checkpoint.")


class QuantizationMixin:
    """``quantize()`` of the model with the output head."""

    def quantize(
        self, bits: int, group_size: int | bool | None = None, head_bits: int | None = None, **kwargs: Any
    ) -> Any:
        """Replace the layers' float weights by integers, in place and one layer after the other.

        After an interrupt, by Ctrl-C or for lack of memory, the model still computes, with integers here and floats
        there. The same call again continues where it stopped.

        Args:
            bits: 8 or 4; 0, or the bits that the model already has, change nothing.
            group_size: columns that share a scale, such as 128, for better quality at 4 bits. None: one scale per row,
                stock's formula. A bool is stock's second argument, ``empty_init``.
            head_bits: 8 to quantise the output head too, which then no longer is the embedding; None to leave it.
            kwargs: stock's further arguments, without effect: empty_init, kernel_file, use_quantization_cache,
                parallel_num.

        Returns:
            The model.

        Raises:
            ValueError: other bits, a group size that does not divide, a model that is quantised otherwise, or layers
                that are no plain linear layers, such as those with adapters of PEFT. The model is unchanged.
            TypeError: an argument that neither stock nor this method knows.
        """
        unknown = sorted(set(kwargs) - _STOCK_ARGUMENTS)
        if unknown:
            raise TypeError(f"quantize() takes bits, group_size and head_bits, and no {', '.join(unknown)}.")
        group_size = None if isinstance(group_size, bool) else group_size
        config = self.config
        if isinstance(bits, int) and not isinstance(bits, bool) and bits == 0:
            return self
        present = (config.quantization_bit or 0, config.quantization_group_size, config.quantization_head_bits)
        if present[0]:
            _check_same(present, (bits, group_size, head_bits))
            return self
        check_quantization(config, bits, group_size, head_bits)
        todo = self._left_to_quantize(bits, group_size or -1, head_bits)
        device = self.device
        # One assignment replaces a layer, so that an interrupt falls before or after it.
        for owner, name in todo:
            setattr(owner, name, QuantizedLinear.of(getattr(owner, name), bits, group_size or -1))
        if head_bits:
            if not isinstance(self.lm_head, QuantizedLinear):
                self.lm_head = QuantizedLinear.of(self.lm_head, head_bits)
            config.tie_word_embeddings = False
        give_back(device)
        config.quantization_group_size = group_size
        config.quantization_head_bits = head_bits
        config.quantization_bit = bits
        return self

    def _left_to_quantize(self, bits: int, group_size: int, head_bits: int | None) -> list[tuple[nn.Module, str]]:
        """Check all linear layers that are still floats, before any of them is touched, and return them."""
        names = {id(module): name for name, module in self.named_modules()}
        todo, done = [], []
        for owner, attribute in _linears(self):
            linear, name = getattr(owner, attribute), f"{names[id(owner)]}.{attribute}"
            if isinstance(linear, QuantizedLinear):
                done.append(linear)
            else:
                check_linear(linear, name, bits)
                todo.append((owner, attribute))
        expected = len(_LINEAR_NAMES) * len(self.transformer.layers)
        if len(todo) + len(done) != expected:
            raise ValueError(
                f"quantize({bits}) looks for {expected} linear layers named {', '.join(_LINEAR_NAMES)}, but the model "
                f"has {len(todo) + len(done)}; put the blocks of ChatGLM-6B there."
            )
        head_is_done = isinstance(self.lm_head, QuantizedLinear)
        begun = {(linear.bits, linear.group_size) for linear in done}
        if begun - {(bits, group_size)} or (head_is_done and not head_bits):
            raise ValueError(_half_quantized(self))
        if head_bits and not head_is_done:
            check_linear(self.lm_head, "lm_head", head_bits)
        return todo

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save the model as transformers does.

        Raises:
            ValueError: ``quantize`` was interrupted: no config.json describes such a model.
        """
        if not self.config.quantization_bit and _begun(self):
            raise ValueError(_half_quantized(self))
        return super().save_pretrained(*args, **kwargs)


def _begun(model: nn.Module) -> list[QuantizedLinear]:
    """Return the quantised layers of a model."""
    linears = [getattr(owner, name) for owner, name in _linears(model)]
    return [linear for linear in linears if isinstance(linear, QuantizedLinear)]


def _half_quantized(model: nn.Module) -> str:
    begun = _begun(model)
    linear = begun[0] if begun else model.lm_head
    arguments = f"{linear.bits}" + ("" if linear.group_size < 0 else f", group_size={linear.group_size}")
    if isinstance(model.lm_head, QuantizedLinear):
        arguments += f", head_bits={model.lm_head.bits}"
    return (
        f"An interrupted quantize() left {len(begun)} of {len(_linears(model))} layers as integers; call "
        f"quantize({arguments}) to finish it, or load the checkpoint again."
    )


def _check_same(present: tuple, asked: tuple) -> None:
    """Raise ValueError if a quantised model is asked for other bits, groups or another head; None asks nothing."""
    names = ("bits", "group_size", "head_bits")
    for name, has, wants in zip(names, present, asked, strict=True):
        if wants is not None and wants != has:
            raise ValueError(
                f"This model is quantised to {present[0]} bits already, with {name}={has} and not {wants!r}; load the "
                "float checkpoint to quantise it differently."
            )
