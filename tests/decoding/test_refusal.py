"""The captured loop leaves a model to the plain path if its kernels would skip something. No kernel runs here."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from faster_chatglm_6b.decoding import refusal
from faster_chatglm_6b.decoding.refusal import CannotServe, check_model, check_sizes
from faster_chatglm_6b.network import blocks

LAYER = "transformer.layers.1"
PLACES = (
    "lm_head",
    "transformer",
    "transformer.word_embeddings",
    "transformer.final_layernorm",
    LAYER,
    f"{LAYER}.input_layernorm",
    f"{LAYER}.attention",
    f"{LAYER}.attention.query_key_value",
    f"{LAYER}.mlp",
    f"{LAYER}.mlp.dense_4h_to_h",
)


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner


class Subclass(torch.Tensor):
    pass


@pytest.fixture
def model(tiny_model, monkeypatch):
    monkeypatch.setattr(refusal, "steps_refusal", lambda device, dtype: None)
    model = copy.deepcopy(tiny_model)
    assert len(check_model(model)) > 2
    return model


def put(model, name, module):
    owner, _, attribute = name.rpartition(".")
    model.get_submodule(owner)._modules[attribute] = module


@pytest.mark.parametrize("name", PLACES)
def test_wrapped(model, name):
    put(model, name, Wrapper(model.get_submodule(name)))
    with pytest.raises(CannotServe, match=rf"^{name} is a .*test_refusal\.Wrapper$"):
        check_model(model)


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "forward"])
@pytest.mark.parametrize("name", PLACES)
def test_hooked(model, name, kind):
    module = model.get_submodule(name)
    if kind == "forward":
        module.forward = module.forward
    else:
        getattr(module, kind)(lambda *arguments: None)
    with pytest.raises(CannotServe, match=f"^{name} has a forward hook or a replaced forward$"):
        check_model(model)


@pytest.mark.parametrize("kind", [blocks.SelfAttention, blocks.GLU, blocks.GLMBlock, nn.Linear, nn.LayerNorm])
def test_forward_of_a_class_replaced(model, kind, monkeypatch):
    """A class with a replaced forward is refused, because forks patch attention in all layers like this."""
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *arguments: forward(self, *arguments))
    with pytest.raises(CannotServe, match="has a forward hook or a replaced forward$"):
        check_model(model)


@pytest.mark.parametrize("name", ["lm_head", f"{LAYER}.mlp.dense_4h_to_h", f"{LAYER}.input_layernorm"])
def test_weights_of_another_kind(model, name):
    module = model.get_submodule(name)
    module.weight = nn.Parameter(module.weight.data.as_subclass(Subclass), requires_grad=False)
    with pytest.raises(CannotServe, match=f"a weight of {name} is a .*Subclass"):
        check_model(model)


def test_parametrised(model):
    parametrize.register_parametrization(model.get_submodule(LAYER).attention.dense, "weight", nn.Identity())
    with pytest.raises(CannotServe, match=f"{LAYER}.attention.dense is a .*ParametrizedLinear"):
        check_model(model)


@pytest.mark.parametrize("settings", [{"elementwise_affine": False}, {"bias": False}], ids=str)
def test_norm_without_vectors(model, settings):
    norm = model.transformer.final_layernorm
    put(model, "transformer.final_layernorm", nn.LayerNorm(norm.normalized_shape, **settings))
    with pytest.raises(CannotServe, match=r"transformer.final_layernorm has no weight or no bias among its parameters"):
        check_model(model)


def test_plain_modules_of_the_user_are_served(model):
    """Plain norms and linear layers of the user are served, because the network is made of them."""
    norm, linear = model.transformer.final_layernorm, model.get_submodule(LAYER).attention.dense
    put(model, "transformer.final_layernorm", nn.LayerNorm(norm.normalized_shape))
    put(model, f"{LAYER}.attention.dense", nn.Linear(linear.in_features, linear.out_features))
    assert len(check_model(model)) > 2


@pytest.mark.parametrize("name", [f"{LAYER}.attention.dense", f"{LAYER}.input_layernorm"])
def test_weight_that_is_no_parameter(model, name):
    """A weight that is no parameter is refused, because graphs are told apart by the parameters' addresses."""
    module = model.get_submodule(name)
    weight = module.weight.data
    del module.weight
    module.weight = weight
    with pytest.raises(CannotServe, match=f"^{name} has no weight or no bias among its parameters$"):
        check_model(model)


def test_model_as_configured_fits(model):
    check_sizes(model)
    check_sizes(copy.deepcopy(model).quantize(8, head_bits=8))


def test_pruned_mlp(model):
    """Plain layers of another width are refused, because the kernels' buffers have the configured width."""
    mlp = model.get_submodule(LAYER).mlp
    key, inner = check_model(model), mlp.dense_h_to_4h.out_features
    mlp.dense_h_to_4h = nn.Linear(mlp.dense_h_to_4h.in_features, inner // 2)
    mlp.dense_4h_to_h = nn.Linear(inner // 2, mlp.dense_4h_to_h.out_features)
    assert check_model(model) != key
    with pytest.raises(CannotServe, match=rf"{LAYER}.mlp.dense_h_to_4h has .* shape \[{inner // 2}, "):
        check_sizes(model)


def test_shape_is_part_of_the_key(model):
    """The key holds shapes, because a smaller weight may lie in the memory of a larger one."""
    key, linear = check_model(model), model.get_submodule(LAYER).mlp.dense_h_to_4h
    linear.weight.data, linear.bias.data = linear.weight.data[:-2], linear.bias.data[:-2]
    assert check_model(model) != key


def test_epsilon_is_part_of_the_key(model):
    """The key holds epsilon, because it is written into captured graphs."""
    key = check_model(model)
    model.transformer.final_layernorm.eps *= 2
    assert check_model(model) != key


def test_dropped_layer(model):
    del model.transformer.layers[1]
    check_model(model)
    with pytest.raises(CannotServe, match=r"^the model has \d+ layers, but num_layers is \d+$"):
        check_sizes(model)


def test_norm_that_lost_its_vectors(model):
    norm = model.transformer.final_layernorm
    del norm.weight, norm.bias
    with pytest.raises(CannotServe, match=r"transformer.final_layernorm has no weight or no bias among its parameters"):
        check_model(model)


@pytest.mark.parametrize(
    "change", [torch.Tensor.half, lambda weight: weight.t().contiguous().t()], ids=["dtype", "strides"]
)
@pytest.mark.parametrize("name", [f"{LAYER}.mlp.dense_4h_to_h", f"{LAYER}.input_layernorm"])
def test_weights_that_do_not_lie_like_the_others(model, name, change):
    weight = model.get_submodule(name).weight
    weight.data = change(weight.data if weight.dim() == 2 else weight.data.view(-1, 2))
    with pytest.raises(CannotServe, match=f"^a weight of {name} is .* all must be contiguous and torch.float32 on cpu"):
        check_model(model)


def test_integers_may_have_scales_of_another_dtype(model):
    quantized = copy.deepcopy(model).quantize(8, head_bits=8)
    linear = quantized.get_submodule(LAYER).attention.dense
    linear.weight_scale.data = linear.weight_scale.data.double()
    key = check_model(quantized)
    linear.weight.data = linear.weight.data.clone()
    assert check_model(quantized) != key
    linear.bias.data = linear.bias.data.double()
    with pytest.raises(CannotServe, match=f"^a weight of {LAYER}.attention.dense is torch.float64"):
        check_model(quantized)


def test_weight_that_is_a_plain_tensor_among_the_parameters(model):
    """Some libraries put tensors that are no ``nn.Parameter`` there; they have addresses as parameters have."""
    linear, key = model.get_submodule(LAYER).attention.dense, check_model(model)
    linear._parameters["weight"] = linear.weight.data
    assert check_model(model) == key
