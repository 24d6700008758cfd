"""Checks of the captured loop against transformers' own loop, for the interpreter and the GPU alike.

Each takes a tiny golden model on its device and raises ``AssertionError``.
"""

import contextlib

import torch
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import faster_chatglm_6b
from faster_chatglm_6b.decoding.refusal import CannotServe
from faster_chatglm_6b.generation import paths
from faster_chatglm_6b.generation.processors import InvalidScoreLogitsProcessor


@contextlib.contextmanager
def plain_path():
    """Let only transformers' loop serve."""

    def refuse(*arguments):
        raise CannotServe("the test asks for the plain path")

    kept, paths.read_request = paths.read_request, refuse
    try:
        yield
    finally:
        paths.read_request = kept


def served():
    """Return how many generations the captured and the plain path have served."""
    status = faster_chatglm_6b.status()
    return sum(status.captured_generations.values()), sum(status.plain_generations.values())


@contextlib.contextmanager
def expect(captured=0, plain=0):
    """Check that exactly so many generations happen inside, on these paths."""
    before = served()
    yield
    after = served()
    assert (after[0] - before[0], after[1] - before[1]) == (captured, plain), faster_chatglm_6b.status()


def prompt(model, length, seed=0, batch=1):
    """Return random ids [batch, length] that end in ``[gMASK] <sop>``."""
    config = model.config
    text = torch.randint(5, 300, (batch, length - 2), generator=torch.Generator().manual_seed(seed))
    end = torch.tensor([[config.gmask_token_id, config.bos_token_id]]).expand(batch, 2)
    return torch.cat((text, end), dim=1).to(model.device)


def padded(model, lengths, seed=0):
    """Return prompts of several lengths, padded on the left, with their mask."""
    longest, pad = max(lengths), model.config.pad_token_id
    ids = torch.full((len(lengths), longest), pad, device=model.device)
    for row, length in enumerate(lengths):
        ids[row, longest - length :] = prompt(model, length, seed + row)[0]
    return {"input_ids": ids, "attention_mask": (ids != pad).long()}


def both(model, **kwargs):
    """Generate on each path in turn; the captured loop must really serve."""
    with expect(captured=1):
        ours = model.generate(**kwargs)
    with plain_path(), expect(plain=1):
        theirs = model.generate(**kwargs)
    assert ours.dtype == theirs.dtype and ours.device == theirs.device
    return ours.tolist(), theirs.tolist()


def check_equal(model, **kwargs):
    ours, theirs = both(model, do_sample=False, **kwargs)
    assert ours == theirs
    return ours


class Recorder(BaseStreamer):
    """Keep what a streamer is given."""

    def __init__(self):
        self.values, self.ended = [], False

    def put(self, value):
        assert value.device.type == "cpu"
        self.values.append(value.tolist())

    def end(self):
        self.ended = True


class StopAtLength(StoppingCriteria):
    """End row r after ``new`` + r tokens, and keep the ids that it was shown."""

    def __init__(self, length, new):
        self.length, self.new, self.seen = length, new, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.tolist())
        rows = torch.arange(input_ids.shape[0], device=input_ids.device)
        return input_ids.shape[1] - self.length >= self.new + rows


def golden_cases(model, cases, names):
    """Check that the captured loop gives the stock code's ids in recorded cases."""
    for name in names:
        case = cases[name]
        with expect(captured=1):
            output = model.generate(torch.tensor(case["prompt_ids"]).to(model.device), **case["kwargs"])
        assert output.tolist() == case["output_ids"], name


def greedy(model):
    for seed, length in enumerate((3, 9)):
        check_equal(model, input_ids=prompt(model, length, seed), max_new_tokens=5)


def one_token(model):
    """Check a single token, which comes from the prompt's logits alone, by ``max_new_tokens`` and ``max_length``."""
    ids = prompt(model, 5)
    assert len(check_equal(model, input_ids=ids, max_new_tokens=1)[0]) == 6
    assert len(check_equal(model, input_ids=ids, max_length=6)[0]) == 6


def left_padded_batch(model):
    inputs = padded(model, (4, 9, 6, 7, 5))
    ours = check_equal(model, **inputs, max_new_tokens=4, eos_token_id=None)
    single = check_equal(model, input_ids=prompt(model, 4, 0), max_new_tokens=4, eos_token_id=None)
    assert ours[0][9:] == single[0][4:]


def prompt_that_goes_on_behind_sop(model):
    """Check that tokens after ``<sop>`` belong to the answer, not to the context."""
    ids = torch.cat((prompt(model, 6), torch.tensor([[20, 30, 40]], device=model.device)), dim=1)
    check_equal(model, input_ids=ids, max_new_tokens=4)


def processors(model):
    inputs = padded(model, (4, 9), seed=50)
    check_equal(model, **inputs, max_new_tokens=5, repetition_penalty=1.5)
    ids = prompt(model, 9, batch=2)
    end = check_equal(model, input_ids=ids, max_new_tokens=4)[0][-1]
    check_equal(
        model,
        input_ids=ids,
        max_new_tokens=6,
        repetition_penalty=1.3,
        no_repeat_ngram_size=2,
        min_new_tokens=5,
        eos_token_id=[end, model.config.eos_token_id],
        logits_processor=LogitsProcessorList([InvalidScoreLogitsProcessor()]),
    )


def end_tokens(model):
    """Check that rows end at different steps and are padded, and that nothing follows the last end."""
    ids = prompt(model, 6, seed=3, batch=3)
    free = check_equal(model, input_ids=ids, max_new_tokens=6, eos_token_id=None)
    ends = sorted({free[0][8], free[1][7], free[2][9]})
    ours = check_equal(model, input_ids=ids, max_new_tokens=6, eos_token_id=ends)
    lengths = {next((i for i, token in enumerate(row[6:]) if token in ends), 6) for row in ours}
    assert len(lengths) > 1 and len(ours[0]) == 6 + max(lengths) + 1
    other_pad = check_equal(model, input_ids=ids, max_new_tokens=6, eos_token_id=ends, pad_token_id=7)
    pad = model.config.pad_token_id
    assert other_pad == [[7 if token == pad else token for token in row] for row in ours] != ours


def streams(model):
    ids = prompt(model, 6, seed=3, batch=2)
    end = check_equal(model, input_ids=ids, max_new_tokens=5, eos_token_id=None)[0][8]
    settings = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": end}
    recorder = Recorder()
    with expect(captured=2):
        whole = model.generate(ids, streamer=recorder, **settings)
        tokens = list(model.stream_tokens(ids, **settings))
    assert recorder.ended and recorder.values[0] == ids.tolist()
    assert recorder.values[1:] == whole[:, 6:].T.tolist() == [token.tolist() for token in tokens]
    assert all(token.dtype == torch.int64 and token.device.type == "cpu" for token in tokens)


def host_criteria(model):
    """Check that criteria without a kernel see the ids so far, as in transformers' loop, and end rows one by one."""
    ids = prompt(model, 6, seed=3, batch=3)
    seen = []
    for captured in (True, False):
        criterion = StopAtLength(6, 2)
        with contextlib.nullcontext() if captured else plain_path():
            output = model.generate(
                ids, do_sample=False, max_new_tokens=6, stopping_criteria=StoppingCriteriaList([criterion])
            )
        seen.append((output.tolist(), criterion.seen))
    assert seen[0] == seen[1]
    assert len(seen[0][0][0]) == 6 + 4


SAMPLERS = ({"top_k": 50, "top_p": 0.7, "temperature": 1.5}, {"top_k": 0, "top_p": 0.9, "temperature": 1.5})


def seeds(model, samplers=SAMPLERS, batch=1):
    """Check that ``torch.manual_seed`` and a generator make runs repeatable and greedy search draws nothing."""
    ids = prompt(model, 4, batch=batch)
    for sampler in samplers:
        settings = {"do_sample": True, "max_new_tokens": 3, "eos_token_id": None, **sampler}
        runs = []
        for seed in (1, 1, 4):
            torch.manual_seed(seed)
            with expect(captured=1):
                runs.append(model.generate(ids, **settings).tolist())
        assert runs[0] == runs[1] != runs[2], (sampler, runs)
    settings |= samplers[0]
    generator, state = torch.Generator().manual_seed(3), torch.get_rng_state()
    first = model.generate(ids, **settings, generator=generator).tolist()
    second = model.generate(ids, **settings, generator=generator).tolist()
    again = model.generate(ids, **settings, generator=torch.Generator().manual_seed(3)).tolist()
    assert first == again != second and torch.equal(state, torch.get_rng_state())
    model.generate(ids, do_sample=False, max_new_tokens=2)
    assert torch.equal(state, torch.get_rng_state())
    with plain_path():
        plain = [model.generate(ids, **settings, generator=torch.Generator().manual_seed(3)).tolist() for _ in range(2)]
    assert plain[0] == plain[1]


def states_and_guidance(model):
    """Check which loop serves states, guidance and caches of fixed size.

    transformers' loop puts states out, and only in a dict. Without a dict they are not asked for, so ours serves.
    """
    ids = prompt(model, 5)
    settings = {"do_sample": False, "max_new_tokens": 2, "eos_token_id": None}
    asked = {"output_hidden_states": True, "output_attentions": True}
    with expect(plain=2):
        output = model.generate(ids, **settings, **asked, return_dict_in_generate=True)
        guided = model.generate(ids, **settings, guidance_scale=1.5)
    # All in one call, because each of these settings alone could send it to transformers' loop.
    with expect(captured=1):
        ours = model.generate(ids, **settings, **asked, prefill_chunk_size=2, cache_implementation="static")
    assert ours.tolist() == output.sequences.tolist() and guided.shape == ours.shape
    assert [len(step) for step in output.hidden_states] == [model.config.num_layers + 1] * 2
    assert [step[0].shape[1:] for step in output.attentions] == [(5, 5), (1, 6)]
    reasons = faster_chatglm_6b.status().plain_generations
    assert [why for why in reasons if "return_dict_in_generate" in why] and [
        why for why in reasons if "Guidance" in why
    ]


EVERYWHERE = (
    states_and_guidance,
    greedy,
    one_token,
    left_padded_batch,
    prompt_that_goes_on_behind_sop,
    processors,
    end_tokens,
    streams,
    host_criteria,
    seeds,
)
