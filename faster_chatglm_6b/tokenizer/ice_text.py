"""The sentencepiece vocabulary of ChatGLM-6B (``ice_text.model``) and its spelling of line breaks, tabs and blanks.

Sentencepiece folds runs of blanks and drops line breaks, so ChatGLM spells them as marker pieces before encoding
(``<n>``, ``<|tab|>``, ``<|blank_2|>`` .. ``<|blank_80|>``) and turns the markers back after decoding.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import sentencepiece

from .vocabulary_file import WHERE_TO_GET_IT, VocabularyError, read_vocabulary

LINE_BREAK_PIECE = "<n>"
TAB_PIECE = "<|tab|>"
LONGEST_BLANK_RUN = 80

_BLANK_RUN = re.compile(f" {{2,{LONGEST_BLANK_RUN}}}")
_IMAGE_TOKEN = re.compile(r"<image_(\d+)>")
_MARKER = re.compile(r"<(?:n|\|tab\||\|blank_([2-9]|[1-7][0-9]|80)\|)>")

# decode() applies these to English spacing, in this order: clean_up_tokenization of transformers 4.27, gone in 5.0.0.
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


def image_token(index: int) -> str:
    """Return the stock tokenizer's name for an image token, and for the label -100."""
    return f"<image_{index}>"


def mark_whitespace(text: str, linebreak: bool = True, whitespaces: bool = True) -> str:
    """Spell line breaks (``linebreak``) and tabs and runs of 2 to 80 blanks (``whitespaces``) as marker pieces."""
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


class TextTokenizer:
    """The bare sentencepiece model, under the names that the stock tokenizer has for it; ids count from 0."""

    def __init__(self, sp: sentencepiece.SentencePieceProcessor):
        self.sp = sp
        self.num_tokens: int = sp.GetPieceSize()

    def __len__(self) -> int:
        return self.num_tokens

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``."""
        return self.sp.EncodeAsIds(text)

    def decode(self, ids: list[int]) -> str:
        """Return the text of ``ids``, markers and all."""
        return self.sp.DecodeIds(ids)

    def tokenize(self, text: str) -> list[str]:
        """Split ``text`` into pieces."""
        return self.sp.EncodeAsPieces(text)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Return the text of pieces, markers and all."""
        return self.sp.DecodePieces(tokens)

    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]:
        """Return the ids of pieces."""
        return self.sp.PieceToId(list(tokens))

    def convert_token_to_id(self, token: str) -> int:
        """Return the id of a piece."""
        return self.sp.PieceToId(token)

    def convert_id_to_token(self, idx: int) -> str:
        """Return the piece of an id."""
        return self.sp.IdToPiece(idx)


class IceTextTokenizer:
    """Plain text <-> ids and pieces by sentencepiece; adds no special tokens around a text.

    Control pieces ([gMASK], <sop>, ...) never come out of a text: if typed in one, they are split like any other
    characters. Decoding drops them.

    With ``num_image_tokens`` the first ids stand for images (``<image_0>``, ...), as in the first ChatGLM-6B
    checkpoints. The pieces' ids follow them.
    """

    special_tokens = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
    max_blank_length = LONGEST_BLANK_RUN
    byte_fallback = True

    def __init__(self, model_file: str | Path, num_image_tokens: int = 0):
        """Load ``model_file``.

        Raises:
            VocabularyError: the file is missing or no sentencepiece model, or it lacks the byte, blank and line break
                pieces of ChatGLM-6B's vocabulary.
        """
        self.vocab_file = model_file
        self.num_image_tokens = num_image_tokens
        self.model, self.is_first_file = read_vocabulary(Path(model_file))
        self.text_tokenizer = TextTokenizer(self.model)
        missing = [piece for piece in (LINE_BREAK_PIECE, TAB_PIECE, "<|blank_80|>", "<0xFF>") if piece not in self]
        if missing:
            raise self.wrong_vocabulary(model_file, missing)
        self.pieces: list[str] = self.model.IdToPiece(list(range(self.num_text_tokens)))
        # Of the model's own ids, which know no images.
        # Filled by detokenizers.
        self.text_of_id: dict[int, str] = {}
        self.byte_of_id: dict[int, int] = {self.model.PieceToId(f"<0x{byte:02X}>"): byte for byte in range(256)}

    def wrong_vocabulary(self, model_file: str | Path, missing: Sequence[str]) -> VocabularyError:
        """Return the error that tells why ``model_file`` is not ChatGLM-6B's vocabulary."""
        return VocabularyError(
            f"{model_file} has {self.num_text_tokens} pieces and no {', '.join(missing)}: it is not the vocabulary of "
            f"ChatGLM-6B; {WHERE_TO_GET_IT}."
        )

    def __contains__(self, piece: str) -> bool:
        index = self.model.PieceToId(piece)
        return not self.model.IsUnknown(index) or self.model.IdToPiece(index) == piece

    @property
    def num_text_tokens(self) -> int:
        """Number of pieces."""
        return self.text_tokenizer.num_tokens

    @property
    def num_tokens(self) -> int:
        """Number of ids: image tokens and pieces."""
        return self.num_image_tokens + self.num_text_tokens

    @property
    def vocab(self) -> dict[str, int]:
        """All image tokens and pieces with their ids."""
        images = [image_token(index) for index in range(self.num_image_tokens)]
        return {piece: index for index, piece in enumerate((*images, *self.pieces))}

    @cached_property
    def control_pieces(self) -> dict[int, str]:
        """Ids and names of the pieces that decoding drops or, <unk>, writes in another way."""
        first = self.num_image_tokens
        numbers = range(self.num_text_tokens)
        return {
            first + index: self.pieces[index]
            for index in numbers
            if self.model.IsControl(index) or self.model.IsUnknown(index)
        }

    def bytes_of_ids(self) -> list[bytes]:
        """Return what each id adds to a text, in UTF-8; nothing for image tokens and control pieces.

        Grammars and other constraints (``xgrammar.TokenizerInfo``, say) need it: they would take markers for text.
        """
        texts = [b""] * self.num_image_tokens
        for index, piece in enumerate(self.pieces):
            text = (
                b""
                if self.num_image_tokens + index in self.control_pieces
                else unmark_whitespace(piece.replace("▁", " ")).encode()
            )
            texts.append(bytes([self.byte_of_id[index]]) if index in self.byte_of_id else text)
        return texts

    @staticmethod
    def get_blank_token(length: int) -> str:
        """Return the marker piece of a run of ``length`` blanks."""
        return f"<|blank_{length}|>"

    @staticmethod
    def get_tab_token() -> str:
        """Return the marker piece of a tab."""
        return TAB_PIECE

    def postprocess(self, text: str) -> str:
        """Turn marker pieces back into whitespace, under the stock tokenizer's name."""
        return unmark_whitespace(text)

    def __getitem__(self, key: int | str) -> int | str:
        """Return the piece of an id, or the id of a piece: that of <unk> if there is no such piece."""
        if isinstance(key, str):
            image = _IMAGE_TOKEN.fullmatch(key)
            return int(image[1]) if image else self.num_image_tokens + self.model.PieceToId(key)
        if key < self.num_image_tokens:  # also the label -100
            return image_token(key)
        return self.model.IdToPiece(key - self.num_image_tokens)

    def encode(
        self, text: str, linebreak: bool = True, whitespaces: bool = True, add_dummy_prefix: bool = True
    ) -> list[int]:
        """Return the ids of ``text``.

        Args:
            linebreak: spell line breaks as marker pieces.
            whitespaces: spell tabs and runs of blanks as marker pieces.
            add_dummy_prefix: put a blank before the text. These three are the stock tokenizer's options.

        Raises:
            TypeError: ``text`` is not a string.
            ValueError: ``text`` is not valid Unicode.
        """
        text = self._prepare(text, linebreak, whitespaces)
        if add_dummy_prefix:
            ids = self.model.EncodeAsIds(text)
        else:
            # Sentencepiece puts its blank before a leading line break, so that both can be cut off again.
            ids = self.model.EncodeAsIds(LINE_BREAK_PIECE + text)[2:]
        first = self.num_image_tokens
        return [first + index for index in ids] if first else ids

    def tokenize(
        self, text: str, linebreak: bool = True, whitespaces: bool = True, add_dummy_prefix: bool = True
    ) -> list[str]:
        """Split ``text`` into pieces; arguments and errors as in ``encode``."""
        text = self._prepare(text, linebreak, whitespaces)
        if add_dummy_prefix:
            return self.model.EncodeAsPieces(text)
        return self.model.EncodeAsPieces(LINE_BREAK_PIECE + text)[2:]

    def decode(self, ids: list[int], is_start: bool = True) -> str:
        """Return the text of ``ids``, each below ``num_tokens``; image tokens have none.

        Bytes that are not UTF-8 become U+FFFD, one each.

        Args:
            is_start: whether the ids begin a text. If they follow other text, their first blank stays.
        """
        first = self.num_image_tokens
        if first:
            ids = [index - first for index in ids if index >= first]
        if not ids:
            return ""
        if is_start:
            return unmark_whitespace(self.model.DecodeIds(ids))
        # Decoded after a line break that is cut off again, so that sentencepiece does not take them for a start.
        anchor = self.model.PieceToId(LINE_BREAK_PIECE)
        return unmark_whitespace(self.model.DecodeIds([anchor, *ids])[len(LINE_BREAK_PIECE) :])

    def decode_tokens(self, tokens: list[str]) -> str:
        """Return the text of a list of pieces."""
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
