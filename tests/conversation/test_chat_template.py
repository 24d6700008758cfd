"""``apply_chat_template`` gives the ids that ``chat`` gives the model, however they are asked for."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from property_profiles import examples

from faster_chatglm_6b.templates.chat_template import CHAT_TEMPLATE, HARMLESS, MARK
from faster_chatglm_6b.templates.prompts import build_prompt
from faster_chatglm_6b.tokenization_chatglm import ChatGLMTokenizer

# These could make a user's text look like the template's own.
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(
            ["[gMASK]", "<sop>", "<eop>", "[MASK]", "</s>", MARK, f"{MARK}[gMASK]{MARK}<sop>", f"{MARK}<eop>"]
        ),
        st.sampled_from(["你好", "hi", " ", "  ", "\n", "\t", "[Round 0]\n问：", "答：", "{{ bos_token }}", "<pad>"]),
        st.text(max_size=8),
    ),
    max_size=5,
).map("".join)
ROUNDS = st.lists(st.tuples(TEXTS, TEXTS), max_size=3)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def as_messages(rounds):
    return [message for question, answer in rounds for message in (user(question), assistant(answer))]


def ids_of(tokenizer, conversation, **arguments):
    return list(tokenizer.apply_chat_template(conversation, return_dict=True, **arguments)["input_ids"])


def expected(tokenizer, query, rounds=(), answer=None):
    ids = [*tokenizer.encode_text(build_prompt(query, list(rounds))), tokenizer.gmask_token_id, tokenizer.bos_token_id]
    return ids if answer is None else [*ids, *tokenizer.encode_text(answer), tokenizer.eos_token_id]


@examples(40, 2000)
@given(rounds=ROUNDS, query=TEXTS, answer=TEXTS, given_system=TEXTS)
def test_ids_are_those_of_build_prompt(tiny_tokenizer, rounds, query, answer, given_system):
    """The ids agree with and without a system text, and for prompts and finished conversations.

    They also agree if the text is rendered first and tokenized later.
    """
    for system_text in ("", given_system):
        messages = [*as_messages(rounds), user(query)]
        first = f"{system_text}\n" if system_text else ""
        said = [(first + rounds[0][0], rounds[0][1]), *rounds[1:]] if rounds else []
        asked = query if rounds else first + query
        if system_text:
            messages.insert(0, system(system_text))
        prompt = expected(tiny_tokenizer, asked, said)
        finished = expected(tiny_tokenizer, asked, said, answer)
        ways = (
            (messages, {"add_generation_prompt": True}, prompt),
            (messages, {}, prompt[:-2]),
            ([*messages, assistant(answer)], {}, finished),
        )
        for conversation, arguments, ids in ways:
            assert ids_of(tiny_tokenizer, conversation, **arguments) == ids
            text = tiny_tokenizer.apply_chat_template(conversation, tokenize=False, **arguments)
            assert tiny_tokenizer(text, add_special_tokens=False)["input_ids"] == ids
            with_special_tokens = ids if ids != prompt[:-2] else prompt
            assert tiny_tokenizer(text)["input_ids"] == tiny_tokenizer.encode(text) == with_special_tokens
            assert tiny_tokenizer([text])["input_ids"] == [with_special_tokens]


@examples(40, 2000)
@given(rounds=ROUNDS, query=TEXTS)
def test_chat_gives_the_model_the_same_ids(tiny_model, tiny_tokenizer, rounds, query):
    ids = ids_of(tiny_tokenizer, [*as_messages(rounds), user(query)], add_generation_prompt=True)
    if query.strip():
        assert tiny_model._chat_ids(tiny_tokenizer, query, rounds) == ids
        assert tiny_model._chat_ids(tiny_tokenizer, query, as_messages(rounds)) == ids


def test_a_typed_mark_changes_no_id(tiny_tokenizer):
    """A message loses its marks without a change of ids, even between blanks that would otherwise be joined."""
    for text in (f"a {MARK} b", f"{MARK}{MARK}", f"a{MARK}\n b", f" {MARK}<sop>"):
        assert tiny_tokenizer.encode_text(text) == tiny_tokenizer.encode_text(text.replace(MARK, HARMLESS))
        rendered = tiny_tokenizer.apply_chat_template([user(text)], tokenize=False, add_generation_prompt=True)
        assert rendered.count(MARK) == 3


def test_texts_without_a_mark_are_tokenized_as_before(tiny_tokenizer):
    """[gMASK] stays text and <sop> becomes its id, as in stock, if nobody rendered a conversation."""
    ids = tiny_tokenizer("hi [gMASK]<sop>")["input_ids"]
    assert ids.count(tiny_tokenizer.gmask_token_id) == 1 and ids.count(tiny_tokenizer.bos_token_id) == 2


def test_a_pair_whose_first_text_is_rendered(tiny_tokenizer):
    prompt = tiny_tokenizer.apply_chat_template([user("hi")], tokenize=False, add_generation_prompt=True)
    assert tiny_tokenizer(prompt, "ok")["input_ids"] == expected(tiny_tokenizer, "hi", answer="ok")


def test_system_texts_are_joined(tiny_tokenizer):
    messages = [system("one"), system(""), system("two"), user("hi")]
    assert ids_of(tiny_tokenizer, messages, add_generation_prompt=True) == expected(tiny_tokenizer, "one\ntwo\nhi")


def test_content_in_parts(tiny_tokenizer):
    parts = [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]
    assert ids_of(tiny_tokenizer, [user(parts)]) == ids_of(tiny_tokenizer, [user("你好")])


def test_messages_as_objects(tiny_tokenizer):
    class Message:
        def __init__(self, role, content):
            self.role, self.content = role, content

    class Conversation:
        messages = (Message("user", "hi"), Message("assistant", "ok"))

    wanted = expected(tiny_tokenizer, "hi", answer="ok")
    assert ids_of(tiny_tokenizer, Conversation.messages) == wanted
    assert ids_of(tiny_tokenizer, Conversation()) == wanted
    assert tiny_tokenizer.apply_chat_template([Conversation(), Conversation()], return_dict=False) == [wanted] * 2


def test_continue_final_message(tiny_tokenizer):
    for answer in ("partly ", "partly <eop>", "好的"):
        messages = [user("hi"), assistant(answer)]
        wanted = expected(tiny_tokenizer, "hi", answer=answer)[:-1]
        assert ids_of(tiny_tokenizer, messages, continue_final_message=True) == wanted
        text = tiny_tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
        assert tiny_tokenizer(text)["input_ids"] == wanted


def test_defaults_are_those_of_the_release(tiny_tokenizer):
    """transformers 5 returns a dict, and transformers 4 a list."""
    plain = tiny_tokenizer.apply_chat_template([user("hi")])
    custom = tiny_tokenizer.apply_chat_template([user("hi")], chat_template="{{ messages[0]['content'] }}")
    assert type(plain) is type(custom)


def test_tensors_padding_and_batches(tiny_tokenizer, tiny_model):
    short, long = [user("hi")], [user("你好"), assistant("好"), user("Who are you?")]
    batch = tiny_tokenizer.apply_chat_template(
        [short, long], add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    rows = [ids_of(tiny_tokenizer, conversation, add_generation_prompt=True) for conversation in (short, long)]
    length = len(rows[1])
    assert batch["input_ids"].tolist() == [[tiny_tokenizer.pad_token_id] * (length - len(rows[0])) + rows[0], rows[1]]
    assert batch["attention_mask"].shape == (2, 1, length, length) and batch["position_ids"].shape == (2, 2, length)
    together = tiny_model.generate(**batch, do_sample=False, max_new_tokens=5)[:, length:]
    for row, ids in zip(together, rows, strict=True):
        alone = tiny_model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=5)[0, len(ids) :].tolist()
        assert row.tolist()[: len(alone)] == alone
    one = tiny_tokenizer.apply_chat_template(short, return_tensors="np", return_dict=True)["input_ids"]
    assert isinstance(one, np.ndarray) and one.shape == (1, len(rows[0]) - 2)
    wide = tiny_tokenizer.apply_chat_template(short, padding="max_length", max_length=20, return_dict=True)
    assert len(wide["input_ids"]) == 20 and wide["input_ids"][:3] == [tiny_tokenizer.pad_token_id] * 3


@pytest.mark.parametrize("side", ["right", "left"])
def test_truncation_keeps_the_prompt_end(tiny_dir, side):
    tokenizer = ChatGLMTokenizer.from_pretrained(tiny_dir, truncation_side=side)
    prompt, control, answer = tokenizer.encode_text("Who are you?"), expected(tokenizer, "x")[-2:], [5, 5]
    answer = [*tokenizer.encode_text("It is me."), tokenizer.eos_token_id]
    messages = [user("Who are you?"), assistant("It is me.")]
    for length in range(3, len(prompt) + 2 + len(answer) + 2):
        kept = ids_of(tokenizer, messages, truncation=True, max_length=length)
        text_kept = ids_of(tokenizer, messages[:1], add_generation_prompt=True, truncation=True, max_length=length)
        lost = max(0, len(prompt) + 2 + len(answer) - length)
        if side == "right":
            from_answer = min(lost, len(answer))
            rest = prompt[: len(prompt) - (lost - from_answer)], answer[: len(answer) - from_answer]
            text = prompt[: length - 2]
        else:
            from_prompt = min(lost, len(prompt))
            rest = prompt[from_prompt:], answer[lost - from_prompt :]
            text = prompt[max(0, len(prompt) - (length - 2)) :]
        assert kept == [*rest[0], *control, *rest[1]]
        assert text_kept == [*text, *control]


def test_assistant_masks(tiny_tokenizer):
    """The mask covers the last answer and <eop> alone, like the labels of the official P-Tuning script."""
    long, short = [user("a"), assistant("bc"), user("d"), assistant("ok <eop>")], [user("a"), assistant("")]
    prompt, answer = expected(tiny_tokenizer, "d", [("a", "bc")]), tiny_tokenizer.encode_text("ok <eop>")
    one = tiny_tokenizer.apply_chat_template(long, return_dict=True, return_assistant_tokens_mask=True)
    assert one["assistant_masks"] == [0] * len(prompt) + [1] * (len(answer) + 1)
    batch = tiny_tokenizer.apply_chat_template(
        [long, short], return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt", padding=True
    )
    assert batch["assistant_masks"].shape == batch["input_ids"].shape
    assert batch["assistant_masks"][0].tolist() == one["assistant_masks"]
    assert batch["assistant_masks"][1].tolist() == [0] * (len(one["input_ids"]) - 1) + [1]
    question = tiny_tokenizer.apply_chat_template(long[:1], return_dict=True, return_assistant_tokens_mask=True)
    assert set(question["assistant_masks"]) == {0}


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([], "The conversation has no message"),
        (None, "The conversation is None, but it must be a list of messages"),
        ("hi", "The conversation is 'hi'"),
        (user("hi"), "The conversation is {'role'"),
        (["hi"], "Message 0 of the conversation is 'hi', but it must be like"),
        ([{"content": "hi"}], "Message 0 of the conversation is {'content': 'hi'}, but it must be like"),
        ([{"role": "user"}], "Message 0 of the conversation is {'role': 'user'}"),
        ([user("hi"), {"role": "tool", "content": "x"}], "Message 1 of the conversation has the role 'tool', but"),
        ([user("a"), user("b")], "Message 1 of the conversation has the role 'user' after one of the user's"),
        ([assistant("a")], "Message 0 of the conversation has the role 'assistant' at the beginning"),
        ([user("a"), assistant("b"), assistant("c")], "Message 2 of the conversation has the role 'assistant' after"),
        ([user("a"), assistant("b"), system("c")], "Message 2 of the conversation has the role 'system' after"),
        ([system("a")], "has no message of the user's"),
        ([user(None)], "Message 0 of the conversation has the content None"),
        ([user(3)], "has the content 3"),
        ([user([])], r"has the content \[\]"),
        ([user([{"type": "image", "url": "x"}])], "has the content .*image"),
    ],
)
def test_what_cannot_be_read_is_refused(tiny_tokenizer, conversation, message):
    with pytest.raises(ValueError, match=message):
        tiny_tokenizer.apply_chat_template(conversation)
    if conversation and isinstance(conversation, list) and isinstance(conversation[0], dict):
        with pytest.raises(ValueError, match=message):
            tiny_tokenizer.apply_chat_template([[user("fine")], conversation])


def test_arguments_that_do_not_fit_are_refused(tiny_tokenizer):
    finished = [user("hi"), assistant("ok")]
    refused = (
        ({"tools": [{"type": "function"}]}, "neither tools nor documents; leave tools out"),
        ({"documents": [{"title": "a", "text": "b"}]}, "leave documents out"),
        ({"add_generation_prompt": True}, "there is nothing to answer"),
        ({"continue_final_message": True, "return_assistant_tokens_mask": True}, "do not go together"),
        ({"return_assistant_tokens_mask": True, "return_dict": False}, "return_dict=True"),
        ({"return_assistant_tokens_mask": True, "tokenize": False}, "tokenize=True"),
    )
    for arguments, message in refused:
        with pytest.raises(ValueError, match=message):
            tiny_tokenizer.apply_chat_template(finished, **arguments)
    assert ids_of(tiny_tokenizer, finished, tools=[], documents=None) == ids_of(tiny_tokenizer, finished)


def test_a_template_of_ones_own(tiny_dir):
    """transformers renders and tokenizes the user's own template, which may take what ours refuses."""
    own = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}{% endfor %}<sop>"
    tokenizer = ChatGLMTokenizer.from_pretrained(tiny_dir)
    messages = [{"role": "tool", "content": "hi"}]
    wanted = tokenizer("tool: hi<sop>", add_special_tokens=False)["input_ids"]
    assert wanted[-1] == tokenizer.bos_token_id
    assert ids_of(tokenizer, messages, chat_template=own) == wanted
    tokenizer.chat_template = own
    assert ids_of(tokenizer, messages) == wanted
    assert ids_of(tokenizer, [user("hi")], chat_template=CHAT_TEMPLATE) == expected(tokenizer, "hi")[:-2]


def test_the_template_is_there_and_is_saved(tiny_tokenizer, tmp_path):
    assert tiny_tokenizer.chat_template == tiny_tokenizer.get_chat_template() == CHAT_TEMPLATE
    tiny_tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    files = [path for path in tmp_path.iterdir() if path.suffix == ".jinja"]
    assert CHAT_TEMPLATE in (config.get("chat_template"), *(path.read_text("utf-8") for path in files))
    again = ChatGLMTokenizer.from_pretrained(tmp_path)
    messages = [system("be kind"), user("hi <eop>"), assistant("ok"), user("你好")]
    assert again.chat_template == CHAT_TEMPLATE
    assert ids_of(again, messages) == ids_of(tiny_tokenizer, messages)


@examples(30, 1000)
@given(rounds=ROUNDS, query=TEXTS)
def test_the_template_renders_the_same_without_our_class(tiny_tokenizer, rounds, query):
    """A server or trainer may read the saved file and call Jinja itself."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from transformers.utils.chat_template_utils import _compile_jinja_template

    messages = [system("be kind"), *as_messages(rounds), user([{"type": "text", "text": query}])]
    template = _compile_jinja_template(CHAT_TEMPLATE)
    assert isinstance(template.environment, ImmutableSandboxedEnvironment)
    rendered = template.render(messages=messages, add_generation_prompt=True)
    assert rendered == tiny_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
