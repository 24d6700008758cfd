"""Checks of prompts that start before their request is read, for stand-in kernels on a CPU and the GPU's alike.

Each takes a tiny golden model on its device and raises ``AssertionError``. Answers have one token: only the prompt, its
sampler and the numbers that both read have to do with an early start.
"""

import contextlib
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import torch
from loop_checks import Recorder, expect, padded, prompt

from faster_chatglm_6b.decoding import refusal, request
from faster_chatglm_6b.decoding.early import EarlyPrompt
from faster_chatglm_6b.decoding.graphs import StepGraphs
from faster_chatglm_6b.decoding.loop import engine_of
from faster_chatglm_6b.decoding.sampler import Sampler
from faster_chatglm_6b.decoding.session import Session
from faster_chatglm_6b.decoding.steps.prompt import PromptStep
from faster_chatglm_6b.ops.cpu import steps

GREEDY = {"do_sample": False, "max_new_tokens": 1, "eos_token_id": None}
SAMPLED = {"do_sample": True, "max_new_tokens": 1, "top_k": 5, "temperature": 3.0, "eos_token_id": None}


def run_prompt(self, model, ids, cache_length, most_keys):
    """Stand for ``PromptStep.run``: compute the logits from the placed ids and the numbers on the device."""
    numbers, batch, length = self._numbers, len(ids), int(self._numbers["last_row"]) + 1
    assert cache_length[:batch].tolist() == [length - 1] * batch
    assert numbers["finished"].tolist() == [0] * batch + [1] * (self._decode.batch - batch)
    real = torch.arange(length) >= numbers["first_key"][:batch, None]
    self._decode.logits.fill_(float("nan"))
    self._decode.logits[:batch] = model(ids[:, :length], attention_mask=real.long()).logits[:, -1]
    return self._decode.logits


def choose(self, plan, logits, state, workspace):
    """Stand for ``Sampler.run``: choose by the seed among the ``top_k`` best, in numbers on the device."""
    assert state.ids_length.tolist() == [int(state.ids_length[0])] * len(logits)
    count = 1 if plan.kernel == "greedy" else int(self._numbers["top_k"][0])
    state.ring[int(state.turn) % len(state.ring)] = logits.topk(count).indices[:, int(state.seed[0]) % count]


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """Let the captured loop serve on a CPU, with graphs that run their step again."""

    def make(self, *arguments, init=StepGraphs.__init__):
        init(self, *arguments)
        self.captures = True

    def capture(self, step, counter):
        return SimpleNamespace(replay=step)

    with (
        mock.patch.object(refusal, "steps_refusal", lambda device, dtype: None),
        mock.patch.object(steps, "CAPTURES", True),
        mock.patch.object(StepGraphs, "__init__", make),
        mock.patch.object(StepGraphs, "_capture", capture),
        mock.patch.object(PromptStep, "run", run_prompt),
        mock.patch.object(Sampler, "run", choose),
        # What drafts is a kernel of its own, without a stand-in.
        mock.patch.object(request, "SPECULATE_DEFAULT", 0),
    ):
        yield


@contextlib.contextmanager
def watched() -> Iterator[SimpleNamespace]:
    """Yield what early starts come to: an entry for each prompt that was offered and each request that began.

    ``started`` tells which prompts started early, and ``found`` which requests found theirs.
    """
    seen = SimpleNamespace(started=[], found=[])

    def noted(method, entries):
        def note(*arguments):
            entries.append(method(*arguments))
            return entries[-1]

        return note

    with (
        mock.patch.object(EarlyPrompt, "offer", noted(EarlyPrompt.offer, seen.started)),
        mock.patch.object(EarlyPrompt, "take", noted(EarlyPrompt.take, seen.found)),
    ):
        yield seen


def never_early():
    return mock.patch.object(EarlyPrompt, "offer", lambda self, layout: False)


def warm(model, ids, seen):
    """Serve requests of this size until their prompts start early, and forget what was seen."""
    for _ in range(4):
        model.generate(ids, **GREEDY)
    assert seen.found[-1]
    seen.started.clear()
    seen.found.clear()


def answers_are_the_same(model):
    """Check greedy and sampled answers, padded batches, ids on the CPU and streamers."""
    alone, batch = prompt(model, 6), padded(model, (4, 7))
    asked = [
        ({"input_ids": alone}, GREEDY),
        ({"input_ids": prompt(model, 15, seed=1)}, {**GREEDY, "repetition_penalty": 1.4}),
        ({"input_ids": prompt(model, 5, seed=2).cpu()}, SAMPLED),
        ({"input_ids": prompt(model, 7, seed=3)}, SAMPLED),
        (batch, GREEDY),
        (padded(model, (9, 5), seed=4), SAMPLED),
    ]

    def answer(number):
        inputs, settings = asked[number]
        torch.manual_seed(number)
        recorder = Recorder() if len(inputs["input_ids"]) == 1 else None
        ids = model.generate(**inputs, **settings, streamer=recorder).tolist()
        return ids, None if recorder is None else recorder.values

    with never_early():
        expected = [answer(number) for number in range(len(asked))]
    with watched() as seen:
        for inputs in (alone, batch["input_ids"], asked[1][0]["input_ids"]):
            warm(model, inputs, seen)
        with expect(captured=len(asked)):
            assert [answer(number) for number in range(len(asked))] == expected
        assert seen.started == seen.found == [True] * len(asked)
        # Nothing is computed before the first token of a stream is asked for.
        stream = model.stream_tokens(alone, **GREEDY)
        assert len(seen.started) == len(asked)
        assert [token.tolist() for token in stream] == [[expected[0][0][0][-1]]] and seen.found[-1] is False
        model.generate(alone, **GREEDY)
        assert seen.found[-1] is True


def unused_prompts(model):
    """Check that errors, refusals and other searches leave nothing, and only the first of them starts a prompt."""
    ids, other = prompt(model, 6), prompt(model, 7, seed=4)
    expected = model.generate(other, **GREEDY).tolist()
    ways = [
        {"return_dict_in_generate": True},
        {"num_beams": 2},
        {"use_cache": False},
        {"num_return_sequences": 2, "do_sample": True, "top_k": 5},
    ]
    with watched() as seen:
        for way in ways:
            warm(model, ids, seen)
            for _ in range(3):
                model.generate(ids, **{**GREEDY, **way})
            assert seen.started.count(True) == 1 and not any(seen.found), (way, seen)
            for _ in range(4):
                assert model.generate(other, **GREEDY).tolist() == expected
            assert seen.found[-1], (way, seen)
        for way in ({"temprature": 1}, {"num_beams": 2, "num_return_sequences": 3}):
            warm(model, ids, seen)
            with never_early():
                wanted = error_of(model, ids, way)
            assert error_of(model, ids, way) == wanted and seen.started == [True] and seen.found == []
            assert not engine_of(model).lock.locked()
            assert model.generate(other, **GREEDY).tolist() == expected and seen.found == [False]


def error_of(model, ids, settings):
    try:
        model.generate(ids, **{**GREEDY, **settings})
    except ValueError as error:
        return str(error)
    raise AssertionError(f"{settings} were accepted")


class Between(Recorder):
    """Let another thread do something while transformers hands the prompt to the streamer."""

    def __init__(self, act):
        super().__init__()
        self.act = act

    def put(self, value):
        if not self.values:
            worker = threading.Thread(target=self.act)
            worker.start()
            worker.join(timeout=60)
            assert not worker.is_alive()
        super().put(value)


def another_request_comes_between(model):
    """Check that another thread's request, or its end of all sessions, changes no answer."""
    ids, other = prompt(model, 6), prompt(model, 7, seed=4)
    expected = [model.generate(one, **GREEDY).tolist() for one in (ids, other)]
    answers = []
    acts = (lambda: answers.append(model.generate(other, **GREEDY).tolist()), model.release_cache)
    with watched() as seen:
        for act in acts:
            warm(model, ids, seen)
            assert model.generate(ids, **GREEDY, streamer=Between(act)).tolist() == expected[0]
            # The other thread's prompt does not start over the first one.
            assert seen.started.count(True) == 1 and not any(seen.found)
    assert answers == expected[1:]


def threads(model):
    """Check the answers of threads whose prompts start early in any order."""
    ids = [prompt(model, 4 + number, seed=number) for number in range(3)]
    expected = [model.generate(one, **GREEDY).tolist() for one in ids]
    answers = [[], [], []]

    def run(number):
        for _ in range(5):
            answers[number].append(model.generate(ids[number], **GREEDY).tolist())

    with expect(captured=15):
        workers = [threading.Thread(target=run, args=(number,)) for number in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(timeout=60)
    assert answers == [[one] * 5 for one in expected]


def an_open_stream(model):
    """Check that no prompt starts while a stream holds the model."""
    ids = prompt(model, 6)
    with watched() as seen:
        warm(model, ids, seen)
        stream = model.stream_tokens(ids, **{**GREEDY, "max_new_tokens": 2})
        next(stream)
        seen.started.clear()
        with expect(plain=1):
            model.generate(ids, **GREEDY)
        assert seen.started == []
        stream.close()


def moved_weights(model):
    """Check that no graph starts early after a weight moved, and that it does again after the next requests."""
    ids, norm = prompt(model, 6), model.transformer.final_layernorm
    kept = norm.weight.data
    before = model.generate(ids, **GREEDY).tolist()
    with watched() as seen:
        warm(model, ids, seen)
        norm.weight.data = kept.clone()
        try:
            assert model.generate(ids, **GREEDY).tolist() == before
            assert seen.started == [] and seen.found == [False]
            warm(model, ids, seen)
        finally:
            norm.weight.data = kept
        warm(model, ids, seen)
        # A new parameter on the same memory is another object, which the next request makes known.
        norm.weight = torch.nn.Parameter(kept)
        assert model.generate(ids, **GREEDY).tolist() == before
        assert seen.started == []
        warm(model, ids, seen)


def memory_runs_out_early(model):
    """Check that a start without enough memory ends the session, and that the request is served all the same."""
    ids = prompt(model, 6)
    expected = model.generate(ids, **GREEDY).tolist()
    place, calls = Session._place, []

    def short_once(*arguments):
        calls.append(1)
        if len(calls) == 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return place(*arguments)

    with watched() as seen:
        warm(model, ids, seen)
        session = engine_of(model)._sessions[1]
        with mock.patch.object(Session, "_place", short_once), expect(captured=1):
            assert model.generate(ids, **GREEDY).tolist() == expected
        assert engine_of(model)._sessions[1] is not session and len(calls) == 2


EVERYWHERE = (
    answers_are_the_same,
    unused_prompts,
    another_request_comes_between,
    threads,
    moved_weights,
    memory_runs_out_early,
)
# Answers of more than one token need the decode step's kernels.
ON_A_GPU = (*EVERYWHERE, an_open_stream)
