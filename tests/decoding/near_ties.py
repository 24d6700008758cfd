"""When two computations in half precision may choose different tokens: where the two best logits are nearly equal."""

import copy

import torch


def margin(model, ids):
    """Difference of the two best logits behind ids, on the plain path."""
    with torch.no_grad():
        best = model(torch.tensor([ids], device=model.device)).logits[0, -1].float().topk(2).values
    return float(best[0] - best[1])


def assert_equal_up_to_near_ties(model, ours, theirs, length, near_tie):
    """Rows of ids are equal, or first differ behind the prompt where the margin is below ``near_tie``; counts those."""
    different = 0
    for one, other in zip(ours, theirs, strict=True):
        step = next((i for i in range(length, len(one)) if one[i] != other[i]), None)
        if step is not None:
            different += 1
            assert margin(model, one[:step]) < near_tie, (one, other)
    return different


def measured_near_tie(model, prompts):
    """A float32 copy of the model, and the margin in it below which rounding alone may decide between two tokens.

    That is twice the largest error of ``model``'s logits over ``prompts``, a list of rows of ids: each of two
    computations may err by it.
    """
    exact = copy.deepcopy(model).float()
    error = 0.0
    with torch.no_grad():
        for row in prompts:
            ids = torch.tensor([row], device=model.device)
            error = max(error, float((model(ids).logits[0, -1].float() - exact(ids).logits[0, -1]).abs().max()))
    return exact, 2 * error
