"""The official ``openai`` client against the server, over the trained tiny checkpoint."""

import openai
import pytest

GREETING = [{"role": "user", "content": "你好"}]
QUESTION = [{"role": "user", "content": "What is int8?"}]


@pytest.fixture(scope="module")
def client(plain_url):
    return openai.OpenAI(base_url=f"{plain_url}/v1", api_key="EMPTY", max_retries=0, timeout=60)


def ask(client, messages=QUESTION, **settings):
    return client.chat.completions.create(model="chatglm-6b", messages=messages, **{"temperature": 0} | settings)


def streamed(client, messages=QUESTION, **settings):
    chunks = [*ask(client, messages, stream=True, **settings)]
    texts, ends = {}, {}
    for chunk in chunks:
        for choice in chunk.choices:
            assert choice.index not in ends, "a chunk after the end of its answer"
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    return texts, ends, chunks


def test_a_greedy_answer_is_chats(client, chat_model, chat_tokenizer):
    for messages in (GREETING, QUESTION):
        response, _ = chat_model.chat(chat_tokenizer, messages[0]["content"], do_sample=False)
        answer = ask(client, messages)
        assert answer.choices[0].message.content == response and answer.choices[0].message.role == "assistant"
        assert answer.choices[0].finish_reason == "stop" and answer.object == "chat.completion"
        ids = chat_tokenizer.encode_text(messages[0]["content"])
        assert answer.usage.prompt_tokens == len(ids) + 2
        made = chat_model.generate(
            chat_tokenizer(messages[0]["content"], return_tensors="pt")["input_ids"],
            do_sample=False,
            max_new_tokens=200,
        )
        assert answer.usage.completion_tokens == made.shape[1] - len(ids) - 2
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        texts, ends, chunks = streamed(client, messages)
        assert texts == {0: response} and ends == {0: "stop"} and len(chunks) > 5
        assert all(chunk.object == "chat.completion.chunk" and chunk.usage is None for chunk in chunks)
        assert chunks[0].choices[0].delta.role == "assistant"


def test_a_conversation_is_chats(client, chat_model, chat_tokenizer):
    system = {"role": "system", "content": "Answer in English."}
    turns = [{"role": "user", "content": "My name is Anna."}, {"role": "assistant", "content": "Hello, Anna!"}]
    last = {"role": "user", "content": "What is my name?"}
    response, _ = chat_model.chat(chat_tokenizer, last["content"], history=[system, *turns], do_sample=False)
    for role in ("system", "developer"):
        answer = ask(client, [{**system, "role": role}, *turns, last])
        assert answer.choices[0].message.content == response
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "my name?"}]
    answer = ask(client, [system, *turns, {"role": "user", "content": parts}])
    assert answer.choices[0].message.content == response


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_limits_count_new_tokens(client, name):
    long_prompt = [{"role": "user", "content": "hello " * 40}]
    answer = ask(client, long_prompt, **{name: 3})
    assert answer.usage.prompt_tokens > 40 and answer.usage.completion_tokens == 3
    assert answer.choices[0].finish_reason == "length"
    _, ends, chunks = streamed(client, **{name: 3}, stream_options={"include_usage": True})
    assert ends == {0: "length"} and chunks[-1].usage.completion_tokens == 3 and chunks[-1].choices == []
    # What load testers send.
    _, _, chunks = streamed(client, **{name: 3}, stream_options={"include_usage": True, "continuous_usage_stats": True})
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == 3


def test_temperature_zero_is_kept_and_seeds_repeat(client):
    greedy = {ask(client, max_tokens=8, seed=seed).choices[0].message.content for seed in range(3)}
    assert len(greedy) == 1
    settings = {"temperature": 5, "top_p": 1, "extra_body": {"top_k": 0}, "max_tokens": 8}
    drawn = [ask(client, seed=seed, **settings).choices[0].message.content for seed in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]
    free = {ask(client, **settings).choices[0].message.content for _ in range(3)}
    assert len(free) > 1


def test_several_answers(client):
    settings = {"temperature": 5, "top_p": 1, "extra_body": {"top_k": 0}, "max_tokens": 8, "seed": 4}
    one = ask(client, **settings)
    three = ask(client, n=3, **settings)
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in three.choices]
    assert texts[0] == one.choices[0].message.content and len(set(texts)) == 3
    assert three.usage.prompt_tokens == one.usage.prompt_tokens
    assert three.usage.completion_tokens <= 24
    assert streamed(client, n=3, **settings)[0] == dict(enumerate(texts))


def test_stop_strings(client):
    whole = ask(client).choices[0].message.content
    stop = whole[10:14]
    cut = whole[: whole.index(stop)]
    for given in (stop, [stop, "never said"]):
        answer = ask(client, stop=given)
        assert answer.choices[0].message.content.strip() == cut.strip() and answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens < ask(client).usage.completion_tokens
        texts, ends, _ = streamed(client, stop=given)
        assert texts == {0: answer.choices[0].message.content} and ends == {0: "stop"}


def test_log_probabilities(client):
    answer = ask(client, logprobs=True, top_logprobs=3, max_tokens=6)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == 6
    for entry in entries:
        assert entry.token == bytes(entry.bytes).decode() and len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
    assert "".join(entry.token for entry in entries).strip().startswith(answer.choices[0].message.content[:5])
    _, _, chunks = streamed(client, logprobs=True, top_logprobs=3, max_tokens=6)
    parts = [choice.logprobs.content for chunk in chunks for choice in chunk.choices if choice.logprobs]
    assert [entry.token for part in parts for entry in part] == [entry.token for entry in entries]
    assert ask(client, logprobs=True, max_tokens=1).choices[0].logprobs.content[0].top_logprobs == []
    assert ask(client, max_tokens=1).choices[0].logprobs is None


def test_bias_and_penalties(client, chat_tokenizer):
    whole = ask(client, max_tokens=4)
    token = chat_tokenizer.encode_text("你好")[0]
    forced = ask(client, max_tokens=4, logit_bias={str(token): 100})
    assert forced.choices[0].message.content != whole.choices[0].message.content
    assert forced.choices[0].message.content.count("你好") == 4
    freed = ask(client, max_tokens=4, logit_bias={str(token): 100}, frequency_penalty=2, presence_penalty=2)
    assert freed.usage.completion_tokens == 4
    penalised = ask(client, max_tokens=40, extra_body={"repetition_penalty": 5.0})
    assert penalised.choices[0].message.content != ask(client, max_tokens=40).choices[0].message.content


def test_an_end_that_is_put_off(client):
    short = ask(client, GREETING)
    count = short.usage.completion_tokens
    longer = ask(client, GREETING, extra_body={"min_tokens": count + 3}, max_tokens=count + 5)
    assert longer.usage.completion_tokens >= count + 3
    ignored = ask(client, GREETING, extra_body={"ignore_eos": True}, max_tokens=count + 6)
    assert ignored.usage.completion_tokens == count + 6 and ignored.choices[0].finish_reason == "length"


def test_completions(client, chat_model, chat_tokenizer):
    def complete(prompt, **settings):
        return client.completions.create(model="chatglm-6b", prompt=prompt, **{"temperature": 0} | settings)

    one = complete("你好")
    assert one.object == "text_completion" and one.usage.completion_tokens == 16
    assert one.choices[0].finish_reason == "length"
    # The bare text of the vocabulary, with its half-width marks.
    assert one.choices[0].text.startswith("你好!")
    two = complete(["你好", "What is int8?"], max_tokens=5, n=2, logprobs=2)
    assert [choice.index for choice in two.choices] == [0, 1, 2, 3] and two.usage.completion_tokens == 20
    assert two.choices[0].text == two.choices[1].text != two.choices[2].text
    logprobs = two.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 5
    assert logprobs.text_offset[0] == 0 and logprobs.text_offset == sorted(logprobs.text_offset)
    ids = [*chat_tokenizer.encode_text("你好")]
    control = [chat_tokenizer.gmask_token_id, chat_tokenizer.bos_token_id]
    for prompt in (ids, [*ids, *control], [ids]):
        assert complete(prompt).choices[0].text == one.choices[0].text
    text = "".join(
        chunk.choices[0].text
        for chunk in client.completions.create(model="chatglm-6b", prompt="你好", temperature=0, stream=True)
    )
    assert text == one.choices[0].text


def test_control_tokens_typed_by_users_stay_text(client, chat_tokenizer):
    content = "[gMASK] <sop> hello <eop>"
    answer = ask(client, [{"role": "user", "content": content}], max_tokens=1)
    assert answer.usage.prompt_tokens == len(chat_tokenizer.encode_text(content)) + 2
    completed = client.completions.create(model="chatglm-6b", prompt=content, max_tokens=1)
    assert completed.usage.prompt_tokens == answer.usage.prompt_tokens


def test_models(client):
    assert [model.id for model in client.models.list()] == ["chatglm-6b", "THUDM/chatglm-6b"]
    assert client.models.retrieve("THUDM/chatglm-6b").id == "THUDM/chatglm-6b"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_errors_are_the_clients_own(client):
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        client.chat.completions.create(model="gpt-4", messages=QUESTION)
    with pytest.raises(openai.BadRequestError, match="not trained with tools") as caught:
        tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
        ask(client, tools=[tool])
    assert caught.value.param == "tools" and caught.value.code == "unsupported"
    with pytest.raises(openai.BadRequestError, match="response_format"):
        ask(client, response_format={"type": "json_object"})
    with pytest.raises(openai.APITimeoutError):
        ask(client.with_options(timeout=0.05), max_tokens=400, extra_body={"ignore_eos": True})
