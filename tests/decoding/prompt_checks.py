"""Checks of the captured loop's prompt step against the plain forward, for the interpreter and the GPU alike.

Each takes a tiny golden model on its device and raises ``AssertionError``. Before a prompt runs, everything that it
must write is filled with NaN.
"""

import random

import torch
from interpreter_blocks import padded_prompts
from loop_checks import expect, padded, prompt
from random_batches import random_prompt

from faster_chatglm_6b.decoding.loop import engine_of
from faster_chatglm_6b.decoding.session import rows_for

TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.15}


def session_for(model, batch):
    """Return the model's session for ``batch`` sequences, if there is one."""
    sessions = engine_of(model)._sessions
    return sessions.get(rows_for(batch)) or sessions.get(batch)


def poison(session):
    """Fill the buffers of a session with NaN."""
    step = session.step
    buffers = [step.cache.storage, step.normed, step.packed, step.logits, step._context]
    # A CPU's kernels have no scratch memory.
    buffers += [step.workspace.partial] if hasattr(step.workspace, "partial") else []
    for buffer in (*buffers, *(session.prompt._captured or ())):
        buffer.fill_(float("nan"))


def check_logits(model, **inputs):
    """Check the logits after the prompts; on a GPU twice, because their graph is replayed the second time."""
    ids = inputs["input_ids"]
    settings = {"do_sample": False, "max_new_tokens": 1, "eos_token_id": None}
    with torch.no_grad():
        expected = model(**inputs).logits[:, -1].float()
    for _ in range(2 if ids.is_cuda else 1):
        if session_for(model, len(ids)) is not None:
            poison(session_for(model, len(ids)))
        with expect(captured=1):
            output = model.generate(**inputs, **settings)
        logits = session_for(model, len(ids)).step.logits[: len(ids)].float()
        error, largest = float((logits - expected).abs().max()), float(expected.abs().max())
        assert error <= TOLERANCE[model.dtype] * max(largest, 1), (error, largest, ids.shape)
        assert output[:, -1].tolist() == logits.argmax(-1).tolist()


def lengths_around_a_graph(model):
    """Check prompts one shorter, as long and one longer than a length that is captured, after a longer one."""
    with padded_prompts(model, (8, 16)):
        for length in (15, 9, 8, 7):
            check_logits(model, input_ids=prompt(model, length, length))
        check_logits(model, **padded(model, (4, 9, 6)))


def more_rows_than_are_captured(model):
    with padded_prompts(model, (8, 16), most_rows=12):
        check_logits(model, input_ids=prompt(model, 13))
        check_logits(model, **padded(model, (7, 4)))


def prompts_of_every_kind(model, count=3, longest=12, seed=0):
    """Check prompts with ``[MASK]`` or ``[gMASK]`` at their end or inside, and with the begin of an answer."""
    rng = random.Random(seed)
    for _ in range(count):
        check_logits(model, input_ids=torch.tensor([random_prompt(model.config, rng, longest)], device=model.device))


EVERYWHERE = (lengths_around_a_graph, more_rows_than_are_captured, prompts_of_every_kind)
