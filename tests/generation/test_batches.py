"""Every row of a batch equals its single run: greedy search, beams and several returned sequences."""

import pytest
import torch
from random_batches import (
    MOST_TOKENS,
    WAYS,
    check_beams,
    expected_rows,
    greedy,
    inputs_of,
    random_batches,
    single_runs,
)


@pytest.fixture(scope="module")
def runs(tiny_model):
    return single_runs(tiny_model)


def test_200_random_batches(tiny_model, tiny_tokenizer, runs):
    """Each row equals its single run token for token, with only pads after its end."""
    pad, ended_early, ways = tiny_model.config.pad_token_id, 0, dict.fromkeys(WAYS, 0)
    for batch, tokens, way in random_batches(runs.rows, 200):
        inputs = inputs_of(batch, way, tiny_tokenizer, tiny_model.device)
        output = tiny_model.generate(
            **inputs, do_sample=False, max_new_tokens=tokens, eos_token_id=runs.end_ids, pad_token_id=pad
        )
        expected = expected_rows(batch, tokens, pad)
        assert output[:, inputs["input_ids"].shape[1] :].tolist() == expected, (batch, tokens, way)
        ended_early += sum(row[-1] == pad for row in expected)
        ways[way] += 1
    assert ended_early > 200 and min(ways.values()) > 50


def test_a_shorter_run_is_the_beginning_of_a_longer_one(tiny_model, runs):
    """A shorter limit cuts a single run short, as the test above takes for granted."""
    lengths = {len(row.answer) for row in runs.rows}
    assert lengths >= {1, MOST_TOKENS} and len(lengths) > 4
    for tokens, row in enumerate(runs.rows[:MOST_TOKENS], start=1):
        assert greedy(tiny_model, [row.ids], runs.end_ids, max_new_tokens=tokens)[0] == row.answer[:tokens]


@pytest.mark.parametrize("way", WAYS)
def test_beams(tiny_model, tiny_tokenizer, runs, way):
    check_beams(tiny_model, tiny_tokenizer, runs, way, 6)


@pytest.mark.parametrize("way", WAYS)
def test_several_sampled_sequences(tiny_model, tiny_tokenizer, runs, way):
    """Rows stay together and differ among themselves; a temperature near zero gives each row's greedy answer."""
    batch, tokens, pad = [row for row in runs.rows if len(row.answer) > 3][:4], 6, tiny_model.config.pad_token_id
    inputs = inputs_of(batch, way, tiny_tokenizer, tiny_model.device)
    length = inputs["input_ids"].shape[1]
    settings = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": tokens, "eos_token_id": runs.end_ids}
    torch.manual_seed(0)
    output = tiny_model.generate(**inputs, **settings, top_k=0)
    for row, prompt in enumerate(inputs["input_ids"].tolist()):
        several = output[3 * row : 3 * row + 3].tolist()
        assert [ids[:length] for ids in several] == [prompt] * 3
        assert len({tuple(ids[length:]) for ids in several}) > 1
    cold = tiny_model.generate(**inputs, **settings, temperature=1e-4)[:, length:].tolist()
    assert cold == [answer for answer in expected_rows(batch, tokens, pad) for _ in range(3)]
