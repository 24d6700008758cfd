"""From a request's text to ids, on a thread of its own, and from its fields to rows."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from ...templates.history import History
from ..defaults import end_ids, sampling_defaults, seed_of
from ..generation import Asked
from ..rows.interface import RowRequest
from ..stop_strings import StopStrings
from .errors import ApiError, unsupported
from .protocol import Message, SamplingFields

# Pieces of ice_text.model have at most 16 characters; only runs of blanks are longer, and are counted as one. Tabs,
# line breaks and U+0085 are tokens, each of them.
_CHARACTERS_PER_TOKEN = 16
_BLANKS = re.compile(r"[^\S\t\n\x85]{2,}")


class Prompts:
    """Make rows of requests for one model and its tokenizer."""

    def __init__(self, model: Any, tokenizer: Any):
        self._tokenizer = tokenizer
        self._config = model.config
        self.defaults, self.end_ids = sampling_defaults(model), end_ids(model)
        self.longest = model.config.max_sequence_length
        # One thread: the tokenizer is shared, and a long text must not hold up the event loop.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    async def of_messages(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> tuple[int, ...]:
        """Return the ids of a conversation, by the tokenizer's chat template.

        Raises:
            ApiError: 400 for messages that the model has no format for, or that are too long.
        """
        read = [_readable(message) for message in messages]
        texts = [part if isinstance(part, str) else "" for message in read for part in _texts(message["content"])]
        self._check_length_of("".join(texts))
        last = read[-1] if read else {"role": "", "content": None}
        if last["role"] == "user" and last["content"] is not None and not "".join(_texts(last["content"])).strip():
            raise ApiError("The last message is empty; send a text to be answered.", param="messages")

        def encode() -> list[int]:
            return self._tokenizer.apply_chat_template(
                read, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False
            )

        return await self._on_thread(encode, "messages")

    async def of_text(self, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Return the ids of a plain text with [gMASK] <sop>. Control tokens typed in it stay text.

        Raises:
            ApiError: 400 for a text that is too long, or no Unicode.
        """
        self._check_length_of(text)
        ends = (self._tokenizer.gmask_token_id, self._tokenizer.bos_token_id) if add_special_tokens else ()
        return (*await self._on_thread(lambda: self._tokenizer.encode_text(text), "prompt"), *ends)

    async def of_turn(self, query: str, history: Any) -> tuple[int, ...]:
        """Return the ids of a turn in ``chat``'s form.

        Raises:
            ApiError: 400 for a history that is none, or a text that is too long.
        """
        if not query.strip():
            raise ApiError("The prompt is empty; send a text to be answered.", param="prompt")
        try:
            text = History.of(history).prompt(query)
        except ValueError as error:
            raise ApiError(str(error), param="history") from error
        return await self.of_text(text)

    def of_ids(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Return given ids, with [gMASK] <sop> at their end if they hold no <sop>.

        Raises:
            ApiError: 400 for ids that the model has not.
        """
        gmask, sop = self._tokenizer.gmask_token_id, self._tokenizer.bos_token_id
        special = (gmask, self._config.mask_token_id)
        wrong = [index for index in ids if not 0 <= index < self._config.vocab_size]
        if wrong or self._config.pad_token_id in ids:
            given = wrong[0] if wrong else f"{self._config.pad_token_id}, which is padding"
            raise ApiError(
                f"The prompt holds the id {given}; ids go from 0 to {self._config.vocab_size - 1}.", param="prompt"
            )
        if sop not in ids:
            return (*ids, gmask, sop)
        if not any(index in special for index in ids):
            raise ApiError("The prompt's ids hold <sop>, but no [gMASK] before it; leave both out.", param="prompt")
        return tuple(ids)

    async def _on_thread(self, encode: Any, param: str) -> tuple[int, ...]:
        try:
            return tuple(await asyncio.get_running_loop().run_in_executor(self._thread, encode))
        except ValueError as error:
            raise ApiError(str(error), param=param) from error

    def _check_length_of(self, text: str) -> None:
        """Refuse by its characters a text that would take long to tokenize."""
        most = _CHARACTERS_PER_TOKEN * self.longest
        if len(text) > most:
            alone = text.count("\t") + text.count("\n")
            at_least = alone + (len(_BLANKS.sub(" ", text)) - alone) // _CHARACTERS_PER_TOKEN
            if at_least > self.longest:
                raise self._too_long(f"at least {at_least}")

    def _too_long(self, tokens: str) -> ApiError:
        return ApiError(
            f"The prompt has {tokens} tokens, but this model takes at most {self.longest} of prompt and answer "
            f"together, so at most {self.longest - 1} of a prompt; shorten it.",
            code="context_length_exceeded",
        )

    def room(self, ids: Sequence[int], limit: int | None = None) -> int:
        """Return how many tokens an answer may have.

        Args:
            limit: the request's ``max_length``, most tokens of prompt and answer.

        Raises:
            ApiError: 400 if there is no room for any.
        """
        if len(ids) >= self.longest:
            raise self._too_long(str(len(ids)))
        if limit is not None and len(ids) >= limit:
            raise ApiError(
                f"The prompt has {len(ids)} tokens, but max_length asks for at most {limit} of prompt and answer "
                "together; raise it or shorten the prompt.",
                param="max_length",
                code="context_length_exceeded",
            )
        return min(self.longest, limit or self.longest) - len(ids)

    def asked(self, body: SamplingFields, ids: tuple[int, ...], is_chat: bool) -> list[Asked]:
        """Return the answers that a request asks for with one prompt.

        Raises:
            ApiError: 400 for a prompt without room, or ids that the model has not.
        """
        room = self.room(ids)
        vocabulary = self._config.vocab_size
        biases = tuple((int(token), bias) for token, bias in (body.logit_bias or {}).items())
        stop_ids = tuple(body.stop_token_ids or ())
        for name, given in (("logit_bias", [token for token, _ in biases]), ("stop_token_ids", stop_ids)):
            if any(not 0 <= token < vocabulary for token in given):
                raise ApiError(f"{name} holds an id beyond {vocabulary - 1}, the model's last.", param=name)
        most = min(body.most_tokens or room, room)
        if (body.min_tokens or 0) > most:
            raise ApiError(f"min_tokens is {body.min_tokens}, but the answer has room for {most}.", param="min_tokens")
        row = RowRequest(
            ids=ids,
            max_tokens=most,
            end_ids=stop_ids if body.ignore_eos else (*self.end_ids, *stop_ids),
            min_tokens=body.min_tokens or 0,
            temperature=self._value(body, "temperature"),
            top_k=max(self._value(body, "top_k"), 0),
            top_p=self._value(body, "top_p"),
            repetition_penalty=self._value(body, "repetition_penalty"),
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            logit_bias=biases,
            top_logprobs=body.reported,
        )
        first = secrets.randbits(63) if body.seed is None else body.seed
        rows = (replace(row, seed=seed_of(first, number)) for number in range(body.n or 1))
        stop = StopStrings(body.stops)
        return [Asked(one, stop, is_chat) for one in rows]

    def _value(self, body: SamplingFields, name: str) -> float:
        given = getattr(body, name)
        return self.defaults[name] if given is None else given


def _readable(message: Message) -> dict[str, Any]:
    """Return a message as ``read_messages`` takes it; a developer's is a system message."""
    role = "system" if message.role == "developer" else message.role
    if role in ("tool", "function") or (message.model_extra or {}).get("tool_calls"):
        raise unsupported(
            "messages", "ChatGLM-6B was not trained with tools; write their results into a user's message."
        )
    if isinstance(message.content, list):
        for part in message.content:
            if part.get("type", "text") != "text":
                raise unsupported(
                    "messages", f"ChatGLM-6B reads text, but a part is of type {str(part['type'])[:40]!r}."
                )
    return {"role": role, "content": message.content}


def _texts(content: Any) -> list[str]:
    if isinstance(content, str):
        return [content]
    return [part.get("text", "") for part in content or [] if isinstance(part.get("text"), str)]
