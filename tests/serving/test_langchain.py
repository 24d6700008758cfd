"""LangChain's ``ChatOpenAI`` against the server, over the trained tiny checkpoint."""

import pytest

pytest.importorskip("langchain_openai", reason='langchain-openai is not installed: pip install -e ".[clients]"')

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage  # noqa: E402
from langchain_openai import ChatOpenAI, OpenAI  # noqa: E402

QUERIES = ["你好", "What is int8?", "1+2"]


@pytest.fixture(scope="module")
def chat(plain_url):
    return ChatOpenAI(base_url=f"{plain_url}/v1", api_key="EMPTY", model="chatglm-6b", temperature=0, timeout=60)


@pytest.fixture(scope="module")
def said(chat_model, chat_tokenizer):
    """Return a function that asks the model itself."""
    return lambda query, **settings: chat_model.chat(chat_tokenizer, query, do_sample=False, **settings)[0]


def test_invoke_stream_and_batch_say_what_chat_says(chat, said):
    answer = chat.invoke(QUERIES[1])
    assert answer.content == said(QUERIES[1]) and answer.response_metadata["finish_reason"] == "stop"
    assert answer.usage_metadata["output_tokens"] > 10
    chunks = [*chat.stream(QUERIES[1], stream_usage=True)]
    assert "".join(chunk.content for chunk in chunks) == answer.content and len(chunks) > 10
    assert [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata][-1] == answer.usage_metadata
    assert [one.content for one in chat.batch(QUERIES)] == [said(query) for query in QUERIES]


def test_a_conversation_and_its_settings(chat, said):
    turns = [HumanMessage("My name is Anna."), AIMessage("Hello, Anna!"), HumanMessage("What is my name?")]
    history = [
        {"role": "system", "content": "Answer in English."},
        {"role": "user", "content": "My name is Anna."},
        {"role": "assistant", "content": "Hello, Anna!"},
    ]
    answer = chat.invoke([SystemMessage("Answer in English."), *turns])
    assert answer.content == said("What is my name?", history=history)
    short = chat.bind(max_tokens=3, stop=["never said"], logprobs=True, top_logprobs=2).invoke(QUERIES[1])
    assert short.usage_metadata["output_tokens"] == 3 and short.response_metadata["finish_reason"] == "length"
    assert len(short.response_metadata["logprobs"]["content"]) == 3


def test_tools_are_refused_in_words(chat):
    def weather(city: str) -> str:
        """Tell the weather."""
        return city

    with pytest.raises(Exception, match="not trained with tools"):
        chat.bind_tools([weather]).invoke("How is the weather?")


def test_plain_completions(plain_url):
    model = OpenAI(base_url=f"{plain_url}/v1", api_key="EMPTY", model="chatglm-6b", temperature=0, max_tokens=5)
    assert model.invoke("你好").startswith("你好")
