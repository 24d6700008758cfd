"""The interface between the engine and a model that computes many rows: what a row is asked for and what it gives."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class RowRequest:
    """A prompt and how it is answered. Nothing here depends on other rows.

    Attributes:
        ids: the prompt, with its [gMASK] <sop>.
        max_tokens: the row ends after so many tokens.
        end_ids: the row ends with one of these.
        min_tokens: none of ``end_ids`` comes before so many tokens.
        temperature: divides the scores; 0 takes the most likely token.
        top_k: draw from so many tokens; 0 for all.
        top_p: draw from the most likely tokens that reach this probability together.
        seed: with a token's index in the answer, the key of its random number, so that neighbours do not matter.
        repetition_penalty: divides positive scores and multiplies negative ones of tokens in prompt and answer.
        presence_penalty: is subtracted from the scores of tokens in the answer.
        frequency_penalty: is subtracted as often as the token is in the answer.
        logit_bias: pairs of an id and what is added to its score.
        top_logprobs: report the log-probability of each token and of so many others; None reports nothing.
    """

    ids: tuple[int, ...]
    max_tokens: int
    end_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_logprobs: int | None = None


@dataclass(frozen=True)
class NewRow:
    """A row that begins: its place in the batch, the pages of its keys and values, and what it is asked for."""

    row: int
    pages: tuple[int, ...]
    request: RowRequest


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities of the model itself, before penalties and temperature.

    Attributes:
        chosen: that of the token.
        top: (id, log-probability) of the most likely tokens, the most likely first.
    """

    chosen: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class RowToken:
    """The next token of a row.

    Attributes:
        end: "stop" if the token is one of ``end_ids``, "length" if it is the last that the request allows, else "".
            Such a row computes nothing more, and keeps its place until it is stopped.
    """

    row: int
    token: int
    end: str = ""
    logprobs: Logprobs | None = None


@dataclass(frozen=True)
class RowFailure:
    """A row that cannot go on; the others can. It keeps its place until it is stopped."""

    row: int
    error: Exception


class Rows(Protocol):
    """A model with places for rows; one thread calls it.

    Results may be those of the last call or of the one before: an implementation may queue a step before it reads the
    previous one. Whatever it has queued for a row that was stopped is never returned, also not for a row that begins in
    the same place.
    """

    rows: int
    """Places for rows."""
    pages: int
    """Pages of keys and values."""
    page_tokens: int
    """Tokens in a page."""

    def turn(self) -> AbstractContextManager:
        """Have the model to oneself. ``start`` and ``step`` are called within, and other threads take turns between."""

    def start(self, new: Sequence[NewRow]) -> list[RowToken | RowFailure]:
        """Read the prompts of new rows; return the tokens that are known by now.

        Raises:
            Exception: none of these rows has begun.
        """

    def step(self) -> list[RowToken | RowFailure]:
        """Compute the next token, or several, of every row that has not ended; return those that are known by now.

        Those of one row come in order.

        Raises:
            Exception: no row can go on. All must be stopped.
        """

    def stop(self, row: int) -> None:
        """Free the place of a row, whether it has ended or not, or could not begin; called in a turn or between two."""
