"""Names that scripts read on the checkpoint's own model, with the same values."""

import inspect

import pytest
import torch

from faster_chatglm_6b.configuration_chatglm import ChatGLMConfig
from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration


@pytest.fixture(scope="module")
def one_axis(tiny_dir):
    """Return an untrained model with 1-D positions."""
    config = ChatGLMConfig.from_pretrained(tiny_dir, position_encoding_2d=False, num_layers=1)
    return ChatGLMForConditionalGeneration(config)


def test_masks_and_positions_equal_stocks(tiny_model, one_axis, golden_json):
    cases = [case for case in golden_json("masks_positions")["cases"] if "error" not in case]
    assert len(cases) == 12 and any("padded" in case["name"] for case in cases)
    for case in cases:
        ids, slots = torch.tensor(case["input_ids"]), case["mask_positions"]
        use_gmasks = case["use_gmasks"]
        for model in (tiny_model, tiny_model.transformer, one_axis, one_axis.transformer):
            mask = model.get_masks(ids, ids.device)
            assert mask.dtype == torch.bool and mask[:, 0].int().tolist() == case["attention_mask"], case["name"]
        for model in (tiny_model, tiny_model.transformer):
            for given in (slots, torch.tensor(slots)):
                positions = model.get_position_ids(ids, given, ids.device, use_gmasks)
                assert positions.dtype == torch.int64 and positions.tolist() == case["position_ids_2d"], case["name"]
            assert model.get_position_ids(ids, mask_positions=slots, device="cpu").tolist() == case["position_ids_2d"]
        for model in (one_axis, one_axis.transformer):
            positions = model.get_position_ids(ids, slots, ids.device, use_gmasks=use_gmasks)
            assert positions.tolist() == case["position_ids_1d"], case["name"]
            without = model.get_position_ids(ids, slots, ids.device)
            assert without.tolist() == case["position_ids_1d_use_gmasks_None"], case["name"]


def test_ids_without_sop(tiny_model):
    ids = torch.tensor([[10, 11, 324], [10, 11, 321]])
    for call in (lambda: tiny_model.get_masks(ids, "cpu"), lambda: tiny_model.get_position_ids(ids, [2, 2], "cpu")):
        with pytest.raises(ValueError, match=r"input_ids hold no <sop> \(324\)"):
            call()


def test_they_are_what_forward_and_tokenizer_take(tiny_model, tiny_tokenizer):
    """The model takes the mask and positions that it made, as stock's idiom has it."""
    batch = tiny_tokenizer(["你好", "a"], padding=True, return_tensors="pt")
    ids = batch["input_ids"]
    longest = [row for row in range(2) if ids[row, 0] != tiny_tokenizer.pad_token_id]
    assert len(longest) == 1
    row = ids[longest]
    mask = tiny_model.get_masks(row, row.device)
    slot = row[0].tolist().index(tiny_model.config.gmask_token_id)
    positions = tiny_model.get_position_ids(row, [slot], row.device)
    assert torch.equal(mask, batch["attention_mask"][longest].bool())
    assert torch.equal(positions, batch["position_ids"][longest])
    with torch.no_grad():
        logits = tiny_model(row, attention_mask=mask, position_ids=positions).logits
        assert torch.equal(logits, tiny_model(row).logits)


def test_the_signatures_are_stocks(tiny_model):
    expected = {
        "get_masks": ["input_ids", "device"],
        "get_position_ids": ["input_ids", "mask_positions", "device", "use_gmasks"],
    }
    for name, parameters in expected.items():
        assert list(inspect.signature(getattr(tiny_model, name)).parameters) == parameters
    assert list(inspect.signature(tiny_model.transformer.get_prompt).parameters) == ["batch_size", "device", "dtype"]
    # The code of March 2023 passes one slot for all rows.
    ids = torch.tensor([[10, 11, 321, 324, 20]])
    assert torch.equal(tiny_model.get_position_ids(ids, 2, "cpu"), tiny_model.get_position_ids(ids, [2], "cpu"))


SIZES = {
    "hidden_size": 128,
    "inner_hidden_size": 512,
    "num_layers": 3,
    "num_attention_heads": 4,
    "hidden_size_per_attention_head": 32,
    "vocab_size": 704,
    "layernorm_epsilon": 1e-5,
    "max_sequence_length": 2048,
    "position_encoding_2d": True,
    "pre_seq_len": None,
    "prefix_projection": False,
    "params_dtype": torch.float16,
    "is_parallelizable": False,
}


def test_attributes(tiny_model, golden_dir):
    for name, value in SIZES.items():
        assert getattr(tiny_model.transformer, name) == value, name
    for name in ("max_sequence_length", "position_encoding_2d", "is_parallelizable"):
        assert getattr(tiny_model, name) == SIZES[name]
    attention = tiny_model.transformer.layers[1].attention
    sizes = (attention.num_attention_heads, attention.num_attention_heads_per_partition, attention.layer_id)
    assert sizes == (4, 4, 1)
    assert (attention.hidden_size, attention.hidden_size_per_partition) == (128, 128)
    assert attention.hidden_size_per_attention_head == 32
    assert tiny_model.quantized is False
    quantised = ChatGLMForConditionalGeneration.from_pretrained(golden_dir / "ckpt" / "tiny-int8")
    assert quantised.quantized is True
    assert not hasattr(tiny_model.transformer, "prefix_tokens") and not hasattr(
        tiny_model.transformer, "prefix_encoder"
    )
    with pytest.raises(ValueError, match=r"needs a P-Tuning prefix, but config.pre_seq_len is not set"):
        tiny_model.transformer.get_prompt(1, "cpu")


def test_quantize_is_seen(tiny_dir):
    model = ChatGLMForConditionalGeneration.from_pretrained(tiny_dir)
    assert model.quantized is False and model.quantize(8).quantized is True


def test_what_scripts_set_stays_settable(tiny_dir):
    """Scripts can set ``is_parallelizable`` and ``model_parallel``, as ChatGLM-Tuning and its forks do."""
    model = ChatGLMForConditionalGeneration(ChatGLMConfig.from_pretrained(tiny_dir, num_layers=1))
    model.is_parallelizable = model.model_parallel = True
    assert model.is_parallelizable and model.model_parallel
    names = set(model.state_dict())
    assert not [name for name in names if "prefix_tokens" in name or "inv_freq" in name]


@pytest.mark.parametrize("projection", [0, 1])
def test_the_prefix_in_stocks_layout(load_tuned, golden_tensors, projection):
    model, golden = load_tuned(projection), golden_tensors(f"ptuning_proj{projection}")
    network = model.transformer
    assert (network.pre_seq_len, network.prefix_projection) == (8, bool(projection))
    assert network.prefix_tokens.tolist() == list(range(8)) and network.prefix_tokens.dtype == torch.int64
    with torch.no_grad():
        prompt = network.get_prompt(batch_size=2, device="cpu", dtype=torch.float32)
        assert network.get_prompt(1, "cpu")[0].dtype == torch.float16
        packed = network.prefix_encoder(network.prefix_tokens.unsqueeze(0).expand(2, -1))
    assert isinstance(prompt, tuple) and packed.shape == (2, 8, 3 * 2 * 128)
    # Stock's get_prompt makes the pairs like this from the encoder's output.
    by_hand = packed.view(2, 8, 6, 4, 32).permute(2, 1, 0, 3, 4).split(2)
    for layer, (one, other) in enumerate(zip(prompt, by_hand, strict=True)):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
        expected = golden[f"prompt_kv.{layer}"].expand(-1, -1, 2, -1, -1)
        torch.testing.assert_close(one, expected, rtol=0, atol=1e-5)


def test_the_prefix_drops_out_in_training(load_tuned):
    network = load_tuned(0).transformer.train()
    dropped = network.get_prompt(1, "cpu", torch.float32)[0]
    assert bool((dropped == 0).any()) and bool((network.eval().get_prompt(1, "cpu", torch.float32)[0] != 0).all())
