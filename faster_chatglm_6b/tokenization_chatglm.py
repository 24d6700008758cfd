"""ChatGLMTokenizer: the tokenizer of ChatGLM-6B on today's transformers.

Ids, pieces, texts, masks and positions are those of the checkpoint's own tokenizer on transformers 4.27.1, whatever
transformers is installed. Different on purpose:

- Padded positions follow [gMASK] before [MASK], as the model's do.
- ``num_image_tokens`` and ``model_max_length`` follow config.json if they are not given.
- Ids without a piece are dropped or named in an error.
- ``decode(skip_special_tokens=False)`` shows special tokens.
- ``filename_prefix`` and ``return_attention_mask=False`` are honoured.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import AddedToken, PreTrainedTokenizer

from .templates.chat_template import MARK, ChatTemplateMixin
from .tokenizer.companion_config import image_tokens, longest_sequence, read_companion
from .tokenizer.decoding import DecodingMixin
from .tokenizer.encoding import EncodingMixin
from .tokenizer.errors import check_files, check_image_tokens, check_settings, clear_errors, is_unlimited
from .tokenizer.ice_text import IceTextTokenizer
from .tokenizer.padding import PaddingMixin
from .tokenizer.saving import SavingMixin
from .tokenizer.vocabulary_file import WHERE_TO_GET_IT, VocabularyError

_IS_BEFORE_4_34 = not hasattr(PreTrainedTokenizer, "added_tokens_decoder")


class ChatGLMTokenizer(
    EncodingMixin,
    DecodingMixin,
    PaddingMixin,
    SavingMixin,
    ChatTemplateMixin,
    PreTrainedTokenizer,
):
    """Text <-> ids of ChatGLM-6B, by sentencepiece (``ice_text.model``).

    ``tokenizer(text)`` gives ``input_ids`` only: the text, then [gMASK] <sop>. A pair gives text, [gMASK] <sop>, second
    text, <eop>. With ``padding`` or ``max_length`` come two more, padded on the left:

    - ``attention_mask``, bool [1, L, L] per row ([B, 1, L, L] per batch), True for a token that must *not* be seen;
    - ``position_ids``, int64 [2, L] ([B, 2, L]): position and block position.

    [MASK], <sop>, <eop>, <pad> and <unk> typed in a text become their ids here, as in the stock tokenizer. Encode text
    that comes from a user with ``encode_text``.
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
        num_image_tokens: int | None = None,
        eop_token: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Load the vocabulary; arguments that are not listed are those of tokenizer_config.json.

        Args:
            vocab_file: path of ice_text.model.
            num_image_tokens: ids before those of the pieces: 0, or 20000 with the first checkpoints (150528 ids). None
                takes it from config.json beside ``vocab_file``, else from the kind of that file.
            eop_token: given by a tokenizer_config.json of April 2023, whose ``eos_token`` is </s>. With image tokens
                the two become ``eos_token`` and ``end_token``; without, they stay, and ``chat`` refuses them.
            kwargs: a missing ``model_max_length`` is the ``max_sequence_length`` of that config.json, else 2048.

        Raises:
            VocabularyError: the file is missing, damaged or not ChatGLM-6B's vocabulary. It is a ValueError.
            ValueError: ``num_image_tokens`` is no number of ids.
        """
        if vocab_file is None:
            folder = kwargs.get("name_or_path") or "the arguments of ChatGLMTokenizer"
            raise VocabularyError(f"There is no ice_text.model in {folder}; {WHERE_TO_GET_IT}.")
        moved = _take_model_specific_tokens(kwargs, ("end_token", "gmask_token", "eop_token"))
        self.gmask_token = str(moved.get("gmask_token", gmask_token))
        self.do_lower_case = do_lower_case
        self.remove_space = remove_space
        self.vocab_file = vocab_file

        # transformers' base class asks for the vocabulary while it is being built.
        self.sp_tokenizer = IceTextTokenizer(vocab_file)
        config = read_companion(vocab_file)
        self._set_image_tokens(num_image_tokens, config)
        end_token, eop_token = moved.get("end_token", end_token), moved.get("eop_token", eop_token)
        eos_token = self._set_end_tokens(eos_token, end_token, eop_token)
        if is_unlimited(kwargs.get("model_max_length", kwargs.get("max_len"))):
            kwargs["model_max_length"] = longest_sequence(config)
        special = {
            "bos_token": bos_token,
            "eos_token": eos_token,
            "mask_token": mask_token,
            "pad_token": pad_token,
            "unk_token": unk_token,
        }
        special = {name: None if token is None else str(token) for name, token in special.items()}
        used = {*special.values(), self.end_token, self.gmask_token, self._separate_eop} - {None}
        self._check_pieces(used)
        _forget_saved_tokens(kwargs, used)
        self._strip_blanks_around(token for token in special.values() if token is not None)
        kwargs.setdefault("clean_up_tokenization_spaces", True)
        self.clean_up_tokenization_spaces = kwargs["clean_up_tokenization_spaces"]
        super().__init__(
            do_lower_case=do_lower_case,
            remove_space=remove_space,
            padding_side=padding_side,
            num_image_tokens=self.num_image_tokens,
            **special,
            **kwargs,
        )
        if _IS_BEFORE_4_34:
            self.sanitize_special_tokens()
        # transformers 5.0 takes [CLS] and [SEP] around a text for granted.
        self.special_tokens_pattern = "none"
        self._save_other_tokens()

    def _set_image_tokens(self, count: int | None, config: dict[str, Any]) -> None:
        if count is None:
            count = image_tokens(config, self.sp_tokenizer)
        check_image_tokens(count)
        self.sp_tokenizer.num_image_tokens = count

    def _set_end_tokens(self, eos_token: Any, end_token: Any, eop_token: Any) -> Any:
        """Name the tokens that end a text and an answer as they are called now; return ``eos_token``."""
        if eop_token is not None and self.num_image_tokens:
            eos_token, end_token, eop_token = eop_token, eos_token, None
        self.end_token = str(end_token)
        self._separate_eop = None if eop_token is None else str(eop_token)
        return eos_token

    def _check_pieces(self, tokens: Iterable[str]) -> None:
        missing = sorted(token for token in tokens if token not in self.sp_tokenizer)
        if missing:
            raise self.sp_tokenizer.wrong_vocabulary(self.vocab_file, missing)

    def _strip_blanks_around(self, tokens: Iterable[str]) -> None:
        """Drop the blanks around special tokens; before transformers 4.34 slow tokenizers did so unasked."""
        if not _IS_BEFORE_4_34:
            self._added_tokens_decoder = {
                self.sp_tokenizer[token]: AddedToken(token, lstrip=True, rstrip=True, normalized=False, special=True)
                for token in tokens
            }

    def _save_other_tokens(self) -> None:
        """Have [gMASK] and </s> saved in tokenizer_config.json.

        The base class sees them only now: as special tokens they would not stay text when a user types them.
        """
        self.init_kwargs.update(end_token=self.end_token, gmask_token=self.gmask_token)
        self.init_kwargs.pop("eop_token", None)
        if self._separate_eop is not None:
            self.init_kwargs["eop_token"] = self._separate_eop

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> ChatGLMTokenizer:
        """Load as ``PreTrainedTokenizer.from_pretrained`` does.

        Raises:
            ValueError: a file cannot be that of a tokenizer.
            VocabularyError: as in the constructor.
        """
        name = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        check_files(name, kwargs.get("subfolder"))
        with clear_errors(name):
            tokenizer = super().from_pretrained(*args, **kwargs)
        check_settings(tokenizer.model_max_length)
        return tokenizer

    @classmethod
    def _from_pretrained(cls, resolved_vocab_files: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        # tokenizer_config.json may name any file of the machine: only a caller's own argument replaces the folder's.
        if kwargs.get("vocab_file") is None:
            kwargs["vocab_file"] = resolved_vocab_files.get("vocab_file")
        return super()._from_pretrained(resolved_vocab_files, *args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoTokenizer") -> None:
        """Do nothing: once registered, every saved checkpoint would get a copy of this package's source."""

    # Vocabulary

    @property
    def vocab_size(self) -> int:
        """Number of image tokens and of pieces in ice_text.model, without tokens added later."""
        return self.sp_tokenizer.num_tokens

    @property
    def num_image_tokens(self) -> int:
        """Number of ids before those of the pieces."""
        return self.sp_tokenizer.num_image_tokens

    @property
    def blank_token_id(self) -> int:
        """Id of the piece that is a lone blank."""
        return self.num_image_tokens + 5

    @property
    def sp_model(self) -> Any:
        """The sentencepiece model, also ``sp_tokenizer.text_tokenizer.sp``; its ids know no image tokens."""
        return self.sp_tokenizer.model

    @property
    def gmask_token_id(self) -> int:
        """Id of [gMASK]."""
        return self.sp_tokenizer[self.gmask_token]

    @property
    def end_token_id(self) -> int:
        """Id of </s>."""
        return self.sp_tokenizer[self.end_token]

    @property
    def eop_token(self) -> str:
        """<eop>, which ends an answer: ``eos_token``, unless tokenizer_config.json has it apart (April 2023)."""
        return self._separate_eop or self.eos_token

    @property
    def eop_token_id(self) -> int:
        """Id of ``eop_token``."""
        return self.sp_tokenizer[self.eop_token]

    def check_end_of_answer(self, eos_token_id: int) -> None:
        """Check that a model and this tokenizer end an answer with the same token.

        Args:
            eos_token_id: ends the model's answers; ``eop_token`` ends them here.

        Raises:
            ValueError: the two differ.
        """
        if self._separate_eop is not None and self.eos_token_id != eos_token_id:
            raise ValueError(
                f"tokenizer_config.json is that of April 2023: its eos_token is {self.eos_token} and {self.eop_token}, "
                'which ends an answer, is its eop_token; change it to "eos_token": "<eop>", "end_token": "</s>" and no '
                "eop_token, or take tokenizer_config.json from the current THUDM/chatglm-6b checkpoint."
            )

    def get_vocab(self) -> dict[str, int]:
        """Return all pieces and added tokens with their ids."""
        return {**self.sp_tokenizer.vocab, **self.added_tokens_encoder}

    def _convert_token_to_id(self, token: str) -> int:
        return self.sp_tokenizer[token]

    def convert_tokens_to_ids(self, tokens: str | list[str] | None) -> int | list[int] | None:
        """Return the id of a token or the ids of a list; that of <unk> for a token that does not exist."""
        if tokens is None:
            return None
        if isinstance(tokens, str):
            return super().convert_tokens_to_ids(tokens)
        ids = self.sp_tokenizer.model.PieceToId(list(tokens))
        if self.num_image_tokens:
            ids = [self.num_image_tokens + index for index in ids]
        unknown = self.num_image_tokens + self.sp_tokenizer.model.unk_id()
        if unknown in ids:
            ids = [
                super(ChatGLMTokenizer, self).convert_tokens_to_ids(token) if index == unknown else index
                for token, index in zip(tokens, ids, strict=True)
            ]
        return ids

    # Text to ids

    def encode_text(self, text: str) -> list[int]:
        """Encode plain text and add nothing; control tokens typed in it ("[gMASK]", "<sop>", "</s>") stay text.

        Raises:
            TypeError: ``text`` is not a string.
            ValueError: ``text`` is not valid Unicode.
        """
        return self.sp_tokenizer.encode(self._normalize(text))

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        """Split ``text`` into pieces; special tokens in it are pieces of their own."""
        if MARK in text or self._holds_special_token(text):
            return super().tokenize(text, **kwargs)
        # The base class would walk the text character by character.
        return self._tokenize(text)

    def _holds_special_token(self, text: str) -> bool:
        names = self._added_tokens_encoder if hasattr(self, "_added_tokens_encoder") else self.unique_no_split_tokens
        return any(name in text for name in names)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return self.sp_tokenizer.tokenize(self._normalize(text))

    def _normalize(self, text: str) -> str:
        if self.remove_space:
            text = " ".join(text.split())
        return text.lower() if self.do_lower_case else text


def _content(token: Any) -> str:
    """Return the text of a token given as str, AddedToken or its saved dict."""
    return token["content"] if isinstance(token, Mapping) else str(token)


def _forget_saved_tokens(kwargs: dict[str, Any], used: Collection[str]) -> None:
    """Remove the tokens in ``used`` from those that newer transformers saved, perhaps with other stripping."""
    if kwargs.get("added_tokens_decoder"):
        kwargs["added_tokens_decoder"] = {
            index: token for index, token in kwargs["added_tokens_decoder"].items() if _content(token) not in used
        }


def _take_model_specific_tokens(kwargs: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Take ``names`` out of the tokens that transformers 5 found in tokenizer_config.json and does not know.

    Left there, they would become special tokens.
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
