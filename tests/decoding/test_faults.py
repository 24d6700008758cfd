"""Faults on the plain path, and interrupts at every line of the captured loop's bookkeeping; no kernel runs here."""

import gc
import subprocess
import sys
import textwrap
import threading
import tracemalloc
import weakref
from types import SimpleNamespace

import pytest
import torch
from interrupts import InterruptBefore
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from faster_chatglm_6b.decoding import early, engine, loop, memory
from faster_chatglm_6b.decoding.refusal import CannotServe

GREEDY = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
PROMPT = torch.tensor([[5, 143, 90, 91, 321, 324]])


class Injected(Exception):
    """An error that a test raises in the middle of something."""


def out_of_memory(*arguments, **kwargs):
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 GiB.")


class Streamer(BaseStreamer):
    def __init__(self, error):
        self.error, self.count = error, 0

    def put(self, value):
        self.count += 1
        if self.count == 3:
            raise self.error

    def end(self):
        pass


class Processor(LogitsProcessor):
    def __init__(self, error):
        self.error = error

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] == PROMPT.shape[1] + 2:
            raise self.error
        return scores


class Criterion(StoppingCriteria):
    def __init__(self, error):
        self.error = error

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] == PROMPT.shape[1] + 2:
            raise self.error
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


WAYS = {
    "streamer": lambda error: {"streamer": Streamer(error)},
    "processor": lambda error: {"logits_processor": LogitsProcessorList([Processor(error)])},
    "criterion": lambda error: {"stopping_criteria": StoppingCriteriaList([Criterion(error)])},
}


@pytest.mark.parametrize("error", [Injected(), KeyboardInterrupt()], ids=["exception", "interrupt"])
@pytest.mark.parametrize("way", WAYS)
def test_exception_in_the_callers_code(tiny_model, way, error):
    """The error comes out unchanged, from ``generate`` and from a stream, and the next answer is right."""
    expected = tiny_model.generate(PROMPT, **GREEDY).tolist()
    with pytest.raises(type(error)):
        tiny_model.generate(PROMPT, **GREEDY, **WAYS[way](error))
    with pytest.raises(type(error)):
        list(tiny_model.stream_tokens(PROMPT, **GREEDY, **WAYS[way](error)))
    assert tiny_model.generate(PROMPT, **GREEDY).tolist() == expected
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("way", ["dropped", "closed", "raised", "interrupted"])
def test_abandoned_stream_chat(tiny_model, tiny_tokenizer, way):
    settings = {"do_sample": False, "max_length": 40}
    expected = tiny_model.chat(tiny_tokenizer, "你好", **settings)
    stream = tiny_model.stream_chat(tiny_tokenizer, "你好", **settings)
    next(stream)
    if way == "closed":
        stream.close()
    elif way in ("raised", "interrupted"):
        error = Injected if way == "raised" else KeyboardInterrupt
        with pytest.raises(error):
            for _ in stream:
                raise error
    del stream
    assert tiny_model.chat(tiny_tokenizer, "你好", **settings) == expected


def test_two_threads_chat_on_one_model(tiny_model, tiny_tokenizer):
    queries, settings = ["你好", "晚上睡不着怎么办", "hello"], {"do_sample": False, "max_length": 48}
    expected = [tiny_model.chat(tiny_tokenizer, query, **settings) for query in queries]
    answers = [[] for _ in queries]

    def talk(index):
        for _ in range(2):
            answers[index].append(tiny_model.chat(tiny_tokenizer, queries[index], **settings))
            answers[index].append(list(tiny_model.stream_chat(tiny_tokenizer, queries[index], **settings))[-1])

    threads = [threading.Thread(target=talk, args=(index,)) for index in range(len(queries))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert answers == [[answer] * 4 for answer in expected]


class StandInSession:
    """Count up instead of computing, because the test is about the bookkeeping around it."""

    graphs = SimpleNamespace(capture_failed=False)

    def __init__(self, model, rows, capacity):
        self.rows, self.capacity, self.bytes, self.launched = rows, capacity, 0, 0

    def start_early(self, model, input_ids, layout):
        pass

    def begin(self, model, request, seed):
        self.launched = 1

    def lacks(self, index, limit):
        return self.launched < min(index + 4, limit)

    def advance(self, model):
        self.launched += 1

    def read(self, index):
        return torch.tensor([10 + index])

    def wait(self):
        pass


@pytest.fixture
def stand_in(monkeypatch):
    """Return a model without weights that the captured loop takes, and a request of four tokens."""
    monkeypatch.setattr(loop, "check_model", lambda model: ("key",))
    monkeypatch.setattr(engine, "check_sizes", lambda model: None)
    monkeypatch.setattr(engine, "Session", StandInSession)
    model = SimpleNamespace(lm_head=torch.nn.Embedding(1, 1))
    model.parameters = model.lm_head.parameters
    model.config = SimpleNamespace(num_layers=1, hidden_size=1, pre_seq_len=None)
    model.transformer = SimpleNamespace(word_embeddings=model.lm_head)
    request = SimpleNamespace(
        input_ids=PROMPT, max_length=PROMPT.shape[1] + 4, eos_ids=(), has_end=False, host_criteria=None
    )
    request.do_sample, request.seed = False, lambda: torch.zeros(1)
    return model, request


def test_interrupt_at_every_line(stand_in):
    """After an interrupt before any line of decoding/loop.py, engine.py or early.py, the model answers at once."""
    model, request = stand_in
    expected = [10, 11, 12, 13]

    def run_until(stop):
        """Tell whether the answer was finished before line number ``stop`` of the run."""
        try:
            with InterruptBefore(stop, (loop.__file__, engine.__file__, early.__file__)):
                early.start_early(model, PROMPT, None)
                return [int(token) for token in loop.captured_tokens(model, request)] == expected
        except KeyboardInterrupt:
            return False

    stop = 1
    while not run_until(stop):
        assert not loop.engine_of(model).lock.locked(), stop
        assert [int(token) for token in loop.captured_tokens(model, request)] == expected, stop
        stop += 1
    assert stop > 100


def test_a_thread_that_holds_the_model_is_not_left_waiting_for_itself(stand_in):
    model, request = stand_in
    stream = loop.captured_tokens(model, request)
    next(stream)
    with pytest.raises(CannotServe, match="another stream of this thread is open"):
        next(loop.captured_tokens(model, request))
    stream.close()
    assert len(list(loop.captured_tokens(model, request))) == 4


@pytest.mark.parametrize("step", [0, 2], ids=["prompt", "later token"])
def test_out_of_memory_on_the_plain_path(tiny_model, monkeypatch, step):
    """The error says what was asked for, what it takes, what is free and what fits; the next answer is right."""
    expected = tiny_model.generate(PROMPT, **GREEDY).tolist()
    normal, calls = type(tiny_model.transformer).forward, []

    def short(self, *arguments, **kwargs):
        calls.append(1)
        return out_of_memory() if len(calls) == step + 1 else normal(self, *arguments, **kwargs)

    monkeypatch.setattr(memory, "free_bytes", lambda device: 9 * 3072 + memory.workspace_bytes(tiny_model, 2, 6))
    ids = PROMPT.repeat(2, 1)
    asked = (
        r"Out of memory on cpu: 2 sequences of up to 12 tokens \(6 of them the prompt\) need 72.0 KiB for keys and "
        r"values and up to .* to compute with beside the weights, and .* are free; about .* would fit"
    )
    beams = {**GREEDY, "num_beams": 2}
    with monkeypatch.context() as patch:
        patch.setattr(type(tiny_model.transformer), "forward", short)
        for call in (
            lambda: tiny_model.generate(ids, **GREEDY),
            lambda: list(tiny_model.stream_tokens(ids, **GREEDY)),
            lambda: tiny_model.generate(PROMPT, **beams),
        ):
            calls.clear()
            with pytest.raises(torch.cuda.OutOfMemoryError, match=asked):
                call()
    assert tiny_model.generate(PROMPT, **GREEDY).tolist() == expected


def test_what_would_fit_fits(tiny_model):
    """By the error's own estimate, the numbers that it names fit into the free memory, and one token more does not."""
    for batch, prompt, total, free in ((1, 20, 10**6, 2**28), (64, 20, 4000, 2**28), (8, 900, 5000, 2**27)):
        tokens = memory.most_tokens(tiny_model, batch, prompt, free)
        sequences = memory.most_sequences(tiny_model, prompt, total, free)
        per_token = memory._bytes_per_token(tiny_model, 1)

        def needed(batch, total, prompt=prompt, per_token=per_token):
            return memory.workspace_bytes(tiny_model, batch, prompt) + batch * total * per_token

        assert needed(batch, tokens) <= free or tokens == 0
        assert needed(batch, tokens + 1) > free
        assert sequences == 0 or needed(sequences, total) <= free
        text = memory.what_fits(tiny_model, batch, prompt, total, free)
        assert (f"{tokens} tokens each" in text) == (tokens > prompt)
        assert (f"{sequences} sequence" in text) == (batch > 1 and sequences > 0)
    assert "not even one such prompt fits" in memory.what_fits(tiny_model, 1, 2000, 2048, 2**20)
    assert "something else took memory" in memory.what_fits(tiny_model, 1, 20, 40, 2**40)


def test_other_errors_are_left_alone(tiny_model, monkeypatch):
    def fail(*arguments, **kwargs):
        raise RuntimeError("The size of tensor a must match")

    monkeypatch.setattr(type(tiny_model.transformer), "forward", fail)
    with pytest.raises(RuntimeError, match="^The size of tensor a must match$"):
        tiny_model.generate(PROMPT, **GREEDY)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"stream": True}], ids=["search", "beams", "stream"])
def test_the_error_holds_no_memory(tiny_model, monkeypatch, settings):
    """A kept exception holds neither the activations nor the cache of the failed run."""
    normal, held = type(tiny_model.transformer).forward, []

    def short(self, *arguments, **kwargs):
        outputs = normal(self, *arguments, **kwargs)
        if len(held) == 3:
            activation = torch.zeros(10)
            cache = outputs.past_key_values
            keys = cache.layers[0].keys if hasattr(cache, "layers") else cache.key_cache[0]
            held.extend(map(weakref.ref, (activation, keys, cache)))
            out_of_memory()
        held.append(None)
        return outputs

    arguments, masks, seen = type(tiny_model)._prompt_arguments, [], []

    def noting(self, *given):
        kwargs = arguments(self, *given)
        masks.append(weakref.ref(kwargs["attention_mask"]))
        return kwargs

    def free(device):
        seen.append([reference() is None for reference in held[3:]])
        return 2**20

    monkeypatch.setattr(type(tiny_model), "_prompt_arguments", noting)
    monkeypatch.setattr(memory, "free_bytes", free)
    monkeypatch.setattr(type(tiny_model.transformer), "forward", short)
    with pytest.raises(torch.cuda.OutOfMemoryError, match="would") as caught:
        if "stream" in settings:
            list(tiny_model.stream_tokens(PROMPT, **GREEDY))
        else:
            tiny_model.generate(PROMPT, **GREEDY, **settings)
    gc.collect()
    assert caught.value.__cause__ is not None
    assert len(held) == 6 and [reference() for reference in held[3:]] == [None] * 3
    assert len(masks) == 1 and masks[0]() is None
    # The error's estimate counts the memory that is free after all this is gone.
    assert seen[-1] == [True] * 3


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the address space is limited by Linux' RLIMIT_AS")
def test_real_out_of_memory_on_a_cpu(tiny_dir):
    """The process goes on after torch's allocator really fails, with a few hundred MB left to it."""
    script = """
        import re, resource, sys
        import torch
        from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration
        torch.set_num_threads(1)
        model = ChatGLMForConditionalGeneration.from_pretrained(sys.argv[1]).float().eval()
        ids = torch.tensor([[5, 143, 321, 324]])
        expected = model.generate(ids, do_sample=False, max_new_tokens=4).tolist()
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 2**28, size + 2**28))
        many = torch.cat((torch.full((64, 1000), 9), ids[:, 2:].expand(64, 2)), dim=1)
        try:
            model.generate(many, do_sample=False, max_new_tokens=2)
        except torch.cuda.OutOfMemoryError as error:
            print(error)
            fits = int(re.search("about ([0-9]+) sequences", str(error))[1])
            assert 1 < fits < 64
            model.generate(many[:fits], do_sample=False, max_new_tokens=2)
            assert model.generate(ids, do_sample=False, max_new_tokens=4).tolist() == expected
            print("goes on")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tiny_dir)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "64 sequences of up to 1004 tokens (1002 of them the prompt)" in done.stdout
    assert done.stdout.endswith("goes on\n")


def test_turns_leave_no_memory_behind(tiny_model, tiny_tokenizer):
    """Python objects and their memory stay flat over sixty turns of mixed lengths, some of them abandoned."""
    queries = ["你好", "晚上睡不着怎么办？" * 3, "hello " * 20, "a"]

    def turns(count):
        for turn in range(count):
            query, settings = queries[turn % 4], {"do_sample": turn % 2 == 0, "max_new_tokens": 1 + turn % 5}
            if turn % 3:
                tiny_model.chat(tiny_tokenizer, query, **settings)
            else:
                stream = tiny_model.stream_chat(tiny_tokenizer, query, **settings)
                next(stream)
                del stream

    def tensors():
        gc.collect()
        return sum(issubclass(type(value), torch.Tensor) for value in gc.get_objects())

    turns(12)
    count = tensors()
    tracemalloc.start()
    try:
        turns(12)
        before, _ = tracemalloc.get_traced_memory()
        turns(60)
        assert tensors() == count
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 64 << 10, after - before


def test_a_prompt_keeps_no_layers_input(tiny_model):
    """Layers' inputs live only with ``output_hidden_states``; 28 would be most of a long prompt's memory."""
    alive, inputs = [], []

    def note(layer, arguments):
        inputs.append(weakref.ref(arguments[0]))
        alive.append(sum(reference() is not None for reference in inputs))

    handles = [layer.register_forward_pre_hook(note) for layer in tiny_model.transformer.layers]
    try:
        with torch.no_grad():
            tiny_model(PROMPT)
            assert alive == [1] * len(handles)
            alive.clear()
            inputs.clear()
            assert len(tiny_model(PROMPT, output_hidden_states=True).hidden_states) == len(handles) + 1
            assert alive == list(range(1, len(handles) + 1))
    finally:
        for handle in handles:
            handle.remove()
