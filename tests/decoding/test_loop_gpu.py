"""The captured loop on a GPU, against transformers' own loop over the same model."""

import contextlib
import gc
import sys
import threading
import warnings
import weakref
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import early_checks  # noqa: E402
import lifecycle_checks  # noqa: E402
import loop_checks  # noqa: E402
import release_checks  # noqa: E402
import table_checks  # noqa: E402
from loop_checks import check_equal, expect, padded, plain_path, prompt  # noqa: E402
from near_ties import assert_equal_up_to_near_ties  # noqa: E402

from faster_chatglm_6b.decoding import loop, memory, session  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

# Two paths that round differently may choose different tokens only if the two best logits are nearer than this: a few
# units in the last place of the tiny model's float16 logits, whose magnitude is below 16.
NEAR_TIE = 0.05
EVERYWHERE = loop_checks.EVERYWHERE + lifecycle_checks.EVERYWHERE + release_checks.EVERYWHERE
EVERYWHERE += early_checks.ON_A_GPU
EXACT = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}


@pytest.mark.parametrize("check", EVERYWHERE, ids=lambda check: check.__name__)
def test_as_in_the_interpreter(single, check):
    check(single)


@pytest.mark.parametrize("captured", [True, False])
def test_ids_on_the_cpu(single, captured):
    """Ids on the CPU are moved to the model, as in transformers 5.24, and the answer is where the ids are."""
    ids = prompt(single, 6, batch=2)
    settings = {"do_sample": False, "max_new_tokens": 4, "repetition_penalty": 1.3}
    with contextlib.nullcontext() if captured else loop_checks.plain_path():
        expected = single.generate(ids, **settings)
        with loop_checks.expect(captured=2 * captured, plain=2 * (not captured)):
            output = single.generate(ids.cpu(), **settings)
            tokens = list(single.stream_tokens(ids.cpu(), **settings))
    assert output.device.type == "cpu" and output.tolist() == expected.tolist()
    assert torch.stack(tokens, dim=1).tolist() == expected[:, 6:].tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("check", table_checks.EVERYWHERE, ids=lambda check: check.__name__)
def test_table(check, dtype):
    check(torch.device("cuda", torch.cuda.current_device()), dtype)


def test_golden_ids(single, golden_json):
    cases = {case["name"]: case for case in golden_json("generate")["cases"]}
    wanted = ("greedy|", "reppen", "ngram", "min_length", "max_new_tokens")
    names = [name for name in cases if name.startswith(wanted)]
    assert len(names) > 40
    loop_checks.golden_cases(single, cases, names)


def test_300_prompts_in_float32(single):
    for seed in range(300):
        check_equal(single, input_ids=prompt(single, 3 + seed % 40, seed), max_new_tokens=6)


def test_300_prompts_in_float16(half):
    different = 0
    for seed in range(300):
        ids = prompt(half, 3 + seed % 40, seed)
        ours, theirs = loop_checks.both(half, input_ids=ids, **EXACT)
        different += assert_equal_up_to_near_ties(half, ours, theirs, ids.shape[1], NEAR_TIE)
    print(f"{different} of 300 runs differ at a near-tie of less than {NEAR_TIE}")
    assert different < 30


@pytest.mark.parametrize("batch", [2, 5, 33, 80])
def test_row_of_a_batch_equals_the_single_run(single, half, batch):
    lengths = [3 + (7 * row) % 30 for row in range(batch)]
    for model in (single, half):
        inputs = padded(model, lengths)
        with expect(captured=1):
            output = model.generate(**inputs, **EXACT)[:, max(lengths) :].tolist()
        for row in range(0, batch, 1 + batch // 8):
            ids = prompt(model, lengths[row], row)
            alone = model.generate(ids, **EXACT).tolist()
            assert_equal_up_to_near_ties(model, [ids[0].tolist() + output[row]], alone, lengths[row], NEAR_TIE)


def test_many_end_ways(half):
    loop_checks.seeds(half, (*loop_checks.SAMPLERS, {"top_k": 80}, {"top_k": 0, "top_p": 1.0}), batch=5)


@pytest.mark.parametrize("batch", [1, 5, 33])
def test_runs_repeat_to_the_bit(half, batch):
    """Runs repeat to the bit, because the same kernels run in the same order, eagerly or captured."""
    ids = prompt(half, 12, batch=batch)
    first = half.generate(ids, do_sample=False, max_new_tokens=20, eos_token_id=None)
    for _ in range(10):
        assert half.generate(ids, do_sample=False, max_new_tokens=20, eos_token_id=None).tolist() == first.tolist()


def test_growing_over_a_length_where_the_graph_changes(single):
    ids = prompt(single, session._SHORTEST_KEYS - 6)
    with expect(captured=1):
        ours = single.generate(ids, do_sample=False, max_new_tokens=16, eos_token_id=None)
    assert len(loop.engine_of(single)._sessions[1].graphs) >= 2
    with plain_path():
        theirs = single.generate(ids, do_sample=False, max_new_tokens=16, eos_token_id=None)
    assert ours.tolist() == theirs.tolist()


def test_no_synchronisation_and_one_graph_per_token(half, monkeypatch):
    replays, eager = [], []
    replay, run = torch.cuda.CUDAGraph.replay, session.Session._run
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(graph), replay(graph))[1])
    monkeypatch.setattr(session.Session, "_run", lambda *a: (eager.append(a), run(*a))[1])
    settings = {"max_new_tokens": 60, "eos_token_id": None, "do_sample": True, "top_p": 0.7, "temperature": 0.95}
    # Where drafts come true there are fewer turns than tokens, see test_speculation_gpu.py.
    settings["speculate"] = 0
    ids = prompt(half, 20)
    half.generate(ids, **settings)
    stream = half.stream_tokens(ids, **settings)
    for _ in range(10):
        next(stream)
    replays.clear()
    eager.clear()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(40):
                next(stream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [w for w in caught if "synchroniz" in str(w.message)] == []
    assert len(replays) == 40 and not eager
    stream.close()


def test_the_count_of_synchronisations_can_fail():
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.ones(1, device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert any("synchroniz" in str(w.message) for w in caught)


def test_memory_is_freed(load_on_gpu, half):
    # This run takes the scratch memory that the process keeps for the prompt's kernels.
    half.generate(prompt(half, 10), **EXACT)
    gc.collect()
    torch.cuda.synchronize()
    empty = torch.cuda.memory_allocated()
    model = load_on_gpu(torch.float16)
    ids = prompt(model, 10)
    model(ids)
    model.generate(ids, **EXACT)
    model.release_cache()
    torch.cuda.synchronize()
    weights = torch.cuda.memory_allocated()
    model.generate(ids, **EXACT)
    kept = torch.cuda.memory_allocated()
    assert kept >= weights + memory.cache_bytes(model, 1, 256)
    model.release_cache()
    assert torch.cuda.memory_allocated() <= weights
    model.generate(ids, **EXACT)
    gone = weakref.ref(model)
    del model
    gc.collect()
    # The first captured graph may have come with a few small tensors of torch's own.
    assert gone() is None and torch.cuda.memory_allocated() <= empty + 2**16


def test_capture_beside_a_busy_thread(single):
    """Graphs are captured while another thread allocates and computes on its own stream.

    That thread draws no random numbers on the GPU, because torch's generator there is part of every capture.
    """
    expected = single.generate(prompt(single, 10), **EXACT).tolist()
    stop, failures, done = threading.Event(), [], []

    def work():
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                while not stop.is_set():
                    x = torch.ones(512, 512 + len(done) % 64, device="cuda")
                    done.append(float((x @ x.t()).sum().cpu()))
        except Exception as error:
            failures.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for _ in range(5):
            single.release_cache()
            assert single.generate(prompt(single, 10), **EXACT).tolist() == expected
    finally:
        stop.set()
        worker.join()
    assert not failures and done


def test_another_current_stream_on_the_way(single):
    ids = prompt(single, 10)
    expected = single.generate(ids, **EXACT)[0, 10:].tolist()
    torch.cuda.synchronize()
    tokens, streams = [], [torch.cuda.Stream(), torch.cuda.Stream()]
    stream = single.stream_tokens(ids, **EXACT)
    for step in range(8):
        with torch.cuda.stream(streams[step % 2]):
            tokens.append(int(next(stream)[0]))
    assert tokens == expected


def test_too_large_a_cache_takes_the_plain_path(single):
    ids = prompt(single, 10)
    stop = loop_checks.StoppingCriteriaList([loop_checks.StopAtLength(10, 3)])
    with expect(plain=1):
        output = single.generate(ids, do_sample=False, max_new_tokens=10**8, stopping_criteria=stop)
    assert output.shape[1] <= 13
    check_equal(single, input_ids=ids, max_new_tokens=4)


def test_moved_weights(load_on_gpu):
    """Weights that were moved by ``half``, ``cpu`` and back, or loaded in place, serve from the next call on."""
    model = load_on_gpu(torch.float32)
    ids = prompt(model, 10)
    first = check_equal(model, input_ids=ids, max_new_tokens=6)
    model.half()
    ours, theirs = loop_checks.both(model, input_ids=ids, **EXACT)
    assert_equal_up_to_near_ties(model, ours, theirs, 10, NEAR_TIE)
    model.cpu()
    with expect(captured=1):
        model.generate(ids.cpu(), **EXACT)
    model.float().cuda()
    other = {name: value.roll(1, 0) for name, value in model.state_dict().items()}
    check_equal(model, input_ids=ids, max_new_tokens=6)
    model.load_state_dict(other)
    assert check_equal(model, input_ids=ids, max_new_tokens=6) != first
