"""Rows without a model: tokens follow from the request alone, and every breach of the interface is noted."""

import contextlib
import hashlib
import threading
import time

from faster_chatglm_6b.serving.rows.interface import Logprobs, RowFailure, RowToken


def scripted_token(request, index: int, vocabulary: int = 1500) -> int:
    """Return the token of a request's answer at an index; 60 and above are texts in the tiny vocabulary."""
    key = repr((request.ids, request.seed, index)).encode()
    return 60 + int.from_bytes(hashlib.sha256(key).digest()[:4], "big") % (vocabulary - 60)


def scripted_answer(request) -> list[int]:
    """Return all tokens of a request's answer."""
    tokens = []
    for index in range(request.max_tokens):
        tokens.append(scripted_token(request, index))
        if tokens[-1] in request.end_ids:
            break
    return tokens


class ScriptedRows:
    """``Rows`` that hold to the interface and watch that the engine does.

    Args:
        lag: return the tokens of a step one call later, as an implementation does that reads one step behind.
        pause: seconds that a step takes.
        burst: most tokens of a row in a step.
        fails: called with a request and an index, returns an exception to fail with, or None.
    """

    def __init__(
        self, rows=4, pages=64, page_tokens=16, lag=False, pause=0.0, burst=1, fails=lambda request, index: None
    ):
        self.rows, self.pages, self.page_tokens = rows, pages, page_tokens
        self._lag, self.pause, self._burst, self._fails = lag, pause, burst, fails
        self._running: dict[int, list] = {}
        self._pages: dict[int, tuple[int, ...]] = {}
        self._queued: list = []
        self._refused: set[int] = set()
        self._inside = False
        self._thread = None
        self.faults: list[str] = []
        self.steps = 0
        self.started: list = []
        self.raise_in_start = self.raise_in_step = self.raise_on_exit = None

    @property
    def occupied(self) -> int:
        return len(self._running)

    def _expect(self, holds: bool, fault: str) -> None:
        if not holds:
            self.faults.append(fault)

    def _called(self) -> None:
        self._thread = self._thread or threading.get_ident()
        self._expect(self._thread == threading.get_ident(), "called from two threads")

    @contextlib.contextmanager
    def turn(self):
        self._expect(not self._inside, "turns overlap")
        self._inside = True
        try:
            yield
        finally:
            self._inside = False
        if self.raise_on_exit is not None and (error := self.raise_on_exit()):
            raise error

    def start(self, new):
        self._called()
        self._expect(self._inside, "start outside of a turn")
        if self.raise_in_start is not None and (error := self.raise_in_start(new)):
            self._refused |= {one.row for one in new}
            raise error
        for one in new:
            self._expect(one.row not in self._running and 0 <= one.row < self.rows, "a row is taken twice")
            held = {page for pages in self._pages.values() for page in pages}
            self._expect(held.isdisjoint(one.pages), "a page belongs to two rows")
            room = len(one.pages) * self.page_tokens
            self._expect(len(one.request.ids) + one.request.max_tokens <= room, "too few pages")
            self._refused.discard(one.row)
            self._running[one.row] = [one.request, 0, False]
            self._pages[one.row] = one.pages
            self.started.append(one.request)
        return self._results([self._next(one.row) for one in new])

    def step(self):
        self._called()
        self._expect(self._inside, "step outside of a turn")
        self.steps += 1
        if self.pause:
            time.sleep(self.pause)
        if self.raise_in_step is not None and (error := self.raise_in_step()):
            raise error
        found = []
        for row, state in self._running.items():
            for _ in range(self._burst - state[1] % 2 if self._burst > 1 else 1):
                if not state[2]:
                    found.append(self._next(row))
        return self._results(found)

    def stop(self, row):
        self._called()
        self._expect(row in self._running or row in self._refused, "a free row is stopped")
        self._refused.discard(row)
        self._running.pop(row, None)
        self._pages.pop(row, None)
        self._queued = [result for result in self._queued if result.row != row]

    def _results(self, results):
        if not self._lag:
            return results
        before, self._queued = self._queued, results
        return before

    def _next(self, row):
        state = self._running[row]
        request, index, _ = state
        if error := self._fails(request, index):
            state[2] = True
            return RowFailure(row, error)
        token = scripted_token(request, index)
        state[1] += 1
        end = "stop" if token in request.end_ids else "length" if state[1] == request.max_tokens else ""
        state[2] = bool(end)
        return RowToken(row, token, end, None if request.top_logprobs is None else Logprobs(-0.5, ((token, -0.5),)))
