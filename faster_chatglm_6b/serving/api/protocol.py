"""Requests as clients send them, checked field by field."""

from __future__ import annotations

import logging
import re
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from .errors import ApiError, unsupported

_log = logging.getLogger("faster_chatglm_6b.serving")

# Fields that would change what the answer means; the value in which they ask for nothing; the reason.
_NO_TOOLS = "ChatGLM-6B was not trained with tools; write what it needs into a message."
_NO_GRAMMAR = "answers are plain text; ask for the form in a message."
_UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "tools": ((None, []), _NO_TOOLS),
    "tool_choice": ((None, "none", "auto"), _NO_TOOLS),
    "functions": ((None, []), _NO_TOOLS),
    "function_call": ((None, "none", "auto"), _NO_TOOLS),
    "response_format": ((None, {"type": "text"}), _NO_GRAMMAR),
    "structured_outputs": ((None,), _NO_GRAMMAR),
    "guided_json": ((None,), _NO_GRAMMAR),
    "guided_regex": ((None,), _NO_GRAMMAR),
    "guided_choice": ((None,), _NO_GRAMMAR),
    "guided_grammar": ((None,), _NO_GRAMMAR),
    "modalities": ((None, ["text"]), "answers are text."),
    "audio": ((None,), "answers are text."),
    "documents": ((None, []), "ChatGLM-6B was not trained with documents; write them into a message."),
    "suffix": ((None, ""), "ChatGLM-6B writes what comes after a prompt."),
    "echo": ((None, False), "the answer comes without its prompt."),
    "use_beam_search": ((None, False), "tokens are drawn one by one."),
    "min_p": ((None, 0, 0.0), "use top_p or top_k."),
    "chat_template": ((None,), "messages have the model's own format."),
    "continue_final_message": ((None, False), "an answer begins anew; use /v1/completions."),
    "prompt_embeds": ((None,), "prompts are texts or ids."),
}
# Taken without a word: they change nothing, or say what is done anyway.
_HARMLESS = {"add_generation_prompt", "best_of"}
MOST_CHOICES = 128
# Each is looked at for every token, so that a request may not bring any number of them.
_MOST_STOPS, _LONGEST_STOP = 16, 256
_MOST_BIASES = 300
_ID = re.compile("0|[1-9][0-9]{0,8}")


class StreamOptions(BaseModel):
    """Which numbers a stream carries."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class SamplingFields(BaseModel):
    """The fields that both kinds of completion have. What is left out has ``chat``'s value."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1, description="most new tokens")
    temperature: float | None = Field(None, ge=0, allow_inf_nan=False, description="0 takes the most likely token")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 and -1 stand for all tokens")
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = Field(None, max_length=64)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    logit_bias: dict[str, float] | None = None
    min_tokens: int | None = Field(None, ge=0)
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    @field_validator("stop")
    @classmethod
    def _short_stop(cls, stop: str | list[str] | None) -> str | list[str] | None:
        strings = [stop] if isinstance(stop, str) else stop or []
        if len(strings) > _MOST_STOPS or not all(0 < len(text) <= _LONGEST_STOP for text in strings):
            raise ValueError(
                f"stop is a text or a list of at most {_MOST_STOPS} texts, none of which is empty or has more than "
                f"{_LONGEST_STOP} characters."
            )
        return stop

    @field_validator("logit_bias")
    @classmethod
    def _known_bias(cls, biases: dict[str, float] | None) -> dict[str, float] | None:
        if len(biases or {}) > _MOST_BIASES:
            raise ValueError(f"logit_bias has {len(biases)} entries, but at most {_MOST_BIASES} are taken.")
        for token, bias in (biases or {}).items():
            if not _ID.fullmatch(token) or not -100 <= bias <= 100:
                raise ValueError("logit_bias maps ids of tokens, without leading zeros, to numbers from -100 to 100.")
        return biases

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def check(self) -> None:
        """Refuse fields that cannot be honoured; log those that are not known, in one line.

        Raises:
            ApiError: 400, with the field and the reason.
        """
        extra = self.model_extra or {}
        for name, (nothing, reason) in _UNSUPPORTED.items():
            if name in extra and not any(extra[name] == value for value in nothing):
                raise unsupported(name, reason)
        best_of = extra.get("best_of")
        if best_of not in (None, 1, self.n):
            raise unsupported("best_of", "every answer that is made is returned; use n.")
        ignored = sorted(set(extra) - _UNSUPPORTED.keys() - _HARMLESS)
        if ignored:
            _log.warning("ignored fields of a request: %s", ", ".join(ascii(name[:40])[1:-1] for name in ignored[:20]))


class Message(BaseModel):
    """One message; ``history.read_messages`` reads its content."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[dict[str, Any]] | None = None


class ChatRequest(SamplingFields):
    """The body of /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = Field(None, ge=1, description="most new tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    def check(self) -> None:
        """Refuse what ``SamplingFields.check`` does, and a number of alternatives without log-probabilities."""
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise ApiError("top_logprobs needs logprobs: true.", param="top_logprobs")

    @property
    def most_tokens(self) -> int | None:
        """The limit of new tokens, if there is one."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def reported(self) -> int | None:
        """How many alternatives to report for each token; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(SamplingFields):
    """The body of /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def most_tokens(self) -> int:
        """The limit of new tokens; OpenAI's is 16 if it is left out."""
        return self.max_tokens or 16

    @property
    def reported(self) -> int | None:
        """How many alternatives to report for each token; None for no log-probabilities."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """All prompts, of which one may be given without a list around it."""
        given = self.prompt
        is_one = isinstance(given, str) or (given and isinstance(given[0], int))
        return [given] if is_one else list(given)


class TokenizeRequest(BaseModel):
    """The body of /tokenize: a text, or messages."""

    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(BaseModel):
    """The body of /detokenize."""

    tokens: list[int]


class StockRequest(BaseModel):
    """The body of THUDM's own api.py; null stands for its default. Unlike there, a temperature of 0 is kept: greedy."""

    model_config = ConfigDict(extra="ignore")

    prompt: str
    history: list[Any] | None = None
    max_length: int | None = Field(None, ge=0, description="tokens of prompt and answer")
    top_p: float | None = Field(None, ge=0, le=1)
    temperature: float | None = Field(None, ge=0, allow_inf_nan=False)
