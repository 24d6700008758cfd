"""A tokenizer's files may be hostile, damaged, of another time, or overwritten while in use."""

import json
import os
import shutil
from pathlib import Path

import pytest
from tokenizer_data import TEXTS, TINY
from transformers import AutoTokenizer

from faster_chatglm_6b.tokenization_chatglm import ChatGLMTokenizer
from faster_chatglm_6b.tokenizer.ice_text import VocabularyError


@pytest.fixture
def folder(tmp_path):
    """Return a copy of the tiny tokenizer's files."""
    for name in ("ice_text.model", "tokenizer_config.json"):
        shutil.copy(TINY / name, tmp_path)
    return tmp_path


def edit(folder: Path, **changes) -> None:
    path = folder / "tokenizer_config.json"
    content = {**json.loads(path.read_text("utf-8")), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "/nowhere/ice_text.model", "../ice_text.model", "tokenizer_config.json", ["a"], 3, "/dev/zero"],
)
def test_the_vocabulary_is_the_directorys_own(folder, path):
    """transformers 4 opened any path that ``tokenizer_config.json`` named, and its errors told what is there."""
    edit(folder, vocab_file=path)
    for load in (
        ChatGLMTokenizer.from_pretrained,
        lambda name: AutoTokenizer.from_pretrained(name, trust_remote_code=True),
    ):
        tokenizer = load(folder)
        assert type(tokenizer) is ChatGLMTokenizer
        assert Path(tokenizer.vocab_file) == folder / "ice_text.model"
        assert tokenizer("你好")["input_ids"] == [5, 143, 321, 324]
    (folder / "ice_text.model").unlink()
    with pytest.raises(
        VocabularyError, match=r"There is no ice_text\.model in .*; take ice_text\.model \(2706249 bytes"
    ):
        ChatGLMTokenizer.from_pretrained(folder)


def test_a_callers_own_vocabulary_comes_first(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "ice_text.model"
    shutil.copy(TINY / "ice_text.model", other)
    assert Path(ChatGLMTokenizer.from_pretrained(folder, vocab_file=str(other)).vocab_file) == other


DAMAGED = {
    "empty": b"",
    "cut": b'{"bos_token": "<sop>", "eos',
    "byte order mark": b"\xef\xbb\xbf{}",
    "deep": b'{"a": ' + b"[" * 200_000,
    "a list": b"[]",
    "no UTF-8": b'{"a": "\xff"}',
}


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_json_file_is_named(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match="is no JSON object with settings: .*; take it from the checkpoint") as raised:
        ChatGLMTokenizer.from_pretrained(folder)
    assert str(folder / name) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "ice_text.model"])
def test_a_sparse_file_is_refused_by_its_size(folder, name):
    os.truncate(folder / name, 2**36)
    with pytest.raises(ValueError, match=r"has 68719476736 bytes, (and|but) more than \d+ are refused") as raised:
        ChatGLMTokenizer.from_pretrained(folder)
    assert str(folder / name) in str(raised.value)


def test_saving_over_itself(folder):
    tokenizer = ChatGLMTokenizer.from_pretrained(folder)
    written = tokenizer.save_pretrained(folder)
    assert {str(folder / "ice_text.model"), str(folder / "tokenizer_config.json")} <= set(written)
    assert all(Path(path).parent == folder for path in written)
    again = ChatGLMTokenizer.from_pretrained(folder)
    assert again(TEXTS) == tokenizer(TEXTS) and again.get_vocab() == tokenizer.get_vocab()
    assert not [name for name in contents(folder) if name.startswith(".")]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("No space left on device")])
@pytest.mark.parametrize("where", ["write_bytes", "write", "replace"])
def test_an_interrupted_save_leaves_the_old_files(folder, monkeypatch, where, error):
    tokenizer = ChatGLMTokenizer.from_pretrained(folder)
    before = contents(folder)

    def interrupted(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        if where == "write_bytes":
            patch.setattr(Path, "write_bytes", interrupted)
        elif where == "replace":
            patch.setattr(os, "replace", interrupted)
        else:
            patch.setattr(json, "dumps", interrupted)
        with pytest.raises(type(error) if isinstance(error, Exception) else error):
            tokenizer.save_pretrained(folder)
    assert contents(folder) == before
    assert ChatGLMTokenizer.from_pretrained(folder)(TEXTS) == tokenizer(TEXTS)


def test_an_interrupted_save_vocabulary_leaves_the_old_file(folder, monkeypatch):
    tokenizer = ChatGLMTokenizer.from_pretrained(folder)
    before = contents(folder)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            tokenizer.save_vocabulary(str(folder))
    assert contents(folder) == before


def test_a_file_in_the_place_of_the_directory_stays(folder):
    target = folder / "file"
    target.write_text("kept")
    try:
        ChatGLMTokenizer.from_pretrained(folder).save_pretrained(target)
    except (OSError, ValueError, AssertionError):
        pass  # some releases log it, others raise
    assert target.read_text() == "kept"


@pytest.fixture
def april(folder):
    edit(folder, eos_token="</s>", eop_token="<eop>", end_token=None)
    return folder


@pytest.mark.parametrize("with_number", [True, False])
def test_a_tokenizer_of_april_2023_loads_as_its_file_says(april, with_number, tmp_path_factory):
    if not with_number:
        edit(april, num_image_tokens=None)
    tokenizer = AutoTokenizer.from_pretrained(april, trust_remote_code=True)
    assert type(tokenizer) is ChatGLMTokenizer and tokenizer.num_image_tokens == 0
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("</s>", 2)
    assert (tokenizer.eop_token, tokenizer.eop_token_id) == ("<eop>", 325)
    assert tokenizer("你好", "你好")["input_ids"] == [5, 143, 321, 324, 5, 143, 2]  # as today's stock code does
    assert "<eop>" not in tokenizer.all_special_tokens
    saved = tmp_path_factory.mktemp("saved")
    tokenizer.save_pretrained(saved)
    again = ChatGLMTokenizer.from_pretrained(saved)
    assert (again.eos_token, again.eop_token) == ("</s>", "<eop>") and again(TEXTS) == tokenizer(TEXTS)


@pytest.mark.parametrize("method", ["chat", "stream_chat", "chat_batch"])
def test_chat_refuses_a_tokenizer_of_april_2023_and_says_what_to_do(april, tiny_model, method):
    tokenizer = AutoTokenizer.from_pretrained(april, trust_remote_code=True)
    query = ["你好"] if method == "chat_batch" else "你好"
    with pytest.raises(ValueError, match="that of April 2023: its eos_token is </s>.* change it to") as raised:
        list(getattr(tiny_model, method)(tokenizer, query))
    assert '"eos_token": "<eop>", "end_token": "</s>" and no eop_token' in str(raised.value)
    edit(april, eos_token="<eop>", end_token="</s>", eop_token=None)
    followed = AutoTokenizer.from_pretrained(april, trust_remote_code=True)
    response, _ = tiny_model.chat(followed, "night", max_length=48, do_sample=False)
    assert response == "花上z的绍花苹"


def test_todays_has_the_same_token_under_both_names(tiny_tokenizer):
    assert (tiny_tokenizer.eop_token, tiny_tokenizer.eop_token_id) == ("<eop>", tiny_tokenizer.eos_token_id)
