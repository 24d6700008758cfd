"""``chat_batch`` gives each conversation the answer that ``chat`` gives alone."""

from pathlib import Path

import pytest
import torch

from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration
from faster_chatglm_6b.tokenization_chatglm import ChatGLMTokenizer

TRAINED = Path(__file__).resolve().parents[2] / "examples" / "tiny_chatglm"
QUERIES = ["你好", "Who are you?", "用英文再说一遍", "再见", "How do I install it?", "今天天气怎么样？我想知道。"]
HISTORIES = [None, [], [("你好", "你好！")], None, [("hi", "Hello!"), ("thanks", "You are welcome.")], None]


@pytest.fixture(scope="module")
def trained():
    return ChatGLMForConditionalGeneration.from_pretrained(TRAINED).float().eval()


@pytest.fixture(scope="module")
def trained_tokenizer():
    return ChatGLMTokenizer.from_pretrained(TRAINED)


def one_by_one(model, tokenizer, queries, histories, **settings):
    turns = zip(queries, histories or [None] * len(queries), strict=True)
    answers = [model.chat(tokenizer, query, history=history, **settings) for query, history in turns]
    return [response for response, _ in answers], [history for _, history in answers]


def check(model, tokenizer, queries, histories=None, **settings):
    alone = one_by_one(model, tokenizer, queries, histories, **settings)
    assert model.chat_batch(tokenizer, queries, histories, **settings) == alone
    return alone[0]


@pytest.mark.parametrize("histories", [None, HISTORIES], ids=["no histories", "histories"])
def test_equal_to_chat(trained, trained_tokenizer, histories):
    """A trained model's answers end at different steps."""
    answers = check(trained, trained_tokenizer, QUERIES, histories, do_sample=False)
    lengths = {len(trained_tokenizer.encode_text(answer)) for answer in answers}
    assert len(lengths) > 2 and all(answers)
    check(trained, trained_tokenizer, QUERIES[:1], histories and histories[:1], do_sample=False)
    check(trained, trained_tokenizer, tuple(QUERIES), histories, do_sample=False, max_new_tokens=7)


def test_max_length_limits_each_conversation(tiny_model, tiny_tokenizer):
    """A long prompt in the batch does not cut a short one's answer, and gets no more room than alone."""
    limit = 4 + max(
        len(tiny_model._chat_ids(tiny_tokenizer, *turn))
        for turn in zip(QUERIES, [history or [] for history in HISTORIES], strict=True)
    )
    answers = check(tiny_model, tiny_tokenizer, QUERIES, HISTORIES, do_sample=False, max_length=limit)
    assert len({len(tiny_tokenizer.encode_text(answer)) for answer in answers}) > 1
    with pytest.raises(ValueError, match="leaves no room for an answer"):
        tiny_model.chat_batch(tiny_tokenizer, QUERIES, HISTORIES, do_sample=False, max_length=limit - 4)


def test_options_of_generate(tiny_model, tiny_tokenizer):
    settings = {"do_sample": False, "max_new_tokens": 8}
    check(tiny_model, tiny_tokenizer, QUERIES, **settings, num_beams=3)
    check(tiny_model, tiny_tokenizer, QUERIES, **settings, num_beams=3, num_return_sequences=2)
    check(tiny_model, tiny_tokenizer, QUERIES, **settings, no_repeat_ngram_size=2, min_new_tokens=6)
    check(tiny_model, tiny_tokenizer, QUERIES, **settings, pad_token_id=7)


def test_seeded_sampling_repeats_and_rows_differ(tiny_model, tiny_tokenizer):
    answers = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        answers.append(tiny_model.chat_batch(tiny_tokenizer, ["你好"] * 4, max_new_tokens=8)[0])
    assert answers[0] == answers[1] != answers[2]
    assert len(set(answers[0])) > 1


def test_nothing_given_is_changed(tiny_model, tiny_tokenizer):
    queries, histories = ["你好", "hi"], [[("a", "b")], None]
    _, new = tiny_model.chat_batch(tiny_tokenizer, queries, histories, do_sample=False, max_new_tokens=3)
    assert (queries, histories) == (["你好", "hi"], [[("a", "b")], None])
    assert [len(history) for history in new] == [2, 1] and new[0][0] == ("a", "b")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("你好",), "The queries are '你好', but chat_batch needs one text or more in a list"),
        (([],), r"The queries are \[\]"),
        ((None,), "The queries are None"),
        ((["你好", " "],), "The query is ' ', but chat needs a text that is not empty"),
        ((["你好", None],), "The query is None"),
        ((["你好", "hi"], [[]]), "There are 2 queries, but the histories are 1; pass one list of rounds"),
        ((["你好"], 3), "There are 1 queries, but the histories are 3"),
    ],
)
def test_bad_arguments(tiny_model, tiny_tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_model.chat_batch(tiny_tokenizer, *arguments)


def test_min_length_is_refused(tiny_model, tiny_tokenizer):
    with pytest.raises(ValueError, match="min_length is 9, but in a batch it would count the padding too"):
        tiny_model.chat_batch(tiny_tokenizer, ["你好"], min_length=9)


def test_wrong_tokenizer(tiny_model):
    with pytest.raises(ValueError, match="needs a ChatGLMTokenizer"):
        tiny_model.chat_batch(lambda text: text, ["你好"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_a_gpu(trained_tokenizer):
    model = ChatGLMForConditionalGeneration.from_pretrained(TRAINED).float().cuda().eval()
    check(model, trained_tokenizer, QUERIES, do_sample=False)
    check(model, trained_tokenizer, QUERIES, HISTORIES, do_sample=False)
