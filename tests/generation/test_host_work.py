"""What the host does before the first token: the prompt is read once, and settings are gathered again only if asked."""

import copy
from functools import partial
from inspect import signature

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.utils import GenerationMixin

from faster_chatglm_6b.generation.reading import keep_layout, layout_of, prompt_kept
from faster_chatglm_6b.generation.settings import follow_settings
from faster_chatglm_6b.network.prompt_layout import PromptLayout

PLAIN = {"do_sample": False, "max_new_tokens": 1, "eos_token_id": None}


@pytest.fixture
def model(tiny_model):
    """Return a copy of the tiny model, as tests change its settings."""
    return copy.deepcopy(tiny_model)


@pytest.fixture
def readings(monkeypatch):
    """Return a list that gets the ids of each prompt whose layout is computed."""
    seen, of = [], PromptLayout.of.__func__

    def counted(cls, input_ids, *arguments):
        seen.append(input_ids)
        return of(cls, input_ids, *arguments)

    monkeypatch.setattr(PromptLayout, "of", classmethod(counted))
    return seen


def prompt(model, batch=2, pads=0):
    ids = torch.randint(5, 300, (batch, 9), generator=torch.Generator().manual_seed(0))
    ids[:, -2], ids[:, -1] = model.config.gmask_token_id, model.config.bos_token_id
    ids[0, :pads] = model.config.pad_token_id
    return ids


def same(one, other):
    fields = ("first_slot", "sop_slot", "mask_position", "has_gmask", "hidden_slots")
    pairs = [(getattr(one, name), getattr(other, name)) for name in fields]
    return all(a is b or torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("pads", [0, 3])
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
def test_a_prompt_is_read_once(model, readings, pads, masked):
    ids = prompt(model, pads=pads)
    mask = {"attention_mask": (ids != model.config.pad_token_id).long()} if masked else {}
    model.generate(ids, **mask, **PLAIN)
    assert len(readings) == 1 and readings[0] is ids
    list(model.stream_tokens(ids, **mask, **PLAIN))
    # The stream's own first step comes after generate() has returned.
    assert len(readings) <= 3


def test_a_shown_pad_is_no_padding_as_long_as_its_mask_is_there(model):
    """Ids that begin with a pad under a mask of ones: the kept layout stands for this mask alone."""
    ids = prompt(model, pads=2)
    ones = torch.ones_like(ids)
    shown, hidden = PromptLayout.of(ids, model.config, ones), PromptLayout.of(ids, model.config)
    assert shown.begins_with_pad and not hidden.begins_with_pad and not same(shown, hidden)
    with prompt_kept():
        keep_layout(ids, ones, shown)
        assert layout_of(ids, model.config, ones) is shown
        assert same(layout_of(ids, model.config, None), hidden)


def test_other_tensors_are_read_anew(model):
    ids, other = prompt(model), prompt(model, pads=3)
    mask = torch.ones_like(ids)
    kept = PromptLayout.of(ids, model.config, mask)
    padding = mask.clone()
    padding[0, :4] = 0
    with prompt_kept():
        keep_layout(ids, mask, kept)
        assert layout_of(ids, model.config, None) is layout_of(ids, model.config, mask) is kept
        assert same(layout_of(other, model.config, None), PromptLayout.of(other, model.config))
        assert same(layout_of(ids, model.config, padding), PromptLayout.of(ids, model.config, padding))
        with prompt_kept():
            assert layout_of(ids, model.config, mask) is not kept
    assert layout_of(ids, model.config, mask) is not kept


def test_the_mask_of_a_layout(model):
    ids = prompt(model, pads=3)
    mask = PromptLayout.of(ids, model.config).attention_mask(ids)
    assert mask.dtype == torch.int64 and torch.equal(mask, (ids != model.config.pad_token_id).long())
    whole = PromptLayout.of(ids[1:], model.config).attention_mask(ids[1:])
    assert whole.dtype == torch.int64 and whole.tolist() == [[1] * 9]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.bfloat16, torch.int32], ids=str)
def test_masks_of_any_dtype(model, dtype):
    ids = prompt(model, pads=3)
    mask = (ids != model.config.pad_token_id).to(dtype)
    assert same(PromptLayout.of(ids.int(), model.config, mask), PromptLayout.of(ids, model.config))


def anew(model, *given, **settings):
    config, others = GenerationMixin._prepare_generation_config(model, *given, **settings)
    follow_settings(config)
    return config, others


def gathered(model, *given, **settings):
    """Return the settings of a call from ours and, gathered anew, from transformers'."""
    ours, others = model._prepare_generation_config(*given, **settings)
    theirs, left = anew(model, *given, **settings)
    assert others == left
    return vars(ours), vars(theirs)


@pytest.mark.skipif(not hasattr(GenerationMixin, "_prepare_generation_config"), reason="there is nothing to gather")
class TestSettings:
    """Settings of a call equal what transformers gathers, whatever was gathered before."""

    # transformers 4.50 to 4.57 pass use_model_defaults too.
    GIVEN = [None] * ("use_model_defaults" in signature(GenerationMixin._prepare_generation_config).parameters)

    def test_calls_in_turn(self, model):
        calls = [
            {"max_new_tokens": 3, "do_sample": False},
            {"max_new_tokens": 3, "do_sample": False},
            {"max_new_tokens": 3, "do_sample": 0},
            {"max_new_tokens": 3, "do_sample": True, "temperature": 1},
            {"max_new_tokens": 3, "do_sample": True, "temperature": 1.0},
            {"max_new_tokens": 3, "eos_token_id": [7, 8]},
            {"max_new_tokens": 3, "output_attentions": True},
            {"max_new_tokens": 3, "attention_mask": None, "use_cache": False},
        ]
        for settings in [*calls, *reversed(calls)]:
            ours, theirs = gathered(model, None, *self.GIVEN, **settings)
            assert [(name, type(value), value) for name, value in ours.items()] == [
                (name, type(value), value) for name, value in theirs.items()
            ], settings

    def test_changes_of_the_model_are_seen(self, model):
        settings = {"max_new_tokens": 3, "do_sample": True}
        for change in ({}, {"top_k": 7}, {"top_k": 8}, {"eos_token_id": [5, 6]}, {"a_new_field": 1}):
            for name, value in change.items():
                setattr(model.generation_config, name, value)
            for _ in range(2):
                ours, theirs = gathered(model, None, *self.GIVEN, **settings)
                assert ours == theirs and ours.items() >= change.items()
        model.generation_config.eos_token_id[0] = 9
        ours, _ = gathered(model, None, *self.GIVEN, **settings)
        assert ours["eos_token_id"] == [9, 6]

    def test_a_given_config_wins(self, model):
        for length in (3, 4, 3):
            given = GenerationConfig(max_new_tokens=length, do_sample=True)
            ours, theirs = gathered(model, given, *self.GIVEN)
            assert ours == theirs and ours["max_new_tokens"] == length
        ours, _ = gathered(model, None, *self.GIVEN, max_new_tokens=5)
        assert ours["max_new_tokens"] == 5

    def test_a_call_gets_settings_of_its_own(self, model):
        one, _ = model._prepare_generation_config(None, *self.GIVEN, max_new_tokens=3)
        one.max_length, one.added = 99, True
        for _ in range(2):
            other, _ = model._prepare_generation_config(None, *self.GIVEN, max_new_tokens=3)
            assert other is not one and other.max_length != 99 and not hasattr(other, "added")

    def test_settings_in_the_models_configuration_are_seen(self, model):
        """transformers 5 refuses them, and earlier releases may follow them."""

        def outcome(call):
            try:
                return vars(call(None, *self.GIVEN, max_new_tokens=3)[0])
            except ValueError as error:
                return str(error)

        assert outcome(model._prepare_generation_config) == outcome(partial(anew, model))
        model.config.top_k = 4
        assert outcome(model._prepare_generation_config) == outcome(partial(anew, model))
        del model.config.top_k
        assert outcome(model._prepare_generation_config) == outcome(partial(anew, model))


def test_an_unknown_argument_is_still_refused(model):
    ids = prompt(model)
    for _ in range(2):
        with pytest.raises(ValueError, match="temprature"):
            model.generate(ids, temprature=0.5, **PLAIN)
