"""Checks of what the captured loop keeps on a model between calls and of what it leaves to transformers' own loop.

Each takes a tiny golden model on its device and raises ``AssertionError``.
"""

import copy
import pickle
import threading
import weakref
from unittest import mock

import torch
from loop_checks import Recorder, check_equal, expect, prompt
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

import faster_chatglm_6b
from faster_chatglm_6b.decoding import loop
from faster_chatglm_6b.decoding.session import Session


def abandoned_streams(model):
    """Check that a dropped or closed stream leaves the model usable; an open one sends this thread's calls plain."""
    ids = prompt(model, 7, seed=5)
    settings = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None}
    expected = check_equal(model, input_ids=ids, max_new_tokens=5, eos_token_id=None)
    stream = model.stream_tokens(ids, **settings)
    first = next(stream)
    assert int(first[0]) == expected[0][7]
    with expect(plain=1):
        assert model.generate(ids, **settings).tolist() == expected
    assert "another stream of this thread is open on the model" in faster_chatglm_6b.status().plain_generations
    assert int(next(stream)[0]) == expected[0][8]
    stream.close()
    with expect(captured=1):
        assert model.generate(ids, **settings).tolist() == expected
    stream = model.stream_tokens(ids, **settings)
    next(stream)
    del stream
    never_started = model.stream_tokens(ids, **settings)
    with expect(captured=1):
        assert model.generate(ids, **settings).tolist() == expected
    del never_started


def failures(model):
    """Check that an exception in the caller's streamer leaves the model usable."""
    ids = prompt(model, 4)

    class Failing(Recorder):
        def put(self, value):
            super().put(value)
            if len(self.values) == 3:
                raise KeyboardInterrupt

    try:
        model.generate(ids, do_sample=False, max_new_tokens=4, streamer=Failing(), eos_token_id=None)
    except KeyboardInterrupt:
        pass
    else:
        raise AssertionError("the exception was lost")
    check_equal(model, input_ids=ids, max_new_tokens=2)


def grad_modes(model):
    """Check that every gradient mode gives the same tokens and that no mode leaks out of a stream."""
    ids = prompt(model, 5)
    settings = {"do_sample": False, "max_new_tokens": 3, "eos_token_id": None}
    outputs = [model.generate(ids, **settings).tolist()]
    model.release_cache()
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            outputs.append(model.generate(ids, **settings).tolist())
    assert all(output == outputs[0] for output in outputs)
    for _ in model.stream_tokens(ids, **settings):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def refusals(model):
    """Check that requests the loop cannot serve go to transformers' loop with the reason."""

    class Unknown(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores

    ids = prompt(model, 4)
    embeds = model.get_input_embeddings()(ids).detach()
    holes = torch.ones_like(ids)
    holes[0, 1] = 0
    holes[0, 0] = 1
    asked = [
        ({"return_dict_in_generate": True}, "return_dict_in_generate"),
        ({"use_cache": False}, "use_cache is False"),
        ({"inputs_embeds": embeds}, "inputs_embeds given"),
        ({"position_ids": torch.arange(4, device=ids.device).expand(1, 2, 4) + 1}, "prompt_position_ids given"),
        ({"logits_processor": LogitsProcessorList([Unknown()])}, "Unknown is not among"),
        ({"bad_words_ids": [[9]]}, "NoBadWordsLogitsProcessor is not among"),
        ({"attention_mask": holes}, "attention_mask hides tokens"),
        ({"past_key_values": DynamicCache()}, "past_key_values given"),
        ({"do_sample": True, "min_p": 0.1}, "MinPLogitsWarper is not among"),
        ({"min_length": 2**31}, "no kernel counts to"),
        ({"no_repeat_ngram_size": 2**40}, "no kernel counts to"),
    ]
    for kwargs, reason in asked:
        before = faster_chatglm_6b.status().plain_generations
        with expect(plain=1):
            model.generate(ids, **{"do_sample": False, "max_new_tokens": 2, **kwargs})
        after = faster_chatglm_6b.status().plain_generations
        new = [why for why, count in after.items() if count != before.get(why, 0)]
        assert len(new) == 1 and reason in new[0], (new, reason)


def mask_token_hidden(model):
    """Check that a mask over the ``[gMASK]``, which leaves the answer without a position, is refused as before."""
    ids = prompt(model, 6)
    ids[0, 1] = model.config.gmask_token_id
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]], device=ids.device)
    try:
        model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=2)
    except ValueError as error:
        assert "position_ids hold -1" in str(error)
    else:
        raise AssertionError("negative positions were accepted")


def changed_models(model):
    """Check that foreign modules, hooks, training mode, autocast and new weights are noticed at the next call."""
    other = copy.deepcopy(model)
    assert "_decode_engine" not in other.__dict__ or not other.__dict__["_decode_engine"]._sessions
    pickle.loads(pickle.dumps(loop.engine_of(model)))
    ids = prompt(other, 4)
    check_equal(other, input_ids=ids, max_new_tokens=3)
    dense = other.transformer.layers[1].attention.dense

    def plain_once():
        with expect(plain=1):
            other.generate(ids, do_sample=False, max_new_tokens=2)

    handle = dense.register_forward_hook(lambda *arguments: None)
    plain_once()
    handle.remove()
    other.train()
    plain_once()
    other.eval()
    other.transformer.layers[1].attention.dense = torch.nn.Sequential(dense)
    plain_once()
    other.transformer.layers[1].attention.dense = dense
    with torch.autocast(other.device.type, dtype=torch.bfloat16):
        plain_once()
    before = check_equal(other, input_ids=ids, max_new_tokens=4)
    for parameter in other.parameters():
        parameter.data = parameter.data.flip(0).contiguous()
    after = check_equal(other, input_ids=ids, max_new_tokens=4)
    assert before != after


def threads_take_turns(model):
    ids = [prompt(model, 4 + i, seed=i) for i in range(3)]
    settings = {"do_sample": False, "max_new_tokens": 3, "eos_token_id": None}
    expected = [model.generate(i, **settings).tolist() for i in ids]
    outputs = [None] * 3

    def run(index):
        outputs[index] = model.generate(ids[index], **settings).tolist()

    stream = model.stream_tokens(ids[0], **settings)
    tokens = [int(next(stream)[0])]
    with expect(captured=3):
        workers = [threading.Thread(target=run, args=(i,)) for i in range(3)]
        for worker in workers:
            worker.start()
        tokens += [int(token[0]) for token in stream]
        for worker in workers:
            worker.join(timeout=60)
    assert outputs == expected and tokens == expected[0][0][4:]


def released_cache(model):
    """Check that ``release_cache`` frees at once or after an open stream, and longer requests get a new session."""
    engine = loop.engine_of(model)
    ids = prompt(model, 4)
    settings = {"do_sample": False, "max_new_tokens": 2, "eos_token_id": None}
    expected = model.generate(ids, **settings).tolist()
    assert engine._sessions
    model.release_cache()
    assert not engine._sessions
    stream = model.stream_tokens(ids, **settings)
    next(stream)
    model.release_cache()
    assert engine._sessions
    list(stream)
    assert not engine._sessions
    assert model.generate(ids, **settings).tolist() == expected
    session = engine._sessions[1]
    model.generate(ids, **settings)
    assert engine._sessions[1] is session
    session, make = weakref.ref(session), Session.__init__

    def make_alone(*arguments):
        assert session() is None, "two caches at once"
        make(*arguments)

    with mock.patch.object(Session, "__init__", make_alone):
        check_equal(model, input_ids=prompt(model, 300), max_new_tokens=2)
    assert session() is None and engine._sessions[1].capacity >= 302


EVERYWHERE = (
    abandoned_streams,
    failures,
    grad_modes,
    refusals,
    mask_token_hidden,
    changed_models,
    threads_take_turns,
    released_cache,
)
