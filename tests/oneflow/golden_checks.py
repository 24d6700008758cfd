"""Compare the model's logits with stock's; OneFlow has no ``torch.testing``."""

from typing import Any

import torch

from faster_chatglm_6b.network.prompt_layout import PromptLayout

TOLERANCE = 1e-3


def assert_close(found: Any, expected: Any, name: Any = "") -> None:
    """Check for the same shape and for no value further off than the tolerance; NaN fails."""
    assert tuple(found.shape) == tuple(expected.shape), name
    error = float((found.float() - expected.float()).abs().max())
    assert error <= TOLERANCE, (name, error)


def cases(tensors: dict[str, Any], suffix: str) -> list[str]:
    """List the cases that have a tensor of this suffix."""
    names = sorted(key.removesuffix(suffix) for key in tensors if key.endswith(suffix))
    assert names
    return names


def check_prefill(model: Any, tensors: dict[str, Any], some: int | None = None) -> None:
    """Check positions, mask and logits of every prompt, or of the first ``some``."""
    for name in cases(tensors, ".input_ids")[:some]:
        input_ids = tensors[f"{name}.input_ids"][None]
        layout, length = PromptLayout.of(input_ids, model.config), input_ids.shape[1]
        assert torch.equal(layout.position_ids(0, length)[0], tensors[f"{name}.position_ids"]), name
        assert torch.equal(layout.hidden(0, length)[0], tensors[f"{name}.attention_mask"]), name
        with torch.no_grad():
            assert_close(model(input_ids).logits[0], tensors[f"{name}.logits"], name)


def check_decode(model: Any, tensors: dict[str, Any], some: int | None = None) -> None:
    """Check 16 greedy steps with the cache, each fed the token that stock chose."""
    for name in cases(tensors, ".prompt_ids")[:some]:
        prompt, generated = tensors[f"{name}.prompt_ids"], tensors[f"{name}.generated"]
        layout = PromptLayout.of(prompt[None], model.config)
        past, tokens = None, prompt[None]
        for step in range(16):
            stop = prompt.shape[0] + step
            position_ids = layout.position_ids(stop - 1, stop) if step else None
            with torch.no_grad():
                output = model(tokens, position_ids=position_ids, past_key_values=past, use_cache=True)
            assert_close(output.logits[0, -1], tensors[f"{name}.step_logits"][step], (name, step))
            past, tokens = output.past_key_values, generated[step].view(1, 1)


def check_batch(model: Any, tensors: dict[str, Any]) -> None:
    """Check a left-padded batch, with stock's mask and with the padding alone."""
    with torch.no_grad():
        given = {name: tensors[name] for name in ("input_ids", "attention_mask", "position_ids")}
        assert_close(model(**given).logits, tensors["prefill_logits"])
        derived = model(tensors["input_ids"]).logits
    for row, ids in enumerate(tensors["input_ids"].tolist()):
        first = next(slot for slot, token in enumerate(ids) if token != model.config.pad_token_id)
        assert_close(derived[row, first:], tensors["prefill_logits"][row, first:], row)
