"""Faults and memory on a GPU: injected faults, memory that is really short, long use and the stated bound."""

import contextlib
import gc
import re
import sys
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import fault_checks  # noqa: E402
from loop_checks import StopAtLength, StoppingCriteriaList, check_equal, expect, padded, plain_path, prompt  # noqa: E402

from faster_chatglm_6b.decoding import loop, memory, session  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
MB = 2**20
# A captured graph may come with a few small tensors of torch's own.
SLACK = 2**16


def keep_longest_table(model):
    """Make the rotary table for the longest request here, because the model keeps it like its weights."""
    model.transformer.rotary.get(4096, model.device, model.dtype)


def allocated():
    """Return the allocated bytes, without the cuBLAS workspaces that torch keeps for each thread and stream.

    Those workspaces depend on what ran before; ``test_new_sessions_leave_memory_flat`` counts them too.
    """
    torch.cuda.synchronize()
    # The function has no public name, only this private one from torch 2.4 to 2.13.
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def settled(model):
    """Return the allocated bytes after everything that can be given back is."""
    model.release_cache()
    gc.collect()
    return allocated()


@contextlib.contextmanager
def only_free(size):
    """Let the process take only ``size`` bytes of the GPU's memory in addition to what it has."""
    fraction = (torch.cuda.memory_reserved() + size) / torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(fraction)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("check", fault_checks.EVERYWHERE, ids=lambda check: check.__name__)
def test_as_in_the_interpreter_and_memory_returns(single, check):
    check(single)
    before = settled(single)
    check(single)
    assert settled(single) <= before + SLACK


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("out of memory"), KeyboardInterrupt()], ids=repr)
def test_fault_inside_a_capture(single, error):
    """After a fault inside a capture, the stream is not capturing any more and the memory comes back."""
    ids = prompt(single, 12)
    settings = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
    expected = single.generate(ids, **settings).tolist()
    before = settled(single)
    # The first step runs eagerly; the second call of the method is its capture.
    with fault_checks.failing_at("_run", 2, error):
        if isinstance(error, KeyboardInterrupt):
            with pytest.raises(KeyboardInterrupt):
                single.generate(ids, **settings)
        else:
            with expect(captured=1):
                assert single.generate(ids, **settings).tolist() == expected
    # The error is a parameter, which outlives the test and would keep the frames that it passed through.
    error.with_traceback(None)
    assert not torch.cuda.is_current_stream_capturing()
    assert settled(single) <= before + SLACK
    with expect(captured=1):
        assert single.generate(ids, **settings).tolist() == expected
    assert loop.engine_of(single)._sessions[1].graphs


def spoil():
    """Spoil a capture by waiting for its stream, which CUDA forbids, and raise ``KeyboardInterrupt``."""
    with pytest.raises(RuntimeError, match="captur"):
        torch.cuda.current_stream().synchronize()
    raise KeyboardInterrupt


def test_fault_that_spoils_a_capture(single):
    """The interrupt comes out instead of CUDA's error; random numbers, memory and later captures are as before."""
    ids = prompt(single, 12)
    settings = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
    expected = single.generate(ids, **settings).tolist()
    torch.rand(3, device="cuda")
    before = settled(single)
    with fault_checks.failing_at("_run", 2, spoil), pytest.raises(KeyboardInterrupt):
        single.generate(ids, **settings)
    assert not torch.cuda.is_current_stream_capturing()
    drawn = []
    for _ in range(2):
        torch.manual_seed(5)
        sampled = single.generate(ids, **settings | {"do_sample": True}).tolist()
        drawn.append((torch.rand(3, device="cuda").tolist(), sampled))
    assert drawn[0] == drawn[1]
    assert settled(single) <= before + SLACK
    with expect(captured=1):
        assert single.generate(ids, **settings).tolist() == expected
    assert loop.engine_of(single)._sessions[1].graphs


def test_an_old_graph_that_is_garbage_during_a_capture(single):
    """An old graph in the garbage does no harm, although torch 2.11 would spoil a capture by destroying it."""
    ids = prompt(single, 12)
    settings = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
    expected = single.generate(ids, **settings).tolist()
    graphs = list(loop.engine_of(single)._sessions[1].graphs.values())
    assert graphs
    single.release_cache()
    original, calls = session.Session._run, []

    def run(*arguments):
        calls.append(1)
        if len(calls) == 2:
            cycle = [graphs.pop()]
            cycle.append(cycle)
            del cycle
            assert len([[] for _ in range(100_000)]) == 100_000 and not gc.isenabled()
        return original(*arguments)

    with mock.patch.object(session.Session, "_run", run), expect(captured=1):
        assert single.generate(ids, **settings).tolist() == expected
    assert gc.isenabled() and loop.engine_of(single)._sessions[1].graphs


def test_abandoned_and_failed_streams_return_their_memory(single):
    ids = prompt(single, 40)
    before = None
    for turn in range(30):
        stream = single.stream_tokens(ids, do_sample=turn % 2 == 0, max_new_tokens=200, eos_token_id=None)
        for _ in range(turn % 7):
            next(stream)
        if turn % 3 == 0:
            with pytest.raises(KeyboardInterrupt):
                stream.throw(KeyboardInterrupt)
        del stream
        if turn == 9:
            before = settled(single)
    assert settled(single) <= before + SLACK
    check_equal(single, input_ids=ids, max_new_tokens=4)


def test_new_sessions_leave_memory_flat(single):
    """Memory stays flat over sessions, although torch keeps a cuBLAS workspace for each capturing stream."""
    ids = prompt(single, 12, batch=80)

    def held(tokens):
        with expect(captured=1):
            single.generate(ids, do_sample=False, max_new_tokens=tokens, eos_token_id=None)
        assert loop.engine_of(single)._sessions[session.rows_for(80)].graphs
        single.release_cache()
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    keep_longest_table(single)
    before = [held(4) for _ in range(2)][-1]
    after = [held(4 + 300 * (turn % 2)) for turn in range(6)]
    print(f"allocated after 2 sessions {before}, after each of the next {after}")
    assert max(after) <= before + SLACK


def test_two_threads_on_the_plain_path(single):
    """Threads that launch kernels on one stream side by side read nothing of each other."""
    ids = [prompt(single, 10 + 7 * index, seed=index) for index in range(3)]
    settings = {"do_sample": False, "max_new_tokens": 40, "eos_token_id": None}
    with plain_path():
        expected = [single.generate(i, **settings).tolist() for i in ids]
        outputs = [[] for _ in ids]

        def talk(index):
            outputs[index] += [single.generate(ids[index], **settings).tolist() for _ in range(5)]

        threads = [threading.Thread(target=talk, args=(index,)) for index in range(len(ids))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
    assert outputs == [[tokens] * 5 for tokens in expected]


def test_real_out_of_memory_for_the_cache(single):
    """The plain path answers a request for half a gigabyte with 0.3 left."""
    ids = prompt(single, 10, batch=8)
    settings = {"do_sample": False, "eos_token_id": None}
    expected = single.generate(ids, **settings, max_new_tokens=3).tolist()
    before = settled(single)
    stop = StoppingCriteriaList([StopAtLength(10, 3)])
    with only_free(300 * MB), expect(plain=1):
        output = single.generate(ids, **settings, max_new_tokens=20_000, stopping_criteria=stop)
    assert [row[:13] for row in output.tolist()] == expected
    assert settled(single) <= before + SLACK


def test_real_out_of_memory_in_the_prompt(single):
    """The error has numbers and holds no memory, and the batch that it names fits."""
    ids = prompt(single, 1500, batch=64)
    settings = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 4}
    check_equal(single, input_ids=ids[:1, -20:], max_new_tokens=3)
    keep_longest_table(single)
    before = settled(single)
    with only_free(600 * MB):
        with pytest.raises(torch.cuda.OutOfMemoryError) as caught:
            single.generate(ids, **settings)
        message = str(caught.value)
        print(message)
        assert "64 sequences of up to 1504 tokens (1500 of them the prompt) need" in message
        assert allocated() <= before + SLACK, "the exception holds memory"
        fits = int(re.search(r"about .*?(\d+) sequences? \(batch", message)[1])
        assert 1 <= fits < 64
        single.generate(ids[:fits], **settings)
        settled(single)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            list(single.stream_tokens(ids, **settings))
        check_equal(single, input_ids=ids[:1, -20:], max_new_tokens=3)
    assert settled(single) <= before + SLACK


def test_real_out_of_memory_in_a_long_answer(single):
    """If the plain path's cache grows until nothing is left, the tokens that the error names do fit."""
    ids = prompt(single, 20, batch=64)
    settings = {"do_sample": False, "eos_token_id": None}
    single.generate(ids[:1], **settings, max_new_tokens=2)
    keep_longest_table(single)
    before = settled(single)
    with only_free(600 * MB):
        with plain_path(), pytest.raises(torch.cuda.OutOfMemoryError) as caught:
            single.generate(ids, **settings, max_new_tokens=4000)
        print(caught.value)
        tokens = int(re.search(r"about (\d+) tokens each", str(caught.value))[1])
        assert 20 < tokens < 4020
        assert allocated() <= before + SLACK
        assert single.generate(ids, **settings, max_length=tokens).shape[1] == tokens
    assert settled(single) <= before + SLACK


def test_a_thousand_turns_leave_memory_flat(single):
    """Memory stays flat over prompts of 3 to 500 tokens: greedy, sampled, streamed and abandoned."""

    def turn(number):
        ids = prompt(single, 3 + (number * 37) % 498, seed=number)
        settings = {"do_sample": number % 2 == 0, "max_new_tokens": 1 + number % 6, "eos_token_id": None}
        if number % 3:
            single.generate(ids, **settings)
        else:
            stream = single.stream_tokens(ids, **settings)
            next(stream)
            if number % 2:
                list(stream)

    def held():
        turn(498)
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    for number in range(250):
        turn(number)
    before = held()
    for number in range(250, 1000):
        turn(number)
    after = held()
    print(f"allocated and reserved after 250 turns {before}, after 1000 {after}")
    assert after[0] <= before[0] + SLACK and after[1] <= before[1] + 2 * MB


@pytest.fixture(scope="module")
def wide():
    """Return two layers of the real widths and vocabulary, in float16 with random weights."""
    from faster_chatglm_6b.configuration_chatglm import ChatGLMConfig
    from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration

    with torch.device("cuda"):
        model = ChatGLMForConditionalGeneration(ChatGLMConfig(num_layers=2)).half()
    model.tie_head()
    return model.eval()


# With "speculate", the steps of several positions run, too; the default only makes their buffers in so short an answer.
SAMPLERS = ({"do_sample": False}, {"do_sample": True, "top_k": 0, "top_p": 0.9}, {"do_sample": False, "speculate": 7})


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@pytest.mark.parametrize("lengths", [(20,), (2000,), (1000,) * 8, (300, 700) * 16], ids=lambda n: f"{len(n)}x{max(n)}")
def test_peak_memory_is_within_the_bound(wide, lengths, sampler):
    """Generation takes at most the cache and workspace that docs/questions.md states in addition to the weights."""
    before, batch, longest = settled(wide), len(lengths), max(lengths)
    inputs = padded(wide, lengths)
    torch.cuda.reset_peak_memory_stats()
    with expect(captured=1):
        wide.generate(**inputs, **sampler, max_new_tokens=8, eos_token_id=None)
    peak = torch.cuda.max_memory_allocated() - before
    cache = memory.cache_bytes(wide, session.rows_for(batch), session.capacity_for(longest + 8))
    bound = cache + memory.workspace_bytes(wide, batch, longest) + memory.draft_bytes(batch)
    print(
        f"{batch} x {longest}: peak {peak / MB:.0f} MiB, bound {bound / MB:.0f} MiB, of it cache {cache / MB:.0f} MiB"
    )
    assert memory.cache_bytes(wide, batch, longest) < peak <= bound
    assert len(loop.engine_of(wide)._sessions) == 1
