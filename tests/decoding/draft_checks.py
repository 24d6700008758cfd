"""Checks of speculation against the loop without it, for the interpreter and the GPU alike.

Most run a ``Babbler`` in place of the network: ids that repeat themselves for a while, in no time. Each check takes a
tiny golden model on its device and raises ``AssertionError``.
"""

import contextlib
from unittest import mock

import torch
from loop_checks import Recorder, StopAtLength, expect, padded, prompt
from sampling_checks import assert_distribution
from transformers import LogitsProcessorList, StoppingCriteriaList

from faster_chatglm_6b.decoding import loop, session, speculation
from faster_chatglm_6b.decoding.steps.decode import DecodeStep
from faster_chatglm_6b.decoding.steps.prompt import PromptStep
from faster_chatglm_6b.generation.processors import InvalidScoreLogitsProcessor
from faster_chatglm_6b.ops.steps import step_kernels

STATES, FIRST_ID, LAST_ID = 61, 10, 22


class Babbler:
    """Give logits by the last two ids, the third one and the place. It keeps ids in slots as a network keeps its keys.

    Args:
        free: give the same logits after any ids.
    """

    def __init__(self, model, seed=0, free=False):
        draw = torch.Generator().manual_seed(seed)
        table = torch.full((STATES, model.lm_head.weight.shape[0]), -30.0)
        table[:, FIRST_ID:LAST_ID] = 3 * torch.randn(STATES, LAST_ID - FIRST_ID, generator=draw)
        self.table, self.free, self.slots = table.to(model.device), free, {}

    def held(self, step):
        """Return the ids in the slots of a step's sequences."""
        if step.cache not in self.slots:
            # A key that no token has written yet would show.
            shape = step.cache.storage.shape[2], step.capacity + 32
            self.slots[step.cache] = torch.full(shape, 7919, device=self.table.device)
        return self.slots[step.cache]

    def logits(self, step, tokens, length):
        batch, rows = tokens.shape
        slots = self.held(step)
        places = length.long()[:batch, None] + torch.arange(rows, device=tokens.device)
        slots[:batch].scatter_(1, places, tokens)
        last, before = (slots[:batch].gather(1, (places - back).clamp(min=0)) for back in (0, 1))
        # The third id is one of the prompt's, or its padding.
        state = (last * 31 + before * 17 + slots[:batch, 2:3] * 5 + (places % 13 == 0)) % STATES
        return self.table[state * (not self.free)]

    def run(self, step, model, tokens, length, most_keys):
        rows = getattr(step, "positions", 1)
        step.logits.view(-1, rows, step.vocab_size).copy_(self.logits(step, tokens.view(-1, rows), length))
        return step.logits

    def run_prompt(self, step, model, ids, cache_length, most_keys):
        # A graph's prompts are padded on the right.
        decode, last = step._decode, cache_length.long()[: len(ids), None, None]
        logits = self.logits(decode, ids, torch.zeros_like(cache_length[: len(ids)]))
        decode.logits[: len(ids)].copy_(logits.gather(1, last.expand(-1, 1, logits.shape[2]))[:, 0])
        return decode.logits

    @contextlib.contextmanager
    def in_place(self, model):
        """Let the babbler compute in place of the network, in sessions of its own."""
        model.release_cache()
        prompts = mock.patch.object(PromptStep, "run", lambda *arguments: self.run_prompt(*arguments))
        tokens = mock.patch.object(DecodeStep, "run", lambda *arguments: self.run(*arguments))
        # The interpreter takes long for each row of a sampler, and has checks of its own for those.
        quick = contextlib.nullcontext()
        if model.device.type != "cuda":
            quick = mock.patch.object(step_kernels(model.device), "greedy_sample", quick_greedy)
        try:
            with prompts, tokens, quick:
                yield
        finally:
            model.release_cache()


def quick_greedy(scores, state, **options):
    """Do what ``greedy_sample`` does, without a kernel."""
    done, rows = state.finished != 0, torch.arange(len(scores), device=scores.device)
    token = torch.where(done, state.pad_id, scores.argmax(-1))
    fits = state.ids_length < state.ids.shape[1]
    state.ids[rows[fits], state.ids_length[fits].long()] = token[fits]
    state.ring[int(state.turn) % len(state.ring)] = token
    for count in (state.ids_length, state.cache_length, state.step, state.turn):
        count += 1
    state.finished |= (state.eos_ids == token[:, None]).any(1) | (state.ids_length >= state.limit)
    state.tokens.copy_(token)


@contextlib.contextmanager
def turns():
    """Count what is queued inside: turns of one token, of 1 + k positions, and reports read."""
    counts = {"one": 0, "several": 0, "read": 0}

    def counted(owner, name, kind):
        normal = getattr(owner, name)

        def run(self, *arguments, **kwargs):
            counts[kind] += 1
            return normal(self, *arguments, **kwargs)

        return mock.patch.object(owner, name, run)

    # Graphs are replayed without a call of these, so every turn is counted where it is chosen.
    normal = session.StepGraphs.run

    def choose(self, key, step, counter):
        counts["several" if key[-1] == "drafts" else "one"] += 1
        return normal(self, key, step, counter)

    with mock.patch.object(session.StepGraphs, "run", choose), counted(speculation.Speculation, "read", "read"):
        yield counts


def answers(model, speculate, **kwargs):
    with expect(captured=1):
        return model.generate(**kwargs, speculate=speculate).tolist()


def same_with_drafts(model, kinds=(3, 7, "auto"), **kwargs):
    """Check that drafts change no token, and return the answers and the turns that each kind took."""
    expected, counts = answers(model, 0, **kwargs), []
    for kind in kinds:
        with turns() as count:
            assert answers(model, kind, **kwargs) == expected, kind
        counts.append(count)
    return expected, counts


# Seeds and lengths of prompts after which the babble soon repeats itself.
REPEATING = ((45, 3), (26, 13))


def babble_is_the_same(model, babbles=REPEATING, new=36):
    """Check prompts of several lengths: fewer turns than tokens, and the same tokens."""
    taken = {3: 0, 7: 0, "auto": 0}
    for seed, length in babbles:
        with Babbler(model, seed).in_place(model):
            ids = prompt(model, length, seed)
            _, counts = same_with_drafts(
                model, tuple(taken), input_ids=ids, do_sample=False, max_new_tokens=new, eos_token_id=None
            )
        for kind, count in zip(taken, counts, strict=True):
            taken[kind] += count["read"]
            assert not count["one"] or kind == "auto"
    assert taken[7] < taken[3] < taken["auto"] < new * len(babbles), taken


def babble_in_batches(model, lengths=(4, 11, 9), new=20):
    """Check padded batches whose rows run at paces of their own, end inside drafts, and stream."""
    with Babbler(model, 3).in_place(model):
        inputs, longest = padded(model, lengths), max(lengths)
        free, (count,) = same_with_drafts(model, (7,), **inputs, do_sample=False, max_new_tokens=new, eos_token_id=None)
        assert count["read"] < new and count["several"] <= new
        found = [row[longest:] for row in free]
        first = {token: [(row + [token]).index(token) for row in found] for token in sum(found, [])}
        # Rows end as far from each other as this babble lets them.
        end = max(first, key=lambda token: max(first[token]) - min(first[token]))
        assert max(first[end]) > 3 + min(first[end]), first
        settings = {"do_sample": False, "max_new_tokens": new, "eos_token_id": end}
        ended = answers(model, 0, **inputs, **settings)
        recorder = Recorder()
        with expect(captured=2):
            model.generate(**inputs, **settings, speculate=7, streamer=recorder)
            tokens = list(model.stream_tokens(**inputs, **settings, speculate="auto"))
        columns = [list(column) for column in zip(*(row[longest:] for row in ended), strict=True)]
        assert recorder.ended and recorder.values[1:] == columns == [token.tolist() for token in tokens]
        last = list(model.stream_generate(**inputs, **settings, speculate=3))[-1]
        assert last.tolist() == ended


def limits_inside_a_draft(model):
    """Check every length of an answer, up to the session's last slot."""
    with Babbler(model, 1).in_place(model):
        ids = prompt(model, 5)
        whole = answers(model, 0, input_ids=ids, do_sample=False, max_new_tokens=30, eos_token_id=None)
        for new in (1, 2, 8, 9, 17):
            cut = answers(model, 7, input_ids=ids, do_sample=False, max_length=5 + new, eos_token_id=None)
            assert cut == [whole[0][: 5 + new]], new
        # The cache ends with the answer.
        with mock.patch.object(session, "_SMALLEST_CAPACITY", 16):
            model.release_cache()
            cut = answers(model, 7, input_ids=ids, do_sample=False, max_length=16, eos_token_id=None)
            assert loop.engine_of(model)._sessions[1].capacity == 16
        assert cut == [whole[0][:16]]
        for end in range(2):
            settings = {"input_ids": ids, "do_sample": False, "max_new_tokens": 30, "eos_token_id": whole[0][15 + end]}
            same_with_drafts(model, (7,), **settings)


# One launch each; the third needs seconds for a sort in the interpreter, and the last one six launches more.
SAMPLERS = ({"top_k": 0, "top_p": 1.0}, {"top_k": 5}, {"top_k": 0, "top_p": 0.9})


def seeds_with_drafts(model, samplers=SAMPLERS[:1], kinds=(3,), new=10, lengths=(6,)):
    """Check that sampled answers of one seed are the same with and without drafts."""
    with Babbler(model, 2).in_place(model):
        settings = {**padded(model, lengths), "do_sample": True, "max_new_tokens": new, "eos_token_id": None}
        for sampler in samplers:
            answered = []
            for seed in (1, 2):
                torch.manual_seed(seed)
                answered.append(answers(model, 0, **settings, **sampler, temperature=0.4))
                told = torch.tensor(answered[-1], device=model.device)
                for kind in kinds:
                    # A graph would go on with the drafts that it was captured with.
                    model.release_cache()
                    torch.manual_seed(seed)
                    with turns() as count, drafts_from(told):
                        assert answers(model, kind, **settings, **sampler, temperature=0.4) == answered[-1], sampler
                    assert kind == "auto" or count["read"] <= 1 + -(-new // (1 + kind)), (sampler, count)
            assert answered[0] != answered[1]


def distribution_with_drafts(model, tokens=300):
    """Check by a chi-square test that tokens that come by drafts are distributed as the logits say."""
    babbler = Babbler(model, 5, free=True)
    babbler.table[:, FIRST_ID + 3 :] = -30.0
    babbler.table[:, FIRST_ID : FIRST_ID + 3] = torch.tensor([0.0, 0.7, 1.4])
    babbler.table[:, :FIRST_ID] = -30.0
    torch.manual_seed(11)
    with babbler.in_place(model):
        with turns() as count:
            settings = {"do_sample": True, "max_new_tokens": tokens, "eos_token_id": None, "top_k": 0}
            ids = prompt(model, 8, batch=4)
            output = answers(model, 3, input_ids=ids, **settings)
    assert count["read"] < tokens
    drawn = torch.tensor(output)[:, 8:].flatten()
    counts = torch.bincount(drawn, minlength=babbler.table.shape[1])
    assert_distribution(counts, babbler.table[0].double().softmax(-1).cpu())


def who_goes_without_drafts(model):
    """Check that processors, criteria of the caller's own and large batches get no drafts; wrong values are refused."""
    ids = prompt(model, 6)
    settings = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
    with Babbler(model).in_place(model):
        stop = StoppingCriteriaList([StopAtLength(6, 3)])
        for given, some in (
            ({"repetition_penalty": 1.3}, False),
            ({"no_repeat_ngram_size": 3}, False),
            ({"min_new_tokens": 3, "eos_token_id": 5}, False),
            ({"stopping_criteria": stop}, False),
            ({"logits_processor": LogitsProcessorList([InvalidScoreLogitsProcessor()])}, True),
        ):
            with turns() as count:
                assert answers(model, 7, input_ids=ids, **settings | given) == answers(
                    model, 0, input_ids=ids, **settings | given
                )
            assert bool(count["several"]) == some, given
        with turns() as count:
            answers(model, 7, input_ids=ids.expand(5, -1), **settings | {"max_new_tokens": 3})
            assert [*loop.engine_of(model)._sessions.values()][-1]._speculation.rows == 4
            answers(model, 7, input_ids=ids.expand(17, -1), **settings | {"max_new_tokens": 2})
        assert [*loop.engine_of(model)._sessions.values()][-1]._speculation is None
        for wrong in (1, -3, "yes", 8.0, [3]):
            try:
                model.generate(ids, **settings, speculate=wrong)
            except ValueError as error:
                assert "pass one of those, or 'auto'" in str(error)
            else:
                raise AssertionError(wrong)


def prompt_lookup(model):
    """Check that transformers' own argument for drafts is served by the loop."""
    ids = prompt(model, 6)
    settings = {"input_ids": ids, "do_sample": False, "max_new_tokens": 16, "eos_token_id": None}
    with Babbler(model, 4).in_place(model):
        expected = answers(model, 0, **settings)
        for asked, rows in ((2, 4), (10, 8)):
            recorder = Recorder()
            with turns() as count, expect(captured=1):
                output = model.generate(**settings, prompt_lookup_num_tokens=asked, streamer=recorder)
            assert output.tolist() == expected and count["several"] and not count["one"]
            assert [ids.tolist(), *([token] for token in expected[0][6:])] == recorder.values
            assert loop.engine_of(model)._sessions[1]._speculation.rows == rows
        # transformers 4.57 looks prompts up only if there is an id that ends answers.
        settings["eos_token_id"] = model.config.vocab_size - 1
        with expect(plain=1):
            plain = model.generate(**settings, prompt_lookup_num_tokens=3, return_dict_in_generate=True)
        assert plain.sequences.shape == output.shape


@contextlib.contextmanager
def drafts_from(answer, wrong=()):
    """Draft the ids of ``answer`` [B, T], but for the columns ``wrong``, which get another id."""
    told = answer.clone()
    for column in wrong:
        told[:, column] = 7
    normal = step_kernels(answer.device).propose

    def propose(state, drafts, **options):
        normal(state, drafts, **options)
        batch, rows = told.shape[0], drafts.tokens.shape[1]
        columns = state.ids_length.long()[:batch, None] + torch.arange(rows - 1, device=told.device)
        drafts.tokens[:batch, 1:] = told.gather(1, columns.clamp(max=told.shape[1] - 1))
        drafts.count.fill_(rows - 1)

    with mock.patch.object(step_kernels(answer.device), "propose", propose):
        yield


def drafts_through_the_network(model, lengths=(6,), new=5, kinds=(3,), all_wrong=False):
    """Check the network's own tokens after drafts that are right, wrong here and there, and wrong everywhere."""
    inputs = padded(model, lengths)
    settings = {**inputs, "do_sample": False, "max_new_tokens": new, "eos_token_id": None}
    expected = answers(model, 0, **settings)
    answer, longest = torch.tensor(expected, device=model.device), max(lengths)
    for kind in kinds:
        for wrong in [(longest + 2,), *([range(longest, longest + new)] if all_wrong else [])]:
            model.release_cache()
            with drafts_from(answer, wrong), turns() as count:
                assert answers(model, kind, **settings) == expected, (kind, wrong)
            # A wrong id costs the rest of its draft.
            most = new if len(wrong) > 1 else 3 + -(-new // (1 + kind))
            assert count["read"] <= most, (kind, wrong, count)
    model.release_cache()


EVERYWHERE = (
    babble_is_the_same,
    babble_in_batches,
    limits_inside_a_draft,
    seeds_with_drafts,
    who_goes_without_drafts,
    prompt_lookup,
    drafts_through_the_network,
)
