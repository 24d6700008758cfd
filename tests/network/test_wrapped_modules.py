"""Modules that forks and users put around or in place of the network's own are called, and none is skipped."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import faster_chatglm_6b
from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration

IDS = torch.tensor([[20, 30, 40, 321, 324]])
BATCH = torch.tensor([[3, 3, 20, 30, 40, 321, 324], [50, 60, 70, 80, 90, 321, 324]])
GREEDY = {"do_sample": False, "max_new_tokens": 5}
# A wrapped layer computes by torch, another one by the CPU's own kernel, which adds in another order.
TOLERANCE = {"rtol": 0, "atol": 1e-4}


class CastOutputToFloat(nn.Sequential):
    """Cast the head's output as ChatGLM-Tuning and many forks do."""

    def forward(self, x):
        return super().forward(x).to(torch.float32)


class Wrapper(nn.Module):
    """Pass everything on, and count the calls."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, *arguments, **settings):
        self.calls += 1
        return self.inner(*arguments, **settings)


class OneArgument(nn.Module):
    """Take the hidden states alone, as stock calls its norms, linear layers and MLP."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, hidden_states):
        self.calls += 1
        return self.inner(hidden_states)


LAYER = "transformer.layers.1"
ONE_ARGUMENT = (
    "lm_head",
    "transformer.word_embeddings",
    "transformer.final_layernorm",
    f"{LAYER}.input_layernorm",
    f"{LAYER}.post_attention_layernorm",
    f"{LAYER}.attention.query_key_value",
    f"{LAYER}.attention.dense",
    f"{LAYER}.mlp",
    f"{LAYER}.mlp.dense_h_to_4h",
    f"{LAYER}.mlp.dense_4h_to_h",
)
PLACES = (*ONE_ARGUMENT, LAYER, f"{LAYER}.attention")


@pytest.fixture(params=["tiny", "tiny-int8"])
def base(request, golden_dir):
    return ChatGLMForConditionalGeneration.from_pretrained(golden_dir / "ckpt" / request.param).float().eval()


def put(model, name, make):
    """Put ``make(module)`` in a module's place and return it."""
    owner, _, attribute = name.rpartition(".")
    owner = model.get_submodule(owner)
    made = make(getattr(owner, attribute))
    if isinstance(owner, nn.ModuleList):
        owner[int(attribute)] = made
    else:
        setattr(owner, attribute, made)
    return made


def check(model, expected, tokenizer):
    """Check that logits, generations and chat equal the other model's; return the reasons for the plain path."""
    before = faster_chatglm_6b.status().plain_generations
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected(IDS).logits, **TOLERANCE)
    for ids in (IDS, BATCH):
        assert model.generate(ids, **GREEDY).tolist() == expected.generate(ids, **GREEDY).tolist()
    sampled = [
        one.generate(IDS, max_new_tokens=5, generator=torch.manual_seed(0)).tolist() for one in (model, expected)
    ]
    assert sampled[0] == sampled[1]
    assert model.generate(IDS, **GREEDY, num_beams=2).tolist() == expected.generate(IDS, **GREEDY, num_beams=2).tolist()
    assert model.chat(tokenizer, "你好", **GREEDY) == expected.chat(tokenizer, "你好", **GREEDY)
    streams = [list(one.stream_chat(tokenizer, "你好", **GREEDY)) for one in (model, expected)]
    assert streams[0] == streams[1] and streams[0]
    return {
        why: count - before.get(why, 0)
        for why, count in faster_chatglm_6b.status().plain_generations.items()
        if count != before.get(why, 0)
    }


@pytest.mark.parametrize("name", PLACES)
def test_a_wrapped_module_is_called(base, tiny_tokenizer, name):
    model = copy.deepcopy(base)
    wrapper = put(model, name, OneArgument if name in ONE_ARGUMENT else Wrapper)
    check(model, base, tiny_tokenizer)
    wrapper.calls = 0
    with torch.no_grad():
        model(IDS)
    assert wrapper.calls == 1


@pytest.mark.parametrize("name", ["lm_head", "transformer.word_embeddings"])
def test_why_is_told(base, tiny_tokenizer, name):
    model = copy.deepcopy(base)
    put(model, name, Wrapper)
    reasons = check(model, base, tiny_tokenizer)
    assert reasons[f"{name} is a {__name__}.Wrapper"] == 5


def test_the_cast_of_chatglm_tuning(base, tiny_tokenizer):
    model, half = copy.deepcopy(base), copy.deepcopy(base).to(torch.bfloat16)
    model.lm_head = CastOutputToFloat(model.lm_head)
    assert any("lm_head" in why and "CastOutputToFloat" in why for why in check(model, base, tiny_tokenizer))
    expected = half(IDS).logits
    half.lm_head = CastOutputToFloat(half.lm_head)
    logits = half(IDS).logits
    assert logits.dtype == torch.float32 and torch.equal(logits, expected.float())
    assert half.generate(IDS, **GREEDY).shape[1] > IDS.shape[1]


def test_several_at_once(base, tiny_tokenizer):
    model = copy.deepcopy(base)
    for name in sorted(PLACES, key=len, reverse=True):
        put(model, name, OneArgument if name in ONE_ARGUMENT else Wrapper)
    check(model, base, tiny_tokenizer)


@pytest.mark.parametrize("name", ["transformer.final_layernorm", f"{LAYER}.input_layernorm"])
def test_another_norm(tiny_model, tiny_tokenizer, name):
    """Norms with and without vectors, of torch's class and of others, are all called."""
    for affine in (True, False):
        plain, other = copy.deepcopy(tiny_model), copy.deepcopy(tiny_model)
        put(plain, name, lambda norm, affine=affine: nn.LayerNorm(norm.normalized_shape, elementwise_affine=affine))
        put(other, name, lambda norm: type("Foreign", (nn.LayerNorm,), {})(norm.normalized_shape))
        check(plain, other, tiny_tokenizer)
    biasless = copy.deepcopy(tiny_model)
    put(biasless, name, lambda norm: nn.LayerNorm(norm.normalized_shape, bias=False))
    check(biasless, other, tiny_tokenizer)


@pytest.mark.parametrize("name", ["lm_head", f"{LAYER}.attention.dense", f"{LAYER}.mlp.dense_h_to_4h"])
def test_another_linear_layer(tiny_model, tiny_tokenizer, name):
    plain, foreign = copy.deepcopy(tiny_model), copy.deepcopy(tiny_model)

    def copied(linear, kind=nn.Linear):
        made = kind(linear.in_features, linear.out_features, bias=True)
        nn.init.zeros_(made.bias)
        made.weight.data = linear.weight.data * 0.5
        return made

    put(plain, name, copied)
    put(foreign, name, lambda linear: copied(linear, type("Foreign", (nn.Linear,), {})))
    check(plain, foreign, tiny_tokenizer)
    with torch.no_grad():
        assert not torch.allclose(plain(IDS).logits, tiny_model(IDS).logits)


@pytest.mark.parametrize("kind", ["forward hook", "forward pre-hook", "replaced forward", "hook on all modules"])
@pytest.mark.parametrize("name", PLACES)
def test_hooks_fire_once_per_call(base, name, kind):
    model, seen = copy.deepcopy(base), []
    module, handle = model.get_submodule(name), None
    if kind == "forward hook":
        module.register_forward_hook(lambda *arguments: seen.append(1))
    elif kind == "forward pre-hook":
        module.register_forward_pre_hook(lambda *arguments: seen.append(1))
    elif kind == "replaced forward":
        forward = module.forward
        module.forward = lambda *arguments, **settings: seen.append(1) or forward(*arguments, **settings)
    else:
        handle = nn.modules.module.register_module_forward_hook(
            lambda called, *arguments: seen.append(1) if called is module else None
        )
    try:
        with torch.no_grad():
            logits = model(IDS).logits
    finally:
        if handle is not None:
            handle.remove()
    assert len(seen) == 1
    with torch.no_grad():
        torch.testing.assert_close(logits, base(IDS).logits, **TOLERANCE)


@pytest.mark.parametrize("name", PLACES)
def test_backward_hooks_fire(tiny_model, name):
    model, seen = copy.deepcopy(tiny_model), []
    model.get_submodule(name).register_full_backward_hook(lambda *arguments: seen.append(1))
    answered = torch.cat((IDS, torch.tensor([[30, 40]])), dim=1)
    model(answered, labels=answered).loss.backward()
    assert len(seen) == 1


def test_hooks_see_what_stocks_modules_give(base):
    """Hooks see a linear layer's product and the outputs of attention and MLP without the residual."""
    model, outputs = copy.deepcopy(base), {}
    layer = model.transformer.layers[1]
    for name, module in (("mlp", layer.mlp), ("attention", layer.attention)):
        last = module.dense_4h_to_h if name == "mlp" else module.dense
        for key, hooked in ((name, module), (f"{name}'s product", last)):
            hooked.register_forward_hook(
                lambda _, arguments, output, key=key: outputs.__setitem__(key, (arguments[0], output))
            )
    with torch.no_grad():
        model(IDS)
    for name in ("mlp", "attention"):
        output = outputs[name][1][0] if name == "attention" else outputs[name][1]
        x, product = outputs[f"{name}'s product"]
        assert torch.equal(output, product)
        linear = (
            base.transformer.layers[1].mlp.dense_4h_to_h
            if name == "mlp"
            else base.transformer.layers[1].attention.dense
        )
        with torch.no_grad():
            torch.testing.assert_close(product, linear(x), **TOLERANCE)


def test_a_hook_changes_the_answer(tiny_model):
    """A hook that returns something replaces the output, on every module."""
    with torch.no_grad():
        before = tiny_model(IDS).logits
    for name in PLACES:
        model = copy.deepcopy(tiny_model)

        def double(module, arguments, output):
            return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output

        model.get_submodule(name).register_forward_hook(double)
        with torch.no_grad():
            assert not torch.allclose(model(IDS).logits, before), name


def test_pruned_and_parametrised_weights_count(tiny_model):
    model, expected = copy.deepcopy(tiny_model), copy.deepcopy(tiny_model)
    for one, place in ((model, "dense"), (expected, "dense")):
        linear = getattr(one.transformer.layers[0].attention, place)
        prune.random_unstructured(linear, "weight", amount=0.0)
        linear.weight_mask[:, ::2] = 0
    prune.remove(expected.transformer.layers[0].attention.dense, "weight")
    parametrised = copy.deepcopy(tiny_model)

    class Mask(nn.Module):
        def forward(self, weight):
            return weight * (torch.arange(weight.shape[1]) % 2)

    parametrize.register_parametrization(parametrised.transformer.layers[0].attention.dense, "weight", Mask())
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected(IDS).logits, **TOLERANCE)
        torch.testing.assert_close(parametrised(IDS).logits, expected(IDS).logits, **TOLERANCE)
        assert not torch.allclose(expected(IDS).logits, tiny_model(IDS).logits)


def test_stocks_state_dict_loads_strictly(tiny_model, tiny_dir):
    """The rotary tables in stock's checkpoints load strictly; any other unknown key still fails."""
    state = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    model = ChatGLMForConditionalGeneration.from_pretrained(tiny_dir).float()
    for value in model.parameters():
        value.data = torch.zeros_like(value)
    for layer in range(3):
        state[f"transformer.layers.{layer}.attention.rotary_emb.inv_freq"] = torch.ones(8)
    names = set(state)
    result = model.load_state_dict(state, strict=True)
    assert not result.missing_keys and not result.unexpected_keys and set(state) == names
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    for key in (
        "transformer.layers.0.attention.rotary_emb.cos",
        "transformer.layers.0.rotary_emb.inv_freq",
        "transformer.layers.7.attention.rotary_emb.inv_freq",
        "rotary_emb.inv_freq",
    ):
        with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict"):
            model.load_state_dict({**state, key: torch.ones(8)}, strict=True)


def test_dropped_and_moved_layers(tiny_model):
    """The cache counts layers by their places, whatever their own numbers and ``num_layers`` say."""
    model = copy.deepcopy(tiny_model)
    kept = list(model.transformer.layers)
    model.transformer.layers = nn.ModuleList((kept[-1], *kept[1:-1], kept[-1]))
    swapped = model.generate(IDS, **GREEDY)
    assert swapped.tolist() == model.generate(IDS, **GREEDY, use_cache=False).tolist()
    model.transformer.layers = nn.ModuleList((kept[-1], *kept[:-2]))
    fewer = model.generate(IDS, **GREEDY)
    assert fewer.tolist() == model.generate(IDS, **GREEDY, use_cache=False).tolist()
