"""Histories may be rounds of texts or role messages, and come back in the form in which they came."""

import copy

import pytest

from faster_chatglm_6b.templates.history import History
from faster_chatglm_6b.templates.prompts import build_prompt

GREEDY = {"do_sample": False, "max_new_tokens": 6}
ROUNDS = [("你好", "你好！"), ("hi", "Hello!")]
MESSAGES = [
    {"role": role, "content": text} for pair in ROUNDS for role, text in zip(("user", "assistant"), pair, strict=True)
]


def turn(query, response):
    return [{"role": "user", "content": query}, {"role": "assistant", "content": response}]


@pytest.fixture(params=["chat", "stream_chat", "chat_batch"])
def answer(request, tiny_model, tiny_tokenizer):
    """Call one of the three ways to chat: (query, history) -> (response, new history)."""

    def ask(query, history, **settings):
        settings = {**GREEDY, **settings}
        if request.param == "chat":
            return tiny_model.chat(tiny_tokenizer, query, history=history, **settings)
        if request.param == "stream_chat":
            return list(tiny_model.stream_chat(tiny_tokenizer, query, history=history, **settings))[-1]
        responses, histories = tiny_model.chat_batch(tiny_tokenizer, [query, "x"], [history, None], **settings)
        return responses[0], histories[0]

    return ask


def test_messages_answer_as_rounds_do(answer):
    given = copy.deepcopy(MESSAGES)
    response, history = answer("再见", given)
    assert response == answer("再见", ROUNDS)[0]
    assert given == MESSAGES and history == [*MESSAGES, *turn("再见", response)]
    again, longer = answer("hi", history)
    assert longer == [*history, *turn("hi", again)]
    assert again == answer("hi", [*ROUNDS, ("再见", response)])[0]


def test_rounds_stay_as_they_came(answer):
    for rounds in (ROUNDS, [list(pair) for pair in ROUNDS], tuple(ROUNDS), iter(ROUNDS)):
        kept = rounds if isinstance(rounds, list) else list(ROUNDS)
        response, history = answer("再见", rounds)
        assert history == [*kept, ("再见", response)]


def test_an_empty_round_is_no_round(answer):
    """THUDM's api.py hands on what a client posts, and clients post ``[[]]``."""
    alone = answer("你好", None)
    for history in ([], [[]], [()], ((),)):
        assert answer("你好", history) == alone
    assert answer("再见", [[], *ROUNDS]) == answer("再见", ROUNDS)


def test_the_system_text_goes_before_the_first_user_text(answer):
    system = {"role": "system", "content": "be kind"}
    response, history = answer("你好", [system])
    assert response == answer("be kind\n你好", None)[0] and history == [system, *turn("你好", response)]
    later, _ = answer("hi", [system, *MESSAGES])
    assert later == answer("hi", [("be kind\n你好", "你好！"), ROUNDS[1]])[0]
    assert History.of([system, *MESSAGES]).prompt("hi").startswith("[Round 0]\n问：be kind\n你好\n答：")


def test_contents_in_parts_are_read_and_kept(answer):
    parts = [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]
    given = [{"role": "user", "content": parts}, *MESSAGES[1:]]
    response, history = answer("再见", given)
    assert response == answer("再见", ROUNDS)[0] and history[0]["content"] == parts


PAIRS = r"must be \(query, response\) pairs of texts, or messages such as"


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ("ab", "The history is 'ab', but it must be a list of"),
        (3, "The history is 3"),
        (MESSAGES[0], "The history is {'role'"),
        ({}, "The history is {}"),
        ([None], f"Round 0 of the history is None, but the history {PAIRS}"),
        (["ab"], f"Round 0 of the history is 'ab', but the history {PAIRS}"),
        ([("a", "b", "c")], f"Round 0 of the history is .*, but the history {PAIRS}"),
        ([("a", "b"), ["a"]], r"Round 1 of the history is \['a'\]"),
        ([("a", None)], r"Round 0 of the history is \('a', None\)"),
        ([(1, "b")], r"Round 0 of the history is \(1, 'b'\)"),
        ([{}], "Message 0 of the history is {}, but it must be like"),
        ([{"query": "a", "response": "b"}], "Message 0 of the history is {'query'.*, but it must be like"),
        ([{"role": "user", "content": None}], "Message 0 of the history has the content None"),
        ([{"role": "human", "content": "a"}], "Message 0 of the history has the role 'human', but"),
        ([("a", "b"), *MESSAGES], r"Message 0 of the history is \('a', 'b'\), but it must be like"),
        ([*MESSAGES, ("a", "b")], r"Message 4 of the history is \('a', 'b'\), but it must be like"),
        (MESSAGES[:3], "The last message of the history is the user's, 'hi'"),
        (MESSAGES[1:], "Message 0 of the history has the role 'assistant' at the beginning"),
        ([MESSAGES[0], *MESSAGES], "Message 1 of the history has the role 'user' after one of the user's"),
        ([*MESSAGES, {"role": "system", "content": "a"}], "Message 4 of the history has the role 'system' after"),
    ],
)
def test_what_cannot_be_read_is_refused(answer, history, message):
    with pytest.raises(ValueError, match=message):
        answer("你好", history)


def test_a_long_item_is_not_shown_whole():
    with pytest.raises(ValueError) as caught:
        History.of([("x" * 5000,)])
    assert len(str(caught.value)) < 300


def test_prompts_are_those_of_build_prompt():
    for history in (None, [], ROUNDS, MESSAGES):
        rounds = ROUNDS if history else []
        assert History.of(history).prompt("q") == build_prompt("q", rounds)
