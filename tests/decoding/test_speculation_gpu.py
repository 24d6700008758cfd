"""Speculation on a GPU: the tokens are those of the loop without it, whatever is drafted."""

import sys
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels")

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "ops")]
import draft_checks  # noqa: E402
import draft_life_checks  # noqa: E402
import loop_checks  # noqa: E402
from loop_checks import expect, padded, prompt  # noqa: E402
from near_ties import assert_equal_up_to_near_ties  # noqa: E402
from test_quantized_loop import MODELS, load  # noqa: E402

from faster_chatglm_6b.decoding import session  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
# As in test_loop_gpu.py.
NEAR_TIE = 0.05
KINDS = (3, 7, "auto")
EXACT = {"do_sample": False, "eos_token_id": None}


CHECKS = draft_checks.EVERYWHERE + draft_life_checks.EVERYWHERE


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_as_in_the_interpreter(single, check):
    check(single)


def test_more_babble(single):
    babbles = [(seed, 3 + 5 * (seed % 4)) for seed in range(20)]
    draft_checks.babble_is_the_same(single, babbles, new=120)
    draft_checks.babble_in_batches(single, (4, 11, 9, 30, 25, 13, 18), new=40)


@pytest.mark.parametrize("sampler", draft_checks.SAMPLERS, ids=str)
def test_seeds(single, sampler):
    draft_checks.seeds_with_drafts(single, (sampler,), KINDS, new=40, lengths=(6, 11, 20))


def test_distribution(single):
    draft_checks.distribution_with_drafts(single)


def test_right_and_wrong_drafts(single):
    draft_checks.drafts_through_the_network(single, (5, 40, 9), 60, (3, 7), all_wrong=True)
    draft_checks.drafts_through_the_network(single, (500,), 60, (7,))


@pytest.mark.parametrize("kind", [7, "auto"])
def test_golden_ids(single, golden_json, kind):
    cases = {case["name"]: case for case in golden_json("generate")["cases"]}
    for case in cases.values():
        case["kwargs"]["speculate"] = kind
    names = [name for name in cases if name.startswith(("greedy|", "reppen", "ngram", "min_length", "max_new_tokens"))]
    assert len(names) > 40
    loop_checks.golden_cases(single, cases, names)


def test_golden_chat(single, tiny_tokenizer, golden_json):
    checked = 0
    for case in golden_json("chat")["cases"]:
        if not case["name"].startswith("h"):
            continue
        arguments = {"history": case["history"], **case["kwargs"]}
        response, _ = single.chat(tiny_tokenizer, case["query"], **arguments, speculate=7)
        assert response == single.chat(tiny_tokenizer, case["query"], **arguments)[0] == case["response"], case["name"]
        *_, (streamed, _) = single.stream_chat(tiny_tokenizer, case["query"], speculate="auto", **_streamed(arguments))
        assert streamed == response, case["name"]
        checked += 1
    assert checked > 5


def _streamed(arguments):
    return {name: value for name, value in arguments.items() if name != "num_beams"}


def test_300_prompts_in_float32(single):
    for seed in range(300):
        ids = prompt(single, 3 + seed % 40, seed)
        draft_checks.same_with_drafts(single, (KINDS[seed % 3],), input_ids=ids, max_new_tokens=24, **EXACT)


def test_300_prompts_in_float16(half):
    different = 0
    for seed in range(300):
        ids = prompt(half, 3 + seed % 40, seed)
        with expect(captured=2):
            expected, ours = (
                half.generate(ids, **EXACT, max_new_tokens=24, speculate=kind).tolist() for kind in (0, KINDS[seed % 3])
            )
        different += assert_equal_up_to_near_ties(half, ours, expected, ids.shape[1], NEAR_TIE)
    print(f"{different} of 300 runs differ at a near-tie of less than {NEAR_TIE}")
    assert different < 30


@pytest.mark.parametrize("batch", [2, 4, 5, 16])
def test_rows_of_a_batch(single, half, batch):
    inputs = padded(single, [3 + (7 * row) % 30 for row in range(batch)])
    draft_checks.same_with_drafts(single, (7, "auto"), **inputs, max_new_tokens=40, **EXACT)
    expected, ours = (half.generate(**inputs, **EXACT, max_new_tokens=24, speculate=kind) for kind in (0, 7))
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        start = next(i for i, token in enumerate(ids) if token != half.config.pad_token_id)
        pair = [[one[row, start:].tolist()] for one in (ours, expected)]
        assert_equal_up_to_near_ties(half, *pair, len(ids) - start, NEAR_TIE)


@pytest.mark.parametrize("name", MODELS)
def test_quantised(name):
    model = load(name, torch.float32, "cuda")
    draft_checks.drafts_through_the_network(model, (6, 20), 40, (3, 7))
    for seed in range(10):
        ids = prompt(model, 3 + seed, seed)
        draft_checks.same_with_drafts(model, (3, 7), input_ids=ids, max_new_tokens=16, **EXACT)


@pytest.mark.parametrize("projection", [0, 1])
def test_with_a_prefix(load_tuned, projection):
    model = load_tuned(projection).cuda()
    draft_checks.drafts_through_the_network(model, (6, 20), 30, (3, 7))
    for seed in range(10):
        draft_checks.same_with_drafts(model, (7,), input_ids=prompt(model, 3 + seed, seed), max_new_tokens=16, **EXACT)


def test_growing_over_a_length_where_the_graph_changes(single):
    ids = prompt(single, session._SHORTEST_KEYS - 20)
    draft_checks.same_with_drafts(single, input_ids=ids, max_new_tokens=50, **EXACT)


@pytest.mark.parametrize("kind", [7, "auto"])
def test_runs_repeat_to_the_bit(half, kind):
    ids = prompt(half, 12, batch=3)
    first = half.generate(ids, **EXACT, max_new_tokens=40, speculate=kind)
    for _ in range(5):
        assert half.generate(ids, **EXACT, max_new_tokens=40, speculate=kind).tolist() == first.tolist()


@pytest.mark.parametrize("kind", [7, "auto"])
def test_no_synchronisation_and_one_graph_per_turn(single, monkeypatch, kind):
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(graph), replay(graph))[1])
    with draft_checks.Babbler(single, 45).in_place(single):
        settings = {"input_ids": prompt(single, 3), "max_new_tokens": 120, "speculate": kind, **EXACT}
        # Both kinds of steps are captured by the end of this one.
        single.generate(**settings)
        stream = single.stream_tokens(**settings)
        next(stream)
        replays.clear()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught, draft_checks.turns() as count:
                warnings.simplefilter("always")
                for _ in range(100):
                    next(stream)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        stream.close()
    assert [w for w in caught if "synchroniz" in str(w.message)] == []
    assert len(replays) == count["one"] + count["several"] < 100
