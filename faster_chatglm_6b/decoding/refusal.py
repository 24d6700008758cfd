"""Refuse models that the captured loop cannot run: it calls kernels on the weights, never the modules."""

import logging
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
from ..ops.availability import kernels_refusal
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


def check_model(model: Any) -> tuple:
    """Check a model and return where its weights lie, the key of ``DecodeEngine.session``.

    Captured graphs hold these addresses. The check runs before every request, so it walks over the modules once and
    builds names only if something is wrong.

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
    return device, dtype, *_weights(model, device, dtype)


def _weights(model: Any, device: torch.device, dtype: torch.dtype) -> list[Any]:
    """Return the addresses and shapes of all weights, and the epsilons of the norms.

    Raises:
        CannotServe: a module or a weight that has no kernel.
    """
    usual = {kind: not _is_patched(kind) for kind in (*_EXPECTED, type(model))}
    addresses = []
    for module in _modules(model):
        if not usual.get(type(module)) or _has_hooks(module) or not _is_whole(module):
            raise CannotServe(_what_is_wrong(model, module))
        # Integers have kernels of their own, which take scales of any float dtype.
        any_dtype = ("weight", "weight_scale") if isinstance(module, QuantizedLinear) else ()
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if type(parameter) is not nn.Parameter and not is_plain_tensor(parameter):
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
            # A smaller tensor may take the address of a freed one.
            addresses.append(parameter.data_ptr())
            addresses.append(parameter.shape)
        if type(module) is nn.LayerNorm:
            addresses.append(module.eps)
    if not addresses:
        raise CannotServe("the weights are no parameters")
    return addresses


def _modules(module: nn.Module) -> list[nn.Module]:
    """List the module and all below it; a shared one comes once for each of its places.

    A P-Tuning prefix is left out, because the prompt runs it as a module.
    """
    modules = [module]
    # The list grows during the walk, which takes half the time of nested generators.
    for one in modules:
        modules += [child for child in one._modules.values() if child is not None and type(child) is not PrefixEncoder]
    return modules


def check_place(model: Any) -> None:
    """Check that kernels run where the weights lie; only then can the rest of the captured loop be imported.

    Raises:
        CannotServe: the weights are on several devices, or no kernel serves their device and dtype.
    """
    places = spread_over(model)
    if places is not None:
        raise CannotServe(f"device_map spreads the model over {places}; the captured loop needs it on one GPU")
    check_ends(model)
    weight = model.transformer.word_embeddings.weight
    reason = kernels_refusal(weight.device, weight.dtype)
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
    """Tell whether the weights are parameters, and a norm has both of its vectors, which the kernels read.

    The addresses of parameters tell graphs apart.
    """
    state = module.__dict__
    # None means that the layer lacks it, such as the bias of a quantised head.
    if state.get("weight") is not None or state.get("bias") is not None:
        return False
    if type(module) is not nn.LayerNorm:
        return True
    parameters = state["_parameters"]
    return parameters["weight"] is not None and parameters["bias"] is not None


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
    reason = f"there is not enough GPU memory for {what}"
    _log.warning("The captured loop cannot serve, because %s%s; the slower plain path does.", reason, fits)
    return CannotServe(reason)
