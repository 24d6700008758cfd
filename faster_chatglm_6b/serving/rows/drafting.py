"""Drafts of rows in the captured loop: turns in which a row gets several tokens, where its drafts come true.

Rows draft by themselves (``decoding.speculation``), and share a turn: it verifies a draft of every row, or of none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...decoding.numbers import RequestNumbers
from ...decoding.request import SamplingPlan, drafts_for
from ...decoding.sampler import Sampler
from ...decoding.speculation import draft_state, first_numbers, position_state, price_of
from ...decoding.steps.decode import DecodeStep
from ...decoding.steps.draft import DraftStep
from ...decoding.steps.kv_cache import PagedKVCache
from ...ops.states import WANTS, DecodeState, DraftState
from .interface import RowRequest

# What a row's positions are told of it.
_SHARED = ("temperature", "top_k", "top_p", "seed")


@dataclass
class DraftTurn:
    """A turn of the first ``rows`` rows with drafts.

    Attributes:
        several: whether it verifies the drafts of now; in any case it makes the next ones.
    """

    drafts: RowDrafts
    rows: int
    several: bool

    @property
    def graph_key(self) -> tuple:
        """The part that a captured graph depends on."""
        return self.drafts.positions, "several" if self.several else "one"

    def run(
        self,
        model: Any,
        state: DecodeState,
        plan: SamplingPlan,
        most_keys: int,
        one: Callable[[], None],
    ) -> None:
        """Compute or queue the turn; ``one`` does so with a token of every row, without drafts."""
        if not self.several:
            one()
        self.drafts.run(model, self.rows, state, plan, most_keys, self.several)

    def read(self, report: torch.Tensor) -> list[list[int]]:
        """Return the tokens that the turn has brought to each row, from its report."""
        return self.drafts.read(report)


class RowDrafts:
    """Drafts of R - 1 ids for up to so many rows.

    Args:
        step: the rows' step of one token, of as many rows.
        numbers: the rows'.
        positions: R.
        reports: turns that the host may fall behind.
    """

    def __init__(self, model: Any, step: DecodeStep, numbers: RequestNumbers, positions: int, reports: int):
        rows, device = step.batch, step.packed.device
        self.rows, self.positions = rows, positions
        self._numbers, self._reports = numbers, reports
        self._each = RequestNumbers(rows * positions, device)
        # Nothing ends a position. Every end token there is would be one for those whose scores are not finite.
        self._each.set(ids_length=1, limit=2**31 - 1, eos_ids=-2)
        self._each.send()
        self._limit = torch.zeros(rows, dtype=torch.int32, device=device)
        self._step = DraftStep(model, step, positions, numbers, self._limit)
        self._sampler = Sampler(rows * positions, step.vocab_size, device, self._each)
        self._tokens = torch.zeros(rows, positions, dtype=torch.int64, device=device)
        self._first = torch.zeros(rows, dtype=torch.int32, device=device)
        self._places = torch.arange(positions, dtype=torch.int32, device=device)
        self._states: dict[int, tuple[DraftStep, DraftState, DecodeState]] = {}
        # Whether a row has asked for several positions by what was read last.
        self.asks = False

    def place(self, cache: PagedKVCache) -> None:
        """Take the rows' pages."""
        self._step.cache = cache

    def tell(self, forget: bool) -> None:
        """Queue what the positions of rows that have begun must know.

        Args:
            forget: the drafts, because the last turn made none.
        """
        numbers, rows = self._numbers, slice(self.rows)
        for name in _SHARED:
            self._each[name].view(-1, self.positions).copy_(numbers[name][rows, None])
        self._each["step"].view(-1, self.positions).copy_(numbers["step"][rows, None] + self._places)
        # It counts turns, and would reach the limit some day.
        self._each["ids_length"].fill_(1)
        self._tokens[:, 0].copy_(numbers["tokens"][rows])
        torch.add(numbers["limit"][rows], self._step.cache.prefix_slots, out=self._limit)
        if forget:
            self.asks = False
            numbers["seen"].copy_(numbers["ids_length"])
            numbers["draft_count"].zero_()

    def run(self, model: Any, rows: int, state: DecodeState, plan: SamplingPlan, most_keys: int, several: bool) -> None:
        """Compute or queue the end of a turn of the first ``rows`` rows, and all of it if it verifies drafts."""
        step, drafts, positions = self._of(rows)
        if several:
            logits = step.run(model, drafts.tokens, state.cache_length, most_keys)
            self._sampler.run(plan, logits, positions, step.workspace)
            step.kernels.accept(positions.tokens, state, drafts)
        step.kernels.propose(state, drafts, spent=several, workspace=step.workspace)

    def _of(self, rows: int) -> tuple[DraftStep, DraftState, DecodeState]:
        """Return the step, the drafts and the positions of the first rows."""
        if rows not in self._states:
            with torch.inference_mode(False):
                drafts = draft_state(
                    self._numbers, rows, self._first, self._tokens[:rows], self._each["step"], self._reports
                )
                positions = position_state(self._each, rows * self.positions)
            self._states[rows] = self._step.narrowed(rows), drafts, positions
        return self._states[rows]

    def report(self, rows: int, turn: int) -> torch.Tensor:
        """Return where the report of a turn of the first ``rows`` rows will be, int64 [rows, 2 + R]."""
        reports = self._of(rows)[1].reports
        return reports[turn % len(reports)]

    def read(self, report: torch.Tensor) -> list[list[int]]:
        """Return the tokens that a turn has brought to each row, from its report."""
        found = report.tolist()
        self.asks = any(flags & WANTS for _, flags, *_ in found)
        return [tokens[:count] for count, _, *tokens in found]


class Drafting:
    """Choose the turns with drafts, by what is asked for, the number of rows, and what the rows ask of their tokens.

    Args:
        speculate: 3, 7 or "auto", as of ``generate``.
        step: the rows' step of one token.
        numbers: the rows'.
        reports: turns that the host may fall behind.
    """

    def __init__(self, model: Any, speculate: int | str, step: DecodeStep, numbers: RequestNumbers, reports: int):
        self._speculate, self._numbers, self._price = speculate, numbers, price_of(model)
        most: dict[int, int] = {}
        for rows in range(1, step.batch + 1):
            drafted, _ = drafts_for(speculate, rows, SamplingPlan())
            if not drafted:
                break
            most[drafted] = rows
        with torch.inference_mode(False):
            self._drafts = {
                drafted: RowDrafts(model, step.narrowed(rows), numbers, 1 + drafted, reports)
                for drafted, rows in most.items()
            }
        self._last: RowDrafts | None = None
        self._told: set[RowDrafts] = set()
        self._reported = 0

    def place(self, cache: PagedKVCache) -> None:
        """Take the rows' pages."""
        for drafts in self._drafts.values():
            drafts.place(cache)

    def seat(self, row: int, prompt: int) -> None:
        """Write the numbers of a row that begins on the host."""
        self._numbers.set_row(row, **first_numbers(prompt, self._price))
        self._told.clear()

    def turns(self, rows: int, plan: SamplingPlan) -> list[DraftTurn]:
        """Return all kinds of turns that there can be, one after the other, to be captured."""
        drafted, always = drafts_for(self._speculate, rows, plan)
        kinds = [] if not drafted else [True] if always else [False, True]
        return [self._begin(self._drafts[drafted], rows, several) for several in kinds]

    def next(self, rows: int, plan: SamplingPlan, requests: Sequence[RowRequest]) -> DraftTurn | None:
        """Return the next turn of the first ``rows`` rows, or None if it knows of no drafts.

        Log-probabilities are read from the logits of a step of one token.
        """
        drafted, always = drafts_for(self._speculate, rows, plan)
        if not drafted or any(request.top_logprobs is not None for request in requests):
            self._last = None
            return None
        return self._begin(self._drafts[drafted], rows, always)

    def _begin(self, drafts: RowDrafts, rows: int, several: bool) -> DraftTurn:
        is_new = drafts is not self._last
        if is_new or drafts not in self._told:
            drafts.tell(forget=is_new)
        self._told.add(drafts)
        self._last = drafts
        return DraftTurn(drafts, rows, several or drafts.asks)

    def report(self, turn: DraftTurn) -> torch.Tensor:
        """Return where the report of a turn that is now queued will be."""
        self._reported += 1
        return turn.drafts.report(turn.rows, self._reported - 1)
