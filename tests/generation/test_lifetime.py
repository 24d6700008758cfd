"""What a generation that was refused or interrupted keeps: neither a cycle of frames nor the model's lock."""

import contextlib
import gc
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from interrupts import InterruptBefore
from release_checks import PROMPT

import faster_chatglm_6b
from faster_chatglm_6b.decoding.refusal import CannotServe
from faster_chatglm_6b.generation import paths


def test_a_refused_request_leaves_no_cycle(tiny_model):
    """A reason that is both raised and kept would hold its frames, and they the model and the cache."""

    def refusals():
        return sum(type(one) is CannotServe for one in gc.get_objects())

    gc.collect()
    before = refusals()
    gc.disable()
    try:
        # The captured loop knows no min_p: the request is refused where its arguments are read.
        settings = {"do_sample": True, "min_p": 0.1, "max_new_tokens": 3, "eos_token_id": None}
        assert len(list(tiny_model.stream_tokens(torch.tensor(PROMPT), **settings))) == 3
        assert any(reason.startswith("MinP") for reason in faster_chatglm_6b.status().plain_generations)
        assert refusals() == before
    finally:
        gc.enable()


@pytest.mark.parametrize("is_closed", [False, True], ids=["finished", "closed"])
def test_an_interrupt_closes_the_captured_loop(monkeypatch, is_closed):
    """KeyboardInterrupt before each line of the path in turn, and of what it calls in contextlib.

    The lock is free while the exception is still held, as interactive shells hold the last one. The call that closes is
    left out too: Python enters ``finally`` and makes that call without an interrupt between the two.
    """
    lock = threading.Lock()

    def captured_tokens(model, request):
        with lock:
            yield from range(4)

    monkeypatch.setattr(paths, "check_place", lambda model: None)
    monkeypatch.setitem(
        sys.modules, "faster_chatglm_6b.decoding.loop", SimpleNamespace(captured_tokens=captured_tokens)
    )
    model, request = SimpleNamespace(has_own_inputs=lambda: False), SimpleNamespace(do_sample=False)
    streamer = SimpleNamespace(put=lambda token: None, end=lambda: None)
    files = (paths.__file__, contextlib.__file__)

    def run_until(stop):
        """Tell whether all was done before line number ``stop`` of the run."""
        try:
            with InterruptBefore(stop, files, uncounted=("tokens.close()",)):
                tokens = paths._captured(model, request, streamer)
                assert next(tokens) == 0
                if is_closed:
                    tokens.close()
                else:
                    assert list(tokens) == [1, 2, 3]
            return True
        except KeyboardInterrupt as held:
            assert held.__traceback__ is not None and not lock.locked(), stop
            return False

    stop = 1
    while not run_until(stop):
        stop += 1
    assert stop > 5
