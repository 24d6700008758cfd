"""Refuse models that the captured loop cannot run: it calls kernels on the weights, never the modules."""

import logging
import operator
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as module_hooks

from ..layers.linear import is_plain_tensor
from ..layers.placement import spread_over
from ..layers.prefix_encoder import PrefixEncoder
from ..layers.quantized import QuantizedLinear
from ..network.blocks import GLU, GLMBlock, SelfAttention
from ..network.model import ChatGLMModel, ChatGLMWithHead
from ..ops.steps import steps_refusal
from . import memory

_log = logging.getLogger("faster_chatglm_6b")


class CannotServe(Exception):
    """The captured loop cannot do what is asked; the message says why."""


_EXPECTED = (
    nn.Linear,
    QuantizedLinear,
    nn.LayerNorm,
    nn.Embedding,
    nn.ModuleList,
    SelfAttention,
    GLU,
    GLMBlock,
    ChatGLMModel,
)
_DEVICE, _DTYPE = operator.attrgetter("device"), operator.attrgetter("dtype")


def check_model(model: Any) -> tuple:
    """Check a model and return where its weights lie, the key of ``DecodeEngine.session``.

    Captured graphs hold these addresses. The check runs before every request and trusts nothing that an earlier one
    found, so it is lean: it builds names only if something is wrong.

    Raises:
        CannotServe: the captured step would not compute what the modules compute; the message says why.
    """
    check_place(model)
    weight = model.transformer.word_embeddings.weight
    device, dtype = weight.device, weight.dtype
    if model.training:
        raise CannotServe("the model is in training mode; call model.eval()")
    if torch.is_autocast_enabled(device.type):
        raise CannotServe("autocast is on")
    _check_forward(model)
    if model.transformer.word_embeddings.max_norm is not None:
        raise CannotServe("the embedding has a max_norm")
    # Sessions and graphs also hold the length of the P-Tuning prefix, which users may switch off.
    return device, dtype, model.config.pre_seq_len, *_weights(model, device, dtype)


def _weights(model: Any, device: torch.device, dtype: torch.dtype) -> list[Any]:
    """Return the addresses and shapes of all weights, and the epsilons of the norms.

    Each property is read of all weights in one sweep, which takes the host a third of the time of one walk that reads
    all properties of each.

    Raises:
        CannotServe: a module or a weight that has no kernel.
    """
    modules = _modules(model)
    usual = {kind for kind in (*_EXPECTED, type(model)) if not _is_patched(kind)}
    if not set(map(type, modules)) <= usual:
        raise CannotServe(_what_is_wrong(model, next(one for one in modules if type(one) not in usual)))
    weights: list[Any] = []
    # Integers have kernels of their own, which take scales of any float dtype.
    integers: list[Any] = []
    epsilons = []
    for module in modules:
        state = module.__dict__
        if (
            state["_forward_hooks"]
            or state["_forward_pre_hooks"]
            or "forward" in state
            # None means that the layer lacks it, such as the bias of a quantised head.
            or state.get("weight") is not None
            or state.get("bias") is not None
        ):
            raise CannotServe(_what_is_wrong(model, module))
        kind, parameters = type(module), state["_parameters"]
        if kind is QuantizedLinear:
            for name, parameter in parameters.items():
                (integers if name in ("weight", "weight_scale") else weights).append(parameter)
            continue
        if kind is nn.LayerNorm:
            if not _has_both(module):
                raise CannotServe(_what_is_wrong(model, module))
            epsilons.append(module.eps)
        weights += parameters.values()
    missing = [index for index, weight in enumerate((*weights, *integers)) if weight is None]
    weights = [weight for weight in weights if weight is not None]
    integers = [weight for weight in integers if weight is not None]
    everything = weights + integers if integers else weights
    if not everything:
        raise CannotServe("the weights are no parameters")
    if (
        set(map(type, everything)) != {nn.Parameter}
        or set(map(_DEVICE, everything)) != {device}
        or not set(map(_DTYPE, weights)) <= {dtype}
        or not all(map(torch.Tensor.is_contiguous, everything))
    ):
        _check_each(model, modules, device, dtype)
    # A smaller tensor may take the address of a freed one.
    return [*map(torch.Tensor.data_ptr, everything), *map(torch.Tensor.size, everything), *epsilons, *missing]


def _check_each(model: Any, modules: list[nn.Module], device: torch.device, dtype: torch.dtype) -> None:
    """Raise CannotServe for the first weight that has no kernel; plain tensors that are no parameters have one."""
    for module in modules:
        any_dtype = ("weight", "weight_scale") if type(module) is QuantizedLinear else ()
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if not is_plain_tensor(parameter):
                raise CannotServe(f"a weight of {_name(model, module)} is a {_kind(parameter)}")
            if (
                parameter.device != device
                or (parameter.dtype != dtype and name not in any_dtype)
                or not parameter.is_contiguous()
            ):
                raise CannotServe(
                    f"a weight of {_name(model, module)} is {parameter.dtype} on {parameter.device} with strides "
                    f"{list(parameter.stride())}; all must be contiguous and {dtype} on {device} like the embedding's"
                )


def _modules(module: nn.Module) -> list[nn.Module]:
    """List the module and all below it; a shared one comes once for each of its places.

    A P-Tuning prefix is left out, because the prompt runs it as a module.
    """
    modules = [module]
    # The list grows during the walk, which takes half the time of nested generators.
    for one in modules:
        children = one.__dict__["_modules"]
        if children:
            modules += [child for child in children.values() if child is not None and type(child) is not PrefixEncoder]
    return modules


def check_place(model: Any) -> None:
    """Check that kernels run where the weights lie; only then can the rest of the captured loop be imported.

    Raises:
        CannotServe: the weights are on several devices, or no kernel serves their device and dtype.
    """
    places = spread_over(model)
    if places is not None:
        raise CannotServe(f"device_map spreads the model over {places}; the captured loop needs it on one device")
    check_ends(model)
    weight = model.transformer.word_embeddings.weight
    reason = steps_refusal(weight.device, weight.dtype)
    if reason is not None:
        raise CannotServe(reason)


def check_ends(model: Any) -> None:
    """Check that the weights of the embedding and the head may be read; do so before all other checks.

    Raises:
        CannotServe: they may not, or the model below the head is another one.
    """
    network = model.transformer
    if not isinstance(network, nn.Module) or not isinstance(getattr(network, "layers", None), nn.ModuleList):
        raise CannotServe(f"transformer is a {_kind(network)}")
    embedding, head = network.word_embeddings, model.lm_head
    for module, kinds in ((embedding, (nn.Embedding,)), (head, (nn.Linear, QuantizedLinear))):
        if type(module) not in kinds:
            raise CannotServe(_what_is_wrong(model, module))


def check_sizes(model: Any) -> None:
    """Check that the weights of a model that ``check_model`` accepts fit the kernels' buffers.

    Raises:
        CannotServe: the number of layers or the shape of a weight differs from the configuration, as in a pruned model.
    """
    config, layers = model.config, model.transformer.layers
    hidden, inner = config.hidden_size, config.inner_hidden_size
    if len(layers) != config.num_layers:
        raise CannotServe(f"the model has {len(layers)} layers, but num_layers is {config.num_layers}")
    norms, linears = [model.transformer.final_layernorm], [(model.lm_head, hidden, model.lm_head.weight.shape[0])]
    for layer in layers:
        attention, mlp = layer.attention, layer.mlp
        norms += layer.input_layernorm, layer.post_attention_layernorm
        linears += (attention.query_key_value, hidden, 3 * hidden), (attention.dense, hidden, hidden)
        linears += (mlp.dense_h_to_4h, hidden, inner), (mlp.dense_4h_to_h, inner, hidden)
    found = [(norm, list(norm.weight.shape), [hidden]) for norm in norms]
    for linear, columns, rows in linears:
        if isinstance(linear, QuantizedLinear):
            found.append((linear, [linear.out_features, linear.in_features], [rows, columns]))
        else:
            found.append((linear, list(linear.weight.shape), [rows, columns]))
        if linear.bias is not None:
            found.append((linear, list(linear.bias.shape), [rows]))
    for module, shape, wanted in found:
        if shape != wanted:
            raise CannotServe(f"{_name(model, module)} has a weight or bias of shape {shape} instead of {wanted}")


def _check_forward(model: Any) -> None:
    if type(model).forward is not ChatGLMWithHead.forward:
        raise CannotServe(f"{type(model).__name__} has a forward of its own")
    if module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks:
        raise CannotServe("a forward hook is registered for all modules")


def _is_hooked(module: nn.Module) -> bool:
    return _has_hooks(module) or _is_patched(type(module))


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _is_patched(kind: type) -> bool:
    """Tell whether somebody put another forward into the class."""
    owner = next((one for one in kind.__mro__ if "forward" in one.__dict__), nn.Module)
    forward = owner.__dict__["forward"]
    return getattr(forward, "__module__", None) != owner.__module__ or hasattr(forward, "__wrapped__")


def _is_whole(module: nn.Module) -> bool:
    """Tell whether the weights are parameters, whose addresses tell graphs apart, and a norm has both its vectors."""
    state = module.__dict__
    if state.get("weight") is not None or state.get("bias") is not None:
        return False
    return type(module) is not nn.LayerNorm or _has_both(module)


def _has_both(norm: nn.LayerNorm) -> bool:
    """Tell whether a norm has a weight and a bias, which the kernels read."""
    parameters = norm._parameters
    return parameters.get("weight") is not None and parameters.get("bias") is not None


def _name(model: Any, wanted: nn.Module) -> str:
    return next((name for name, module in model.named_modules() if module is wanted), "") or "the model"


def _kind(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__name__}"


def _what_is_wrong(model: Any, module: nn.Module) -> str:
    name = _name(model, module)
    if _is_hooked(module):
        return f"{name} has a forward hook or a replaced forward"
    if not _is_whole(module):
        return f"{name} has no weight or no bias among its parameters"
    return f"{name} is a {_kind(module)}"


def too_little_for_the_loop(model: Any, what: str, batch: int, prompt: int, total: int) -> CannotServe:
    """Return the refusal for lack of memory, and warn users, because the plain path is much slower.

    Args:
        what: what found no room.
        batch: number of sequences.
        prompt: tokens of each prompt.
        total: tokens of each sequence with the longest answer.
    """
    free = memory.free_bytes(model.device)
    fits = "" if free is None else f" ({memory.what_fits(model, batch, prompt, total, free)})"
    reason = f"there is not enough memory for {what}"
    _log.warning("The captured loop cannot serve, because %s%s; the slower plain path does.", reason, fits)
    return CannotServe(reason)
