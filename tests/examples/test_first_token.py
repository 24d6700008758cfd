"""The benchmark counts what a first token costs, holds it against its floor, and writes what was asked of it."""

import argparse
import copy
import importlib
import json
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def example(monkeypatch):
    """Import one of the examples' modules."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module


@pytest.fixture
def machine(example):
    """Return a function that makes a machine out of its two rates: GB/s and TFLOP/s."""
    return lambda *rates: example("measuring.machine").Machine("cpu", "a machine", "unknown", *rates)


WORK = {"backend": "ours", "mode": "greedy", "iters": 1, "warmup_iters": 1}


def test_the_operations_are_those_of_every_row_and_of_one_row_in_the_head(example, tiny_model):
    count = example("measuring.models").operations_of_prompt
    config = tiny_model.config
    matrices = [p.numel() for p in tiny_model.transformer.layers.parameters() if p.dim() == 2]
    head = tiny_model.lm_head.weight.numel()
    assert len(matrices) == 4 * config.num_layers
    scores_and_values = 2 * 2 * 10 * 5 * config.hidden_size * config.num_layers
    assert count(tiny_model, 2, 5) == 2 * 10 * sum(matrices) + scores_and_values + 2 * 2 * head


def test_the_operations_of_integer_weights_are_those_of_floats(example, tiny_model):
    count = example("measuring.models").operations_of_prompt
    assert count(tiny_model, 1, 7) == count(copy.deepcopy(tiny_model).quantize(4), 1, 7)


@pytest.mark.parametrize("new_tokens", [1, 3])
@pytest.mark.parametrize("rates", [(1e-3, 1e9), (1e9, 1e-3)], ids=["slow memory", "slow products"])
def test_the_floor_is_the_longer_of_reading_and_computing(example, tiny_model, machine, new_tokens, rates):
    """Only a first token has to compute."""
    timing, models = example("measuring.timing"), example("measuring.models")
    args = argparse.Namespace(**WORK, new_tokens=new_tokens)
    record = timing.measure(tiny_model, models.make_prompt(tiny_model, 2, 9), args, machine(*rates)).record
    reading = models.bytes_per_step(tiny_model, 2, 9 if new_tokens == 1 else 10.5) / rates[0] / 1e6
    computing = models.operations_of_prompt(tiny_model, 2, 9) / rates[1] / 1e9
    assert record["floor_ms"] == pytest.approx(max(reading, computing) if new_tokens == 1 else reading, abs=1e-4)
    assert record["share"] == pytest.approx(record["floor_ms"] / record["ms_per_step"], rel=1e-3, abs=1e-4)
    assert (record["operations_per_step"] is None) == (new_tokens > 1)
    assert record["matrix_rate_tflops"] == round(rates[1], 1)
    assert ("floor" in timing.describe(record)) == (new_tokens == 1)


def test_without_a_read_ceiling_there_is_no_floor(example, machine):
    assert example("measuring.timing").floor_of(10, 10, machine(None, 1.0)) is None


def test_the_suite_measures_and_judges_first_tokens_in_every_precision(example, tmp_path, monkeypatch, machine):
    """A suite whose measurements are made up: 8 ms for every call for one token, 5 ms for every other token."""
    names = ("suite", "first_token", "rows", "timing")
    suite, first_token, rows, timing = (example(f"measuring.{name}") for name in names)

    class Model:
        weights = "fp16"

        def quantize(self, bits):
            self.weights = f"int{bits}"
            return self

        def release_cache(self):
            pass

    def measure(model, ids, args, machine):
        record = dict.fromkeys(timing.KEYS, 1) | {"weights": model.weights, "read_ceiling_gb_per_s": 4000.0}
        record |= {"batch": ids[0], "prompt_tokens": ids[1], "new_tokens": args.new_tokens, "mode": args.mode}
        return timing.Run([], record | {"ms_per_step": 8.0 if args.new_tokens == 1 else 5.0, "share": 0.9})

    monkeypatch.setattr(suite.machines, "look", lambda: machine(4000.0, 700.0))
    monkeypatch.setattr(timing, "measure", measure)
    monkeypatch.setattr(first_token, "beside_a_busy_process", lambda model, tokens, iters: (tokens / 1000, 2.0))
    for name, fake in {
        "build_model": lambda name: Model(),
        "make_prompt": lambda model, batch, tokens: (batch, tokens),
        "memory_at_2048": lambda model: (14.0, 13.5),
        "synchronisations": lambda model: 0,
        "weights_of": lambda model: model.weights,
        "in_new_process": lambda *arguments, cache=None: {"greedy": 1.0, "sample": 1.0} if cache else 3.0,
    }.items():
        monkeypatch.setattr(suite, name, fake)
    file = tmp_path / "suite.json"
    for part in ("floats", "integers"):
        suite.run(argparse.Namespace(model_name=None, json=str(file), profile=False, iters=3, suite=part))

    firsts = [record for record in json.loads(file.read_text("utf-8")) if record["new_tokens"] == 1]
    found = [(record["weights"], record["batch"], record["prompt_tokens"]) for record in firsts]
    assert found == [(weights, *prompt) for weights in first_token.WEIGHTS for prompt in first_token.PROMPTS]
    checks = {check["what"]: check for check in json.loads((tmp_path / "suite_checks.json").read_text("utf-8"))}
    judged = [check for name, check in checks.items() if name.endswith(", ms") and name.startswith("first token")]
    assert len(judged) == 15
    fp16 = checks["first token of 1024 tokens, fp16, ms"]
    assert (fp16["must"], fp16["goal"], fp16["met"]) == ("<= 23", "<= 19.5", True)
    int4 = checks["first token of 20 tokens, int4, ms"]
    assert (int4["must"], int4["goal"], int4["met"]) == ("<= 4.5", "<= 2.2", False)
    shares = [checks[rows.name_of(batch, weights)] for weights in first_token.WEIGHTS for batch in rows.MUSTS]
    assert [share["met"] for share in shares] == [0.9 >= float(share["must"][3:]) for share in shares]
    assert {share["met"] for share in shares} == {True, False}
    assert [checks[first_token.BUSY.format(tokens=tokens)]["measured"] for tokens in (128, 1024)] == [0.128, 1.024]
    # The pages show every check in Chinese too.
    words = json.loads((ROOT / "images" / "words.json").read_text("utf-8"))["checks_zh"]
    assert set(checks) <= set(words)


def test_a_busy_process_is_over_when_it_is_no_longer_needed(example):
    busy_process = example("measuring.first_token").busy_process
    with pytest.raises(KeyError), busy_process() as process:
        assert process.poll() is None
        raise KeyError
    assert process.poll() is not None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux binds a process to a core")
def test_beside_a_busy_process_the_cores_are_given_back(example, tiny_model):
    before = os.sched_getaffinity(0)
    ratios = example("measuring.first_token").beside_a_busy_process(tiny_model, 8, 1)
    assert len(ratios) == 2 and min(ratios) > 0 and os.sched_getaffinity(0) == before
