"""The network against logits, caches, hidden states and gradients of the stock code."""

from dataclasses import replace

import pytest
import torch

from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration
from faster_chatglm_6b.network import model
from faster_chatglm_6b.network.prompt_layout import PromptLayout
from faster_chatglm_6b.ops import reference, reference_operators

TOLERANCE = {"rtol": 0, "atol": 1e-3}


def cases(tensors: dict[str, torch.Tensor], suffix: str) -> list[str]:
    names = sorted(key.removesuffix(suffix) for key in tensors if key.endswith(suffix))
    assert names
    return names


def check_prefill(model, tensors):
    for name in cases(tensors, ".input_ids"):
        input_ids = tensors[f"{name}.input_ids"][None]
        layout = PromptLayout.of(input_ids, model.config)
        length = input_ids.shape[1]
        assert torch.equal(layout.position_ids(0, length)[0], tensors[f"{name}.position_ids"]), name
        assert torch.equal(layout.hidden(0, length)[0], tensors[f"{name}.attention_mask"]), name
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids).logits[0], tensors[f"{name}.logits"], **TOLERANCE, msg=name)


def check_decode(model, tensors):
    """Check 16 greedy steps, each of which is given the token that stock chose."""
    for name in cases(tensors, ".prompt_ids"):
        prompt, generated = tensors[f"{name}.prompt_ids"], tensors[f"{name}.generated"]
        layout = PromptLayout.of(prompt[None], model.config)
        past, tokens = None, prompt[None]
        for step, expected in enumerate(tensors[f"{name}.step_logits"]):
            with torch.no_grad():
                stop = len(prompt) + step
                position_ids = layout.position_ids(0 if step == 0 else stop - 1, stop)
                if step:
                    assert torch.equal(position_ids[0, :, 0], tensors[f"{name}.step_position_ids"][step]), (name, step)
                output = model(
                    tokens, position_ids=position_ids if step else None, past_key_values=past, use_cache=True
                )
            torch.testing.assert_close(output.logits[0, -1], expected, **TOLERANCE, msg=f"{name} step {step}")
            assert int(expected.argmax()) == int(generated[step])
            past, tokens = output.past_key_values, generated[step].view(1, 1)


def test_prefill(tiny_model, golden_tensors):
    check_prefill(tiny_model, golden_tensors("prefill"))


def test_decode(tiny_model, golden_tensors):
    check_decode(tiny_model, golden_tensors("decode"))


def test_heads_of_128(large_golden_dir, golden_tensors):
    model = ChatGLMForConditionalGeneration.from_pretrained(large_golden_dir / "ckpt" / "tiny_hd128").float()
    check_prefill(model, golden_tensors("prefill", "tiny_hd128", large_golden_dir))
    check_decode(model, golden_tensors("decode", "tiny_hd128", large_golden_dir))


def test_long_prompts(tiny_model, golden_tensors):
    tensors = golden_tensors("long")
    for name in cases(tensors, ".input_ids"):
        key = f"{name}.logits_last4" if f"{name}.logits_last4" in tensors else f"{name}.logits_last1"
        with torch.no_grad():
            logits = tiny_model(tensors[f"{name}.input_ids"][None]).logits[0]
        torch.testing.assert_close(logits[-len(tensors[key]) :], tensors[key], **TOLERANCE, msg=name)


def test_cache_after_prefill(tiny_model, golden_tensors):
    tensors = golden_tensors("decode")
    with torch.no_grad():
        cache = tiny_model(tensors["gmask_n07.prompt_ids"][None], use_cache=True).past_key_values
    legacy = [(layer_key, layer_value) for layer_key, layer_value in layers_of(cache)]
    for layer, (key, value) in enumerate(legacy):
        for ours, kind in ((key, "key"), (value, "value")):
            stock = tensors[f"gmask_n07.past_after_prefill.{layer}.{kind}"]
            torch.testing.assert_close(ours.permute(2, 0, 1, 3), stock, **TOLERANCE)


def layers_of(cache):
    """Return (key, value) [B, H, T, K] of each layer, on every transformers."""
    if hasattr(cache, "layers"):
        return [(layer.keys, layer.values) for layer in cache.layers]
    return list(zip(cache.key_cache, cache.value_cache, strict=True))


def test_stocks_tuple_of_past_key_values(tiny_model, golden_tensors):
    tensors = golden_tensors("decode")
    past = tuple(
        tuple(tensors[f"gmask_n07.past_after_prefill.{layer}.{kind}"] for kind in ("key", "value"))
        for layer in range(3)
    )
    layout = PromptLayout.of(tensors["gmask_n07.prompt_ids"][None], tiny_model.config)
    with torch.no_grad():
        output = tiny_model(
            tensors["gmask_n07.generated"][:1][None], past_key_values=past, position_ids=layout.position_ids(9, 10)
        )
    torch.testing.assert_close(output.logits[0, -1], tensors["gmask_n07.step_logits"][1], **TOLERANCE)


def test_padded_batch(tiny_model, golden_tensors):
    tensors = golden_tensors("batch")
    with torch.no_grad():
        logits = tiny_model(
            tensors["input_ids"], attention_mask=tensors["attention_mask"], position_ids=tensors["position_ids"]
        ).logits
        derived = tiny_model(tensors["input_ids"]).logits
    torch.testing.assert_close(logits, tensors["prefill_logits"], **TOLERANCE)
    for row, ids in enumerate(tensors["input_ids"]):
        first = int((ids != tiny_model.config.pad_token_id).int().argmax())
        torch.testing.assert_close(derived[row, first:], tensors["prefill_logits"][row, first:], **TOLERANCE)


def test_hidden_states_and_attentions(tiny_model, golden_tensors):
    tensors, batch = golden_tensors("hidden_attn"), golden_tensors("batch")
    inputs = {
        "single": {"input_ids": tensors["single.input_ids"]},
        "batch": {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")},
    }
    for name, arguments in inputs.items():
        with torch.no_grad():
            output = tiny_model(**arguments, output_hidden_states=True, output_attentions=True)
        assert len(output.hidden_states) == 4 and len(output.attentions) == 3
        for i, hidden_states in enumerate(output.hidden_states):
            torch.testing.assert_close(hidden_states, tensors[f"{name}.hidden_states.{i}"], **TOLERANCE)
        for i, attention in enumerate(output.attentions):
            torch.testing.assert_close(attention, tensors[f"{name}.attentions.{i}"], **TOLERANCE)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients(tiny_dir, golden_tensors, checkpointing):
    tensors = golden_tensors("loss")
    model = ChatGLMForConditionalGeneration.from_pretrained(tiny_dir).float().train(checkpointing)
    if checkpointing:
        model.gradient_checkpointing_enable()
    computed = []
    # Count before a layer, not after it: recomputing stops as soon as nothing more is needed.
    model.transformer.layers[1].register_forward_pre_hook(lambda *arguments: computed.append(1))
    for name in cases(tensors, ".input_ids"):
        model.zero_grad()
        computed.clear()
        output = model(tensors[f"{name}.input_ids"], labels=tensors[f"{name}.labels"])
        torch.testing.assert_close(output.logits.detach(), tensors[f"{name}.logits"], **TOLERANCE, msg=name)
        torch.testing.assert_close(output.loss.detach(), tensors[f"{name}.loss"], **TOLERANCE, msg=name)
        output.loss.backward()
        assert len(computed) == (2 if checkpointing else 1)
        gradients = dict(model.named_parameters())
        for key in (key for key in tensors if key.startswith(f"{name}.grad.")):
            gradient = gradients[key.removeprefix(f"{name}.grad.")].grad
            torch.testing.assert_close(gradient, tensors[key], **TOLERANCE, msg=key)


def test_one_dimensional_positions(tiny_dir, golden_tensors):
    """1-D positions equal stock's uncached run; its cached steps wrongly repeat the position of ``[gMASK]``."""
    tensors = golden_tensors("pos1d")
    model = ChatGLMForConditionalGeneration.from_pretrained(tiny_dir, position_encoding_2d=False).float()
    for name in cases(tensors, ".position_ids"):
        input_ids = tensors[f"{name}.input_ids"][None]
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids).logits[0], tensors[f"{name}.logits"], **TOLERANCE, msg=name)
            output = model.generate(
                input_ids,
                do_sample=False,
                max_new_tokens=8,
                eos_token_id=None,
                return_dict_in_generate=True,
                output_scores=True,
            )
        assert output.sequences[0, input_ids.shape[1] :].tolist() == tensors[f"{name}.uncached.generated"].tolist(), (
            name
        )
        torch.testing.assert_close(
            torch.cat(output.scores), tensors[f"{name}.uncached.step_logits"], **TOLERANCE, msg=name
        )
        repeats_mask_position = not torch.equal(
            tensors[f"{name}.cached.generated"], tensors[f"{name}.uncached.generated"]
        )
        assert repeats_mask_position == (not name.startswith("mask_"))


def test_half_and_bfloat16(tiny_dir, golden_tensors):
    """Half and bfloat16 stay near float32, unlike stock's bfloat16, whose angles are wrong on the long last prompt."""
    tensors = golden_tensors("half_bf16")
    model = ChatGLMForConditionalGeneration.from_pretrained(tiny_dir)
    for dtype, margin in ((torch.float16, 1.0), (torch.bfloat16, 1.0)):
        model.to(dtype)
        for i in range(4):
            with torch.no_grad():
                logits = model(tensors[f"input_ids.{i}"][None]).logits[0, -1].float()
            assert (logits - tensors[f"float32.logits_last.{i}"]).abs().max() < margin, (dtype, i)
    stock_error = (tensors["bfloat16.logits_last.3"] - tensors["float32.logits_last.3"]).abs().max()
    assert stock_error > 5


@pytest.mark.parametrize(
    ("ids", "asks", "masks"),
    [
        ([[20, 30, 40, 50, 60, 321, 324]], {}, 0),
        ([[20, 30, 40, 50, 60, 321, 324]], {"output_attentions": True}, 1),
        ([[20, 30, 40, 321, 324, 50, 60]], {}, 1),
        ([[20, 30, 321, 324, 50], [20, 321, 324, 30, 40]], {}, 1),
    ],
    ids=["prompt", "attentions asked for", "answer after the prompt", "two lengths of context"],
)
def test_a_prompt_has_no_mask_if_its_attention_needs_none(tiny_model, monkeypatch, ids, asks, masks):
    """Attention that follows the context's length gives the definition's values, and no mask is computed for it."""
    ids = torch.tensor(ids)
    with torch.no_grad():
        expected = tiny_model.transformer(ids, **asks).last_hidden_state
        fused = replace(
            reference_operators("the test asks for them"),
            fused_multi_head_attention_inference_v2=attend_to_prefix,
            prompts_need_no_bias=True,
        )
        monkeypatch.setattr(model, "operators_for", lambda *arguments: fused)
        computed, hidden = [], PromptLayout.hidden
        monkeypatch.setattr(PromptLayout, "hidden", lambda *args: computed.append(args) or hidden(*args))
        actual = tiny_model.transformer(ids, **asks).last_hidden_state
    assert len(computed) == masks
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def attend_to_prefix(*, query, key, value, attn_bias=None, prefix_length=None, scale=None):
    """Compute attention from the context's length alone if only the last row is not context."""
    if prefix_length == key.shape[2] - 1:
        attn_bias = torch.zeros(query.shape[2], key.shape[2])
        attn_bias[:-1, -1] = -torch.inf
    return reference.fused_multi_head_attention_inference_v2(query=query, key=key, value=value, attn_bias=attn_bias)
