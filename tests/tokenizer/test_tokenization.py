"""ChatGLMTokenizer agrees with everything that the stock tokenizer gave on transformers 4.27.1 (tests/golden)."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizer_data import TEXTS, TINY, load_golden, text_of

from faster_chatglm_6b.tokenization_chatglm import ChatGLMTokenizer
from faster_chatglm_6b.tokenizer.ice_text import IceTextTokenizer


def mask_rows(mask) -> list[str]:
    """Return the rows of one [1, L, L] mask as text of 0 and 1, as in the golden files."""
    return ["".join(str(int(hidden)) for hidden in row) for row in np.asarray(mask)[0]]


def as_lists(value):
    return (
        value.tolist()
        if hasattr(value, "tolist")
        else [as_lists(v) for v in value]
        if isinstance(value, list)
        else value
    )


def two_mask_tokens(tokenizer, input_ids: list[int]) -> bool:
    return tokenizer.gmask_token_id in input_ids and tokenizer.mask_token_id in input_ids


def positions_of_gmask(tokenizer, input_ids: list[int], stock_positions: list[list[int]]) -> list[list[int]]:
    """Return stock's positions of a row with [gMASK]'s place from <sop> on, as the model itself computes them."""
    context = input_ids.index(tokenizer.bos_token_id)
    return [
        stock_positions[0][:context] + [input_ids.index(tokenizer.gmask_token_id)] * (len(input_ids) - context),
        stock_positions[1],
    ]


class TestStockCases:
    def test_ids_and_pieces_of_every_text(self, stock):
        tokenizer, golden = stock
        for case in golden["cases"]:
            text = text_of(case)
            encoded = tokenizer(text)
            assert list(encoded) == case["call_keys"], text
            assert encoded["input_ids"] == case["input_ids"], text
            assert tokenizer.encode(text) == case["input_ids"], text
            assert tokenizer.encode(text, add_special_tokens=False) == case["ids_no_special"], text
            if "tokens" in case:
                assert tokenizer.tokenize(text) == case["tokens"], text
                assert tokenizer.convert_tokens_to_ids(case["tokens"]) == case["ids_no_special"], text
                assert tokenizer.convert_ids_to_tokens(case["ids_no_special"]) == case["tokens"], text
        assert len(golden["cases"]) >= 60

    def test_every_decoded_text(self, stock):
        tokenizer, golden = stock
        for case in golden["cases"]:
            full, plain = case["input_ids"], case["ids_no_special"]
            if "decode" not in case:
                assert tokenizer.decode(plain) == text_of(case) and case["decode_equals_text"]
                continue
            assert case["decode"] == {
                "with_special_ids": tokenizer.decode(full),
                "with_special_ids_skip": tokenizer.decode(full, skip_special_tokens=True),
                "raw": tokenizer.decode(plain),
                "raw_skip": tokenizer.decode(plain, skip_special_tokens=True),
                "raw_noclean": tokenizer.decode(plain, clean_up_tokenization_spaces=False),
                "raw_skip_noclean": tokenizer.decode(
                    plain, skip_special_tokens=True, clean_up_tokenization_spaces=False
                ),
                "sp_tokenizer.decode": tokenizer.sp_tokenizer.decode(plain),
            }, case["text"]

    def test_padded_form_of_every_text(self, stock):
        tokenizer, golden = stock
        for case in golden["cases"]:
            expected = case["padded_single"]
            padded = tokenizer([text_of(case)], padding=True, return_tensors="pt")
            mask, positions = padded["attention_mask"], padded["position_ids"]
            assert list(padded) == expected["keys"]
            assert [list(mask.shape), str(mask.dtype)] == [
                expected["attention_mask_shape"],
                expected["attention_mask_dtype"],
            ]
            assert list(positions.shape) == expected["position_ids_shape"] and positions.dtype == torch.int64
            if "attention_mask_rows" in expected:
                assert mask_rows(mask[0]) == expected["attention_mask_rows"], case["text"]
            if "position_ids" in expected:
                stock_positions = expected["position_ids"]
                if two_mask_tokens(tokenizer, case["input_ids"]):
                    stock_positions = positions_of_gmask(tokenizer, case["input_ids"], stock_positions)
                assert positions[0].tolist() == stock_positions, case["text"]

    def test_padding_truncation_and_pairs(self, stock):
        tokenizer, golden = stock
        for case in golden["batch_cases"]:
            if case["name"] in ("no_attention_mask", "mask_token_in_text") or "error" in case:
                continue  # fixed or failing on purpose: the tests below cover both
            tokenizer.truncation_side = "left" if case["name"].startswith("trunc_left") else "right"
            encoded = tokenizer(*case["args"], **case["kwargs"])
            tokenizer.truncation_side = "right"
            self.check_batch(case, encoded)

    @staticmethod
    def check_batch(case, encoded):
        name = case["name"]
        assert set(encoded) == set(case["keys"]), name
        for key in ("input_ids", "position_ids", "length", "overflowing_tokens"):
            if key in case:
                assert as_lists(encoded[key]) == case[key], (name, key)
        if "attention_mask" in encoded:
            batched = isinstance(as_lists(encoded["input_ids"])[0], list)
            masks = list(encoded["attention_mask"]) if batched else [encoded["attention_mask"]]
            assert [list(mask.shape) for mask in masks] == case["attention_mask_shape"], name
            if "attention_mask_rows" in case:
                rows = case["attention_mask_rows"]
                assert [mask_rows(mask) for mask in masks] == (rows if isinstance(rows[0], list) else [rows]), name
        if "num_truncated_tokens" in case:
            assert encoded["num_truncated_tokens"] == case["num_truncated_tokens"]
        if "dtypes" in case:
            assert {key: str(encoded[key].dtype) for key in case["dtypes"]} == case["dtypes"], name

    def test_decode_cases(self, stock):
        tokenizer, golden = stock
        for case in golden["decode_cases"]:
            if isinstance(case["text"], str) and case["name"] != "negative":
                assert tokenizer.decode(case["ids"], **case["kwargs"]) == case["text"], case
        ids = tokenizer("你好")["input_ids"]
        answer = [*ids, *tokenizer.encode("你好", add_special_tokens=False), tokenizer.eos_token_id]
        assert tokenizer.batch_decode([answer, answer]) == golden["batch_decode"]
        assert tokenizer.decode(torch.tensor(ids)) == tokenizer.decode(np.array(ids)) == golden["decode_tensor"]

    def test_options_of_sp_tokenizer(self, stock):
        tokenizer, golden = stock
        for case in golden["encode_sp_options"]:
            assert tokenizer.sp_tokenizer.encode(case["text"], **case["kwargs"]) == case["ids"], case
            assert tokenizer.sp_tokenizer.tokenize(case["text"], **case["kwargs"]) == case["tokens"], case
            assert tokenizer.sp_tokenizer.decode_tokens(case["tokens"]) == tokenizer.sp_tokenizer.decode(case["ids"])

    def test_conversions(self, stock):
        tokenizer, golden = stock
        for token, index in golden["convert_tokens_to_ids"].items():
            assert tokenizer.convert_tokens_to_ids(token) == index, token
        tokens = list(golden["convert_tokens_to_ids"])
        assert tokenizer.convert_tokens_to_ids(tokens) == list(golden["convert_tokens_to_ids"].values())
        assert tokenizer.convert_tokens_to_ids([]) == [] and tokenizer.convert_tokens_to_ids(None) is None
        for index, token in golden["convert_ids_to_tokens"].items():
            if isinstance(token, str):
                assert tokenizer.convert_ids_to_tokens(int(index)) == token
                assert tokenizer.convert_ids_to_tokens([int(index)]) == [token]
                assert tokenizer.sp_tokenizer[int(index)] == token and tokenizer.sp_tokenizer[token] == int(index)

    def test_attributes(self, stock):
        tokenizer, golden = stock
        expected = golden["attributes"]
        for name in (
            *(
                "vocab_size",
                "all_special_tokens",
                "all_special_ids",
                "special_tokens_map",
                "bos_token_id",
                "eos_token_id",
            ),
            *("pad_token_id", "unk_token_id", "mask_token_id", "gmask_token_id", "end_token_id", "end_token"),
            *("gmask_token", "padding_side", "truncation_side", "num_image_tokens"),
            "model_input_names",
        ):
            assert getattr(tokenizer, name) == expected[name], name
        assert len(tokenizer) == expected["len"]
        vocabulary = tokenizer.get_vocab()
        assert len(vocabulary) == expected["len(get_vocab())"]
        assert all(vocabulary[tokenizer.convert_ids_to_tokens(i)] == i for i in range(0, len(tokenizer), 7))
        assert tokenizer.cls_token is None and tokenizer.sep_token is None
        assert tokenizer.num_special_tokens_to_add() == expected["num_special_tokens_to_add"]
        assert tokenizer.num_special_tokens_to_add(pair=True) == expected["num_special_tokens_to_add_pair"]
        for name, value in expected["init_kwargs"].items():
            if name not in ("name_or_path", "special_tokens_map_file"):
                assert str(tokenizer.init_kwargs[name]) == value, name
        # transformers 4.34 and later list the vocabulary's special tokens as added tokens, at their own ids.
        assert set(tokenizer.get_added_vocab()) <= set(tokenizer.all_special_tokens)

    def test_build_inputs_pad_and_prepare_for_model(self, stock):
        tokenizer, golden = stock
        ids = tokenizer.encode("你好", add_special_tokens=False)
        given = list(ids)
        assert tokenizer.build_inputs_with_special_tokens(given) == golden["build_inputs"]["single"]
        assert tokenizer.build_inputs_with_special_tokens(given, given) == golden["build_inputs"]["pair"]
        assert given == ids
        assert dict(tokenizer.prepare_for_model(ids)) == golden["prepare_for_model"]
        padded = tokenizer.pad([{"input_ids": row} for row in golden["tok.pad"]["input_ids"]], padding=True)
        assert as_lists(padded["input_ids"]) == golden["tok.pad"]["input_ids"]
        assert as_lists(padded["position_ids"]) == golden["tok.pad"]["position_ids"]

    def test_save(self, stock, tmp_path):
        tokenizer, golden = stock
        expected = golden["save"]
        (written,) = tokenizer.save_vocabulary(str(tmp_path))
        assert [Path(written).name] == expected["returned"]
        original = Path(tokenizer.vocab_file).read_bytes()
        assert Path(written).read_bytes() == original and expected["bytes_identical"]
        (written,) = tokenizer.save_vocabulary(str(tmp_path / "somefile.bin"))
        assert [Path(written).name] == expected["not_a_dir_returned"] and Path(written).read_bytes() == original

        folder = tmp_path / "saved"
        tokenizer.save_pretrained(folder)
        files = {path.name for path in folder.iterdir()}
        # transformers 5 keeps the content of special_tokens_map.json in tokenizer_config.json
        assert set(expected["save_pretrained_files"]) - files <= {"special_tokens_map.json"}
        assert not any(name.endswith(".py") for name in files)
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        for name, value in expected["tokenizer_config.json"].items():
            if name not in ("special_tokens_map_file", "model_max_length"):
                assert config[name] == value, name

        again = ChatGLMTokenizer.from_pretrained(folder)
        assert len(again) == expected["after_reload_len"]
        assert again.get_vocab() == tokenizer.get_vocab()
        for case in golden["cases"]:
            text = text_of(case)
            assert again(text)["input_ids"] == case["input_ids"], text
            assert again.decode(case["input_ids"]) == tokenizer.decode(case["input_ids"]), text


class TestFixedOnPurpose:
    def test_padded_positions_follow_gmask_as_the_model_does(self, stock):
        tokenizer, golden = stock
        seen = 0
        for case in golden["batch_cases"]:
            if case["name"] != "mask_token_in_text":
                continue
            stock_positions = case["position_ids"]
            assert stock_positions[0] == [[0, 1, 2, 3, 1], [0, 0, 0, 0, 1]]  # [MASK] is at 1, [gMASK] at 3
            ours = tokenizer(*case["args"], **case["kwargs"])
            assert ours["position_ids"].tolist() == [[[0, 1, 2, 3, 3], [0, 0, 0, 0, 1]], stock_positions[1]]
            assert ours["input_ids"].tolist() == case["input_ids"]
            seen += 1
        # In texts with [MASK], stock takes the position of [MASK]; ours takes that of [gMASK].
        for case in golden["cases"]:
            if two_mask_tokens(tokenizer, case["input_ids"]) and "position_ids" in case["padded_single"]:
                ids = case["input_ids"]
                context = ids.index(tokenizer.bos_token_id)
                assert case["padded_single"]["position_ids"][0][context] == ids.index(tokenizer.mask_token_id)
                ours = tokenizer(case["text"], padding=True)["position_ids"]
                assert ours[0, context] == ids.index(tokenizer.gmask_token_id)
                seen += 1
        assert seen >= 2

    def test_mask_token_alone_still_gives_the_position(self, tiny):
        ids = [16, tiny.mask_token_id, 27, tiny.bos_token_id, 40]
        positions = tiny.pad({"input_ids": ids}, padding=True)["position_ids"]
        assert positions.tolist() == [[0, 1, 2, 1, 1], [0, 0, 0, 1, 2]]

    def test_num_image_tokens_is_0_without_being_said(self, tmp_path):
        # The stock class's own default of 20000 would shift every id here.
        shutil.copy(TINY / "ice_text.model", tmp_path)
        config = json.loads((TINY / "tokenizer_config.json").read_text())
        del config["num_image_tokens"]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        assert ChatGLMTokenizer.from_pretrained(tmp_path)("你好")["input_ids"] == [5, 143, 321, 324]
        assert ChatGLMTokenizer(TINY / "ice_text.model")("你好")["input_ids"] == [5, 143, 321, 324]

    def test_ids_after_the_vocabulary_are_dropped_and_others_named(self, stock):
        tokenizer, golden = stock
        size = tokenizer.vocab_size
        for case in golden["decode_cases"]:
            if case["name"] == "id_eq_vocab_size":
                assert case["ids"] == [size] and case["text"]["error"].startswith("IndexError")
                assert tokenizer.decode(case["ids"], **case["kwargs"]) == ""
            if case["name"] == "negative":
                assert case["text"] == "<image_-1>"
                with pytest.raises(ValueError, match=r"Token id -1 is not in the vocabulary of ChatGLM-6B \(0 to"):
                    tokenizer.decode(case["ids"], **case["kwargs"])
        hello = tokenizer.encode_text("hello")
        assert tokenizer.decode([*hello, size, *hello, size + 183]) == tokenizer.decode(hello + hello)
        for outside in (size + 184, 2**40, -99):
            with pytest.raises(ValueError, match=f"Token id {outside} "):
                tokenizer.decode([*hello, outside])

    def test_convert_ids_to_tokens_names_an_id_without_a_piece(self, stock):
        tokenizer, golden = stock
        errors = {
            int(index): token for index, token in golden["convert_ids_to_tokens"].items() if isinstance(token, dict)
        }
        assert len(errors) == 2 and all(token["error"].startswith("IndexError") for token in errors.values())
        for index in (*errors, -1):
            with pytest.raises(ValueError, match=f"Token id {index} is not in the vocabulary"):
                tokenizer.convert_ids_to_tokens(index)
            with pytest.raises(ValueError, match=f"Token id {index} is not in the vocabulary"):
                tokenizer.convert_ids_to_tokens([5, index])

    def test_filename_prefix_is_used(self, stock, tmp_path):
        tokenizer, golden = stock
        assert golden["save"]["with_prefix_returned"] == ["ice_text.model"]
        (written,) = tokenizer.save_vocabulary(str(tmp_path), filename_prefix="mine")
        assert Path(written).name == "mine-ice_text.model" and Path(written).is_file()

    def test_no_attention_mask_if_not_wanted(self, stock):
        tokenizer, golden = stock
        for case in golden["batch_cases"]:
            if case["name"] == "no_attention_mask":
                assert "attention_mask" in case["keys"]
        padded = tokenizer(TEXTS, padding=True, return_attention_mask=False, return_tensors="pt")
        assert list(padded) == ["input_ids", "position_ids"]
        with_mask = tokenizer(TEXTS, padding=True, return_tensors="pt")
        assert torch.equal(padded["input_ids"], with_mask["input_ids"])
        assert torch.equal(padded["position_ids"], with_mask["position_ids"])

    def test_right_padding_is_refused_with_a_sentence(self, tiny):
        golden = load_golden("tiny")
        assert golden["batch_cases"][-1]["error"] == "AssertionError: "
        tiny.padding_side = "right"
        assert tiny("你好")["input_ids"] == [5, 143, 321, 324]
        with pytest.raises(ValueError, match="padding_side is 'right': ChatGLM-6B can only be padded on the left"):
            tiny(TEXTS, padding=True)

    def test_tensors_of_unequal_rows_are_refused_as_before(self, tiny):
        with pytest.raises(ValueError, match="padding=True"):
            tiny(TEXTS, return_tensors="pt")


def test_marker_texts_of_all_blank_runs():
    vocabulary = IceTextTokenizer(TINY / "ice_text.model")
    for length in range(1, 200):
        text = "x" + " " * length + "y\t\n"
        ids = vocabulary.encode(text)
        assert vocabulary.decode(ids) == text
        blanks = [piece for piece in vocabulary.tokenize(text) if piece.startswith("<|blank_")]
        assert blanks == ["<|blank_80|>"] * (length // 80) + [f"<|blank_{length % 80}|>"] * (length % 80 > 1)
