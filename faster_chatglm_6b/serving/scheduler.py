"""Decide which requests run: first come, first served, with memory for the whole answer set aside beforehand.

It knows neither a model nor a clock. Keys and values lie in pages of a fixed number of tokens. A request is admitted
when a row is free and enough pages for its prompt and its longest answer are, so nothing that runs is ever preempted.
"""

import heapq
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass


@dataclass(frozen=True)
class Seat:
    """What an admitted request may use until it ends.

    Attributes:
        key: names the request.
        row: its place in the batch, from 0 on; the lowest one that was free.
        pages: its pages, in the order in which its tokens fill them.
    """

    key: Hashable
    row: int
    pages: tuple[int, ...]


@dataclass(frozen=True)
class _Waiting:
    prompt: int
    pages: int


class Scheduler:
    """Waiting and running requests; call from one thread.

    A request at the head of the queue waits for its pages, and those behind it wait with it: otherwise short requests
    could keep a long one out for ever.
    """

    def __init__(self, rows: int, pages: int, page_tokens: int, prompt_tokens: int = 2048):
        """Begin with everything free.

        Args:
            rows: most requests that run at once.
            pages: pages of keys and values in all.
            page_tokens: tokens that fit into a page.
            prompt_tokens: most prompt tokens that ``admit`` lets in at once. A prompt is never cut: a longer one is
                admitted alone.

        Raises:
            ValueError: a number below 1.
        """
        if min(rows, pages, page_tokens, prompt_tokens) < 1:
            raise ValueError(
                f"The scheduler needs at least one row, page, token in a page and token of prompts at once, but got "
                f"{rows}, {pages}, {page_tokens} and {prompt_tokens}."
            )
        self.rows, self.pages, self.page_tokens, self.prompt_tokens = rows, pages, page_tokens, prompt_tokens
        # A heap: a step computes the rows up to the last one that runs, so the lowest free one is taken.
        self._free_rows = list(range(rows))
        self._free_pages = list(range(pages - 1, -1, -1))
        self._queue: deque[Hashable] = deque()
        self._waiting: dict[Hashable, _Waiting] = {}
        self._running: dict[Hashable, Seat] = {}

    @property
    def waiting(self) -> int:
        """The number of requests that wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """The number of requests that run."""
        return len(self._running)

    @property
    def free_pages(self) -> int:
        """The number of pages that no request holds."""
        return len(self._free_pages)

    def submit(self, key: Hashable, prompt: int, answer: int) -> None:
        """Put a request at the end of the queue.

        Args:
            key: a name that no other request has.
            prompt: its tokens.
            answer: most tokens of its answer.

        Raises:
            ValueError: the name is taken, a number is below 1, or all pages together could not hold the request.
        """
        if key in self._waiting or key in self._running:
            raise ValueError(f"A request {key!r} waits or runs already; give each a name of its own.")
        if prompt < 1 or answer < 1:
            raise ValueError(
                f"A request needs a prompt and an answer of at least one token, not {prompt} and {answer}."
            )
        pages = -(-(prompt + answer) // self.page_tokens)
        if pages > self.pages:
            raise ValueError(
                f"A prompt of {prompt} tokens and an answer of {answer} do not fit into this server's memory for "
                f"{self.pages * self.page_tokens} tokens; shorten the prompt or lower max_tokens."
            )
        self._waiting[key] = _Waiting(prompt, pages)
        self._queue.append(key)

    def admit(self) -> list[Seat]:
        """Admit from the head of the queue what fits; call once between two steps of the running requests."""
        seats: list[Seat] = []
        prompt_tokens = 0
        while self._queue and self._free_rows:
            asked = self._waiting[self._queue[0]]
            prompt_tokens += asked.prompt
            if asked.pages > len(self._free_pages) or (seats and prompt_tokens > self.prompt_tokens):
                break
            key = self._queue.popleft()
            del self._waiting[key]
            pages = tuple(self._free_pages.pop() for _ in range(asked.pages))
            seats.append(Seat(key, heapq.heappop(self._free_rows), pages))
            self._running[key] = seats[-1]
        return seats

    def end(self, key: Hashable) -> Seat | None:
        """End a request, whether it runs or waits, and free what it holds.

        Returns:
            its seat if it ran, else None.

        Raises:
            KeyError: there is no such request.
        """
        seat = self._running.pop(key, None)
        if seat is None:
            del self._waiting[key]
            self._queue.remove(key)
            return None
        heapq.heappush(self._free_rows, seat.row)
        self._free_pages.extend(reversed(seat.pages))
        return seat
