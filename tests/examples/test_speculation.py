"""The measurement of speculation forces what it says, and holds its numbers against what was asked."""

import importlib
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels to measure")


@pytest.fixture
def measurement(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "examples"))
    return importlib.import_module("measuring.speculation")


@pytest.mark.parametrize("accepted", [0, 2, 3])
def test_the_hook_makes_exactly_so_many_ids_come_true(measurement, accepted):
    tokens = torch.tensor([[5, 6, 7, 8], [50, 60, 70, 80]])
    drafts = SimpleNamespace(tokens=tokens, count=torch.zeros(2, dtype=torch.int32))
    sampled, taken = torch.full((8,), -1), []
    with mock.patch.object(
        measurement.kernels, "accept", lambda sampled, state, drafts: taken.append(sampled.view(2, 4))
    ):
        with measurement.forced(accepted):
            measurement.kernels.accept(sampled, None, drafts)
        assert measurement.kernels.accept is not measurement.forced
    (chosen,) = taken
    right = (chosen[:, :3] == tokens[:, 1:]).long().cumprod(1).sum(1)
    assert right.tolist() == [accepted] * 2 and drafts.count.tolist() == [3, 3]


def test_verdicts(measurement):
    step = {"kind": "forced", "weights": "fp16", "batch": 1, "k": 7, "accepted": 0, "cost": 1.1, "gain": 0.9}
    best = step | {"accepted": 7, "gain": 1.7}
    text = {"kind": "unforced", "weights": "fp16", "text": "greedy", "times_as_long": 1.01}
    words = [line.split()[0] for line in measurement.verdicts([step, best, text])]
    assert words == ["ok", "ok", "MISSED"]
    worse = [step | {"cost": 1.3}, best | {"gain": 3.0}, text | {"times_as_long": 1.05}]
    assert [line.split()[0] for line in measurement.verdicts(worse)] == ["MISSED", "MISSED", "ok"]


def test_the_summary_of_copies_is_by_task(measurement):
    one = {"kind": "copies", "task": "repeat", "k": 7, "tokens": 30, "turns": 6, "exact": True, "same": True}
    records = [one, one | {"tokens": 10, "turns": 4, "exact": False}, one | {"task": "quote"}, {"kind": "cost"}]
    assert measurement.copies_summary(records) == (
        "tokens per step: repeat k = 7: 4.00, quote k = 7: 5.00; 2 of 3 answers are exact copies, 3 the same as "
        "without drafts"
    )
