"""Gradient checkpointing under its names before and since transformers 5.24."""

import copy
from inspect import signature
from unittest import mock

import pytest
import torch
from release_checks import PROMPT, notices, rows_read
from transformers import Trainer, TrainingArguments

from faster_chatglm_6b import modeling_chatglm
from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration

IDS = torch.tensor(PROMPT)
EXAMPLE = torch.tensor([[*IDS[0], 40, 41]])
NAMES = ("activation_checkpointing", "gradient_checkpointing")


@pytest.fixture
def tuned(tiny_dir):
    """Load the tiny model with a new P-Tuning prefix, which alone is trained."""
    return ChatGLMForConditionalGeneration.from_pretrained(tiny_dir, pre_seq_len=4).float()


def enable(model, settings, **kwargs):
    """Enable checkpointing by the name that the installed transformers does not deprecate."""
    name = next(name for name in NAMES if hasattr(model, f"{name}_enable"))
    getattr(model, f"{name}_enable")(**{f"{name}_kwargs": settings}, **kwargs)


def gradients(model):
    model.zero_grad()
    model.train()
    # The prefix's dropout would make each run differ from the others.
    model.transformer.prefix_encoder.eval()
    model(EXAMPLE, labels=EXAMPLE).loss.backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("settings", [None, {}, {"use_reentrant": False}], ids=str)
def test_the_trainer(tuned, tmp_path, settings):
    """The Trainer trains only the prefix, also with PEFT's empty settings and the new arguments of 5.24."""
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate: pip install accelerate")
    before = {name: parameter.detach().clone() for name, parameter in tuned.named_parameters()}
    name = next(name for name in NAMES if name in TrainingArguments.__dataclass_fields__)
    options = {"max_steps": 2, "report_to": [], "use_cpu": True, "save_strategy": "no", "learning_rate": 0.1}
    options |= {name: True, f"{name}_kwargs": settings}
    arguments = TrainingArguments(output_dir=str(tmp_path), **options)
    Trainer(model=tuned, args=arguments, train_dataset=[{"input_ids": EXAMPLE[0], "labels": EXAMPLE[0]}] * 2).train()
    assert tuned.transformer.gradient_checkpointing
    changed = {name for name, one in tuned.named_parameters() if not torch.equal(before[name], one)}
    assert changed and changed == {name for name in before if "prefix_encoder" in name}


@pytest.mark.parametrize("settings", [None, {}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_not_reentrant_unless_asked_for(tuned, name, settings):
    """The default is not reentrant, because reentrant checkpoints do not see the prefix beside the layers' inputs."""
    if not hasattr(tuned, f"{name}_enable"):
        pytest.skip(f"the installed transformers has no {name}_enable")
    expected = gradients(tuned)
    getattr(tuned, f"{name}_enable")(**{f"{name}_kwargs": settings})
    recomputed = gradients(tuned)
    assert set(recomputed) == set(expected) and all("prefix_encoder" in name for name in expected)
    for key, gradient in expected.items():
        torch.testing.assert_close(recomputed[key], gradient)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_every_so_many_layers(tuned, every):
    """Every n-th layer is recomputed in newer releases; the others keep what they computed."""
    switch = next(getattr(type(tuned), f"{name}_enable") for name in NAMES if hasattr(tuned, f"{name}_enable"))
    if "every_n_layers" not in signature(super_of(switch)).parameters:
        pytest.skip("the installed transformers checkpoints all layers or none")
    expected = gradients(tuned)
    enable(tuned, None, every_n_layers=every)
    forward, seen = modeling_chatglm.GLMBlock.forward, []

    def counted(layer, *arguments):
        seen.append(layer.attention.layer_id)
        return forward(layer, *arguments)

    with mock.patch.object(modeling_chatglm.GLMBlock, "forward", counted):
        recomputed = gradients(tuned)
    layers = range(tuned.config.num_layers)
    assert sorted(seen) == sorted([*layers, *(index for index in layers if index % every == 0)])
    for key, gradient in expected.items():
        torch.testing.assert_close(recomputed[key], gradient)


def super_of(switch):
    """Return transformers' own function of the same name."""
    from transformers import PreTrainedModel

    return getattr(PreTrainedModel, switch.__name__)


@pytest.mark.parametrize("generator", [None, torch.Generator()], ids=["transformers' loop", "own loop"])
def test_generation_keeps_its_cache(tiny_model, generator):
    """A generation in training mode keeps its cache, because nothing is recomputed without gradients."""
    model = copy.deepcopy(tiny_model).train()
    enable(model, None)
    with rows_read(model) as rows, notices() as found:
        model.generate(IDS, do_sample=False, max_new_tokens=5, eos_token_id=None, generator=generator)
    assert rows == [len(PROMPT[0])] + [1] * 4 and not found


def test_reentrant_checkpoints_of_a_prefix_are_refused(tuned, tiny_dir):
    """Reentrant checkpoints of a prefix are refused: torch would fail in the first step with an obscure error."""
    for settings in ({"use_reentrant": True}, {"use_reentrant": True, "preserve_rng_state": False}):
        with pytest.raises(ValueError, match="use_reentrant=True cannot train a P-Tuning prefix"):
            enable(tuned, settings)
    assert not tuned.is_gradient_checkpointing
    enable(tuned, {"use_reentrant": False})
    assert tuned.is_gradient_checkpointing and gradients(tuned)
    plain = ChatGLMForConditionalGeneration.from_pretrained(tiny_dir).float()
    enable(plain, {"use_reentrant": True})
    assert plain.is_gradient_checkpointing
