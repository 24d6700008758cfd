"""The one model file gives on OneFlow what the stock code gives: logits, generation, chat."""

import pytest
import torch
from golden_checks import assert_close, cases, check_batch, check_decode, check_prefill

from faster_chatglm_6b.network.prompt_layout import PromptLayout

# Stock misbehaves in these cases; tests/conversation/test_chat.py has a test for each.
STOCK_BUGS = (
    "mask_in_query",
    "eop_in_query",
    "sop_in_query",
    "empty_query",
    "prompt_longer_than_max_length",
    "prompt_equal_max_length",
    "no_repeat_ngram_size (InvalidScoreLogitsProcessor trap)",
    "min_length (trap)",
)


def test_torch_is_oneflow():
    assert torch.Tensor.__module__.startswith("oneflow")


def test_prefill(tiny_model, golden_tensors):
    check_prefill(tiny_model, golden_tensors("prefill"))


def test_decode(tiny_model, golden_tensors):
    check_decode(tiny_model, golden_tensors("decode"))


def test_batch(tiny_model, golden_tensors):
    check_batch(tiny_model, golden_tensors("batch"))


def test_long_prompts(tiny_model, golden_tensors):
    tensors = golden_tensors("long")
    for name in cases(tensors, ".input_ids"):
        key = f"{name}.logits_last4" if f"{name}.logits_last4" in tensors else f"{name}.logits_last1"
        with torch.no_grad():
            logits = tiny_model(tensors[f"{name}.input_ids"][None]).logits[0]
        assert_close(logits[-tensors[key].shape[0] :], tensors[key], name)


def test_cache_after_prefill(tiny_model, golden_tensors):
    tensors = golden_tensors("decode")
    with torch.no_grad():
        cache = tiny_model(tensors["gmask_n07.prompt_ids"][None], use_cache=True).past_key_values
    assert cache.get_seq_length() == 9
    for layer in range(3):
        for ours, kind in zip(cache[layer], ("key", "value"), strict=True):
            assert_close(ours.permute(2, 0, 1, 3), tensors[f"gmask_n07.past_after_prefill.{layer}.{kind}"])


def test_hidden_states_and_attentions(tiny_model, golden_tensors):
    tensors = golden_tensors("hidden_attn")
    with torch.no_grad():
        output = tiny_model(tensors["single.input_ids"], output_hidden_states=True, output_attentions=True)
    for i in range(4):
        assert_close(output.hidden_states[i], tensors[f"single.hidden_states.{i}"], i)
    for i in range(3):
        assert_close(output.attentions[i], tensors[f"single.attentions.{i}"], i)


def test_loss_and_gradients(load, tiny_dir, golden_tensors):
    tensors = golden_tensors("loss")
    name = cases(tensors, ".input_ids")[0]
    model = load(tiny_dir).float()
    output = model(tensors[f"{name}.input_ids"], labels=tensors[f"{name}.labels"])
    assert_close(output.loss, tensors[f"{name}.loss"])
    output.loss.backward()
    parameters = dict(model.named_parameters())
    keys = [key for key in tensors if key.startswith(f"{name}.grad.")]
    assert keys
    for key in keys:
        assert_close(parameters[key.removeprefix(f"{name}.grad.")].grad, tensors[key], key)


@pytest.mark.parametrize("kind", ["proj0", "proj1"])
def test_prefix_tuning(load, tiny_dir, golden_dir, golden_tensors, kind):
    from safetensors.torch import load_file

    from faster_chatglm_6b.configuration_chatglm import ChatGLMConfig

    directory, tensors = golden_dir / "ckpt" / f"tiny-ptuning-{kind}", golden_tensors(f"ptuning_{kind}")
    model = load(tiny_dir, config=ChatGLMConfig.from_pretrained(directory)).float().eval()
    prefix = load_file(directory / "model.safetensors")
    model.transformer.prefix_encoder.load_state_dict(
        {name.removeprefix("transformer.prefix_encoder."): value for name, value in prefix.items()}
    )
    for name in ("gmask", "mask_mid"):
        input_ids = tensors[f"{name}.input_ids"][None]
        for use_cache in (True, False):
            with torch.no_grad():
                assert_close(model(input_ids, use_cache=use_cache).logits[0], tensors[f"{name}.logits"], name)
            output = model.generate(
                input_ids, do_sample=False, max_new_tokens=8, eos_token_id=None, use_cache=use_cache
            )
            assert output[0, input_ids.shape[1] :].tolist() == tensors[f"{name}.generated"].tolist(), name


def arguments(case, config):
    """Return what stock was given: ids, and for padded calls also the 4-D mask and the tokenizer's positions."""
    input_ids = torch.tensor(case["prompt_ids"])
    if "attention_mask" not in case["inputs"]:
        return {"input_ids": input_ids}
    layout, length = PromptLayout.of(input_ids, config), input_ids.shape[1]
    return {
        "input_ids": input_ids,
        "attention_mask": layout.hidden(0, length),
        "position_ids": layout.position_ids(0, length),
    }


def test_generate(tiny_model, golden_json):
    """Greedy, processors, beams and padded batches agree. This transformers is the one that the ids were made with."""
    prefixes = ("greedy|", "reppen", "ngram", "min_length", "max_new_tokens", "nocache", "batch_", "single", "beam3")
    found = [case for case in golden_json("generate")["cases"] if case["name"].startswith(prefixes)]
    assert sum(case["name"].startswith("beam3") for case in found) >= 4 and len(found) > 25
    for case in found:
        output = tiny_model.generate(**arguments(case, tiny_model.config), **case["kwargs"])
        assert output.tolist() == case["output_ids"], case["name"]


def test_sampling_is_seed_stable(tiny_model, tiny_tokenizer):
    answers = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        answers.append(tiny_model.chat(tiny_tokenizer, "你好", max_length=24)[0])
    torch.manual_seed(7)
    streamed = list(tiny_model.stream_chat(tiny_tokenizer, "你好", max_length=24))[-1][0]
    assert answers[0] == answers[1] == streamed != answers[2]


def test_a_generator_makes_sampling_repeatable(tiny_model, tiny_tokenizer):
    input_ids = tiny_tokenizer("你好", return_tensors="pt")["input_ids"]
    outputs = []
    for seed in (1, 1, 2):
        generator = torch.Generator("cpu")
        generator.manual_seed(seed)
        outputs.append(tiny_model.generate(input_ids, do_sample=True, max_new_tokens=12, generator=generator).tolist())
    assert outputs[0] == outputs[1] != outputs[2]


def test_chat_and_stream_chat(tiny_model, tiny_tokenizer, golden_json):
    checked = 0
    for case in golden_json("chat")["cases"]:
        if case["name"] in STOCK_BUGS:
            continue
        call = {"history": case["history"], **case["kwargs"]}
        response, history = tiny_model.chat(tiny_tokenizer, case["query"], **call)
        assert response == case["response"], case["name"]
        assert [list(pair) for pair in history] == [list(pair) for pair in case["new_history"]], case["name"]
        if case.get("stream_responses"):
            responses = [text for text, _ in tiny_model.stream_chat(tiny_tokenizer, case["query"], **call)]
            stock = case["stream_responses"]
            assert responses[: len(stock)] == stock and responses[-1] == response, case["name"]
        checked += 1
    assert checked > 20


def test_chat_batch_equals_chat(tiny_model, tiny_tokenizer):
    queries, settings = ["你好", "再见", "今天天气怎么样？"], {"do_sample": False, "max_new_tokens": 6}
    alone = [tiny_model.chat(tiny_tokenizer, query, **settings) for query in queries]
    responses, histories = tiny_model.chat_batch(tiny_tokenizer, queries, **settings)
    assert list(zip(responses, histories, strict=True)) == alone


def test_stream_generate_fills_ended_rows_with_pads(tiny_model, tiny_tokenizer, golden_json):
    golden = golden_json("chat")
    inputs = tiny_tokenizer(golden["stream_generate_batch"]["texts"], return_tensors="pt", padding=True)
    expected = golden["generate_batch_same"]
    steps = list(tiny_model.stream_generate(**inputs, do_sample=False, max_length=len(expected[0])))
    assert steps[-1].tolist() == expected


def test_streams_need_no_no_grad_and_leave_autograd_alone(tiny_model, tiny_tokenizer):
    for _ in tiny_model.stream_chat(tiny_tokenizer, "你好", do_sample=False, max_new_tokens=3):
        assert torch.is_grad_enabled()
    output = tiny_model.generate(tiny_tokenizer("你好", return_tensors="pt")["input_ids"], max_new_tokens=2)
    assert not output.requires_grad


def test_streaming_of_beams_and_contrastive_search_are_refused(tiny_model, tiny_tokenizer):
    input_ids = tiny_tokenizer("你好", return_tensors="pt")["input_ids"]
    with pytest.raises(ValueError, match="Streaming yields one token at a time"):
        tiny_model.stream_tokens(input_ids, num_beams=2, max_new_tokens=2)
    with pytest.raises(ValueError, match="Contrastive search"):
        tiny_model.generate(input_ids, penalty_alpha=0.6, top_k=4, max_new_tokens=2)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_precision_on_a_cpu_says_what_to_do(load, tiny_dir, name):
    model = load(tiny_dir).to(getattr(torch, name))
    with pytest.raises(ValueError, match=r"on the CPU, which OneFlow has no kernels for; call model.float\(\)"):
        with torch.no_grad():
            model(torch.tensor([[5, 143, 321, 324]]))


def test_status_tells_what_serves(tiny_model, tiny_tokenizer):
    import faster_chatglm_6b

    tiny_model.chat(tiny_tokenizer, "你好", do_sample=False, max_new_tokens=2)
    status = faster_chatglm_6b.status()
    assert status.backend == "oneflow" and status.torch_version is None
    assert set(status.operators["cpu:0 float32"]) >= {"fast_gelu", "fused_matmul_bias"}
    report = str(status)
    assert "in the place of torch" in report and "has no such operator" in report
