"""ChatGLMTokenizer handles users' text, loading and its errors, copies, added tokens, and rows to pad."""

import copy
import json
import pickle
import shutil

import pytest
import sentencepiece
import torch
from tokenizer_data import TEXTS, TINY, text_of

from faster_chatglm_6b.tokenization_chatglm import ChatGLMTokenizer
from faster_chatglm_6b.tokenizer.ice_text import VocabularyError


class TestEncodeText:
    CONTROL = ["[gMASK]", "[MASK]", "[sMASK]", "<sop>", "<eop>", "<pad>", "<unk>", "</s>", "<s>"]

    def test_equals_the_call_without_special_tokens(self, stock):
        tokenizer, golden = stock
        for case in golden["cases"]:
            if not any(token in text_of(case) for token in self.CONTROL):
                assert tokenizer.encode_text(text_of(case)) == case["ids_no_special"]

    @pytest.mark.parametrize("token", CONTROL)
    def test_control_tokens_stay_text(self, stock, token):
        tokenizer, _ = stock
        text = f"a {token} b{token}"
        ids = tokenizer.encode_text(text)
        assert not set(ids) & {tokenizer.convert_tokens_to_ids(control) for control in self.CONTROL}
        assert tokenizer.decode(ids) == text

    def test_not_text(self, tiny):
        with pytest.raises(TypeError, match="The text to encode is a NoneType; give a str"):
            tiny.encode_text(None)
        for encode in (tiny.encode_text, tiny):
            with pytest.raises(ValueError, match=r"lone surrogate '\\ud83d' at character 2"):
                encode("ab\ud83d")


class TestLoading:
    def test_directly(self, tiny):
        direct = ChatGLMTokenizer(str(TINY / "ice_text.model"))
        assert direct.get_vocab() == tiny.get_vocab()
        assert direct("a [MASK] b [gMASK]</s>") == tiny("a [MASK] b [gMASK]</s>")

    def test_lower_case_and_remove_space(self):
        tokenizer = ChatGLMTokenizer(TINY / "ice_text.model", do_lower_case=True, remove_space=True)
        assert tokenizer.tokenize("  Hello \n WORLD ") == ["▁hello", "▁world"]
        assert tokenizer.encode_text("  Hello \n WORLD ") == tokenizer.convert_tokens_to_ids(["▁hello", "▁world"])

    def test_missing_file(self, tmp_path):
        with pytest.raises(VocabularyError, match=r"nowhere.ice_text\.model is not there; take ice_text\.model"):
            ChatGLMTokenizer(tmp_path / "nowhere" / "ice_text.model")
        with pytest.raises(VocabularyError, match=r"There is no ice_text\.model in the arguments of ChatGLMTokenizer"):
            ChatGLMTokenizer()
        shutil.copy(TINY / "tokenizer_config.json", tmp_path)
        with pytest.raises(VocabularyError, match=r"There is no ice_text\.model in .*; take") as raised:
            ChatGLMTokenizer.from_pretrained(tmp_path)
        assert str(tmp_path) in str(raised.value)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "0 bytes. is not a readable sentencepiece model"),
            (b"\x00" * 100, "100 bytes. is not a readable sentencepiece model"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:5e97\nsize 2706249\n", "git lfs pull"),
            ((TINY / "ice_text.model").read_bytes()[:100_001], "not a readable sentencepiece model"),
        ],
        ids=["empty", "zeros", "lfs pointer", "truncated"],
    )
    @pytest.mark.parametrize(
        "load", [lambda folder: ChatGLMTokenizer(folder / "ice_text.model"), ChatGLMTokenizer.from_pretrained]
    )
    def test_damaged_file(self, tmp_path, content, message, load):
        shutil.copy(TINY / "tokenizer_config.json", tmp_path)
        (tmp_path / "ice_text.model").write_bytes(content)
        with pytest.raises(VocabularyError, match=message) as raised:
            load(tmp_path)
        assert str(tmp_path / "ice_text.model") in str(raised.value)

    def test_vocabulary_of_another_model(self, tmp_path):
        """The file has other text pieces, and no control, blank or byte pieces."""
        path = tmp_path / "ice_text.model"
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(["hello world", "你好 世界"] * 20),
            model_prefix=str(tmp_path / "ice_text"),
            vocab_size=24,
            hard_vocab_limit=False,
            user_defined_symbols=["<pad>", "<n>"],
            minloglevel=2,
        )
        with pytest.raises(ValueError, match=r"pieces and no <\|tab\|>.*not the vocabulary of ChatGLM-6B"):
            ChatGLMTokenizer(path)

    def test_vocabulary_without_the_control_pieces(self):
        with pytest.raises(ValueError, match=r"664 pieces and no \[hMASK\]: it is not the vocabulary"):
            ChatGLMTokenizer(TINY / "ice_text.model", gmask_token="[hMASK]")

    @pytest.mark.parametrize("count", [-1, True, "20000", 2.5, 2**30])
    def test_what_is_no_number_of_image_tokens_is_refused(self, count):
        with pytest.raises(ValueError, match=f"gives num_image_tokens={count!r}, but a number from 0 to"):
            ChatGLMTokenizer(TINY / "ice_text.model", num_image_tokens=count)

    def test_register_for_auto_class_does_nothing(self, tmp_path):
        ChatGLMTokenizer.register_for_auto_class("AutoTokenizer")
        assert ChatGLMTokenizer._auto_class is None
        ChatGLMTokenizer.from_pretrained(TINY).save_pretrained(tmp_path)
        assert not list(tmp_path.glob("*.py"))


class TestCopies:
    @pytest.mark.parametrize(
        "duplicate",
        [copy.deepcopy, lambda tokenizer: pickle.loads(pickle.dumps(tokenizer))],
        ids=["deepcopy", "pickle"],
    )
    def test_copy(self, stock, duplicate, tmp_path):
        tokenizer, golden = stock
        other = duplicate(tokenizer)
        for case in golden["cases"]:
            assert other(text_of(case))["input_ids"] == case["input_ids"]
            assert other.decode(case["input_ids"]) == tokenizer.decode(case["input_ids"])
        other.save_pretrained(tmp_path)
        assert ChatGLMTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()

    def test_save_where_the_vocabulary_was_deleted(self, tmp_path):
        source = tmp_path / "source"
        shutil.copytree(TINY, source)
        tokenizer = ChatGLMTokenizer.from_pretrained(source)
        shutil.rmtree(source)
        tokenizer.save_pretrained(tmp_path / "saved")
        assert (tmp_path / "saved" / "ice_text.model").read_bytes() == (TINY / "ice_text.model").read_bytes()

    def test_saved_special_tokens_do_not_come_back_as_others(self, tmp_path):
        """A ``tokenizer_config.json`` of another transformers version can list tokens with other properties."""
        shutil.copy(TINY / "ice_text.model", tmp_path)
        config = json.loads((TINY / "tokenizer_config.json").read_text())
        plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
        config["added_tokens_decoder"] = {
            "320": {"content": "[MASK]", **plain},
            "321": {"content": "[gMASK]", **plain},
            "2": {"content": "</s>", **plain},
        }
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = ChatGLMTokenizer.from_pretrained(tmp_path)
        text = "  [MASK]  [gMASK]</s>"
        assert tokenizer(text) == ChatGLMTokenizer.from_pretrained(TINY)(text)


class TestAddedTokens:
    def test_added_token_is_encoded_decoded_and_saved(self, tiny, tmp_path):
        assert tiny.add_tokens(["<tool>"]) == 1
        assert len(tiny) == 665 and tiny.vocab_size == 664
        tiny.save_pretrained(tmp_path)
        for tokenizer in (tiny, ChatGLMTokenizer.from_pretrained(tmp_path)):
            ids = tokenizer.encode("hello<tool>world", add_special_tokens=False)
            assert 664 in ids and tokenizer.convert_tokens_to_ids(["▁hello", "<tool>"]) == [157, 664]
            assert tokenizer.decode(ids) == "hello <tool> world"
            assert tokenizer.decode(ids, spaces_between_special_tokens=False) == "hello<tool>world"
            assert tokenizer.decode([664, 665]) == "<tool>"
            assert 664 not in tokenizer.encode_text("hello<tool>world")


class TestPadding:
    def test_rows_that_have_masks_are_padded(self, tiny):
        """A data collator pads truncated rows that come with masks of their own size."""
        rows = [tiny(text, truncation=True, max_length=12) for text in TEXTS]
        assert len({row["attention_mask"].shape for row in rows}) == 3
        padded = tiny.pad(rows, padding=True, return_tensors="pt")
        expected = tiny(TEXTS, truncation=True, max_length=12, padding=True, return_tensors="pt")
        assert padded.keys() == expected.keys()
        assert all(torch.equal(padded[key], expected[key]) for key in expected)

    def test_a_plain_mask_stays_plain(self, tiny):
        padded = tiny.pad(
            [
                {"input_ids": [16, 27, 321, 324], "attention_mask": [1, 1, 1, 1]},
                {"input_ids": [16, 324], "attention_mask": [1, 1]},
            ],
            padding=True,
            return_tensors="np",
        )
        assert padded["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
        assert padded["position_ids"].shape == (2, 2, 4)

    def test_longer_than_max_length_without_truncation(self, tiny):
        row = tiny(TEXTS[1], padding="max_length", max_length=4, truncation=False)
        assert len(row["input_ids"]) == 13 and row["attention_mask"].shape == (1, 13, 13)

    def test_token_type_ids_and_special_tokens_mask_are_padded(self, tiny):
        padded = tiny.pad(
            {"input_ids": [[16, 324], [27]], "token_type_ids": [[1, 1], [1]], "special_tokens_mask": [[0, 0], [0]]},
            padding=True,
        )
        assert padded["token_type_ids"] == [[1, 1], [0, 1]] and padded["special_tokens_mask"] == [[0, 0], [1, 0]]
