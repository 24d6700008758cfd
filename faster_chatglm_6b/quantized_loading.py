"""Loading a float checkpoint straight into int8 or int4: the float model never exists as a whole."""

import copy
import json
from collections.abc import Iterator
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import safe_open
from torch import nn
from transformers.utils import cached_file

from .configuration_chatglm import ChatGLMConfig
from .quantization import QuantizedLinear, frozen, quantize_weight

_QUANTIZATION_SETTINGS = ("quantization_bit", "quantization_group_size", "quantization_head_bits")
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_OTHER_ARGUMENTS = {
    "adapter_kwargs",
    "config",
    "device_map",
    "dtype",
    "low_cpu_mem_usage",
    "torch_dtype",
    "trust_remote_code",
    "use_safetensors",
}
_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def quantizes_while_loading(name: Any, kwargs: dict[str, Any]) -> bool:
    """Whether ``from_pretrained`` was asked for a quantisation that the checkpoint's own config.json does not have.

    Raises:
        ValueError: the checkpoint is quantised, but differently.
    """
    # The Auto classes turn the caller's setting into one of the config that they pass on.
    asked = kwargs.get("quantization_bit") or getattr(kwargs.get("config"), "quantization_bit", None)
    if not asked:
        return False
    config, _ = ChatGLMConfig.get_config_dict(name, **_only(kwargs, _HUB_ARGUMENTS))
    present = config.get("quantization_bit") or 0
    if present and present != asked:
        raise ValueError(
            f"{name} holds {present}-bit weights, which cannot be turned into {asked}-bit ones; load a float "
            "checkpoint instead."
        )
    return not present


def load_quantized(model_class: type, name: Any, kwargs: dict[str, Any]) -> Any:
    """Build the quantised model and fill it tensor by tensor from the float checkpoint ``name``.

    Args:
        model_class: the model with the output head.
        kwargs: of ``from_pretrained``: quantization_bit and its companions, hub arguments, a dtype, and a
        ``device_map``
            that names one device.

    Raises:
        ValueError: arguments that this path does not know, or a checkpoint that does not fit its config.json.
    """
    known = {*_QUANTIZATION_SETTINGS, *_HUB_ARGUMENTS, *_OTHER_ARGUMENTS}
    unknown = {argument for argument in kwargs if argument not in known and not argument.startswith("_")}
    if unknown:
        raise ValueError(
            f"from_pretrained was asked to quantise while loading and for {', '.join(sorted(unknown))}, which do not "
            "go together; load the float checkpoint and call quantize()."
        )
    hub, device = _only(kwargs, _HUB_ARGUMENTS), _one_device(kwargs.get("device_map"))
    config = kwargs.get("config")
    if config is None:
        config = ChatGLMConfig.from_pretrained(name, **_only(kwargs, _QUANTIZATION_SETTINGS), **hub)
    if not _has_meta_device():
        return _load_then_quantize(model_class, name, config, kwargs)
    config.tie_word_embeddings = config.tie_word_embeddings and not config.quantization_head_bits
    with torch.device("meta"):
        model = model_class(config).eval()
    dtype = kwargs.get("dtype") or kwargs.get("torch_dtype")
    for key, tensor in _tensors(name, hub):
        _put(model, key, tensor, device, dtype if isinstance(dtype, torch.dtype) else None, name)
    if config.tie_word_embeddings:
        model.tie_head()
    elif model.lm_head.weight.is_meta and config.quantization_head_bits:
        model.lm_head = QuantizedLinear.of(_as_linear(model.transformer.word_embeddings), config.quantization_head_bits)
    missing = [key for key, value in model.state_dict().items() if value.is_meta]
    if missing:
        raise ValueError(f"The weights of {name} lack {missing[0]}, which its config.json asks for; download it again.")
    return model


def _has_meta_device() -> bool:
    try:
        torch.empty(0, device="meta")
    except RuntimeError:
        return False
    return True


def _load_then_quantize(model_class: type, name: Any, config: ChatGLMConfig, kwargs: dict[str, Any]) -> Any:
    """Without a device of tensors that hold nothing, the float model has to exist as a whole first."""
    bits, group_size, head_bits = (getattr(config, setting) for setting in _QUANTIZATION_SETTINGS)
    config = copy.deepcopy(config)
    config.quantization_bit, config.quantization_group_size, config.quantization_head_bits = 0, None, None
    others = {argument: value for argument, value in kwargs.items() if argument not in _QUANTIZATION_SETTINGS}
    model = model_class.from_pretrained(name, **{**others, "config": config})
    return model.quantize(bits, group_size, head_bits)


def _put(
    model: nn.Module, key: str, tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None, name: Any
) -> None:
    """Set one parameter of the checkpoint, quantised on ``device`` where its layer is."""
    owner_name, _, parameter_name = key.rpartition(".")
    try:
        owner = model.get_submodule(owner_name)
    except AttributeError:
        return
    if parameter_name not in owner._parameters:
        return
    tensor = tensor.to(device)
    if isinstance(owner, QuantizedLinear) and parameter_name == "weight":
        shape = (owner.out_features, owner.in_features)
        if tuple(tensor.shape) == shape:
            integers, scale = quantize_weight(tensor, owner.bits, owner.group_size)
            owner.weight, owner.weight_scale = frozen(integers), frozen(scale.to(dtype or scale.dtype))
            return
    else:
        shape = tuple(owner._parameters[parameter_name].shape)
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"The weights of {name} have other shapes than its config.json says; take both from the same checkpoint. "
            f"({key}: {list(tensor.shape)} instead of {list(shape)})"
        )
    setattr(owner, parameter_name, nn.Parameter(tensor.to(dtype or tensor.dtype)))


def _tensors(name: Any, hub: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every (name, tensor) of the checkpoint, one weight file after the other."""
    for file in _FILES:
        path = cached_file(name, file, **hub, _raise_exceptions_for_missing_entries=False)
        if path is not None:
            break
    else:
        raise OSError(f"{name} holds none of {', '.join(_FILES)}; copy or download the checkpoint again.")
    if not file.endswith(".index.json"):
        yield from _tensors_of_file(path)
        return
    with open(path, encoding="utf-8") as index:
        shards = dict.fromkeys(json.load(index)["weight_map"].values())
    for shard in shards:
        yield from _tensors_of_file(cached_file(name, shard, **hub))


def _tensors_of_file(path: str) -> Iterator[tuple[str, torch.Tensor]]:
    if path.endswith(".safetensors"):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 safe_open is no mapping
                yield key, file.get_tensor(key)
    else:
        yield from torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path)).items()


def _as_linear(embedding: nn.Embedding) -> nn.Linear:
    """The head that is tied to an embedding, without a copy."""
    head = nn.Linear(embedding.embedding_dim, embedding.num_embeddings, bias=False, device="meta")
    head.weight = embedding.weight
    return head


def _one_device(device_map: Any) -> torch.device:
    if isinstance(device_map, dict) and set(device_map) == {""}:
        device_map = device_map[""]
    if device_map is None:
        return torch.device("cpu")
    if device_map == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(device_map, dict) or device_map in ("balanced", "balanced_low_0", "sequential"):
        raise ValueError(
            f"from_pretrained was asked to quantise while loading and for device_map={device_map!r}, but it can fill "
            "one device only; name one, or load the float checkpoint and call quantize()."
        )
    return torch.device(device_map)


def _only(kwargs: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: kwargs[name] for name in names if kwargs.get(name) is not None}
