"""Each tensor or cache that cannot be meant is refused in one sentence by forward and generate, before any work."""

import copy

import pytest
import torch
from release_checks import rows_read
from transformers import DynamicCache, StaticCache, cache_utils

from faster_chatglm_6b.ops.caches import CACHE_NAME

IDS = torch.tensor([[20, 30, 40, 50, 60, 321, 324]])
LENGTH = IDS.shape[1]
POSITIONS = torch.tensor([[[0, 1, 2, 3, 4, 5, 5], [0, 0, 0, 0, 0, 0, 1]]])
GREEDY = {"do_sample": False, "max_new_tokens": 2, "eos_token_id": None, "pad_token_id": 3}


def refused(model, message, *calls):
    """Check that every call raises ``ValueError`` with the message before anything is computed."""
    computed = []
    handles = [
        module.register_forward_pre_hook(lambda *arguments: computed.append(1))
        for module in (model.transformer.word_embeddings, model.transformer.layers[0])
    ]
    try:
        for call in calls:
            with pytest.raises(ValueError, match=message) as caught:
                call()
            assert "\n" not in str(caught.value)
    finally:
        for handle in handles:
            handle.remove()
    assert not computed


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (IDS[:0], r"input_ids have shape \[0, 7\]"),
        (IDS[:, :0], r"input_ids have shape \[1, 0\]"),
        (IDS[0], r"input_ids have shape \[7\]"),
        (IDS[None], r"input_ids have shape \[1, 1, 7\]"),
        (IDS.tolist(), "input_ids is a list, but a tensor is needed"),
        (IDS.numpy(), "input_ids is a ndarray"),
        (IDS.float(), "input_ids are torch.float32, but ids are integers"),
        (IDS.bool(), "input_ids are torch.bool"),
        (IDS.to(torch.uint8), "input_ids are torch.uint8"),
        (IDS.to("meta"), "input_ids lies on the device meta and holds no values"),
        (IDS.to_sparse(), "input_ids is a sparse tensor"),
        (IDS + 900, "the id 1224, but this model's vocabulary goes from 0 to 703"),
        (-IDS, "the id -324"),
    ],
    ids=str,
)
def test_ids(tiny_model, ids, message):
    refused(
        tiny_model,
        message,
        lambda: tiny_model(ids),
        lambda: tiny_model.transformer(ids),
        lambda: tiny_model.generate(ids, **GREEDY),
        lambda: tiny_model.generate(input_ids=ids, **GREEDY),
        lambda: tiny_model.stream_tokens(ids, **GREEDY),
    )


def test_ids_of_32_bits_are_ids(tiny_model):
    assert tiny_model.generate(IDS.int(), **GREEDY).tolist() == tiny_model.generate(IDS, **GREEDY).tolist()
    with torch.no_grad():
        assert torch.equal(tiny_model(IDS.int()).logits, tiny_model(IDS).logits)


@pytest.mark.parametrize("ids", [torch.tensor([[704]]), torch.tensor([[-1]])], ids=str)
def test_ids_after_a_cache_and_with_everything_given(tiny_model, ids):
    """Ids are checked even if nothing is derived from them."""
    with torch.no_grad():
        cache = tiny_model(IDS, use_cache=True)[CACHE_NAME]
    step = {"position_ids": torch.tensor([[[5], [2]]]), "past_key_values": cache}
    whole = torch.cat((IDS[:, 1:], ids), dim=1)
    mask = tiny_model.get_masks(IDS)
    refused(
        tiny_model,
        "this model's vocabulary goes from 0 to 703",
        lambda: tiny_model(ids, **step),
        lambda: tiny_model(whole, position_ids=POSITIONS, attention_mask=mask),
    )
    assert cache.get_seq_length() == LENGTH


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(7), r"attention_mask has shape \[7\]; pass \[batch, length\]"),
        (torch.ones(1, 7, 7), r"attention_mask has shape \[1, 7, 7\]; pass \[batch, length\]"),
        (torch.ones(1, 9), "covers 9 tokens, but 7 are attended to"),
        (torch.ones(1, 5), "covers 5 tokens, but 7 are attended to"),
        (torch.ones(2, 7), r"attention_mask has shape \[2, 7\], but \[1, 7\] is needed"),
        (torch.ones(0, 7), r"attention_mask has shape \[0, 7\]"),
        (torch.zeros(1, 1, 7, 9, dtype=torch.bool), r"attention_mask has shape \[1, 1, 7, 9\]"),
        (torch.zeros(1, 4, 7, 7, dtype=torch.bool), r"attention_mask has shape \[1, 4, 7, 7\]"),
        (torch.ones(1, 7, device="meta"), "attention_mask lies on the device meta"),
        (torch.ones(1, 7).to_sparse(), "attention_mask is a sparse tensor"),
        ([[1] * 7], "attention_mask is a list"),
        (torch.zeros(1, 7), "hides every token of a row"),
    ],
    ids=lambda value: str(list(value.shape)) if isinstance(value, torch.Tensor) else None,
)
def test_masks(tiny_model, mask, message):
    refused(
        tiny_model,
        message,
        lambda: tiny_model(IDS, attention_mask=mask),
        lambda: tiny_model.generate(IDS, attention_mask=mask, **GREEDY),
    )


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (POSITIONS - 1, "position_ids hold -1, but positions go from 0 to 1048575"),
        (POSITIONS + 2**40, "position_ids hold 1099511627781"),
        (POSITIONS[0, 0], r"position_ids have shape \[7\], but \[1, 2, 7\] is needed"),
        (POSITIONS[0], r"position_ids have shape \[2, 7\]"),
        (POSITIONS[..., :5], r"position_ids have shape \[1, 2, 5\]"),
        (POSITIONS.repeat(2, 1, 1), r"position_ids have shape \[2, 2, 7\]"),
        (POSITIONS.float(), "position_ids are torch.float32"),
        (POSITIONS.to("meta"), "position_ids lies on the device meta"),
        (POSITIONS.to_sparse(), "position_ids is a sparse tensor"),
        (POSITIONS.tolist(), "position_ids is a list"),
    ],
    ids=str,
)
def test_positions(tiny_model, positions, message):
    mask = tiny_model.get_masks(IDS)
    refused(
        tiny_model,
        message,
        lambda: tiny_model(IDS, position_ids=positions),
        lambda: tiny_model(IDS, position_ids=positions, attention_mask=mask),
        lambda: tiny_model.generate(IDS, position_ids=positions, **GREEDY),
    )


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 7, 64), r"inputs_embeds are torch.float32 of shape \[1, 7, 64\]"),
        ((7, 128), r"inputs_embeds are torch.float32 of shape \[7, 128\]"),
        ((1, 5, 128), r"inputs_embeds have shape \[1, 5, 128\], but input_ids \[1, 7\]"),
        ((2, 7, 128), r"inputs_embeds have shape \[2, 7, 128\], but input_ids \[1, 7\]"),
    ],
)
def test_embeddings(tiny_model, shape, message):
    embeds = torch.zeros(shape)
    calls = [
        lambda: tiny_model(IDS, inputs_embeds=embeds),
        lambda: tiny_model.generate(input_ids=IDS, inputs_embeds=embeds, **GREEDY),
    ]
    refused(tiny_model, message, *calls)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (IDS[:, :3], r"labels are torch.int64 of shape \[1, 3\]; pass int64 \[1, 7\]"),
        (IDS.repeat(2, 1), r"labels are torch.int64 of shape \[2, 7\]"),
        (IDS.float(), "labels are torch.float32"),
        (IDS.tolist(), "labels is a list"),
        (IDS + 900, "labels hold 920, but this model's vocabulary goes from 0 to 703; pass -100"),
        (-IDS, "labels hold -20"),
    ],
    ids=str,
)
def test_labels(tiny_model, labels, message):
    refused(tiny_model, message, lambda: tiny_model(IDS, labels=labels))


def cache_of(layers, tokens=3, batch=1, heads=4, head_size=32):
    cache = DynamicCache()
    for layer in range(layers):
        cache.update(torch.zeros(batch, heads, tokens, head_size), torch.zeros(batch, heads, tokens, head_size), layer)
    return cache


def uneven():
    cache = cache_of(3)
    cache.update(torch.zeros(1, 4, 1, 32), torch.zeros(1, 4, 1, 32), 2)
    return cache


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cache_of(1), "The cache holds 1 layers, and not all equally long, but this model has 3"),
        (lambda: cache_of(4), "The cache holds 4 layers"),
        (uneven, "not all equally long"),
        (lambda: cache_of(3, batch=2), "The cache holds 2 sequences, but 1 are to follow"),
        (lambda: cache_of(3, heads=2), "The cache holds 2 heads of 32 values, but this model has 4 of 32"),
        (lambda: cache_of(3, head_size=16), "The cache holds 4 heads of 16 values"),
        (lambda: "cache", "past_key_values is of the class str"),
        (lambda: {}, "past_key_values is of the class dict"),
        (lambda: ((torch.zeros(3, 1, 4, 32),),) * 3, "past_key_values is a tuple, but not one of"),
        (lambda: ((1, 2),) * 3, "past_key_values is a tuple, but not one of"),
    ],
    ids=["one layer", "more layers", "uneven", "batch", "heads", "width", "text", "dict", "no pairs", "no tensors"],
)
def test_caches_of_other_models(tiny_model, make, message):
    token, positions = torch.tensor([[7]]), torch.tensor([[[5], [2]]])
    refused(
        tiny_model,
        message,
        lambda: tiny_model(token, position_ids=positions, past_key_values=make()),
        lambda: tiny_model.generate(IDS, past_key_values=make(), **GREEDY),
    )


@pytest.mark.parametrize("tokens", [LENGTH, LENGTH + 5])
def test_a_cache_that_holds_all_of_the_ids(tiny_model, tokens):
    message = f"The cache holds {tokens} tokens, but input_ids have only 7; pass the whole sequence"
    refused(tiny_model, message, lambda: tiny_model.generate(IDS, past_key_values=cache_of(3, tokens), **GREEDY))


@pytest.mark.parametrize(
    "name", ["StaticCache", "SlidingWindowCache", "HybridCache", "EncoderDecoderCache", "SinkCache"]
)
def test_caches_that_cannot_follow_a_prefix_mask(tiny_model, name):
    if not hasattr(cache_utils, name):
        pytest.skip(f"this transformers has no {name}")
    made = {"EncoderDecoderCache": lambda: cache_utils.EncoderDecoderCache(DynamicCache(), DynamicCache())}
    try:
        cache = made.get(name, lambda: getattr(cache_utils, name)(config=tiny_model.config, max_cache_len=32))()
    except (TypeError, NotImplementedError) as error:
        pytest.skip(f"this transformers makes no {name}: {error}")
    refused(
        tiny_model,
        "past_key_values is of the class .*; pass a DynamicCache, or leave it out",
        lambda: tiny_model(IDS, past_key_values=cache),
        lambda: tiny_model.generate(IDS, past_key_values=cache, **GREEDY),
    )


def test_a_static_cache_is_refused_by_its_kind(tiny_model):
    cache = StaticCache(config=tiny_model.config, max_cache_len=32)
    refused(tiny_model, "StaticCache, whose size is fixed", lambda: tiny_model(IDS, past_key_values=cache))


def test_a_cache_without_the_prefix(load_tuned):
    model = load_tuned(0)
    with torch.no_grad():
        cache = model(IDS, use_cache=True)[CACHE_NAME]
    assert cache.get_seq_length() == LENGTH + 8
    message = "The cache holds 3 tokens, but those of this model begin with its P-Tuning prefix of 8"
    refused(model, message, lambda: model.generate(IDS, past_key_values=cache_of(3), **GREEDY))


def test_stocks_tuples_are_gone_on_with(tiny_model, golden_tensors):
    """``generate`` takes stock's pairs of keys and values [length, batch, heads, head size], one for each layer."""
    expected = tiny_model.generate(IDS, **GREEDY).tolist()
    begun = tiny_model.generate(IDS, **{**GREEDY, "max_new_tokens": 1}, return_dict_in_generate=True)
    cache = begun[CACHE_NAME]
    layers = [cache.layers[layer] for layer in range(3)] if hasattr(cache, "layers") else None
    pairs = (
        [(one.keys, one.values) for one in layers] if layers else zip(cache.key_cache, cache.value_cache, strict=True)
    )
    stock = tuple((key.permute(2, 0, 1, 3), value.permute(2, 0, 1, 3)) for key, value in pairs)
    with rows_read(tiny_model) as rows:
        output = tiny_model.generate(begun.sequences, past_key_values=stock, **{**GREEDY, "max_new_tokens": 1})
    assert output.tolist() == expected and rows == [1]


def test_a_quantised_cache(tiny_model):
    """A quantised cache serves, whether transformers or the caller makes it; here its room keeps all keys exact."""
    pytest.importorskip("optimum.quanto", reason="quantised caches need optimum-quanto")
    expected = tiny_model.generate(IDS, **GREEDY).tolist()
    config = {"backend": "quanto", "nbits": 4, "q_group_size": 32, "residual_length": 64}
    output = tiny_model.generate(IDS, **GREEDY, cache_implementation="quantized", cache_config=copy.copy(config))
    assert output.shape == (1, LENGTH + 2)
    try:
        cache = cache_utils.QuantizedCache(config=tiny_model.config, **config)
    except TypeError as error:
        pytest.skip(f"this transformers makes quantised caches in another way: {error}")
    assert tiny_model.generate(IDS, **GREEDY, past_key_values=cache).shape == (1, LENGTH + 2)
    assert cache.get_seq_length() == LENGTH + 1
    assert expected[0][:LENGTH] == output[0, :LENGTH].tolist()


def test_a_cache_that_lies_elsewhere_between_the_steps(tiny_model):
    if not torch.cuda.is_available():
        pytest.skip("an offloaded cache needs a GPU to offload from")
    model = copy.deepcopy(tiny_model).cuda()
    expected = model.generate(IDS.cuda(), **GREEDY).tolist()
    assert model.generate(IDS.cuda(), **GREEDY, cache_implementation="offloaded").tolist() == expected
