"""Which models the captured loop can run: it calls kernels on the weights and never the modules themselves."""

from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as module_hooks

from .sampling import CannotServe


def check_model(model: Any) -> None:
    """Raise CannotServe, with the reason, for a model whose step would not be what its modules compute."""
    from ..ops.cuda import kernels_refusal

    weight = model.lm_head.weight
    reason = kernels_refusal(weight.device, weight.dtype)
    if reason is not None:
        raise CannotServe(reason)
    if model.training:
        raise CannotServe("the model is in training mode; call model.eval()")
    if _autocast(weight.device.type):
        raise CannotServe("autocast is on")
    _check_modules(model)
    for name, parameter in model.named_parameters():
        if parameter.device != weight.device or parameter.dtype != weight.dtype:
            raise CannotServe(
                f"{name} is {parameter.dtype} on {parameter.device}, lm_head {weight.dtype} on {weight.device}"
            )
        if not parameter.is_contiguous():
            raise CannotServe(f"{name} is not contiguous")


def _autocast(device_type: str) -> bool:
    return torch.is_autocast_enabled(device_type)


def _check_modules(model: Any) -> None:
    """Every module must be the one that the step stands for, with nothing hooked into it."""
    from .. import layers, modeling_chatglm

    expected = {
        layers.Linear,
        layers.LayerNorm,
        nn.Embedding,
        nn.ModuleList,
        modeling_chatglm.SelfAttention,
        modeling_chatglm.GLU,
        modeling_chatglm.GLMBlock,
        modeling_chatglm.ChatGLMModel,
    }
    if type(model).forward is not modeling_chatglm.ChatGLMForConditionalGeneration.forward:
        raise CannotServe(f"{type(model).__name__} has a forward of its own")
    if module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks:
        raise CannotServe("a forward hook is registered for all modules")
    for name, module in model.named_modules():
        if module is not model and type(module) not in expected:
            raise CannotServe(f"{name} is a {type(module).__module__}.{type(module).__name__}")
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            raise CannotServe(f"{name or 'the model'} has a forward hook or a replaced forward")
    if next(model.parameters(), None) is None:
        raise CannotServe("the weights are no parameters")
    embedding = model.transformer.word_embeddings
    if embedding.max_norm is not None:
        raise CannotServe("the embedding has a max_norm")
