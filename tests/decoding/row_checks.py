"""Checks of rows that stand at different places in one step, for the interpreter and the GPU alike.

Each takes a tiny golden model on its device and raises ``AssertionError``.
"""

import torch
from loop_checks import expect, prompt
from prompt_checks import TOLERANCE

from faster_chatglm_6b.decoding.loop import engine_of
from faster_chatglm_6b.decoding.session import Session

PLACES = ("cache_length", "first_key", "position", "sop_index")


def rows_at_different_places(model):
    """Check a step of three rows, each after another prompt and answer, and of one that is done, against each alone."""
    alone, kept = [], []
    for row, length in enumerate((4, 9, 6)):
        with expect(captured=1):
            model.generate(prompt(model, length, row), do_sample=False, max_new_tokens=2 + row, eos_token_id=None)
        session = engine_of(model)._sessions[1]
        state, numbers = session.state, session.numbers
        places = {name: numbers[name].clone() for name in PLACES}
        kept.append((session.step.cache.storage[:, :, 0].clone(), state.tokens.clone(), places))
        # The row is at its limit.
        numbers["finished"].zero_()
        with torch.inference_mode():
            alone.append(session.step.run(model, state.tokens, state.cache_length, session.capacity).float().clone())
    together = Session(model, 4, session.capacity)
    together.step.cache.storage.fill_(float("nan"))
    together.numbers.set(finished=[0, 0, 0, 1])
    together.numbers.send()
    for row, (storage, token, places) in enumerate(kept):
        together.step.cache.storage[:, :, row] = storage
        together.state.tokens[row] = token[0]
        for name, value in places.items():
            together.numbers[name][row] = value[0]
    assert len({int(places["cache_length"]) for _, _, places in kept}) == 3
    with torch.inference_mode():
        logits = together.step.run(model, together.state.tokens, together.state.cache_length, session.capacity).float()
    for row, expected in enumerate(alone):
        error, largest = float((logits[row] - expected[0]).abs().max()), float(expected.abs().max())
        assert error <= TOLERANCE[model.dtype] * max(largest, 1), (row, error, largest)
    # The row that is done has written nothing.
    assert together.step.cache.storage[:, :, 3].isnan().all()


EVERYWHERE = (rows_at_different_places,)
