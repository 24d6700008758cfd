"""Answer thousands of prompts without a server: the same engine, read from a queue."""

from __future__ import annotations

import itertools
import queue
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .defaults import end_ids, sampling_defaults, seed_of
from .engine import Engine, EngineClosed, EngineFailed
from .generation import Answer, Asked, Piece
from .rows.interface import RowRequest, Rows
from .rows.making import make_rows
from .stop_strings import StopStrings

# Prompts that are read ahead of the rows, so that a row which becomes free is taken at once.
_AHEAD = 64


@dataclass(frozen=True)
class Finished:
    """An answer.

    Attributes:
        index: the place of its prompt.
        text: cleaned up as ``chat`` does.
        tokens: their number, the one that ended the answer included.
        end: "stop", "length" or "error".
        error: why there is no answer, if ``end`` is "error".
    """

    index: int
    text: str
    tokens: int
    end: str
    error: Exception | None = None


def answer_many(
    model: Any,
    tokenizer: Any,
    prompts: Iterable[str | Sequence[Mapping[str, Any]]],
    *,
    places: Iterable[int] | None = None,
    max_tokens: int | None = None,
    ignore_eos: bool = False,
    stop: str | Sequence[str] = (),
    seed: int = 0,
    max_rows: int = 64,
    memory: float = 0.9,
    rows: Rows | None = None,
    **sampling: float,
) -> Iterator[Finished]:
    """Yield an answer for each prompt, in the order in which they are finished.

    An answer depends on its prompt, its place and the seed, and not on what else runs. A prompt that cannot be answered
    yields its error, and the others go on. Prompts are taken as they are needed, so there may be any number of them;
    answers are yielded in between.

    Args:
        prompts: texts of users, or conversations as ``apply_chat_template`` takes them.
        places: the index of each prompt, to go on with some of a list; 0, 1, 2 and so on if left out.
        max_tokens: most new tokens of an answer; None for as many as the model's length allows.
        ignore_eos: let an answer end at its most tokens or at a stop string alone.
        stop: one string or several that end an answer and are not in it.
        max_rows, memory: most answers at once, and the share of free memory for their keys and values.
        rows: what computes them; those of ``make_rows`` if left out.
        sampling: ``temperature`` (0 takes the most likely token), ``top_p``, ``top_k``, ``repetition_penalty``,
            ``presence_penalty``, ``frequency_penalty``, ``min_tokens``; those left out have ``chat``'s values.

    Raises:
        EngineFailed: while iterating, after all answers that were finished: nothing is said about the other prompts.
        ValueError: prompts that are one text, an empty stop string, or memory for less than one prompt; nothing has
            been computed.
        TypeError: an argument that is not known.
    """
    if isinstance(prompts, (str, bytes, Mapping)):
        raise ValueError(
            "The prompts are one text, but answer_many needs a list or an iterator of prompts; call chat()."
        )
    settings = {**sampling_defaults(model), **sampling}
    RowRequest((), 1, **settings)
    stops, ends = StopStrings(stop), () if ignore_eos else end_ids(model)
    rows = rows or make_rows(model, max_rows, memory)

    def asked(index: int, prompt: str | Sequence[Mapping[str, Any]]) -> Asked:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        longest = model.config.max_sequence_length
        room = longest - len(ids)
        if room < 1:
            raise ValueError(
                f"Prompt {index} has {len(ids)} tokens, but the model takes {longest} of prompt and answer together; "
                "shorten it."
            )
        most = room if max_tokens is None else min(max_tokens, room)
        return Asked(RowRequest(tuple(ids), most, ends, seed=seed_of(seed, index), **settings), stops)

    return _Run(rows, tokenizer, asked).answers(
        zip(itertools.count() if places is None else places, prompts, strict=False)
    )


class _Run:
    """The engine, the answers under way, and those that are finished; also the event loop that the engine wakes."""

    def __init__(self, rows: Rows, tokenizer: Any, asked: Callable[[int, Any], Asked]):
        self._rows, self._tokenizer, self._asked = rows, tokenizer, asked
        self._calls: queue.SimpleQueue[tuple[Callable[..., object], tuple]] = queue.SimpleQueue()
        self._open: dict[Answer, int] = {}
        self._finished: list[Finished] = []
        self._failure: Exception | None = None

    def answers(self, prompts: Iterator[tuple[int, Any]]) -> Iterator[Finished]:
        self._engine = Engine(self._rows)
        try:
            while True:
                while self._wants_more() and (item := next(prompts, None)) is not None:
                    self._submit(*item)
                    while not self._calls.empty():
                        self._hear()
                    yield from self._take_finished()
                yield from self._take_finished()
                if not self._open:
                    break
                self._hear()
        finally:
            self._engine.close()
        if self._failure is not None:
            raise self._failure

    def _wants_more(self) -> bool:
        return self._failure is None and len(self._open) < self._rows.rows + _AHEAD

    def _hear(self) -> None:
        """Take what one step of the engine brought; wait for it if need be."""
        callback, arguments = self._calls.get()
        callback(*arguments)

    def _submit(self, index: int, prompt: Any) -> None:
        try:
            asked = self._asked(index, prompt)
        except (TypeError, ValueError) as error:
            self._finished.append(Finished(index, "", 0, "error", error))
            return
        answer = Answer(self, index, asked, self._tokenizer)
        self._open[answer] = index
        try:
            answer.job = self._engine.submit(asked.row, answer.receive, loop=self)
        except EngineClosed as error:  # it has failed just now; what it says of the others is still to be heard
            del self._open[answer]
            self._failure = error

    def _take_finished(self) -> list[Finished]:
        finished, self._finished = self._finished, []
        return finished

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any) -> None:
        self._calls.put((callback, args))

    def on_tokens(self, gap: float | None, answer: Answer, count: int) -> None:
        pass

    def stop(self, answer: Answer) -> None:
        if answer.job is not None:
            self._engine.cancel(answer.job)

    def add(self, answer: Answer, error: Exception | None) -> None:
        if not answer.end:
            return
        index = self._open.pop(answer)
        if isinstance(error, EngineFailed):
            self._failure = error
            return
        end, whole = answer.end, Piece(index)
        try:
            whole = answer.take()
        except ValueError as wrong:  # a token without text
            end, error = "error", wrong
        self._finished.append(Finished(index, whole.text, whole.count, end, error))
