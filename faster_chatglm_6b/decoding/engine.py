"""Keep the captured loop's sessions of a model between calls, for one request at a time."""

import threading
from collections import OrderedDict
from typing import Any

from ..ops.steps import step_kernels
from .early import Whereabouts
from .memory import cache_bytes, shown
from .refusal import CannotServe, check_sizes, too_little_for_the_loop
from .session import Session, capacity_for, rows_for
from .shortage import is_out_of_memory

# Sessions of several batch sizes are kept as long as they are few and their caches together fit in this.
_MOST_IDLE_BYTES = 2 << 30
_MOST_SESSIONS = 4


class DecodeEngine:
    """Owner of a model's sessions: one request runs at a time, and others wait.

    A thread that would wait for itself gets an error. The engine is no part of the model's state: copies and pickles
    of the model start with an empty one.
    """

    def __init__(self) -> None:
        # Held by the running request. Requests take it only by ``with``, so that no interrupt leaves it taken.
        self.lock = threading.Lock()
        self._owner: int | None = None
        self._key: tuple | None = None
        self._sessions: OrderedDict[int, Session] = OrderedDict()
        self._whereabouts: Whereabouts | None = None
        self._release_when_free = False

    def __deepcopy__(self, memo: dict) -> "DecodeEngine":
        return DecodeEngine()

    def __reduce__(self) -> tuple:
        return DecodeEngine, ()

    def refuse_own_thread(self) -> None:
        """Refuse a thread that would wait for its own request; call before waiting for the lock.

        Raises:
            CannotServe: this thread has a stream open that is neither finished nor closed.
        """
        if self.lock.locked() and self._owner == threading.get_ident():
            raise CannotServe("another stream of this thread is open on the model")

    def touch(self) -> None:
        """Note that the calling thread continues the request: any thread may advance a generator."""
        self._owner = threading.get_ident()

    def end(self) -> None:
        """End the request; call with the lock held."""
        self._owner = None
        if self._release_when_free:
            self._drop()

    def give_up_sessions(self) -> None:
        """Drop all sessions after this request: a step was left half done, or memory ran out."""
        self._release_when_free = True

    def start_over(self) -> None:
        """Drop all sessions at once, and keep those made from now on; call with the lock held."""
        self._drop()

    def release(self) -> None:
        """Release all caches and graphs, now or when the running request ends."""
        self._release_when_free = True
        if self.lock.acquire(blocking=False):
            try:
                self._drop()
            finally:
                self.lock.release()

    def _drop(self) -> None:
        while self._sessions:
            self._forget(next(iter(self._sessions)))
        self._release_when_free = False

    def session(self, model: Any, key: tuple, batch: int, tokens: int) -> Session:
        """Return a session for ``batch`` sequences of up to ``tokens`` cached ids and prefix keys.

        Call with the lock held.

        Args:
            key: where the weights lie, from ``check_model``; another key drops all sessions.

        Raises:
            CannotServe: the weights do not fit the kernels' buffers, or memory is too short for the cache.
        """
        if key != self._key:
            self._drop()
            check_sizes(model)
            self._key, self._whereabouts = key, None
        if self._whereabouts is None:
            self._whereabouts = Whereabouts(model)
        # The previous session gets no name here: a name would hold its cache while the new one is made.
        for rows in (_rows_for(model, batch), batch):
            if rows in self._sessions and self._sessions[rows].capacity >= tokens:
                self._sessions.move_to_end(rows)
                return self._sessions[rows]
        return self._make(model, batch, capacity_for(tokens))

    def prepared(self, batch: int) -> Session | None:
        """Return the session for ``batch`` sequences if there is one whose graphs may still read the weights.

        Call with the lock held.
        """
        session = self._sessions.get(rows_for(batch)) or self._sessions.get(batch)
        if session is not None and self._whereabouts is not None and not self._whereabouts.hold():
            self._whereabouts = None
        return None if self._whereabouts is None else session

    def _make(self, model: Any, batch: int, capacity: int) -> Session:
        rows = _rows_for(model, batch)
        self._forget(rows)
        needed = cache_bytes(model, rows, capacity)
        while self._sessions and (
            len(self._sessions) >= _MOST_SESSIONS
            or needed + sum(s.bytes for s in self._sessions.values()) > _MOST_IDLE_BYTES
        ):
            self._forget(next(iter(self._sessions)))
        session = self._try_to_make(model, rows, capacity)
        if session is None and self._sessions:
            self._drop()
            session = self._try_to_make(model, rows, capacity)
        if session is None and rows > batch:
            # Without rows to spare it may fit.
            session = self._try_to_make(model, batch, capacity)
        if session is None:
            cache = f"a cache of {batch} x {capacity} tokens ({shown(cache_bytes(model, batch, capacity))})"
            raise too_little_for_the_loop(model, cache, batch, 0, capacity)
        self._sessions[session.rows] = session
        return session

    @staticmethod
    def _try_to_make(model: Any, rows: int, capacity: int) -> Session | None:
        try:
            return Session(model, rows, capacity)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None

    def _forget(self, rows: int) -> None:
        session = self._sessions.pop(rows, None)
        if session is not None:
            session.wait()


def _rows_for(model: Any, batch: int) -> int:
    """Return the rows of a session of the model for ``batch`` sequences."""
    return rows_for(batch, step_kernels(model.lm_head.weight.device).CAPTURES)
