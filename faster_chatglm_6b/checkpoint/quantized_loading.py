"""Load a float checkpoint straight into int8 or int4: the float model never exists as a whole."""

import copy
import inspect
from typing import Any

import torch
from torch import nn

from ..configuration_chatglm import DTYPES, QUANTIZATION_SETTINGS, ChatGLMConfig
from ..layers.quantized import QuantizedLinear, frozen, quantize_weight
from .files import has_meta_device, tensors_of_file
from .source import BIN_FILES, HUB_ARGUMENTS, SAFETENSORS_FILES, Source

_OTHER_ARGUMENTS = {
    "adapter_kwargs",
    "config",
    "device_map",
    "dtype",
    "low_cpu_mem_usage",
    "torch_dtype",
    "trust_remote_code",
    "use_safetensors",
    # Stock's own, and some that do not change what is read here.
    "empty_init",
    "mirror",
    "resume_download",
    "weights_only",
}


def quantizes_while_loading(source: Source, kwargs: dict[str, Any]) -> bool:
    """Return whether ``from_pretrained`` was asked for a quantisation that the checkpoint's config.json does not have.

    Raises:
        ValueError: the checkpoint is quantised, but differently, or groups or a head are asked for without bits.
    """
    # The Auto classes put the caller's settings into the config that they pass on.
    config = kwargs.get("config")
    bits, group_size, head_bits = (
        kwargs.get(setting) or getattr(config, setting, None) for setting in QUANTIZATION_SETTINGS
    )
    if not (bits or group_size or head_bits):
        return False
    name, stored = source.name, source.stored
    present = stored.get("quantization_bit") or 0
    if present and bits and present != bits:
        raise ValueError(
            f"{name} holds {present}-bit weights, which cannot be turned into {bits}-bit ones; load a float "
            "checkpoint instead."
        )
    for setting, asked in zip(QUANTIZATION_SETTINGS[1:], (group_size, head_bits), strict=True):
        if not asked or asked == stored.get(setting):
            continue
        if not bits:
            raise ValueError(
                f"from_pretrained was given {setting}={asked} without quantization_bit; add quantization_bit=8 or 4, "
                f"or leave {setting} out."
            )
        if present:
            raise ValueError(
                f"{name} holds {present}-bit weights with {setting}={stored.get(setting)}, which cannot be turned into "
                f"{setting}={asked}; load a float checkpoint instead."
            )
    return not present


def load_quantized(model_class: type, source: Source, kwargs: dict[str, Any]) -> Any:
    """Build the quantised model and fill it tensor by tensor from a float checkpoint.

    Args:
        model_class: the model with the output head.
        source: the checkpoint's files.
        kwargs: of ``from_pretrained``: quantization_bit and its companions, hub arguments, a dtype, and a
            ``device_map`` that names one device.

    Raises:
        ValueError: arguments that this path does not know, or a checkpoint that does not fit its config.json.
    """
    settings = {argument: value for argument, value in kwargs.items() if _is_setting(argument)}
    known = {*settings, *HUB_ARGUMENTS, *_OTHER_ARGUMENTS}
    unknown = {argument for argument in kwargs if argument not in known and not argument.startswith("_")}
    if unknown:
        raise ValueError(
            f"from_pretrained was asked to quantise while loading and for {', '.join(sorted(unknown))}, which do not "
            "go together; load the float checkpoint and call quantize()."
        )
    name, device = source.name, _one_device(kwargs.get("device_map"))
    config = kwargs.get("config")
    if config is None:
        config = source.configuration(ChatGLMConfig, **settings)
    elif settings:
        config = ChatGLMConfig.from_dict({**config.to_dict(), **settings})
    if not has_meta_device():
        return _load_then_quantize(model_class, name, config, kwargs)
    config.tie_word_embeddings = config.tie_word_embeddings and not config.quantization_head_bits
    with torch.device("meta"):
        model = model_class(config).eval()
    if not source.weights:
        raise OSError(
            f"{name} holds none of {', '.join(SAFETENSORS_FILES + BIN_FILES)}; copy or download the checkpoint again."
        )
    dtype = _dtype(kwargs, config)
    for path in source.weights:
        for key, tensor in tensors_of_file(path):
            dtype = dtype or (tensor.dtype if tensor.is_floating_point() else None)
            _put(model, key, tensor, device, dtype, name)
    if config.tie_word_embeddings:
        model.tie_head()
    elif model.lm_head.weight.is_meta and config.quantization_head_bits:
        model.lm_head = QuantizedLinear.of(_as_linear(model.transformer.word_embeddings), config.quantization_head_bits)
    prefix = getattr(model.transformer, "prefix_encoder", None)
    if prefix is not None and all(parameter.is_meta for parameter in prefix.parameters()):
        # P-Tuning starts like this, or its prefix is a file of its own that is loaded later.
        prefix.to_empty(device=device).to(dtype).reset_parameters()
    missing = [key for key, value in model.state_dict().items() if value.is_meta]
    if missing:
        raise ValueError(f"The weights of {name} lack {missing[0]}, which its config.json asks for; download it again.")
    model.base_model.freeze_below_prefix()
    return model


def _is_setting(argument: str) -> bool:
    """Return whether an argument of ``from_pretrained`` is a field of the config, ``pre_seq_len`` for example."""
    return argument in inspect.signature(ChatGLMConfig.__init__).parameters and argument not in ("self", "kwargs")


def _dtype(kwargs: dict[str, Any], config: ChatGLMConfig) -> torch.dtype | None:
    """Return the dtype that was asked for, or else the one of config.json; None means that of the first tensor.

    ``from_pretrained`` has checked it.
    """
    settings = [kwargs.get("dtype"), kwargs.get("torch_dtype")]
    settings += [getattr(config, "dtype", None), config.__dict__.get("torch_dtype")]
    names = (str(setting).rsplit(".", 1)[-1] for setting in settings)
    return next((getattr(torch, name) for name in names if name in DTYPES), None)


def _load_then_quantize(model_class: type, name: Any, config: ChatGLMConfig, kwargs: dict[str, Any]) -> Any:
    """Quantise a float model that exists as a whole: this framework has no tensors without content."""
    bits, group_size, head_bits = (getattr(config, setting) for setting in QUANTIZATION_SETTINGS)
    config = copy.deepcopy(config)
    config.quantization_bit, config.quantization_group_size, config.quantization_head_bits = 0, None, None
    others = {argument: value for argument, value in kwargs.items() if not _is_setting(argument)}
    model = model_class.from_pretrained(name, **{**others, "config": config})
    return model.quantize(bits, group_size, head_bits)


def _put(
    model: nn.Module, key: str, tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None, name: Any
) -> None:
    """Set one parameter of the checkpoint, quantised on ``device`` if its layer is quantised."""
    base = f"{model.base_model_prefix}."
    # A model that was saved without a head has names without the base.
    key = key if key.startswith((base, "lm_head.")) else base + key
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


def _as_linear(embedding: nn.Embedding) -> nn.Linear:
    """Return the head that is tied to an embedding, without a copy."""
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
