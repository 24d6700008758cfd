"""Rows of random batches through the captured loop on a GPU against their single runs."""

import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from loop_checks import expect  # noqa: E402
from near_ties import margin, measured_near_tie  # noqa: E402
from random_batches import WAYS, check_beams, expected_rows, inputs_of, random_batches, single_runs  # noqa: E402

# Limits of the share of different rows and of the measured margin; a wrong kernel would exceed them by far.
MOST_DIFFERENT = {torch.float32: 0.01, torch.float16: 0.1, torch.bfloat16: 0.4}
LARGEST_MARGIN = {torch.float32: 1e-3, torch.float16: 0.5, torch.bfloat16: 4.0}


def compare(model, tokenizer, count):
    """Run ``count`` random batches and compare each row with its single run.

    The margin of a near-tie is measured: rounding can change a token only if the two best logits are nearer than
    twice its error.

    Returns:
        (rows that differ at a near-tie, rows, the margin of a near-tie)
    """
    runs, pad = single_runs(model), model.config.pad_token_id
    batches = random_batches(runs.rows, count)
    near_tie = measured_near_tie(model, [inputs_of(batch, way, tokenizer, model.device) for batch, _, way in batches])
    different, rows = 0, 0
    for batch, tokens, way in batches:
        inputs = inputs_of(batch, way, tokenizer, model.device)
        length = inputs["input_ids"].shape[1]
        with expect(captured=1):
            output = model.generate(**inputs, do_sample=False, max_new_tokens=tokens, eos_token_id=runs.end_ids)
        answers, expected = output[:, length:].tolist(), expected_rows(batch, tokens, pad)
        equal = [ours == alone for ours, alone in zip(answers, expected, strict=True)]
        rows += len(equal)
        for row, ours, alone in zip(batch, answers, expected, strict=True):
            step = next((i for i, (one, other) in enumerate(zip(ours, alone, strict=False)) if one != other), None)
            if step is not None:
                different += 1
                assert margin(model, row.ids + alone[:step]) < near_tie, (row, ours, way)
            elif ours != alone:
                # Another row's near-tie made the whole batch longer or shorter.
                assert not all(equal) and set(ours[len(alone) :] + alone[len(ours) :]) <= {pad}, (row, ours, way)
    return different, rows, near_tie


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize("dtype", MOST_DIFFERENT, ids=str)
def test_200_random_batches(load_on_gpu, tiny_tokenizer, dtype):
    model = load_on_gpu(dtype)
    different, rows, near_tie = compare(model, tiny_tokenizer, 200)
    print(f"{dtype}: {different} of {rows} rows differ at a near-tie of less than {near_tie:.6f}")
    assert near_tie < LARGEST_MARGIN[dtype]
    assert rows > 800 and different <= MOST_DIFFERENT[dtype] * rows


@pytest.mark.parametrize("way", WAYS)
def test_beams(single, tiny_tokenizer, way):
    """Beams of a batch equal those of each row alone, on the plain path."""
    check_beams(single, tiny_tokenizer, single_runs(single), way, 6)
