"""ChatGLMTokenizer: the tokenizer of ChatGLM-6B on today's transformers.

Same ids, pieces, texts, masks and positions as the checkpoint's own tokenizer gives on transformers 4.27.1, whatever
transformers is installed. Different on purpose: padded positions follow [gMASK] before [MASK] as the model's do,
`num_image_tokens` defaults to 0, ids without a piece are dropped or named in an error, `filename_prefix` and
`return_attention_mask=False` are honoured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from transformers import AddedToken, PreTrainedTokenizer
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils import PaddingStrategy, logging

from .chat_template import MARK, ChatTemplateMixin
from .ice_text import WHERE_TO_GET_IT, IceTextTokenizer, VocabularyError, clean_up_spacing
from .padding import attention_mask, context_length, pad_on_the_left, position_ids
from .tokenizer_errors import check_settings, clear_errors

logger = logging.get_logger(__name__)

# ChatGLM-6B's embedding has 130528 rows for 130344 pieces. A model can pick one of the rows without a piece.
_ROWS_WITHOUT_PIECE = 130528 - 130344


class ChatGLMTokenizer(ChatTemplateMixin, PreTrainedTokenizer):
    """Text <-> ids of ChatGLM-6B, by sentencepiece (`ice_text.model`).

    `tokenizer(text)` gives `input_ids` only: the text, then [gMASK] <sop>; a pair gives text, [gMASK] <sop>, second
    text, <eop>. With `padding` or `max_length` there are also `attention_mask`, bool [1, L, L] per row (batched:
    [B, 1, L, L]), True where a token must *not* be looked at, and `position_ids`, int64 [2, L] ([B, 2, L]): position
    and block position. Padding goes to the left.

    [MASK], <sop>, <eop>, <pad> and <unk> typed in a text become their ids here, as in the stock tokenizer; use
    `encode_text` for text that comes from a user.
    """

    vocab_files_names = {"vocab_file": "ice_text.model"}
    model_input_names = ["input_ids", "attention_mask", "position_ids"]
    padding_side = "left"

    def __init__(
        self,
        vocab_file: str | Path | None = None,
        do_lower_case: bool = False,
        remove_space: bool = False,
        bos_token: str = "<sop>",
        eos_token: str = "<eop>",
        end_token: str = "</s>",
        mask_token: str = "[MASK]",
        gmask_token: str = "[gMASK]",
        padding_side: str = "left",
        pad_token: str = "<pad>",
        unk_token: str = "<unk>",
        num_image_tokens: int = 0,
        **kwargs: Any,
    ) -> None:
        """Load `vocab_file`; the other arguments are those of tokenizer_config.json.

        Raises VocabularyError (a ValueError) if the file is missing, damaged or not ChatGLM-6B's current vocabulary;
        ValueError if `num_image_tokens` is not 0.
        """
        if vocab_file is None:
            folder = kwargs.get("name_or_path") or "the arguments of ChatGLMTokenizer"
            raise VocabularyError(f"There is no ice_text.model in {folder}; {WHERE_TO_GET_IT}.")
        if num_image_tokens != 0:
            raise ValueError(
                f"num_image_tokens is {num_image_tokens}: ids shifted by image tokens belong to the first ChatGLM-6B "
                "checkpoints (150528 embedding rows), which are not supported; use a current checkpoint, whose "
                "tokenizer_config.json says 0."
            )
        moved = _take_model_specific_tokens(kwargs, ("end_token", "gmask_token"))
        self.end_token = str(moved.get("end_token", end_token))
        self.gmask_token = str(moved.get("gmask_token", gmask_token))
        self.do_lower_case = do_lower_case
        self.remove_space = remove_space
        self.num_image_tokens = num_image_tokens
        self.vocab_file = vocab_file

        # transformers' base class asks for the vocabulary while it is being built.
        self.sp_tokenizer = IceTextTokenizer(vocab_file)
        special = {
            "bos_token": bos_token,
            "eos_token": eos_token,
            "mask_token": mask_token,
            "pad_token": pad_token,
            "unk_token": unk_token,
        }
        used = {str(token) for token in (*special.values(), self.end_token, self.gmask_token) if token is not None}
        missing = sorted(used - self.sp_tokenizer.vocab.keys())
        if missing:
            raise self.sp_tokenizer.wrong_vocabulary(vocab_file, missing)
        if kwargs.get("added_tokens_decoder"):
            # A checkpoint saved by newer transformers lists its special tokens here, perhaps with other stripping.
            kwargs["added_tokens_decoder"] = {
                index: token for index, token in kwargs["added_tokens_decoder"].items() if _content(token) not in used
            }
        is_before_4_34 = not hasattr(PreTrainedTokenizer, "added_tokens_decoder")
        if not is_before_4_34:
            # Slow tokenizers of transformers 4.27 dropped the blanks around special tokens; since 4.34 it takes this.
            self._added_tokens_decoder = {
                self.sp_tokenizer.vocab[str(token)]: AddedToken(
                    str(token), lstrip=True, rstrip=True, normalized=False, special=True
                )
                for token in special.values()
                if token is not None
            }
        kwargs.setdefault("clean_up_tokenization_spaces", True)
        self.clean_up_tokenization_spaces = kwargs["clean_up_tokenization_spaces"]
        super().__init__(
            do_lower_case=do_lower_case,
            remove_space=remove_space,
            padding_side=padding_side,
            num_image_tokens=num_image_tokens,
            **{name: None if token is None else str(token) for name, token in special.items()},
            **kwargs,
        )
        if is_before_4_34:
            self.sanitize_special_tokens()
        # transformers 5.0 takes [CLS] and [SEP] around a text for granted.
        self.special_tokens_pattern = "none"
        # [gMASK] and </s> are no special tokens for the base class, since typed in a text they must stay text. They
        # are handed over only now, to be saved in tokenizer_config.json.
        self.init_kwargs.update(end_token=self.end_token, gmask_token=self.gmask_token)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> ChatGLMTokenizer:
        """`PreTrainedTokenizer.from_pretrained`; raises ValueError, or VocabularyError as the constructor does."""
        with clear_errors(args[0] if args else kwargs.get("pretrained_model_name_or_path")):
            tokenizer = super().from_pretrained(*args, **kwargs)
        check_settings(tokenizer.model_max_length)
        return tokenizer

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoTokenizer") -> None:
        """Do nothing: registered, transformers would copy this package's source into every saved checkpoint."""

    # Vocabulary

    @property
    def vocab_size(self) -> int:
        """Number of pieces in ice_text.model, without tokens added later."""
        return self.sp_tokenizer.num_tokens

    @property
    def gmask_token_id(self) -> int:
        """Id of [gMASK]."""
        return self.sp_tokenizer.vocab[self.gmask_token]

    @property
    def end_token_id(self) -> int:
        """Id of </s>."""
        return self.sp_tokenizer.vocab[self.end_token]

    def get_vocab(self) -> dict[str, int]:
        """All pieces and added tokens with their ids."""
        return {**self.sp_tokenizer.vocab, **self.added_tokens_encoder}

    def _convert_token_to_id(self, token: str) -> int:
        if token not in self.sp_tokenizer.vocab and token.startswith("<image_") and token[7:-1].isdecimal():
            return int(token[7:-1])  # the stock tokenizer's name for an image token, of which there are none
        return self.sp_tokenizer[token]

    def _convert_id_to_token(self, index: int) -> str:
        if not 0 <= index < self.vocab_size:
            raise self._no_such_id(index)
        return self.sp_tokenizer[index]

    def convert_tokens_to_ids(self, tokens: str | list[str] | None) -> int | list[int] | None:
        """Id or ids of a token or a list of tokens; the id of <unk> for a token that does not exist."""
        if tokens is None:
            return None
        if isinstance(tokens, str):
            return super().convert_tokens_to_ids(tokens)
        ids = self.sp_tokenizer.model.PieceToId(list(tokens))
        unknown = self.sp_tokenizer.model.unk_id()
        if unknown in ids:
            ids = [
                super(ChatGLMTokenizer, self).convert_tokens_to_ids(token) if index == unknown else index
                for token, index in zip(tokens, ids, strict=True)
            ]
        return ids

    # Text to ids

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text, with nothing added; control tokens typed in it ("[gMASK]", "<sop>", "</s>") stay text.

        Raises TypeError if `text` is not a string and ValueError if it is not valid Unicode.
        """
        return self.sp_tokenizer.encode(self._normalize(text))

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        """Pieces of `text`; special tokens in it are pieces of their own."""
        if MARK in text or self._holds_special_token(text):
            return super().tokenize(text, **kwargs)
        return self._tokenize(text)  # the base class would walk the text character by character

    def _holds_special_token(self, text: str) -> bool:
        names = self._added_tokens_encoder if hasattr(self, "_added_tokens_encoder") else self.unique_no_split_tokens
        return any(name in text for name in names)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return self.sp_tokenizer.tokenize(self._normalize(text))

    def _normalize(self, text: str) -> str:
        if self.remove_space:
            text = " ".join(text.split())
        return text.lower() if self.do_lower_case else text

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """`token_ids_0` [gMASK] <sop>, then, if there is a second sequence, `token_ids_1` <eop>."""
        ids = [*token_ids_0, self.gmask_token_id, self.bos_token_id]
        return ids if token_ids_1 is None else [*ids, *token_ids_1, self.eos_token_id]

    def truncate_sequences(
        self,
        ids: list[int],
        pair_ids: list[int] | None = None,
        num_tokens_to_remove: int = 0,
        truncation_strategy: str | TruncationStrategy = "longest_first",
        stride: int = 0,
    ) -> tuple[list[int], list[int] | None, list[int]]:
        """`PreTrainedTokenizer.truncate_sequences`; what would lose all tokens stays whole, as in transformers 4."""
        strategy = TruncationStrategy(truncation_strategy)
        shortened = pair_ids if strategy == TruncationStrategy.ONLY_SECOND else ids
        is_one_shortened = strategy != TruncationStrategy.LONGEST_FIRST or pair_ids is None
        if is_one_shortened and shortened and len(shortened) <= num_tokens_to_remove:
            logger.error(f"The text of {len(shortened)} tokens is not truncated: {num_tokens_to_remove} are too many.")
            return ids, pair_ids, []
        return super().truncate_sequences(ids, pair_ids, num_tokens_to_remove, strategy, stride)

    # Padding

    def pad(self, encoded_inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """`PreTrainedTokenizer.pad`, also for rows that already have [1, L, L] masks of different L."""
        if isinstance(encoded_inputs, (list, tuple)) and encoded_inputs and isinstance(encoded_inputs[0], Mapping):
            encoded_inputs = {key: [row[key] for row in encoded_inputs] for key in encoded_inputs[0]}
        if isinstance(encoded_inputs, Mapping):
            mask = encoded_inputs.get("attention_mask")
            if isinstance(mask, list) and mask and getattr(mask[0], "ndim", 0) > 1:
                # Newer transformers stack a list of masks unpadded; a tuple goes to _pad row by row.
                encoded_inputs = {**encoded_inputs, "attention_mask": tuple(mask)}
        return super().pad(encoded_inputs, *args, **kwargs)

    def _pad(
        self,
        encoded_inputs: MutableMapping[str, Any],
        max_length: int | None = None,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        **kwargs: Any,
    ) -> MutableMapping[str, Any]:
        """Pad one row on the left and give it `attention_mask` and `position_ids` (see the class).

        A 1-D attention mask that came with the row (1 = look at) is kept in that form.
        Raises ValueError if the padding side is not "left".
        """
        side = padding_side if padding_side is not None else self.padding_side
        if padding_strategy != PaddingStrategy.DO_NOT_PAD and side != "left":
            raise ValueError(f"padding_side is {side!r}: ChatGLM-6B can only be padded on the left; set it to 'left'.")
        input_ids = list(encoded_inputs["input_ids"])
        if padding_strategy == PaddingStrategy.LONGEST:
            max_length = len(input_ids)
        if max_length is None:
            return encoded_inputs
        if pad_to_multiple_of is not None:
            max_length = -(-max_length // pad_to_multiple_of) * pad_to_multiple_of
        if return_attention_mask is None:
            return_attention_mask = "attention_mask" in self.model_input_names
        context = context_length(input_ids, self.bos_token_id)
        if return_attention_mask and "attention_mask" not in encoded_inputs:
            encoded_inputs["attention_mask"] = attention_mask(len(input_ids), context)
        if "position_ids" not in encoded_inputs:
            mask_token_ids = (self.gmask_token_id, self.mask_token_id)
            encoded_inputs["position_ids"] = position_ids(input_ids, context, mask_token_ids)
        missing = max_length - len(input_ids)
        if padding_strategy != PaddingStrategy.DO_NOT_PAD and missing > 0:
            pad_on_the_left(encoded_inputs, missing, self.pad_token_id, self.pad_token_type_id)
        return encoded_inputs

    # Ids to text

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

    # Saving

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Write ice_text.model into `save_directory` (or, if that is no directory, to that very path).

        The content is the loaded one, also where the original file is gone. Returns the path written.
        """
        path = Path(save_directory)
        if path.is_dir():
            path = path / "-".join(filter(None, (filename_prefix, self.vocab_files_names["vocab_file"])))
        path.write_bytes(self.sp_tokenizer.model.serialized_model_proto())
        return (str(path),)


def _content(token: Any) -> str:
    """The text of a token given as str, AddedToken or its saved dict."""
    return token["content"] if isinstance(token, Mapping) else str(token)


def _take_model_specific_tokens(kwargs: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Take `names` out of the dict in which transformers 5 hands over tokens of tokenizer_config.json it does not know.

    Left there they would become special tokens.
    """
    taken = {}
    for argument in ("model_specific_special_tokens", "extra_special_tokens"):  # the latter in 5.0
        tokens = kwargs.get(argument)
        if not isinstance(tokens, Mapping):
            continue
        taken.update({name: tokens[name] for name in names if name in tokens})
        kwargs[argument] = {name: token for name, token in tokens.items() if name not in names}
        if not kwargs[argument]:
            del kwargs[argument]
    return taken
