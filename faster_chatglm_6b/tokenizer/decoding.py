"""Turn the ids that a model gave into text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .ice_text import clean_up_spacing, image_token

# ChatGLM-6B's embedding has 130528 rows for 130344 pieces. A model can pick one of the rows without a piece.
_ROWS_WITHOUT_PIECE = 130528 - 130344
# What PyTorch's losses ignore: labels are decoded too.
IGNORED_LABEL = -100


class DecodingMixin:
    """``decode`` and ``convert_ids_to_tokens`` on top of ``sp_tokenizer``."""

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool | None = None,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str | list[str]:
        """Return the text of an id, of ids in any sequence or tensor, or (transformers 5) the texts of a batch.

        Control tokens are dropped. So are the 184 ids after the vocabulary, for which ChatGLM-6B's embedding has rows
        and ice_text.model no pieces. The label -100 and image tokens are ``<image_-100>``, ``<image_5>``, as in stock.

        Args:
            skip_special_tokens: False, given explicitly, shows control tokens by their names; None decodes as stock.
            clean_up_tokenization_spaces: False keeps the blanks before English punctuation.

        Raises:
            ValueError: another negative id, or a larger one.
        """
        kwargs |= {
            "skip_special_tokens": skip_special_tokens,
            "clean_up_tokenization_spaces": clean_up_tokenization_spaces,
        }
        if type(token_ids) is list and token_ids and type(token_ids[0]) is int:
            return self._decode(token_ids, **kwargs)
        return super().decode(token_ids, **kwargs)

    def batch_decode(
        self,
        sequences: Any,
        skip_special_tokens: bool | None = None,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Decode each sequence; arguments and errors as in ``decode``."""
        # The base class hands its own default on to decode, which would take it for a given one.
        return super().batch_decode(
            sequences,
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            **kwargs,
        )

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool | None = None,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool = True,
        **kwargs: Any,
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        shows_control = skip_special_tokens is not None and not skip_special_tokens
        ids = self._ids_with_text(ids, bool(skip_special_tokens), shows_control, labels=(IGNORED_LABEL,))
        names = self.sp_tokenizer.control_pieces if shows_control else {}
        if ids and max(ids) >= self.vocab_size:
            text = (" " if spaces_between_special_tokens else "").join(self._texts_around_added_tokens(ids, names))
        else:
            text = self._text_of_pieces(ids, names)
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        return clean_up_spacing(text) if clean_up_tokenization_spaces else text

    def decodable_ids(self, ids: list[int], skip_special_tokens: bool = False) -> list[int]:
        """Return ``ids`` without <pad>, without ids that have no piece, and, if asked, without special tokens.

        Raises:
            ValueError: an id that neither this vocabulary nor ChatGLM-6B's embedding has.
        """
        return self._ids_with_text(ids, skip_special_tokens)

    def _ids_with_text(
        self, ids: list[int], skips_special: bool, shows_control: bool = False, labels: tuple[int, ...] = ()
    ) -> list[int]:
        if not ids:
            return []
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            added = self.added_tokens_decoder
            rows = self.vocab_size + _ROWS_WITHOUT_PIECE
            for index in ids:
                if not 0 <= index < rows and index not in added and index not in labels:
                    raise self._no_such_id(index)
            ids = [index for index in ids if index < self.vocab_size or index in added]
        hidden = set(self.all_special_ids) if skips_special else set() if shows_control else {self.pad_token_id}
        return ids if hidden.isdisjoint(ids) else [index for index in ids if index not in hidden]

    def _texts_around_added_tokens(self, ids: Iterable[int], names: Mapping[int, str]) -> list[str]:
        added = self.added_tokens_decoder
        texts: list[str] = []
        run: list[int] = []
        for index in (*ids, None):
            if index is not None and index < self.vocab_size:
                run.append(index)
                continue
            text = self._text_of_pieces(run, names)
            if text:
                texts.append(text)
            if index is not None:
                texts.append(str(added[index]))
            run = []
        return texts

    def _text_of_pieces(self, ids: Sequence[int], names: Mapping[int, str]) -> str:
        """Return the text of ids below ``vocab_size``; those in ``names``, image tokens and labels by their names."""
        first = self.num_image_tokens
        if not names and (not ids or min(ids) >= first):
            return self.sp_tokenizer.decode(ids)
        text = ""
        run: list[int] = []
        for index in (*ids, None):
            name = image_token(index) if index is not None and index < first else names.get(index, "")
            if index is not None and not name:
                run.append(index)
                continue
            text += self.sp_tokenizer.decode(run, is_start=not text) + name
            run = []
        return text

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Return the text of a list of pieces."""
        return self.sp_tokenizer.decode_tokens(tokens)

    def _convert_id_to_token(self, index: int) -> str:
        if index != IGNORED_LABEL and not 0 <= index < self.vocab_size:
            raise self._no_such_id(index)
        return self.sp_tokenizer[index]

    def _no_such_id(self, index: int) -> ValueError:
        return ValueError(
            f"Token id {index} is not in the vocabulary of ChatGLM-6B (0 to {len(self) - 1}); check that the ids come "
            "from this tokenizer or its model."
        )
