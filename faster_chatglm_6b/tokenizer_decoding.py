"""Ids to text: what ``ChatGLMTokenizer`` says for the ids that the model gave."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .ice_text import clean_up_spacing

# ChatGLM-6B's embedding has 130528 rows for 130344 pieces. A model can pick one of the rows without a piece.
_ROWS_WITHOUT_PIECE = 130528 - 130344


class DecodingMixin:
    """``decode`` and ``convert_ids_to_tokens`` on top of ``sp_tokenizer``."""

    def decode(self, token_ids: Any, *args: Any, **kwargs: Any) -> str | list[str]:
        """Text of an id, of ids in any sequence or tensor, or (transformers 5) texts of a batch.

        Control tokens are dropped, and so are the 184 ids after the vocabulary, which ChatGLM-6B's embedding has rows
        but ice_text.model no pieces for. Blanks before English punctuation are removed unless
        `clean_up_tokenization_spaces=False`. Raises ValueError for a negative or larger id.
        """
        if type(token_ids) is list and token_ids and type(token_ids[0]) is int:
            return self._decode(token_ids, *args, **kwargs)
        return super().decode(token_ids, *args, **kwargs)

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool = True,
        **kwargs: Any,
    ) -> str:
        ids = self.decodable_ids([token_ids] if isinstance(token_ids, int) else token_ids, skip_special_tokens)
        if ids and max(ids) >= self.vocab_size:
            text = (" " if spaces_between_special_tokens else "").join(self._texts_around_added_tokens(ids))
        else:
            text = self.sp_tokenizer.decode(ids)
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        return clean_up_spacing(text) if clean_up_tokenization_spaces else text

    def decodable_ids(self, ids: list[int], skip_special_tokens: bool = False) -> list[int]:
        """`ids` without <pad>, without ids that have no piece, and, if asked, without special tokens.

        Raises ValueError for an id that neither this vocabulary nor ChatGLM-6B's embedding has.
        """
        if not ids:
            return []
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            added = self.added_tokens_decoder
            for index in ids:
                if not 0 <= index < self.vocab_size + _ROWS_WITHOUT_PIECE and index not in added:
                    raise self._no_such_id(index)
            ids = [index for index in ids if index < self.vocab_size or index in added]
        hidden = set(self.all_special_ids) if skip_special_tokens else {self.pad_token_id}
        return ids if hidden.isdisjoint(ids) else [index for index in ids if index not in hidden]

    def _texts_around_added_tokens(self, ids: Iterable[int]) -> list[str]:
        added = self.added_tokens_decoder
        texts: list[str] = []
        run: list[int] = []
        for index in (*ids, None):
            if index is not None and index < self.vocab_size:
                run.append(index)
                continue
            text = self.sp_tokenizer.decode(run)
            if text:
                texts.append(text)
            if index is not None:
                texts.append(str(added[index]))
            run = []
        return texts

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of a list of pieces."""
        return self.sp_tokenizer.decode_tokens(tokens)

    def _no_such_id(self, index: int) -> ValueError:
        return ValueError(
            f"Token id {index} is not in the vocabulary of ChatGLM-6B (0 to {len(self) - 1}); check that the ids come "
            "from this tokenizer or its model and hold no label values such as -100."
        )

    def _convert_id_to_token(self, index: int) -> str:
        if not 0 <= index < self.vocab_size:
            raise self._no_such_id(index)
        return self.sp_tokenizer[index]
