"""The engine over rows that are scripted: everybody gets the whole of their own answer, once."""

import asyncio
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from property_profiles import examples
from scripted_rows import ScriptedRows, scripted_answer

from faster_chatglm_6b.serving.engine import Engine, EngineClosed, EngineFailed
from faster_chatglm_6b.serving.rows.interface import RowRequest


class Caller:
    """One request, and all that was received for it."""

    def __init__(self, engine, request):
        self.request, self.tokens, self.ends, self.error = request, [], [], None
        self.done = asyncio.Event()
        self.job = engine.submit(request, self.receive)

    def receive(self, news):
        assert not self.ends, "news after the end"
        self.tokens += [token.token for token in news.tokens]
        if news.end:
            self.ends.append(news.end)
            self.error = news.error
            self.done.set()

    @property
    def is_whole(self) -> bool:
        answer = scripted_answer(self.request)
        return self.tokens == answer and self.ends == ["stop" if answer[-1] in self.request.end_ids else "length"]


def run(test, rows):
    """Run a coroutine with an engine over the rows; check that everything is free at the end."""

    async def whole():
        engine = Engine(rows)
        try:
            await asyncio.wait_for(test(engine), 30)
            assert (engine.running, engine.waiting, engine.pages_used, rows.occupied) == (0, 0, 0, 0)
        finally:
            await asyncio.to_thread(engine.close)
        assert rows.faults == []

    asyncio.run(whole())


REQUESTS = st.lists(
    st.tuples(
        st.integers(1, 40),  # prompt
        st.integers(1, 30),  # answer
        st.integers(0, 3),  # seed
        st.booleans(),  # whether tokens may end it
        st.sampled_from([0, 0, 0, 0.001, 0.003]),  # seconds before it comes
        st.sampled_from([None, None, None, 0, 0.002]),  # seconds after which it is cancelled
        st.booleans(),  # whether it fails
    ),
    max_size=12,
)


@examples(40, 1000)
@given(REQUESTS, st.booleans(), st.integers(1, 4), st.integers(5, 20), st.sampled_from([1, 4]))
def test_each_request_ends_once_with_its_own_answer(asked, lag, places, pages, burst):
    def fails(request, index):
        return ValueError("as asked") if request.min_tokens == 7 and index == request.max_tokens // 2 else None

    rows = ScriptedRows(places, pages, 16, lag=lag, burst=burst, fails=fails)

    async def test(engine):
        async def one(number, prompt, answer, seed, ends, delay, cancel_after, is_failing):
            await asyncio.sleep(delay)
            end_ids = tuple(range(60, 260)) if ends else ()
            request = RowRequest((number,) * prompt, answer, end_ids, 7 if is_failing else 0, seed=seed)
            caller = Caller(engine, request)
            if cancel_after is not None:
                await asyncio.sleep(cancel_after)
                engine.cancel(caller.job)
                engine.cancel(caller.job)
            await caller.done.wait()
            (end,) = caller.ends
            expected = scripted_answer(request)
            if end == "error":
                assert is_failing or prompt + answer > pages * 16
            elif end == "abort":
                assert cancel_after is not None
            else:
                assert caller.is_whole
            assert caller.tokens == expected[: len(caller.tokens)]

        await asyncio.gather(*(one(number, *fields) for number, fields in enumerate(asked)))

    run(test, rows)


@pytest.mark.parametrize("lag", [False, True])
def test_rows_join_at_any_step(lag):
    rows = ScriptedRows(8, 64, lag=lag, pause=0.001)

    async def test(engine):
        callers = []
        for number in range(12):
            callers.append(Caller(engine, RowRequest((number, 1, 2), 30)))
            await asyncio.sleep(0.004)
        await asyncio.gather(*(caller.done.wait() for caller in callers))
        assert all(caller.is_whole for caller in callers)
        assert [request.ids[0] for request in rows.started] == list(range(12))

    run(test, rows)
    assert rows.steps < 12 * 30


def test_prompts_of_one_turn_keep_to_the_budget():
    starts = []
    rows = ScriptedRows(8, 2000, 64)
    rows.raise_in_start = lambda new: starts.append([len(one.request.ids) for one in new])

    async def test(engine):
        lengths = (1500, 500, 500, 3000, 100)
        callers = [Caller(engine, RowRequest((1,) * length, 3)) for length in lengths]
        await asyncio.gather(*(caller.done.wait() for caller in callers))

    run(test, rows)
    assert sum(starts, []) == [1500, 500, 500, 3000, 100]
    assert all(sum(lengths) <= 2048 or len(lengths) == 1 for lengths in starts)


@pytest.mark.parametrize("lag", [False, True])
def test_a_start_that_raises_ends_only_the_one_at_fault(lag):
    rows = ScriptedRows(8, 64, lag=lag)
    rows.raise_in_start = lambda new: ValueError("bad") if any(one.request.seed == 13 for one in new) else None

    async def test(engine):
        callers = [Caller(engine, RowRequest((number,), 5, seed=13 if number == 2 else 0)) for number in range(5)]
        await asyncio.gather(*(caller.done.wait() for caller in callers))
        assert [caller.is_whole for caller in callers] == [True, True, False, True, True]
        assert callers[2].ends == ["error"] and str(callers[2].error) == "bad"

    run(test, rows)


def test_a_step_that_raises_ends_what_runs_and_nothing_else():
    rows = ScriptedRows(2, 64, pause=0.002)
    failures = [RuntimeError("the device is gone")]
    rows.raise_in_step = lambda: failures.pop() if failures and rows.steps == 3 else None

    async def test(engine):
        callers = [Caller(engine, RowRequest((number,), 9)) for number in range(5)]
        await asyncio.gather(*(caller.done.wait() for caller in callers))
        assert sum(caller.ends == ["error"] for caller in callers) == 2
        assert [caller.is_whole for caller in callers] == [False, False, True, True, True]

    run(test, rows)


def run_to_failure(rows, requests, prepare=lambda engine: None):
    """Submit requests to an engine that fails, all of them before its first turn; return them when all have ended."""

    async def test():
        engine = Engine(rows)
        prepare(engine)
        with engine._wake:
            callers = [Caller(engine, request) for request in requests]
        await asyncio.wait_for(asyncio.gather(*(caller.done.wait() for caller in callers)), 20)
        assert all(len(caller.ends) == 1 for caller in callers)
        assert not engine.is_alive and rows.faults == [] and rows.occupied == 0
        with pytest.raises(EngineClosed):
            engine.submit(RowRequest((1,), 1), lambda news: None)
        return callers

    return asyncio.run(test())


@pytest.mark.parametrize("lag", [False, True])
def test_an_answer_that_ended_in_a_turn_that_fails_is_handed_out(lag):
    rows = ScriptedRows(2, 64, lag=lag)
    rows.raise_on_exit = lambda: OSError("the lock is gone") if rows.steps == 4 else None
    short, long, waiting = run_to_failure(
        rows, [RowRequest((n,), most) for n, most in enumerate((4 if lag else 5, 50, 9))]
    )
    assert short.is_whole
    assert long.ends == waiting.ends == ["error"] and long.tokens == scripted_answer(long.request)[: len(long.tokens)]
    assert len(long.tokens) == len(short.tokens) and waiting.tokens == []
    for caller in (long, waiting):
        assert isinstance(caller.error, EngineFailed) and "the lock is gone" in str(caller.error)
        assert isinstance(caller.error.__cause__, OSError)


def test_orders_that_were_taken_when_it_failed_end_too():
    def prepare(engine):
        submit = engine._scheduler.submit

        def fails(job, prompt, answer):
            if job.request.seed == 13:
                raise KeyError("a bug")
            submit(job, prompt, answer)

        engine._scheduler.submit = fails

    callers = run_to_failure(
        ScriptedRows(1, 64), [RowRequest((n,), 5, seed=13 if n == 1 else 0) for n in range(4)], prepare
    )
    assert all(caller.ends == ["error"] and isinstance(caller.error, EngineFailed) for caller in callers)


def test_a_row_that_cannot_be_stopped_has_ended():
    rows = ScriptedRows(2, 64)
    stop = rows.stop

    def fails(row):
        stop(row)
        raise OSError("no")

    rows.stop = fails
    short, long = run_to_failure(rows, [RowRequest((1,), 3), RowRequest((2,), 50)])
    assert short.is_whole and long.ends == ["error"]


def test_a_cancelled_row_is_free_within_four_steps():
    rows = ScriptedRows(1, 64, pause=0.005)

    async def test(engine):
        caller = Caller(engine, RowRequest((1,), 500))
        while rows.steps < 5:
            await asyncio.sleep(0.001)
        engine.cancel(caller.job)
        at = rows.steps
        await caller.done.wait()
        assert caller.ends == ["abort"] and rows.steps - at <= 4
        second = Caller(engine, RowRequest((2,), 3))
        await second.done.wait()
        assert second.is_whole

    run(test, rows)


def test_one_wake_up_of_the_loop_per_step():
    rows = ScriptedRows(16, 64, pause=0.002)
    wake_ups = 0

    async def test(engine):
        nonlocal wake_ups
        loop = asyncio.get_running_loop()
        call = loop.call_soon_threadsafe

        def counted(*arguments):
            nonlocal wake_ups
            wake_ups += threading.current_thread().name == "engine"
            return call(*arguments)

        loop.call_soon_threadsafe = counted
        callers = [Caller(engine, RowRequest((number,), 20)) for number in range(16)]
        await asyncio.gather(*(caller.done.wait() for caller in callers))

    run(test, rows)
    assert wake_ups <= rows.steps + 2


def test_a_receiver_that_fails_ends_nothing():
    async def test(engine):
        def receive(news):
            raise ValueError("a bug")

        engine.submit(RowRequest((1,), 5), receive)
        caller = Caller(engine, RowRequest((2,), 8))
        await caller.done.wait()
        assert caller.is_whole

    run(test, ScriptedRows(2, 64))


def test_what_can_never_fit_is_an_error_at_once():
    async def test(engine):
        with pytest.raises(ValueError, match="memory for 160 tokens"):
            engine.check(RowRequest((1,) * 100, 61))
        engine.check(RowRequest((1,) * 100, 60))
        caller = Caller(engine, RowRequest((1,) * 100, 61))
        await caller.done.wait()
        assert caller.ends == ["error"] and "do not fit" in str(caller.error)

    run(test, ScriptedRows(2, 10, 16))


def test_closing_ends_everybody():
    rows = ScriptedRows(1, 64, pause=0.005)

    async def test():
        engine = Engine(rows)
        callers = [Caller(engine, RowRequest((number,), 500)) for number in range(3)]
        while rows.steps < 2:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(engine.close)
        await asyncio.gather(*(caller.done.wait() for caller in callers))
        assert all(isinstance(caller.error, EngineClosed) for caller in callers) and not engine.is_alive
        assert rows.occupied == 0 and rows.faults == []
        with pytest.raises(EngineClosed):
            engine.submit(RowRequest((1,), 1), lambda news: None)
        engine.cancel(callers[0].job)

    asyncio.run(test())


def test_a_loop_that_was_closed_frees_its_rows():
    rows = ScriptedRows(1, 64, pause=0.002)
    engine = Engine(rows)

    async def leave():
        engine.submit(RowRequest((1,), 500), lambda news: None)
        while not rows.steps:
            await asyncio.sleep(0.001)

    asyncio.run(leave())
    end = time.monotonic() + 10
    while engine.running and time.monotonic() < end:
        time.sleep(0.002)
    steps = rows.steps
    engine.close()
    assert steps < 400 and rows.occupied == 0
