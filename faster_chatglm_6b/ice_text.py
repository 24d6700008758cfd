"""The sentencepiece vocabulary of ChatGLM-6B (``ice_text.model``) and its spelling of line breaks, tabs and blanks.

Sentencepiece folds runs of blanks and drops line breaks, so ChatGLM spells them as marker pieces before encoding
(``<n>``, ``<|tab|>``, ``<|blank_2|>`` .. ``<|blank_80|>``) and turns the markers back after decoding.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

LINE_BREAK_PIECE = "<n>"
TAB_PIECE = "<|tab|>"
LONGEST_BLANK_RUN = 80

_BLANK_RUN = re.compile(f" {{2,{LONGEST_BLANK_RUN}}}")
_MARKER = re.compile(r"<(?:n|\|tab\||\|blank_([2-9]|[1-7][0-9]|80)\|)>")

# What decode() does to English spacing (transformers 4.27's clean_up_tokenization, missing in 5.0.0), in this order.
_SPACING_RULES = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)

WHERE_TO_GET_IT = (
    "take ice_text.model (2706249 bytes, 130344 pieces) from the current THUDM/chatglm-6b checkpoint and put it "
    "beside tokenizer_config.json"
)


class VocabularyError(ValueError):
    """ice_text.model is missing, damaged or that of another model."""


def mark_whitespace(text: str, linebreak: bool = True, whitespaces: bool = True) -> str:
    """Spell line breaks (`linebreak`) and tabs and runs of 2 to 80 blanks (`whitespaces`) as marker pieces."""
    if linebreak:
        text = text.replace("\n", LINE_BREAK_PIECE)
    if whitespaces:
        text = text.replace("\t", TAB_PIECE)
        if "  " in text:
            text = _BLANK_RUN.sub(lambda run: f"<|blank_{len(run[0])}|>", text)
    return text


def unmark_whitespace(text: str) -> str:
    """Turn marker pieces back into line breaks, tabs and blanks."""
    if "<" not in text:
        return text
    return _MARKER.sub(_marker_to_whitespace, text)


def _marker_to_whitespace(marker: re.Match) -> str:
    if marker[1]:
        return " " * int(marker[1])
    return "\n" if marker[0] == LINE_BREAK_PIECE else "\t"


def clean_up_spacing(text: str) -> str:
    """Remove the blank before punctuation and English contractions ("a , b" -> "a, b")."""
    if " " in text:
        for spaced, closed in _SPACING_RULES:
            text = text.replace(spaced, closed)
    return text


class IceTextTokenizer:
    """Plain text <-> ids and pieces by sentencepiece; knows nothing of special tokens added around a text.

    Control pieces ([gMASK], <sop>, ...) never come out of a text: typed in a text they are split like any other
    characters. Decoding drops them.
    """

    def __init__(self, model_file: str | Path):
        """Load `model_file`.

        Raises VocabularyError if the file is missing or not a sentencepiece model, or if it lacks the byte, blank and
        line break pieces of ChatGLM-6B's current vocabulary.
        """
        self.model = _load_model(Path(model_file))
        missing = [
            piece for piece in (LINE_BREAK_PIECE, TAB_PIECE, "<|blank_80|>", "<0xFF>") if not self._has_piece(piece)
        ]
        if missing:
            raise self.wrong_vocabulary(model_file, missing)
        self.num_tokens: int = self.model.GetPieceSize()
        pieces = self.model.IdToPiece(list(range(self.num_tokens)))
        self.vocab: dict[str, int] = {piece: index for index, piece in enumerate(pieces)}
        self.byte_of_id: dict[int, int] = {self.vocab[f"<0x{byte:02X}>"]: byte for byte in range(256)}

    def wrong_vocabulary(self, model_file: str | Path, missing: Sequence[str]) -> VocabularyError:
        """The error that tells why `model_file` is not ChatGLM-6B's current vocabulary."""
        return VocabularyError(
            f"{model_file} has {self.model.GetPieceSize()} pieces and no {', '.join(missing)}: it is not the current "
            f"vocabulary of ChatGLM-6B (the first checkpoints had another one); {WHERE_TO_GET_IT}."
        )

    def _has_piece(self, piece: str) -> bool:
        return not self.model.IsUnknown(self.model.PieceToId(piece))

    def __getitem__(self, key: int | str) -> int | str:
        """The piece of an id or the id of a piece (the id of <unk> if there is no such piece)."""
        return self.model.PieceToId(key) if isinstance(key, str) else self.model.IdToPiece(key)

    def encode(
        self, text: str, linebreak: bool = True, whitespaces: bool = True, add_dummy_prefix: bool = True
    ) -> list[int]:
        """Ids of `text`; options as in the stock tokenizer (`add_dummy_prefix=False`: no blank before the text).

        Raises TypeError if `text` is not a string and ValueError if it is not valid Unicode.
        """
        text = self._prepare(text, linebreak, whitespaces)
        if add_dummy_prefix:
            return self.model.EncodeAsIds(text)
        # Sentencepiece puts its blank before a leading line break, so that both can be cut off again.
        return self.model.EncodeAsIds(LINE_BREAK_PIECE + text)[2:]

    def tokenize(
        self, text: str, linebreak: bool = True, whitespaces: bool = True, add_dummy_prefix: bool = True
    ) -> list[str]:
        """Pieces of `text`; arguments and errors as in `encode`."""
        text = self._prepare(text, linebreak, whitespaces)
        if add_dummy_prefix:
            return self.model.EncodeAsPieces(text)
        return self.model.EncodeAsPieces(LINE_BREAK_PIECE + text)[2:]

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, each in [0, num_tokens). Bytes that are not UTF-8 become U+FFFD, one each."""
        return unmark_whitespace(self.model.DecodeIds(ids)) if ids else ""

    def decode_tokens(self, tokens: list[str]) -> str:
        """Text of a list of pieces."""
        return unmark_whitespace(self.model.DecodePieces(tokens)) if tokens else ""

    def _prepare(self, text: str, linebreak: bool, whitespaces: bool) -> str:
        if not isinstance(text, str):
            raise TypeError(f"The text to encode is a {type(text).__name__}; give a str.")
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"The text to encode has a lone surrogate {text[error.start]!r} at character {error.start}, which "
                    "is not valid Unicode; drop it, for example with text.encode(errors='ignore').decode()."
                ) from None
        return mark_whitespace(text, linebreak, whitespaces)


def _load_model(path: Path) -> sentencepiece.SentencePieceProcessor:
    if not path.is_file():
        raise VocabularyError(f"{path} is not there; {WHERE_TO_GET_IT}.")
    content = path.read_bytes()
    if content.startswith(b"version https://git-lfs"):
        raise VocabularyError(
            f"{path} is a Git LFS pointer, not the vocabulary itself; run `git lfs pull` in its folder."
        )
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(content)
    except RuntimeError:
        raise VocabularyError(
            f"{path} ({len(content)} bytes) is not a readable sentencepiece model: truncated or damaged; "
            f"{WHERE_TO_GET_IT}."
        ) from None
    return model
