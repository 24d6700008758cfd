"""Simulated changes of a newer transformers, for the interpreter and the GPU, and the tools of the tripwire."""

import contextlib
import logging
from unittest import mock

import torch
from transformers import GenerationConfig

import faster_chatglm_6b
from faster_chatglm_6b import report
from faster_chatglm_6b.generation import reading
from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration as Model
from faster_chatglm_6b.ops.caches import CACHE_NAME

PROMPT = [[20, 30, 40, 50, 60, 321, 324]]


@contextlib.contextmanager
def rows_read(model):
    """Yield a list that gets the number of tokens each forward of the network reads."""
    rows = []

    def note(module, arguments, kwargs):
        given = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        rows.append((arguments[0] if arguments else given).shape[1])

    handle = model.transformer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


@contextlib.contextmanager
def notices():
    """Yield a list that gets the sentences recorded inside; check that the log gets each of them once."""
    records, found = [], []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("faster_chatglm_6b")
    logger.addHandler(handler)
    try:
        with mock.patch.object(report, "_notices", {}):
            yield found
            found += faster_chatglm_6b.status().notices
            assert all(sentence in str(faster_chatglm_6b.status()) for sentence in found)
    finally:
        logger.removeHandler(handler)
    assert sorted(found) == sorted(one.getMessage() for one in records if one.getMessage() in found), records


@contextlib.contextmanager
def arguments_changed(change):
    """Let ``change`` alter the keyword arguments with which ``generate`` calls ``_sample``."""
    original = Model._sample

    def _sample(self, *args, **kwargs):
        change(kwargs)
        return original(self, *args, **kwargs)

    with mock.patch.object(Model, "_sample", _sample):
        yield


def _generate(model, **kwargs):
    ids = torch.tensor(PROMPT, device=model.device)
    settings = {"do_sample": False, "max_new_tokens": 3, "eos_token_id": None, **kwargs}
    return model.generate(ids, **settings).tolist()


def _served():
    status = faster_chatglm_6b.status()
    return dict(status.captured_generations), dict(status.plain_generations)


def _check(model, captured, change, reason=None):
    """Check that the change leaves the tokens alone and takes the expected path: plain if there is a ``reason``."""
    expected = _generate(model)
    before = _served()
    with arguments_changed(change):
        assert _generate(model) == expected
    after = _served()
    new = [sum(now.values()) - sum(then.values()) for now, then in zip(after, before, strict=True)]
    assert new == ([1, 0] if captured and reason is None else [0, 1]), (before, after)
    if reason is not None:
        assert after[1].get(reason, 0) - before[1].get(reason, 0) == 1, after


def rename_cache(kwargs):
    """Pass the cache under another name, if there is one: transformers 5.0 lets the model make the first."""
    if CACHE_NAME in kwargs:
        kwargs["memory"] = kwargs.pop(CACHE_NAME)


def a_renamed_cache(model, captured=True):
    """Check that an empty cache under an unknown name is still used as the cache, in streams too."""

    with notices() as found:
        _check(model, captured, rename_cache)
        expected = _generate(model)[0][len(PROMPT[0]) :]
        with arguments_changed(rename_cache):
            ids = torch.tensor(PROMPT, device=model.device)
            tokens = list(model.stream_tokens(ids, do_sample=False, max_new_tokens=3, eos_token_id=None))
        assert [int(token[0]) for token in tokens] == expected
    assert not found


def new_arguments(model, captured=True):
    """Check that new arguments of None or False say nothing, and that an unread value is noticed in one sentence."""
    with notices() as found:
        _check(model, captured, lambda kwargs: kwargs.update(novelty=None, other=False))
        assert not faster_chatglm_6b.status().notices
        _check(model, captured, lambda kwargs: kwargs.update(novelty=torch.arange(3), output_attentions=False))
    assert len(found) == 1 and found[0].startswith("The argument novelty reaches the decoding loop of transformers")


def new_arguments_of_the_search(model, captured=True):
    """Check that a new parameter of transformers' own loop is served at its default and left to that loop otherwise."""
    known = reading._defaults(reading.GenerationMixin._sample)
    with mock.patch.dict(known, {"novelty": 7}):
        _check(model, captured, lambda kwargs: kwargs.update(novelty=7))
        _check(model, captured, lambda kwargs: kwargs.update(novelty=False), reason="novelty given")
        _check(model, captured, lambda kwargs: kwargs.update(novelty=8), reason="novelty given")


def new_settings(model, captured=True):
    """Check that a new field of ``GenerationConfig`` is served at its default and left to transformers otherwise."""
    original = GenerationConfig.__init__

    def __init__(self, **kwargs):
        self.novelty = kwargs.pop("novelty", 5)
        original(self, **kwargs)

    def set_to(value):
        return lambda kwargs: setattr(kwargs["generation_config"], "novelty", value)

    reading._setting_defaults.cache_clear()
    try:
        with mock.patch.object(GenerationConfig, "__init__", __init__):
            _check(model, captured, set_to(5))
            _check(model, captured, set_to(None))
            _check(model, captured, set_to(6), reason="novelty given")
    finally:
        reading._setting_defaults.cache_clear()


def a_pad_token_in_another_place(model, captured=True):
    """Check that ended rows are padded even if the private name of the derived pad token is gone."""
    ids = torch.tensor([PROMPT[0], [9, *PROMPT[0][1:]]], device=model.device)
    free = model.generate(ids, do_sample=False, max_new_tokens=4, eos_token_id=None)
    settings = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 3}
    settings["eos_token_id"] = [int(free[0, -4]), int(free[1, -1])]
    expected = model.generate(ids, **settings).tolist()

    def hide(kwargs):
        config = kwargs["generation_config"]
        kept[:] = [config._pad_token_tensor]
        del config._pad_token_tensor

    kept = []
    with notices() as found, arguments_changed(hide):
        # transformers' own loop of today reads that name, so only our loop can run on the plain path.
        answers = torch.stack(list(model.stream_tokens(ids, **settings)), dim=1).tolist()
    assert [row[len(PROMPT[0]) :] for row in expected] == answers
    assert len(found) == 1 and "derived pad token" in found[0]


def processors_in_another_form(model, captured=True):
    """Check that a processor with moved parameters or a missing class goes to transformers' loop, with the reason."""
    from transformers.generation import logits_process

    from faster_chatglm_6b.generation.requests import _known

    processor = logits_process.RepetitionPenaltyLogitsProcessor(penalty=1.2)
    processor.__dict__["strength"] = processor.__dict__.pop("penalty")
    type_of = type(processor)
    with mock.patch.object(type_of, "__call__", lambda self, ids, scores: scores):
        for stays in (True, False):
            before = _served()[1]
            ids = torch.tensor(PROMPT, device=model.device)
            with contextlib.nullcontext() if stays else mock.patch.object(logits_process, type_of.__name__, None):
                assert (type_of in _known()) is stays
                model.generate(ids, do_sample=False, max_new_tokens=2, logits_processor=[processor])
            after = _served()[1]
            new = [reason for reason in after if after[reason] != before.get(reason, 0)]
            wanted = "keeps its parameters in another way" if stays else "is not among the processors"
            assert len(new) == 1 and wanted in new[0], new


def a_model_with_its_own_inputs(model, captured=True):
    """Check that the plain path serves a model whose subclass or instance prepares its own inputs."""
    original = Model.prepare_inputs_for_generation

    def replaced(self, *args, first_token=None, **kwargs):
        inputs = original(self, *args, **kwargs)
        inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == PROMPT[0][0], first_token)
        return inputs

    def on_the_instance(*args, first_token=None, **kwargs):
        return replaced(model, *args, first_token=first_token, **kwargs)

    class Subclass(Model):
        prepare_inputs_for_generation = replaced

    expected = _generate(model)
    before = _served()
    with notices() as found, mock.patch.object(model, "prepare_inputs_for_generation", on_the_instance):
        wrapped = _generate(model, first_token=200)
    assert not found
    model.__class__ = Subclass
    try:
        subclassed = _generate(model, first_token=200)
    finally:
        model.__class__ = Model
    after = _served()
    assert wrapped == subclassed != expected and before[0] == after[0]


EVERYWHERE = (
    a_renamed_cache,
    new_arguments,
    new_arguments_of_the_search,
    new_settings,
    a_pad_token_in_another_place,
    processors_in_another_form,
    a_model_with_its_own_inputs,
)
