"""P-Tuning v2 prefixes, inference and training, against stock."""

import pytest
import torch

from faster_chatglm_6b.configuration_chatglm import ChatGLMConfig
from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration
from faster_chatglm_6b.network.prompt_layout import PromptLayout

TOLERANCE = {"rtol": 0, "atol": 1e-3}
PREFIX = "transformer.prefix_encoder."


@pytest.fixture(params=[0, 1], ids=["embedding", "projection"])
def tuned(request, load_tuned, golden_tensors):
    """Return the model with its prefix, and the tensors that stock computed with it."""
    return load_tuned(request.param), golden_tensors(f"ptuning_proj{request.param}")


def test_prefix_keys_and_values(tuned):
    model, tensors = tuned
    for layer, pair in enumerate(model.transformer.prefix_encoder.keys_and_values(1, torch.float32)):
        for ours, stock in zip(pair, tensors[f"prompt_kv.{layer}"], strict=True):
            torch.testing.assert_close(ours.permute(2, 0, 1, 3), stock, **TOLERANCE)


@pytest.mark.parametrize("use_cache", [True, False])
def test_prefill_and_greedy_steps(tuned, use_cache):
    model, tensors = tuned
    for name in ("gmask", "mask_mid"):
        input_ids = tensors[f"{name}.input_ids"][None]
        with torch.no_grad():
            output = model(input_ids, use_cache=use_cache, output_attentions=True)
        torch.testing.assert_close(output.logits[0], tensors[f"{name}.logits"], **TOLERANCE)
        if f"{name}.attentions.0" in tensors:
            torch.testing.assert_close(output.attentions[0], tensors[f"{name}.attentions.0"], **TOLERANCE)
        steps = model.generate(
            input_ids,
            do_sample=False,
            max_new_tokens=8,
            eos_token_id=None,
            use_cache=use_cache,
            return_dict_in_generate=True,
            output_scores=True,
        )
        assert steps.sequences[0, input_ids.shape[1] :].tolist() == tensors[f"{name}.generated"].tolist()
        torch.testing.assert_close(torch.cat(steps.scores), tensors[f"{name}.step_logits"], **TOLERANCE)


def test_padded_batch(tuned):
    model, tensors = tuned
    input_ids = tensors["batch.input_ids"]
    with torch.no_grad():
        logits = model(input_ids).logits
    layout = PromptLayout.of(input_ids, model.config)
    for row, first in enumerate(layout.first_slot.tolist()):
        torch.testing.assert_close(logits[row, first:], tensors["batch.logits"][row, first:], **TOLERANCE)
    steps = model.generate(input_ids, do_sample=False, max_new_tokens=8, eos_token_id=None)
    assert steps[:, input_ids.shape[1] :].tolist() == tensors["batch.generated"].tolist()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_reaches_the_prefix_alone(tuned, checkpointing):
    model, tensors = tuned
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {
        name for name, _ in model.named_parameters() if name.startswith(PREFIX)
    }
    if checkpointing:
        model.train().gradient_checkpointing_enable()
        model.enable_input_require_grads()
        model.transformer.prefix_encoder.eval()
    output = model(tensors["loss.input_ids"][None], labels=tensors["loss.labels"][None])
    torch.testing.assert_close(output.loss.detach(), tensors["loss.loss"], **TOLERANCE)
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.transformer.prefix_encoder.named_parameters()}
    names = [key.removeprefix("loss.grad.") for key in tensors if key.startswith("loss.grad.")]
    assert names
    for name in names:
        torch.testing.assert_close(gradients[name], tensors[f"loss.grad.{name}"], **TOLERANCE)


def test_streaming_chat_and_round_trip(tuned, tiny_tokenizer, tmp_path):
    model, _ = tuned
    response, _ = model.chat(tiny_tokenizer, "你好", do_sample=False, max_new_tokens=6)
    assert list(model.stream_chat(tiny_tokenizer, "你好", do_sample=False, max_new_tokens=6))[-1][0] == response
    model.save_pretrained(tmp_path)
    again = ChatGLMForConditionalGeneration.from_pretrained(tmp_path).float().eval()
    assert again.chat(tiny_tokenizer, "你好", do_sample=False, max_new_tokens=6)[0] == response


def test_assisted_decoding_is_the_loops_or_refused(tuned, monkeypatch):
    model, tensors = tuned
    prompt, settings = tensors["gmask.input_ids"][None], {"do_sample": False, "max_new_tokens": 4}
    looked_up = model.generate(prompt, **settings, prompt_lookup_num_tokens=2)
    assert looked_up.tolist() == model.generate(prompt, **settings).tolist()
    monkeypatch.setenv("FASTER_CHATGLM_6B_KERNELS", "off")
    with pytest.raises(ValueError, match="which a P-Tuning prefix shifts"):
        model.generate(prompt, **settings, prompt_lookup_num_tokens=2)


@pytest.mark.parametrize("settings", [{}, {"quantization_bit": 8}, {"quantization_bit": 4}], ids=str)
@pytest.mark.parametrize("projection", [False, True])
def test_training_starts_from_a_plain_checkpoint(tiny_dir, settings, projection):
    """If the config asks for a prefix that the weights lack, the prefix is new and it alone is trained."""
    config = ChatGLMConfig.from_pretrained(tiny_dir, pre_seq_len=4, prefix_projection=projection, **settings)
    model = ChatGLMForConditionalGeneration.from_pretrained(tiny_dir, config=config)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names and all(name.startswith(PREFIX) for name in names)
    assert all(parameter.isfinite().all() for name, parameter in model.named_parameters() if name in names)
    assert model.transformer.prefix_encoder.embedding.weight.float().std() > 0.1
    assert len({parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}) == 1
    ids = torch.tensor([[5, 143, 90, 321, 324, 40, 41]])
    model.float().train()(ids, labels=ids).loss.backward()
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if name in names)
