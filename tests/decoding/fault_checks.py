"""Checks of the captured loop when memory runs out or something interrupts it, for the interpreter and the GPU.

Each check takes a tiny golden model on its device, breaks one thing and raises ``AssertionError`` unless the model
answers rightly afterwards.
"""

import contextlib
import logging
import threading
from unittest import mock

import torch
from loop_checks import Recorder, StopAtLength, expect, prompt
from transformers import StoppingCriteria, StoppingCriteriaList

import faster_chatglm_6b
from faster_chatglm_6b.decoding import engine, loop, session
from faster_chatglm_6b.decoding.graphs import StepGraphs
from faster_chatglm_6b.decoding.session import Session

# The calls of a step are counted: with drafts there may be fewer. What fails in those is in draft_checks.py.
EXACT = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None, "speculate": 0}


class Injected(Exception):
    """An error that a test raises in the middle of something."""


def out_of_memory(*arguments, **kwargs):
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 GiB.")


def failing_at(method, call, error):
    """Let the ``call``-th call of a method of ``Session``, counted from 1, do its work and then raise."""
    original, calls = getattr(Session, method), []

    def fail(*arguments, **kwargs):
        result = original(*arguments, **kwargs)
        calls.append(1)
        if len(calls) == call:
            if callable(error):
                error()
            raise error
        return result

    return mock.patch.object(Session, method, fail)


@contextlib.contextmanager
def raises(kind):
    """Check that exactly this error comes out; yield a list that gets it."""
    caught = []
    try:
        yield caught
    except kind as error:
        caught.append(error)
    else:
        raise AssertionError(f"{kind.__name__} was lost")


@contextlib.contextmanager
def warnings_logged():
    """Yield a list that gets the library's warnings."""
    logger, messages = logging.getLogger("faster_chatglm_6b"), []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


def is_usable(model, ids, expected):
    """Check that no thread holds the model and that it answers through the captured loop."""
    outputs, short = [], {**EXACT, "max_new_tokens": 1}
    with expect(captured=2):
        worker = threading.Thread(target=lambda: outputs.append(model.generate(ids, **EXACT).tolist()))
        worker.start()
        worker.join(timeout=120)
        first = model.generate(ids, **short).tolist()
    assert outputs == [expected] and first == [expected[0][: ids.shape[1] + 1]]


def start(model):
    ids = prompt(model, 6, seed=3)
    model.release_cache()
    return ids, model.generate(ids, **EXACT).tolist()


def new_reason(before):
    after = faster_chatglm_6b.status().plain_generations
    return [why for why, count in after.items() if count != before.get(why, 0)]


def interrupt_inside_the_loop(model):
    """Check ``KeyboardInterrupt`` in the prompt, in a step and in a wait: half a step is never continued."""
    ids, expected = start(model)
    for method, call in (("begin", 1), ("advance", 2), ("_mark", 2), ("read", 2)):
        with failing_at(method, call, KeyboardInterrupt()), raises(KeyboardInterrupt):
            model.generate(ids, **EXACT)
        assert bool(loop.engine_of(model)._sessions) == (method == "read")
    stream = model.stream_tokens(ids, **EXACT)
    with failing_at("advance", 2, KeyboardInterrupt()), raises(KeyboardInterrupt):
        list(stream)
    is_usable(model, ids, expected)


def exception_in_the_callers_code(model):
    """Check that an error in a streamer, a criterion or the code around a stream leaves the next request unharmed."""
    ids, expected = start(model)

    class Streamer(Recorder):
        def put(self, value):
            super().put(value)
            if len(self.values) == 3:
                raise Injected

    class Criterion(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            if input_ids.shape[1] == ids.shape[1] + 2:
                raise Injected
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    for settings in (
        {"streamer": Streamer()},
        {"stopping_criteria": StoppingCriteriaList([Criterion()])},
    ):
        with raises(Injected) as caught:
            model.generate(ids, **EXACT, **settings)
        del caught
    with raises(Injected):
        for _ in model.stream_tokens(ids, **EXACT):
            raise Injected
    is_usable(model, ids, expected)


def out_of_memory_for_the_cache(model):
    """Check that sessions of other batch sizes go first, and then the plain path answers and ``status`` says why."""
    ids, expected = start(model)
    made, make = [], engine.Session

    def short_once(*arguments):
        made.append(arguments)
        return out_of_memory() if len(made) == 1 else make(*arguments)

    with mock.patch.object(engine, "Session", short_once), expect(captured=1):
        model.generate(ids.repeat(2, 1), **EXACT)
    assert len(made) == 2 and list(loop.engine_of(model)._sessions) == [2]
    before = faster_chatglm_6b.status().plain_generations
    with mock.patch.object(engine, "Session", out_of_memory), expect(plain=1), warnings_logged() as logged:
        assert model.generate(ids, **EXACT).tolist() == expected
    assert len(logged) == 1 and "1 x 256 tokens" in logged[0] and "the slower plain path does" in logged[0], logged
    (reason,) = new_reason(before)
    assert "not enough memory for a cache of 1 x 256 tokens" in reason
    is_usable(model, ids, expected)


def out_of_memory_for_rows_to_spare(model):
    """Check that a batch between two sizes gets its own number of rows if there is no room for the larger one."""
    ids, expected = start(model)
    made, make = [], engine.Session

    def short(model, rows, capacity):
        made.append(rows)
        return out_of_memory() if rows == 3 else make(model, rows, capacity)

    with mock.patch.object(session, "ROW_BUCKETS", (1, 3)):
        with mock.patch.object(engine, "Session", short), expect(captured=2):
            for _ in range(2):
                assert model.generate(ids.repeat(2, 1), **EXACT).tolist() == 2 * expected
        # At first without the other sessions; the second call finds the session that there is.
        assert made == [3, 3, 2] and list(loop.engine_of(model)._sessions) == [2]
        with expect(captured=2):
            assert model.generate(ids.repeat(3, 1), **EXACT).tolist() == 3 * expected
            assert model.generate(ids.repeat(2, 1), **EXACT).tolist() == 2 * expected
        assert 3 in loop.engine_of(model)._sessions


def out_of_memory_in_the_prompt(model):
    """Check that the cache is given up and the plain path answers, in ``generate`` and in a stream."""
    ids, expected = start(model)
    before = faster_chatglm_6b.status().plain_generations
    with failing_at("begin", 1, out_of_memory), expect(plain=1):
        assert model.generate(ids, **EXACT).tolist() == expected
    assert not loop.engine_of(model)._sessions
    with failing_at("begin", 1, out_of_memory), expect(plain=1):
        assert [int(token) for token in model.stream_tokens(ids, **EXACT)] == expected[0][ids.shape[1] :]
    (reason,) = new_reason(before)
    assert "not enough memory for a prompt of 1 x 6 tokens" in reason
    is_usable(model, ids, expected)


def out_of_memory_in_capture(model):
    """Check that the answer goes on uncaptured and the next request starts anew."""
    ids, expected = start(model)
    model.release_cache()
    kept = []

    def make(*arguments):
        kept.append(Session(*arguments))
        kept[-1].graphs.captures = True
        return kept[-1]

    with mock.patch.object(engine, "Session", make), mock.patch.object(StepGraphs, "_capture", out_of_memory):
        with expect(captured=1):
            assert model.generate(ids, **EXACT).tolist() == expected
    assert len(kept) == 1 and kept[0].graphs.capture_failed and not kept[0].graphs
    assert not loop.engine_of(model)._sessions
    kept.clear()
    is_usable(model, ids, expected)


def out_of_memory_in_the_middle(model):
    """Check that the error says what was asked for and nothing is kept, because tokens are out already."""
    ids, expected = start(model)
    with failing_at("advance", 4, out_of_memory), raises(torch.cuda.OutOfMemoryError) as caught:
        model.generate(ids, **EXACT)
    assert f"1 sequence of up to {6 + 5} tokens (6 of them the prompt)" in str(caught[0]), caught
    assert not loop.engine_of(model)._sessions
    stream = model.stream_tokens(ids, **EXACT)
    with failing_at("advance", 4, out_of_memory), raises(torch.cuda.OutOfMemoryError):
        list(stream)
    is_usable(model, ids, expected)


def absurd_lengths(model):
    """Check that the plain path serves lengths beyond any memory, because it takes only what it needs."""
    ids, expected = start(model)
    for tokens in (10**13, 10**18):
        stop = StoppingCriteriaList([StopAtLength(ids.shape[1], 5)])
        with expect(plain=1):
            output = model.generate(ids, **EXACT | {"max_new_tokens": tokens}, stopping_criteria=stop)
        assert output.tolist() == expected
    is_usable(model, ids, expected)


EVERYWHERE = (
    interrupt_inside_the_loop,
    exception_in_the_callers_code,
    out_of_memory_for_the_cache,
    out_of_memory_for_rows_to_spare,
    out_of_memory_in_the_prompt,
    out_of_memory_in_capture,
    out_of_memory_in_the_middle,
    absurd_lengths,
)
