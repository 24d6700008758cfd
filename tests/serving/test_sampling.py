"""A row's next token, against transformers' own processors and against its probabilities."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from faster_chatglm_6b.serving.rows.choice import choose, uniform
from faster_chatglm_6b.serving.rows.interface import RowRequest

SIZE = 40


def scores(seed: int) -> torch.Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed)) * 3


def token(logits, answer=(), **settings) -> int:
    return choose(logits, RowRequest(ids=(1, 2), max_tokens=9, **settings), answer)[0]


@given(st.integers(0, 2**31), st.floats(0.2, 3), st.integers(0, 12), st.floats(0.05, 1), st.floats(0.5, 2))
def test_candidates_are_those_of_transformers(seed, temperature, top_k, top_p, penalty):
    logits, answer = scores(seed), [3, 5, 5]
    ids = torch.tensor([[1, 2, *answer]])
    warped = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits[None].clone())
    warped = TemperatureLogitsWarper(temperature)(ids, warped)
    if top_k:
        warped = TopKLogitsWarper(top_k)(ids, warped)
    if top_p < 1:
        warped = TopPLogitsWarper(top_p)(ids, warped)
    probabilities = torch.softmax(warped[0].double(), dim=0)
    order = probabilities.argsort(descending=True)
    reached = probabilities[order].cumsum(dim=0)
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "repetition_penalty": penalty}
    for number in range(5):
        drawn = token(logits, answer, seed=number, **settings)
        place = (order == drawn).nonzero().item()
        point = uniform(number, len(answer))
        before = float(reached[place - 1]) if place else 0.0
        assert probabilities[drawn] > 0
        assert before - 1e-6 <= point <= float(reached[place]) + 1e-6


def test_tokens_come_as_often_as_is_likely():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    count = 4000
    drawn = [token(logits, temperature=1.0, seed=seed) for seed in range(count)]
    for index, share in enumerate((0.5, 0.3, 0.15, 0.05)):
        spread = math.sqrt(share * (1 - share) / count)
        assert abs(drawn.count(index) / count - share) < 4 * spread


def test_random_numbers_follow_from_the_seed_and_the_place_alone():
    numbers = [uniform(seed, index) for seed in (0, 1, -1, 2**64 - 2) for index in range(50)]
    assert len(set(numbers)) == len(numbers) and all(0 <= number < 1 for number in numbers)
    assert uniform(7, 3) == uniform(7, 3) == uniform(7 + 2**64, 3)
    assert abs(np.mean([uniform(5, index) for index in range(2000)]) - 0.5) < 0.03


def test_temperature_zero_takes_the_most_likely():
    for seed in range(20):
        assert token(scores(seed), top_k=1, top_p=0.1) == int(scores(seed).argmax())
        assert token(scores(seed), temperature=5.0, top_k=1, seed=seed) == int(scores(seed).argmax())
        assert token(scores(seed), temperature=1e-40, seed=seed) == int(scores(seed).argmax())
        assert token(scores(seed), temperature=1e-5, repetition_penalty=100.0, seed=seed) < SIZE
        assert token(scores(seed), temperature=1.0, top_p=0.0, seed=seed) == int(scores(seed).argmax())


def test_bias_and_penalties_add_up():
    logits = torch.zeros(6)
    assert token(logits, logit_bias=((4, 1.0),)) == 4
    assert token(logits, logit_bias=((4, 1.0), (5, 2.0))) == 5
    assert token(logits, [0], presence_penalty=0.5) == 1
    # Once 0.5 + 0.3, twice 0.5 + 0.6: 1 is seen less often than 0, and 2 never, but with a bias against it.
    settings = {"presence_penalty": 0.5, "frequency_penalty": 0.3}
    others = tuple((index, -9.0) for index in (2, 3, 4, 5))
    assert token(logits, [0, 0, 1], logit_bias=others, **settings) == 1
    assert token(logits, [0, 0, 1], logit_bias=(*others[1:], (2, -0.7)), **settings) == 2
    assert token(logits, [0, 0, 1], logit_bias=(*others[1:], (2, -0.9)), **settings) == 1
    # The prompt does not count for these two.
    assert token(torch.tensor([0.0, 0.2, 0.1]), presence_penalty=2.0, frequency_penalty=2.0) == 1


def test_the_tensors_of_a_bias_are_made_once_for_a_row(monkeypatch):
    made = []
    tensor = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *given, **kinds: made.append(given) or tensor(*given, **kinds))
    biases = tuple((index, index / 7) for index in range(SIZE))
    logits = scores(4)
    expected = int((logits + tensor([bias for _, bias in biases])).argmax())
    assert [token(logits, [1] * length, logit_bias=biases) for length in range(20)] == [expected] * 20
    assert len(made) == 2


def test_no_end_before_the_minimum():
    logits = torch.tensor([0.0, 5.0, 1.0, 4.0])
    settings = {"end_ids": (1, 3), "min_tokens": 2}
    assert [token(logits, answer, **settings) for answer in ([], [2], [2, 2])] == [2, 2, 1]
    assert [token(logits, [2] * n, temperature=1.0, seed=n, **settings) in (0, 2) for n in (0, 1)] == [True, True]


def test_log_probabilities_are_the_models_own():
    logits = scores(3)
    request = RowRequest(ids=(1,), max_tokens=1, temperature=0.1, logit_bias=((7, 50.0),), top_logprobs=3)
    chosen, reported = choose(logits, request, [])
    expected = torch.log_softmax(logits, dim=0)
    assert chosen == 7 and reported.chosen == pytest.approx(float(expected[7]))
    assert [index for index, _ in reported.top] == expected.topk(3).indices.tolist()
    assert choose(logits, RowRequest(ids=(1,), max_tokens=1), [])[1] is None
    assert choose(logits, RowRequest(ids=(1,), max_tokens=1, top_logprobs=0), [])[1].top == ()


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_scores_that_are_no_numbers_are_an_error(wrong):
    logits = torch.tensor([0.0, wrong, 1.0])
    with pytest.raises(ArithmeticError, match="not finite"):
        token(logits)


def test_the_scores_are_left_as_they_are():
    logits = scores(1)
    token(logits, [3], logit_bias=((3, 5.0),), presence_penalty=1.0, repetition_penalty=1.5, end_ids=(1,), min_tokens=3)
    assert torch.equal(logits, scores(1))
