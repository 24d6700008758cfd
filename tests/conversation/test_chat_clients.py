"""Clients that nobody here wrote send messages, and each gives the tokens that ``model.chat`` gives."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
import transformers
from transformers import TextIteratorStreamer, pipeline

from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration
from faster_chatglm_6b.templates.prompts import process_response
from faster_chatglm_6b.tokenization_chatglm import ChatGLMTokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
TRAINED = REPOSITORY / "examples" / "tiny_chatglm"
HISTORY = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello!"}]
MESSAGES = [*HISTORY, {"role": "user", "content": "你好"}]
LIMIT = {"do_sample": False, "max_new_tokens": 60}


@pytest.fixture(scope="module")
def model():
    return ChatGLMForConditionalGeneration.from_pretrained(TRAINED).float().eval()


@pytest.fixture(scope="module")
def tokenizer():
    return ChatGLMTokenizer.from_pretrained(TRAINED)


@pytest.fixture(scope="module")
def answer(model, tokenizer):
    """Return what ``chat`` answers to ``MESSAGES``."""
    response, history = model.chat(tokenizer, "你好", history=HISTORY, **LIMIT)
    assert response and history == [*MESSAGES, {"role": "assistant", "content": response}]
    return response


@pytest.fixture(scope="module")
def generator(model, tokenizer):
    return pipeline("text-generation", model=model, tokenizer=tokenizer)


def test_pipeline_of_messages(generator, tokenizer, model, answer):
    (record,) = generator(MESSAGES, **LIMIT)
    *asked, said = record["generated_text"]
    assert asked == MESSAGES and said["role"] == "assistant" and process_response(said["content"]) == answer
    (record,) = generator(MESSAGES, **LIMIT, return_tensors=True)
    prompt = model._chat_ids(tokenizer, "你好", HISTORY)
    ids = record["generated_token_ids"]
    assert ids[: len(prompt)] == prompt and process_response(tokenizer.decode(ids[len(prompt) :])) == answer


def test_pipeline_of_a_rendered_conversation(generator, tokenizer, answer):
    """LangChain does this; the text comes back after its prompt."""
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    (record,) = generator(text, **LIMIT)
    assert record["generated_text"].startswith(text)
    assert process_response(record["generated_text"].removeprefix(text)) == answer


def test_pipeline_of_several_conversations(generator, tokenizer, model, answer):
    queries = ["hi", "Who are you?"]
    conversations = [MESSAGES, *([{"role": "user", "content": query}] for query in queries)]
    wanted = [answer, *(model.chat(tokenizer, query, **LIMIT)[0] for query in queries)]
    for batch_size in (1, 3):
        records = generator(conversations, **LIMIT, batch_size=batch_size, return_full_text=False)
        assert [process_response(record["generated_text"]) for (record,) in records] == wanted


def test_pipeline_goes_on_with_an_answer(generator, model, tokenizer):
    begun = [*MESSAGES, {"role": "assistant", "content": "你好"}]
    (record,) = generator(begun, **LIMIT)
    said = record["generated_text"][-1]["content"]
    assert said.startswith("你好") and len(record["generated_text"]) == len(begun)
    inputs = tokenizer.apply_chat_template(begun, continue_final_message=True, return_tensors="pt", return_dict=True)
    ids = model.generate(inputs["input_ids"], **LIMIT)[0, inputs["input_ids"].shape[1] :]
    assert said.removeprefix("你好").strip() == tokenizer.decode(ids.tolist()).strip()


def test_text_iterator_streamer(model, tokenizer, answer):
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    inputs = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model.generate(**inputs, **LIMIT, streamer=streamer)
    assert process_response("".join(streamer)) == answer


def test_langchain(model, tokenizer, answer):
    langchain = pytest.importorskip("langchain_huggingface", reason="needs langchain-huggingface")
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage

    generator = pipeline("text-generation", model=model, tokenizer=tokenizer, return_full_text=False, **LIMIT)
    llm = langchain.HuggingFacePipeline(pipeline=generator)
    chat = langchain.ChatHuggingFace(llm=llm, tokenizer=tokenizer)
    messages = [HumanMessage("hi"), AIMessage("Hello!"), HumanMessage("你好")]
    assert process_response(chat.invoke(messages).content) == answer
    system = {"role": "system", "content": "be kind"}
    wanted, _ = model.chat(tokenizer, "你好", history=[system], **LIMIT)
    assert process_response(chat.invoke([SystemMessage("be kind"), HumanMessage("你好")]).content) == wanted
    assert process_response(llm.invoke("hi")) == model.chat(tokenizer, "hi", **LIMIT)[0]


def test_llama_index(model, tokenizer, answer):
    huggingface = pytest.importorskip("llama_index.llms.huggingface", reason="needs llama-index-llms-huggingface")
    from llama_index.core.llms import ChatMessage

    llm = huggingface.HuggingFaceLLM(
        model=model, tokenizer=tokenizer, max_new_tokens=60, generate_kwargs={"do_sample": False}, is_chat_model=True
    )
    messages = [ChatMessage(**message) for message in MESSAGES]
    assert process_response(llm.chat(messages).message.content) == answer
    assert process_response(list(llm.stream_chat(messages))[-1].message.content) == answer
    assert process_response(llm.complete("hi").text) == model.chat(tokenizer, "hi", **LIMIT)[0]


def test_trl_tokenizes_messages(tokenizer, tmp_path):
    """trl tokenizes the conversation for training, with a loss on the last answer and its <eop> alone."""
    trl = pytest.importorskip("trl", reason="needs trl")
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    model = ChatGLMForConditionalGeneration.from_pretrained(TRAINED)
    said = [*MESSAGES, {"role": "assistant", "content": "你好！"}]
    ids = list(tokenizer.apply_chat_template(said, return_dict=True)["input_ids"])
    begin = len(model._chat_ids(tokenizer, "你好", HISTORY))
    answer_only = [-100] * begin + ids[begin:]
    rows = (
        ({"messages": [said]}, {"assistant_only_loss": True}, answer_only),
        ({"messages": [said]}, {}, ids),
        ({"prompt": [said[:-1]], "completion": [said[-1:]]}, {}, answer_only),
    )
    for columns, settings, labels in rows:
        arguments = trl.SFTConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, **settings)
        trainer = trl.SFTTrainer(
            model=model, args=arguments, processing_class=tokenizer, train_dataset=datasets.Dataset.from_dict(columns)
        )
        (row,) = trainer.train_dataset
        assert row["input_ids"] == ids
        assert row.get("labels", ids) == labels


def post(port, path, **body):
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


@pytest.fixture(scope="module")
def server():
    """Start ``transformers serve`` on this machine and yield its port."""
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("transformers 4's serve loads models in another way")
    missing = [name for name in ("fastapi", "uvicorn", "openai", "pydantic") if find_spec(name) is None]
    if missing:
        pytest.skip(f"transformers serve needs {', '.join(missing)}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "examples/transformers_serve.py", "serve", str(TRAINED), "--trust-remote-code"]
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        while process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except urllib.error.URLError:
                time.sleep(0.3)
        if process.poll() is not None:
            pytest.fail(f"the server ended with {process.returncode}: {process.stdout.read().decode()[-2000:]}")
        yield port
    finally:
        process.kill()
        process.communicate()


def test_transformers_serve(server, model, tokenizer, answer):
    asked = {"model": str(TRAINED), "temperature": 0.0, "max_tokens": 60}
    reply = post(server, "/v1/chat/completions", **asked, messages=MESSAGES)
    assert process_response(reply["choices"][0]["message"]["content"]) == answer
    assert reply["usage"]["prompt_tokens"] == len(model._chat_ids(tokenizer, "你好", HISTORY))
    reply = post(server, "/v1/completions", **asked, prompt="hi")
    assert process_response(reply["choices"][0]["text"]) == model.chat(tokenizer, "hi", **LIMIT)[0]


def test_transformers_serve_does_not_stream(server):
    """It decodes a stream with ``tokenizer._tokenizer``, which only fast tokenizers have; docs/clients.md says so."""
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(server, "/v1/chat/completions", model=str(TRAINED), messages=MESSAGES, stream=True)
    assert refused.value.code == 500
