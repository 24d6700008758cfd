"""Put control tokens around a text's ids, and name arguments of a call that have no effect."""

from __future__ import annotations

from inspect import signature
from typing import Any

from transformers import PreTrainedTokenizer
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Further arguments, which transformers takes among its keyword arguments.
_OTHER_ARGUMENTS = {"split_special_tokens", "max_target_length", "return_offsets_mapping", "sanitize_control_tokens"}
_KNOWN_ARGUMENTS = _OTHER_ARGUMENTS.union(signature(PreTrainedTokenizer.__call__).parameters)


class EncodingMixin:
    """Ids with [gMASK] <sop> after a text and <eop> after a second one."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Encode as ``PreTrainedTokenizer.__call__`` does; log an argument that it does not know.

        Raises:
            NotImplementedError: ``return_offsets_mapping``, which needs a fast tokenizer.
        """
        self._check_arguments({**(kwargs.get("tokenizer_kwargs") or {}), **kwargs})
        return super().__call__(*args, **kwargs)

    def encode(self, *args: Any, **kwargs: Any) -> list[int]:
        """Encode as ``PreTrainedTokenizer.encode`` does; arguments and errors as in a call."""
        self._check_arguments(kwargs)
        return super().encode(*args, **kwargs)

    @staticmethod
    def _check_arguments(arguments: dict[str, Any]) -> None:
        if arguments.get("return_offsets_mapping"):
            raise NotImplementedError(
                "return_offsets_mapping needs a fast tokenizer, and ChatGLM-6B has none; leave it out and find the "
                "places of the tokens from convert_ids_to_tokens."
            )
        unknown = sorted(set(arguments) - _KNOWN_ARGUMENTS)
        if unknown:
            logger.warning(f"The tokenizer ignores {', '.join(unknown)}: it has no such argument.")

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """Return 1 for each id that ``build_inputs_with_special_tokens`` adds and 0 for the others.

        With ``already_has_special_tokens`` return 1 for each special id of ``token_ids_0`` instead.

        Raises:
            ValueError: a second sequence together with ``already_has_special_tokens``.
        """
        if already_has_special_tokens:
            if token_ids_1 is not None:
                raise ValueError("token_ids_0 has its special tokens already: give both sequences in it.")
            special = {*self.all_special_ids, self.gmask_token_id, self.end_token_id}
            return [int(int(index) in special) for index in token_ids_0]
        mask = [0] * len(token_ids_0) + [1, 1]
        return mask if token_ids_1 is None else [*mask, *[0] * len(token_ids_1), 1]

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Return 0 for each id up to <sop> and 1 for each after it. ChatGLM-6B itself has no token types."""
        types = [0] * (len(token_ids_0) + 2)
        return types if token_ids_1 is None else types + [1] * (len(token_ids_1) + 1)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Return ``token_ids_0`` [gMASK] <sop>, then ``token_ids_1`` <eop> if there is a second sequence."""
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
        """Truncate as ``PreTrainedTokenizer`` does, but keep what would lose all tokens whole, as in transformers 4."""
        strategy = TruncationStrategy(truncation_strategy)
        shortened = pair_ids if strategy == TruncationStrategy.ONLY_SECOND else ids
        is_one_shortened = strategy != TruncationStrategy.LONGEST_FIRST or pair_ids is None
        if is_one_shortened and shortened and len(shortened) <= num_tokens_to_remove:
            logger.error(f"The text of {len(shortened)} tokens is not truncated: {num_tokens_to_remove} are too many.")
            return ids, pair_ids, []
        return super().truncate_sequences(ids, pair_ids, num_tokens_to_remove, strategy, stride)
