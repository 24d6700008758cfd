"""Checks of when drafts begin and of what ends them: switches, interrupts and memory, for the interpreter and the GPU.

Each check takes a tiny golden model on its device and raises ``AssertionError``.
"""

from unittest import mock

import torch
from draft_checks import REPEATING, Babbler, answers, turns
from loop_checks import expect, prompt

from faster_chatglm_6b.decoding import loop, session, speculation
from faster_chatglm_6b.decoding.steps.draft import DraftStep


def interrupted_drafts(model):
    """Check that an abandoned or interrupted request with drafts leaves the next one right, with and without them."""
    ids = prompt(model, 6)
    settings = {"input_ids": ids, "do_sample": False, "max_new_tokens": 20, "eos_token_id": None}
    with Babbler(model, 6).in_place(model):
        expected = answers(model, 0, **settings)
        for stop in (1, 3):
            stream = model.stream_tokens(**settings, speculate=7)
            for _ in range(stop):
                next(stream)
            stream.close()
            assert answers(model, 7, **settings) == expected
        for name in ("run", "read", "begin"):
            model.release_cache()
            normal, calls = getattr(speculation.Speculation, name), []

            def interrupt(self, *arguments, normal=normal, calls=calls, last=1 if name == "begin" else 2):
                calls.append(1)
                if len(calls) == last:
                    raise KeyboardInterrupt
                return normal(self, *arguments)

            with mock.patch.object(speculation.Speculation, name, interrupt):
                try:
                    answers(model, 7, **settings)
                except KeyboardInterrupt:
                    pass
                else:
                    raise AssertionError(f"the interrupt in {name} was lost")
            for kind in (0, 7):
                assert answers(model, kind, **settings) == expected, name


def no_memory_for_drafts(model):
    """Check that a request goes on without drafts if there is no memory for their buffers."""
    ids = prompt(model, 6)
    settings = {"input_ids": ids, "do_sample": False, "max_new_tokens": 8, "eos_token_id": None}

    def short(*arguments):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 GiB.")

    with Babbler(model, 6).in_place(model):
        expected = answers(model, 0, **settings)
        # Nobody asked for them, so nobody may lose an answer by them.
        with mock.patch.object(session, "Speculation", short), turns() as count:
            assert answers(model, None, **settings) == expected
        with mock.patch.object(session, "Speculation", short), turns() as count:
            assert answers(model, 7, **settings) == expected
        assert not count["several"]
        with turns() as count:
            assert answers(model, 7, **settings) == expected
        assert count["several"]


def no_memory_for_a_drafted_step(model):
    """Check that an answer goes on with steps of one token if there is no memory for one of several positions."""
    seed, length = REPEATING[0]
    ids = prompt(model, length, seed)
    settings = {"input_ids": ids, "do_sample": False, "max_new_tokens": 24, "eos_token_id": None}

    def short(*arguments):
        asked.append(1)
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 GiB.")

    with Babbler(model, seed).in_place(model):
        expected = answers(model, 0, **settings)
        for kind in (7, "auto"):
            asked = []
            with mock.patch.object(DraftStep, "run", short):
                assert answers(model, kind, **settings) == expected
            # One failure is enough for the answer, and the next one has drafts again.
            assert len(asked) == 1
        with turns() as count:
            assert answers(model, "auto", **settings) == expected
        assert count["several"]


def no_memory_for_prompt_and_drafts(model):
    """Check that a prompt that leaves no room for drafts is served by the loop without them, with the same seed."""
    settings = {"input_ids": prompt(model, 6), "max_new_tokens": 8, "eos_token_id": None, "top_k": 0}
    begin, begun = session.Session.begin, []

    def short(self, model, request, seed):
        begun.append(request.draft_tokens)
        if request.draft_tokens:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 GiB.")
        return begin(self, model, request, seed)

    with Babbler(model, 6).in_place(model):
        sampled = {}
        for kind in (0, None):
            for do_sample in (True, False):
                torch.manual_seed(3)
                with mock.patch.object(session.Session, "begin", short):
                    sampled[kind, do_sample] = answers(model, kind, **settings, do_sample=do_sample)
        assert begun == [0, 0, 7, 0, 7, 0]
        assert sampled[0, True] == sampled[None, True] and sampled[0, False] == sampled[None, False]
        assert list(loop.engine_of(model)._sessions) == [1]


def drafts_by_default(model):
    """Check that drafts are looked up unless they are switched off, and cost no step until one of a row comes true."""
    seed, length = REPEATING[0]
    ids = prompt(model, length, seed)
    settings = {"input_ids": ids, "do_sample": False, "eos_token_id": None}
    drafted, run = [], DraftStep.run

    def note(self, *arguments):
        drafted.append(1)
        return run(self, *arguments)

    with Babbler(model, seed).in_place(model), mock.patch.object(DraftStep, "run", note):
        off = ({"speculate": 0}, {"prompt_lookup_num_tokens": 0})
        for given in off:
            with expect(captured=1), turns() as count:
                model.generate(**settings, max_new_tokens=3, **given)
            assert [*loop.engine_of(model)._sessions.values()][-1]._speculation is None
            assert not count["read"]
        for given in ({}, {"speculate": None}, {"speculate": "auto"}, {"prompt_lookup_num_tokens": None}):
            model.release_cache()
            with expect(captured=1), turns() as count:
                model.generate(**settings, max_new_tokens=3, **given)
            assert count["read"] == 3 and not count["several"] and not drafted, given
        with turns() as count:
            model.generate(**settings, max_new_tokens=36)
        assert count["one"] and count["several"]


EVERYWHERE = (
    drafts_by_default,
    interrupted_drafts,
    no_memory_for_drafts,
    no_memory_for_a_drafted_step,
    no_memory_for_prompt_and_drafts,
)
