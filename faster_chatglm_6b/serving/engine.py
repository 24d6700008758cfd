"""Run the rows: one thread admits requests, reads their prompts, steps, and hands out tokens once per step."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from .rows.interface import NewRow, RowFailure, RowRequest, Rows, RowToken
from .scheduler import Scheduler

_log = logging.getLogger("faster_chatglm_6b.serving")
# The engine's thread queues the next step while the GPU computes this one. Python's own 5 ms, for which a busy event
# loop may keep the interpreter, are as long as a step.
_SWITCH_INTERVAL = 0.0005


class EngineClosed(RuntimeError):
    """The engine was closed before the request had ended."""


class EngineFailed(RuntimeError):
    """The engine itself has failed, not the request; the cause says how. It serves no more requests."""


@dataclass
class News:
    """What one step brought for one request.

    Attributes:
        tokens: further tokens of the answer, in order.
        end: "stop", "length", "abort" or "error" if the request has ended, else "".
        error: the reason of "error".
        at: when the step was read, in seconds of ``time.monotonic``.
    """

    tokens: list[RowToken] = field(default_factory=list)
    end: str = ""
    error: Exception | None = None
    at: float = 0.0


class Loop(Protocol):
    """What the engine needs of an event loop."""

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any) -> object:
        """Call back soon, in the loop's own thread; RuntimeError if the loop was closed."""


@dataclass(eq=False)
class Job:
    """A request on its way through the engine. Times are seconds of ``time.monotonic``, 0 until known."""

    request: RowRequest
    receive: Callable[[News], None]
    loop: Loop
    submitted: float = 0.0
    started: float = 0.0


class Engine:
    """Owner of the model's rows. ``submit`` and ``cancel`` may be called from any thread.

    Each job's ``receive`` is called in its event loop, once per step that brings something, the last time with an
    ``end``; there is one wake-up of the loop per step, whatever the number of rows.

    Attributes:
        steps: steps since the beginning.
    """

    def __init__(self, rows: Rows, prompt_tokens: int = 2048):
        self._rows = rows
        self._scheduler = Scheduler(rows.rows, rows.pages, rows.page_tokens, prompt_tokens)
        self._wake = threading.Condition()
        self._orders: deque[tuple[str, Job]] = deque()
        self._closing = False
        self._at_row: dict[int, Job] = {}
        self._open: set[Job] = set()
        self._news: dict[Job, News] = {}  # of this turn; whatever fails in it, they are handed out
        self.steps = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """The number of rows that run."""
        return self._scheduler.running

    @property
    def waiting(self) -> int:
        """The number of submitted requests that wait."""
        with self._wake:
            ordered = sum(what == "submit" for what, _ in self._orders)
        return self._scheduler.waiting + ordered

    @property
    def pages_used(self) -> float:
        """The share of pages that requests hold."""
        return 1 - self._scheduler.free_pages / self._scheduler.pages

    @property
    def is_alive(self) -> bool:
        """Whether requests are served."""
        return self._thread.is_alive() and not self._closing

    def check(self, request: RowRequest) -> None:
        """Refuse what could never run.

        Raises:
            ValueError: all pages together could not hold it.
        """
        most = self._scheduler.pages * self._scheduler.page_tokens
        if len(request.ids) + request.max_tokens > most:
            raise ValueError(
                f"A prompt of {len(request.ids)} tokens and an answer of {request.max_tokens} do not fit into this "
                f"server's memory for {most} tokens; shorten the prompt or lower max_tokens."
            )

    def submit(self, request: RowRequest, receive: Callable[[News], None], loop: Loop | None = None) -> Job:
        """Queue a request.

        Args:
            loop: where ``receive`` is called; the running event loop if left out.

        Raises:
            EngineClosed: the engine takes no more requests.
        """
        job = Job(request, receive, loop or asyncio.get_running_loop(), submitted=time.monotonic())
        self._order("submit", job)
        return job

    def cancel(self, job: Job) -> None:
        """End a request at the next step, or do nothing if it has ended. It receives an "abort"."""
        try:
            self._order("cancel", job)
        except EngineClosed:
            return

    def close(self, seconds: float = 10.0) -> None:
        """End all requests with an error and stop the thread, after its step."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(seconds)

    def _order(self, what: str, job: Job) -> None:
        with self._wake:
            if not self.is_alive:
                raise EngineClosed("The server takes no more requests.")
            self._orders.append((what, job))
            self._wake.notify()

    def _run(self) -> None:
        sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_INTERVAL))
        try:
            while self._has_work():
                self._turn()
            error: Exception = EngineClosed("The server is shutting down.")
        except Exception as failure:
            _log.exception("The engine has failed and serves no more requests.")
            error = EngineFailed(f"The engine has failed: {type(failure).__name__}: {failure}")
            error.__cause__ = failure
        self._closing = True
        self._take_orders()
        for row in [*self._at_row]:
            try:
                self._rows.stop(row)
            except Exception:
                _log.exception("A row could not be stopped.")
        for job in self._open:
            self._tell_end(job, "error", error)
        self._hand_out()

    def _has_work(self) -> bool:
        with self._wake:
            while not (self._closing or self._orders or self._open):
                self._wake.wait()
            return not self._closing

    def _turn(self) -> None:
        """Take orders, begin what fits, and step."""
        for what, job in self._take_orders():
            (self._take if what == "submit" else self._abort)(job)
        new = self._admitted()
        if self._at_row:
            with self._rows.turn():
                if new:
                    self._read(self._start(new))
                if self._at_row:
                    self._read(self._step())
            self.steps += 1
        self._hand_out()

    def _take_orders(self) -> list[tuple[str, Job]]:
        """Empty the queue. From here on its requests are open, so that a failure ends them too."""
        with self._wake:
            orders = [*self._orders]
            self._orders.clear()
            self._open.update(job for what, job in orders if what == "submit")
        return orders

    def _take(self, job: Job) -> None:
        try:
            self._scheduler.submit(job, len(job.request.ids), job.request.max_tokens)
        except ValueError as error:
            self._open.discard(job)
            self._tell_end(job, "error", error)

    def _abort(self, job: Job) -> None:
        if job in self._open:
            self._end(job, "abort")

    def _admitted(self) -> list[NewRow]:
        seats = self._scheduler.admit()
        for seat in seats:
            seat.key.started = time.monotonic()
            self._at_row[seat.row] = seat.key
        return [NewRow(seat.row, seat.pages, seat.key.request) for seat in seats]

    def _start(self, new: list[NewRow]) -> Iterable[RowToken | RowFailure]:
        try:
            return self._rows.start(new)
        except Exception as error:
            if len(new) == 1:
                return [RowFailure(new[0].row, error)]
            # None has begun: each is tried alone, so that only the one at fault ends.
            return [result for one in new for result in self._start([one])]

    def _step(self) -> Iterable[RowToken | RowFailure]:
        try:
            return self._rows.step()
        except Exception as error:
            return [RowFailure(row, error) for row in self._at_row]

    def _read(self, results: Iterable[RowToken | RowFailure]) -> None:
        for result in [*results]:
            job = self._at_row.get(result.row)
            if job is None:
                continue
            if isinstance(result, RowFailure):
                _log.error("A request has failed.", exc_info=result.error)
                self._end(job, "error", result.error)
                continue
            self._news.setdefault(job, News()).tokens.append(result)
            if result.end:
                self._end(job, result.end)

    def _end(self, job: Job, end: str, error: Exception | None = None) -> None:
        self._tell_end(job, end, error)
        self._open.discard(job)
        seat = self._scheduler.end(job)
        if seat is not None:
            del self._at_row[seat.row]
            self._rows.stop(seat.row)

    def _tell_end(self, job: Job, end: str, error: Exception | None = None) -> None:
        one = self._news.setdefault(job, News())
        one.end, one.error = end, error

    def _hand_out(self) -> None:
        """Wake each event loop once, with all that is new for it."""
        news, self._news = self._news, {}
        loops: dict[Loop, list[tuple[Job, News]]] = {}
        now = time.monotonic()
        for job, one in news.items():
            one.at = now
            loops.setdefault(job.loop, []).append((job, one))
        for loop, items in loops.items():
            try:
                loop.call_soon_threadsafe(_receive_all, items)
            except RuntimeError:  # the loop was closed: nobody waits for these any more
                for job, one in items:
                    if not one.end:
                        self._orders.append(("cancel", job))


def _receive_all(items: list[tuple[Job, News]]) -> None:
    for job, news in items:
        try:
            job.receive(news)
        except Exception:
            _log.exception("A request's receiver has failed.")
