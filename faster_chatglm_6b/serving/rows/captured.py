"""Rows in the captured loop: all of a running batch in one step, whose graph is replayed.

Keys and values lie in pages. A new row's prompt fills its pages but for the last token. That one goes through the next
step together with the other rows, so the first token of an answer comes from the same kernels as the others.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...decoding.graphs import StepGraphs
from ...decoding.loop import engine_of
from ...decoding.numbers import RequestNumbers
from ...decoding.refusal import CannotServe, check_model, check_sizes
from ...decoding.request import SamplingPlan
from ...decoding.sampler import Sampler
from ...decoding.session import ROW_BUCKETS, key_bucket, rows_for
from ...decoding.steps.decode import DecodeStep
from ...decoding.steps.kv_cache import PagedKVCache
from ...decoding.steps.packed_prompt import PackedPromptStep
from ...decoding.steps.prompt import LENGTHS
from ...network.prompt_layout import PromptLayout
from ...ops.states import DecodeState
from ...ops.steps import step_kernels
from .choice import scores_not_finite
from .drafting import Drafting, DraftTurn
from .interface import Logprobs, NewRow, RowFailure, RowRequest, RowToken
from .row_numbers import INVALID, MOST_END_TOKENS, more_numbers, sampling_plan, write_row

PAGE_TOKENS = 64
# Prompts of up to so many tokens in all go through the model together; the scheduler admits no more at once.
PROMPT_TOKENS = 2048
# Steps that may be queued on the device before the host has read their tokens. More would make new rows wait longer:
# the prompts of others stand between them and their first token.
_LOOKAHEAD = 1
_RING_ROWS = 4
_MOST_GRAPHS, _MORE_FOR_DRAFTS = 64, 32
# Long enough that a thread which waits for the model wakes up and takes it.
_BREATH = 1e-4


@dataclass(eq=False)
class _Row:
    """A row as the host knows it: at least ``launched`` tokens are queued or computed, ``read`` were returned."""

    request: RowRequest
    prompt: int
    launched: int = 0
    read: int = 0
    has_ended: bool = False


@dataclass
class _Step:
    """A queued step: the rows that take part, and where their tokens, or the report of a turn with drafts, will be."""

    ring: torch.Tensor
    rows: list[tuple[int, _Row]]
    drafts: DraftTurn | None = None
    done: torch.cuda.Event | None = None
    logprobs: dict[int, tuple[torch.Tensor, ...]] = field(default_factory=dict)


class CapturedRows:
    """``Rows`` on the kernels of the captured loop, for a model that ``refusal.check_model`` accepts.

    Every row's random numbers come from its seed and the index of its token. So a seeded answer does not depend on the
    rows beside it, but for ties that another number of rows breaks otherwise.

    Args:
        model: a ``ChatGLMForConditionalGeneration``.
        rows: most rows at once.
        pages: pages of keys and values, or None if ``place_pages`` says later how many there are.
        speculate: ids that a step drafts for each of a few rows, as of ``generate``: 0, 3, 7 or "auto".

    Raises:
        CannotServe: the captured loop cannot run the model.
        RuntimeError: memory is too short.
    """

    def __init__(self, model: Any, rows: int, pages: int | None = None, speculate: int | str = 0):
        self._key = check_model(model)
        check_sizes(model)
        if not model.config.position_encoding_2d:
            raise CannotServe("position_encoding_2d is False")
        config, self.device = model.config, model.lm_head.weight.device
        kernels = step_kernels(self.device)
        if speculate == "auto" and not kernels.DRAFTS_PAY:
            speculate = 0
        self._model, self._lock = model, engine_of(model)
        self.rows, self.page_tokens = rows, PAGE_TOKENS
        self._captures = kernels.CAPTURES
        # A CPU computes a step when it is asked for.
        self._lookahead = _LOOKAHEAD if self._captures else 0
        self._prefix, self._longest = config.pre_seq_len or 0, config.max_sequence_length
        pages_per_row = -(-self._prefix // PAGE_TOKENS) + -(-self._longest // PAGE_TOKENS)
        self._numbers = RequestNumbers(rows, self.device, more_numbers(pages_per_row), MOST_END_TOKENS)
        with self._on_device(), torch.inference_mode(False):
            self._full = DecodeStep(model, rows, pages_per_row * PAGE_TOKENS, self._numbers, _NO_CACHE)
            self._sampler = Sampler(rows, self._full.vocab_size, self.device, self._numbers)
            self._ids = torch.zeros(rows, self._longest, dtype=torch.int64, device=self.device)
            self._drafting = Drafting(model, speculate, self._full, self._numbers, _RING_ROWS) if speculate else None
            self.graphs = StepGraphs(self.device, _MOST_GRAPHS + (_MORE_FOR_DRAFTS if speculate else 0))
        self._steps: dict[int, DecodeStep] = {}
        self._states: dict[int, DecodeState] = {}
        self._running: dict[int, _Row] = {}
        self._queued: deque[_Step] = deque()
        self._turn = 0
        self.pages = 0
        if pages is not None:
            self.place_pages(pages)

    def place_pages(self, pages: int) -> None:
        """Allocate the keys and values of so many pages, and what depends on them."""
        config, step = self._model.config, self._full
        with self._on_device():
            step.cache = PagedKVCache(
                config.num_layers,
                pages,
                config.num_attention_heads,
                PAGE_TOKENS,
                config.head_size,
                step.packed.dtype,
                self._numbers["block_table"],
                self._prefix,
            )
            if self._prefix:
                with torch.no_grad():
                    step.cache.place_prefix(self._model.transformer.prefix_encoder.packed(step.packed.dtype))
            if self._drafting is not None:
                self._drafting.place(step.cache)
            most_rows = max(PROMPT_TOKENS, self._longest)
            self._prompt = PackedPromptStep(self._model, step, self._numbers, most_rows)
            self._numbers.set(finished=1, seed=0, lane=0, pad_id=0, turn=0, first_key=step.cache.first_key)
            self._numbers.set(tokens=0, bias_ids=-1)
            self._numbers.send()
        self.pages = pages

    def warm_up(self) -> None:
        """Compile and capture the steps of every number of rows and of short prompts, so that no request waits for it.

        Steps of many keys, and of rows that ask for penalties, biases or the like, are captured when they first run.
        """
        if not self.graphs.captures:
            return
        greedy, drawn = RowRequest((), 1), RowRequest((), 1, temperature=1.0)
        with self.turn():
            for rows in {min(bucket, self.rows) for bucket in (*ROW_BUCKETS, self.rows)}:
                for plan in (sampling_plan([greedy]), sampling_plan([drawn])):
                    drafts = [] if self._drafting is None else self._drafting.turns(rows, plan)
                    for turn in (None, *drafts):
                        # All rows are done, so the step reads and writes no keys.
                        self._replay(rows, key_bucket(1, self._full.capacity), plan, turn)
            for tokens in LENGTHS:
                self._run_prompts([(0, tokens * (0,))])
        torch.cuda.synchronize(self.device)

    def _on_device(self) -> contextlib.AbstractContextManager:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Hold the lock that other threads' ``chat`` and ``generate`` hold."""
        with self._lock.lock, self._on_device(), torch.no_grad():
            self._lock.touch()
            try:
                yield
            finally:
                self._lock.end()
        time.sleep(_BREATH)

    def start(self, new: Sequence[NewRow]) -> list[RowToken | RowFailure]:
        """Queue the prompts of new rows. Their first tokens come from the next steps."""
        if check_model(self._model) != self._key:
            raise RuntimeError("The model's weights were replaced while it is served; start the server anew.")
        failures: list[RowToken | RowFailure] = []
        prompts: list[tuple[int, tuple[int, ...]]] = []
        for one in new:
            try:
                prompts.append((one.row, self._seat(one)))
            except ValueError as error:
                failures.append(RowFailure(one.row, error))
        try:
            self._send(prompts)
        except BaseException:
            for row, _ in prompts:
                self.stop(row)
            raise
        return failures

    def _seat(self, new: NewRow) -> tuple[int, ...]:
        """Write a row's numbers on the host, and return its prompt without padding."""
        layout = PromptLayout.of(torch.tensor([new.request.ids]), self._model.config)
        ids = new.request.ids[int(layout.first_slot) :]
        write_row(self._numbers, new, len(ids), layout, self._full.cache, self._full.vocab_size)
        if self._drafting is not None:
            self._drafting.seat(new.row, len(ids))
        self._running[new.row] = _Row(new.request, len(ids))
        return ids

    def _send(self, prompts: list[tuple[int, tuple[int, ...]]]) -> None:
        """Send the rows' numbers and ids to the device, and fill their pages."""
        if not prompts:
            return
        self._numbers.send_rows([row for row, _ in prompts])
        places = [(row, column, token) for row, ids in prompts for column, token in enumerate(ids)]
        rows, columns, tokens = torch.tensor(places).T.contiguous().to(self.device)
        self._ids.index_put_((rows, columns), tokens)
        part: list[tuple[int, tuple[int, ...]]] = []
        for row, ids in [*((row, ids[:-1]) for row, ids in prompts if len(ids) > 1), (None, ())]:
            if part and (row is None or sum(len(ids) for _, ids in part) + len(ids) > self._prompt.most_rows):
                self._run_prompts(part)
                part = []
            part.append((row, ids))

    def _run_prompts(self, part: list[tuple[int, tuple[int, ...]]]) -> None:
        prompts = self._prompt.place(part)
        run = functools.partial(self._prompt.run, self._model, prompts)
        if prompts.graph_key is None:
            run()
        else:
            self.graphs.run(prompts.graph_key, run, self._numbers["turn"])

    def step(self) -> list[RowToken | RowFailure]:
        """Queue the next token of every row that has not ended, or several, and return those of the step before."""
        rows = [(place, row) for place, row in sorted(self._running.items()) if _goes_on(row)]
        if rows:
            self._queue(rows)
        results = []
        while len(self._queued) > (self._lookahead if rows else 0):
            results += self._read(self._queued.popleft())
        return results

    def _queue(self, rows: list[tuple[int, _Row]]) -> None:
        bucket = min(rows_for(rows[-1][0] + 1, self._captures), self.rows)
        keys = max(row.prompt + row.launched for _, row in rows) + self._full.cache.prefix_slots
        plan = sampling_plan([row.request for _, row in rows])
        step, state = self._of(bucket)
        drafts = None
        if self._drafting is not None:
            drafts = self._drafting.next(bucket, plan, [row.request for _, row in rows])
        queued = _Step(self._replay(bucket, key_bucket(keys, self._full.capacity), plan, drafts), rows, drafts)
        for place, row in rows:
            row.launched += 1
            if row.request.top_logprobs is not None:
                queued.logprobs[place] = self._logprobs(step.logits[place], state.tokens[place], row.request)
        if self.device.type == "cuda":
            queued.done = torch.cuda.Event(blocking=True)
            queued.done.record()
        self._queued.append(queued)

    def _replay(self, bucket: int, most_keys: int, plan: SamplingPlan, drafts: DraftTurn | None = None) -> torch.Tensor:
        """Queue a step of the first rows, and return where its tokens, or the report with drafts, will be."""
        self._sampler.reserve(plan)
        step, state = self._of(bucket)
        ring, key = state.ring[self._turn % _RING_ROWS], (bucket, most_keys, plan.graph_key)
        run = functools.partial(self._run, step, state, plan, most_keys)
        if drafts is not None:
            ring, key = self._drafting.report(drafts), (*key, drafts.graph_key)
            run = functools.partial(drafts.run, self._model, state, plan, most_keys, run)
        self.graphs.run(key, run, state.step)
        # A step that verifies drafts leaves the ring as it is.
        self._turn += drafts is None or not drafts.several
        return ring

    def _of(self, bucket: int) -> tuple[DecodeStep, DecodeState]:
        """Return the step and the state of the first rows; their rings differ, because a ring has a place for each."""
        if bucket not in self._steps:
            with torch.inference_mode(False):
                ring = torch.full((_RING_ROWS, bucket), INVALID, dtype=torch.int64)
                ring = ring.pin_memory() if self.device.type == "cuda" else ring
            numbers = {name: self._numbers[name] for name in ("tokens", *DecodeState.NUMBERS)}
            shared = {name: tensor if tensor.shape[0] == 1 else tensor[:bucket] for name, tensor in numbers.items()}
            self._states[bucket] = DecodeState(ids=self._ids[:bucket], ring=ring, **shared)
            self._steps[bucket] = self._full.narrowed(bucket)
        return self._steps[bucket], self._states[bucket]

    def _run(self, step: DecodeStep, state: DecodeState, plan: SamplingPlan, most_keys: int) -> None:
        logits = step.run(self._model, state.tokens, state.cache_length, most_keys)
        self._sampler.run(plan, logits, state, step.workspace)

    def _logprobs(self, logits: torch.Tensor, token: torch.Tensor, request: RowRequest) -> tuple[torch.Tensor, ...]:
        """Queue the log-probabilities of a row's token and of the most likely ones, to be read with the token."""
        every = torch.log_softmax(logits.float(), dim=0)
        values, ids = every.topk(min(request.top_logprobs, every.shape[0]))
        chosen = every.gather(0, token.clamp(min=0)[None])
        found = chosen, values, ids
        if self.device.type != "cuda":
            return found
        held = tuple(torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in found)
        for target, source in zip(held, found, strict=True):
            target.copy_(source, non_blocking=True)
        return held

    def _read(self, step: _Step) -> list[RowToken | RowFailure]:
        """Wait for a step and return its tokens, but those of rows that have ended or were stopped."""
        if step.done is not None:
            step.done.synchronize()
        if step.drafts is None:
            brought = [[token] for token in step.ring.tolist()]
        else:
            brought = step.drafts.read(step.ring)
        results = []
        for place, row in step.rows:
            row.launched += len(brought[place]) - 1
            results += [self._result(place, row, token, step) for token in brought[place] if not row.has_ended]
        return results

    def _result(self, place: int, row: _Row, token: int, step: _Step) -> RowToken | RowFailure:
        row.read += 1
        if token == INVALID:
            row.has_ended = True
            return RowFailure(place, scores_not_finite())
        end = "length" if row.read >= row.request.max_tokens else ""
        end = "stop" if token in row.request.end_ids else end
        row.has_ended = bool(end)
        logprobs = None
        if place in step.logprobs:
            chosen, values, ids = (tensor.tolist() for tensor in step.logprobs[place])
            logprobs = Logprobs(chosen[0], tuple(zip(ids, values, strict=True)))
        return RowToken(place, token, end, logprobs)

    def stop(self, row: int) -> None:
        """Free the place of a row. Steps that are queued finish first; no later one touches its pages."""
        stopped = self._running.pop(row, None)
        if stopped is None:
            return
        if not stopped.has_ended:
            with self._on_device(), torch.no_grad():
                self._numbers["finished"][row : row + 1].fill_(1)
        stopped.has_ended = True


class _NoCache:
    """Stands for the pages until it is known how many there are."""

    block_table = None


_NO_CACHE = _NoCache()


def _goes_on(row: _Row) -> bool:
    return not row.has_ended and row.launched < row.request.max_tokens
