"""Near-ties: two computations that round differently may choose different tokens if the best logits are close."""

import torch

from faster_chatglm_6b.decoding.loop import engine_of
from faster_chatglm_6b.decoding.session import rows_for


def margin(model, ids):
    """Return the difference of the two best logits after ``ids``, on the plain path."""
    with torch.no_grad():
        best = model(torch.tensor([ids], device=model.device)).logits[0, -1].double().topk(2).values
    return float(best[0] - best[1])


def assert_equal_up_to_near_ties(model, ours, theirs, length, near_tie):
    """Check that rows of ids are equal or first differ at a margin below ``near_tie``; return how many differ."""
    different = 0
    for one, other in zip(ours, theirs, strict=True):
        step = next((i for i in range(length, len(one)) if one[i] != other[i]), None)
        if step is not None:
            different += 1
            assert margin(model, one[:step]) < near_tie, (one, other)
    return different


def measured_near_tie(model, batches):
    """Return the margin on the plain path below which rounding alone may decide between two tokens.

    It is twice the largest error over ``batches``, because either computation may err by that much. The error is the
    difference between the logits of each row alone on the plain path and those of the captured loop or of a batch's
    prompt. Each batch holds ``generate``'s arguments, padded with the model's pad id.
    """
    error = 0.0
    for inputs in batches:
        output = model.generate(**inputs, do_sample=False, max_new_tokens=2, eos_token_id=None)[:, :-1]
        # The logits of the step that chose the last token.
        looped = engine_of(model)._sessions[rows_for(len(output))].step.logits
        with torch.no_grad():
            prompts = model(output).logits[:, -1]
            for row, ids in enumerate(output.tolist()):
                first = next(i for i, token in enumerate(ids) if token != model.config.pad_token_id)
                alone = model(output[row : row + 1, first:]).logits[0, -1].float()
                error = max(error, *(float((other[row].float() - alone).abs().max()) for other in (looped, prompts)))
    assert error > 0
    return 2 * error
