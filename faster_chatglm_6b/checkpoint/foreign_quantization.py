"""Serve quantisation by other libraries while transformers loads, and check that it took place."""

import copy
from typing import Any

from torch import nn

from ..layers.linear import is_plain_tensor
from .source import Source

# Libraries that quantise a float model while it is loaded, and their settings' name for the modules to leave out.
# Others need a checkpoint of their own making.
_SERVED = {
    "bitsandbytes": "llm_int8_skip_modules",
    "quanto": "modules_to_not_convert",
    "torchao": "modules_to_not_convert",
    "hqq": "skip_modules",
}
# The second from the model with the head, the third from the one without.
_FLOATS = ("lm_head", "transformer.prefix_encoder", "prefix_encoder")
_LOAD_IN = ("load_in_8bit", "load_in_4bit")


def prepare_foreign(source: Source, kwargs: dict[str, Any]) -> bool:
    """Prepare the arguments of transformers' ``from_pretrained`` for a quantisation by another library.

    The caller or config.json asks for it. ``load_in_8bit=True`` and ``load_in_4bit=True``, which transformers 5 no
    longer has, are bitsandbytes' settings. The output head, which is the embedding, and a P-Tuning prefix stay floats.

    Args:
        source: the checkpoint's files.
        kwargs: of ``from_pretrained``; they are changed.

    Returns:
        whether another library quantises.

    Raises:
        ValueError: a library that cannot quantise this model, or ``quantization_bit`` as well.
    """
    load_in = {argument: kwargs.pop(argument, False) for argument in _LOAD_IN}
    given = kwargs.get("quantization_config")
    name, stored = source.name, {} if source.name is None else source.stored
    if given is None and not any(load_in.values()):
        present = getattr(kwargs.get("config"), "quantization_config", None) or stored.get("quantization_config")
        if present is not None:
            _check(name, present, stored, kwargs)
        return present is not None
    if given is None:
        from transformers import BitsAndBytesConfig

        given = BitsAndBytesConfig(**load_in)
    elif any(load_in.values()):
        raise ValueError("load_in_8bit or load_in_4bit is given beside a quantization_config; put it in there.")
    method = _check(name, given, stored, kwargs)
    kwargs["quantization_config"] = given = copy.deepcopy(given)
    attribute = _SERVED[method]
    skipped = given.get(attribute) if isinstance(given, dict) else getattr(given, attribute, None)
    skipped = list(dict.fromkeys([*(skipped or ()), *_FLOATS]))
    if isinstance(given, dict):
        given[attribute] = skipped
    else:
        setattr(given, attribute, skipped)
    return True


def _check(name: Any, settings: Any, stored: dict[str, Any], kwargs: dict[str, Any]) -> str:
    """Return the library's name; refuse settings that cannot be served."""
    read = settings.get if isinstance(settings, dict) else lambda key: getattr(settings, key, None)
    method = read("quant_method")
    if method is None and (read("load_in_8bit") or read("load_in_4bit")):
        method = "bitsandbytes"
    method = str(getattr(method, "value", method))
    if method not in _SERVED:
        raise ValueError(
            f"{name} is to be loaded with a quantization_config of {method}, but only {', '.join(_SERVED)} can "
            "quantise ChatGLM-6B; pass quantization_bit=8 or 4 instead."
        )
    bits = kwargs.get("quantization_bit") or getattr(kwargs.get("config"), "quantization_bit", None)
    bits = bits or stored.get("quantization_bit")
    if bits:
        raise ValueError(
            f"{name} is to be loaded with quantization_bit={bits} and with a quantization_config of {method}, which "
            "cannot both quantise it; leave one out, and take a float checkpoint for the latter."
        )
    return method


def check_converted(model: nn.Module, name: Any) -> None:
    """Check that another library has quantised the model, as transformers says.

    Raises:
        ValueError: no linear layer of the blocks has changed.
    """
    for module in model.base_model.layers.modules():
        plain = type(module) in (nn.Linear, nn.LayerNorm) and all(map(is_plain_tensor, module.parameters()))
        if not plain and next(module.children(), None) is None and next(module.parameters(), None) is not None:
            return
    raise ValueError(
        f"{name} was loaded with a quantization_config, but no linear layer of its blocks was quantised; pass "
        "quantization_bit=8 or 4 instead."
    )
