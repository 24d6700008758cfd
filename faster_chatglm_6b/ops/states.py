"""The state of rows in generation and of their drafts, all in device memory, whatever kernels read and advance it."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

# A report's numbers before its tokens: how many tokens follow, and the two flags.
REPORT_HEAD = 2
WANTS, FINISHED = 1, 2
# Last ids that are looked up for a draft: the most, and the fewest for which a match counts.
LONGEST_MATCH, SHORTEST_MATCH = 4, 2
# What a row must have seen come true before it asks for steps of R positions, at first and after many losses; the
# balance at which it starts, and at which losses are forgotten.
FIRST_NEED, LAST_NEED, LONGEST_STREAK = 3, 48, 64
FIRST_BALANCE, BEST_BALANCE = 8, 32


class StateArguments(NamedTuple):
    """The tensors and sizes of a ``DecodeState`` as one argument of a kernel; names as there."""

    tokens: torch.Tensor
    finished: torch.Tensor
    ids: torch.Tensor
    ids_length: torch.Tensor
    cache_length: torch.Tensor
    step: torch.Tensor
    limit: torch.Tensor
    eos_ids: torch.Tensor
    seed: torch.Tensor
    lane: torch.Tensor
    ring: torch.Tensor
    turn: torch.Tensor
    pad_id: torch.Tensor
    ids_capacity: int
    ring_rows: int
    eos_count: int


@dataclass
class DecodeState:
    """The buffers of the rows in generation; samplers read and advance them.

    Every row has a state of its own: it may stand at another place than its neighbours, and end by other rules.

    Attributes:
        tokens: int64 [B], the token fed in this step, then the next one.
        finished: int32 [B], 1 once a row has produced an end token or reached its limit; from then on it gets
            ``pad_id``.
        ids: int64 [B, T], everything so far; the next token goes to column ``ids_length`` (dropped beyond T).
        ids_length, cache_length, step: int32 [B], each grows by 1 per step: ids so far, slots of the cache filled,
            tokens chosen (the counter of the row's random numbers).
        limit: int32 [B], ids at which the row ends.
        eos_ids: int64 [B, E], E >= 1, the end tokens; -1 entries match nothing.
        seed: int64 [B], lane: int32 [B]: which random numbers a row gets. Rows of one seed differ by their lanes.
        ring: int64 [R, B], pinned host memory or device memory: row turn % R receives the next tokens.
        turn: int32 [1], steps of the batch; grows by 1 per step.
        pad_id: int64 [1], token of finished rows.
        NUMBERS: the names of those that are numbers of a request or a row, and change with it.
    """

    NUMBERS: ClassVar = (
        "finished", "ids_length", "cache_length", "step", "limit", "eos_ids", "seed", "lane", "turn", "pad_id"
    )  # fmt: skip

    tokens: torch.Tensor
    finished: torch.Tensor
    ids: torch.Tensor
    ids_length: torch.Tensor
    cache_length: torch.Tensor
    step: torch.Tensor
    limit: torch.Tensor
    eos_ids: torch.Tensor
    seed: torch.Tensor
    lane: torch.Tensor
    ring: torch.Tensor
    turn: torch.Tensor
    pad_id: torch.Tensor

    def arguments(self) -> StateArguments:
        """Return the state as kernels take it."""
        return StateArguments(
            self.tokens,
            self.finished,
            self.ids,
            self.ids_length,
            self.cache_length,
            self.step,
            self.limit,
            self.eos_ids,
            self.seed,
            self.lane,
            self.ring,
            self.turn,
            self.pad_id,
            self.ids.shape[1],
            self.ring.shape[0],
            self.eos_ids.shape[1],
        )

    def eos_block(self) -> int:
        """Return a block size that holds all end tokens."""
        return 1 << (self.eos_ids.shape[1] - 1).bit_length()


class DraftArguments(NamedTuple):
    """The tensors and sizes of a ``DraftState`` as one argument of a kernel; names as there."""

    tokens: torch.Tensor
    count: torch.Tensor
    seen: torch.Tensor
    first: torch.Tensor
    streak: torch.Tensor
    need: torch.Tensor
    balance: torch.Tensor
    price: torch.Tensor
    steps: torch.Tensor
    reports: torch.Tensor
    turn: torch.Tensor
    report_rows: int


@dataclass
class DraftState:
    """The buffers of speculation for B rows of R = 1 + k positions; R is a power of two.

    Attributes:
        tokens: int64 [B, R], what the next step of R positions reads: the row's current token, then its draft.
        count: int32 [B], ids of the draft: k, or 0 if there is none. Without one, the current token fills the row.
        seen: int32 [B], the row's ids when the draft was made.
        first: int32 [B], column of the row's first id after its padding.
        streak: int32 [B], how long drafts have come true: drafted ids that followed, halved by each that did not.
        need: int32 [B], the streak from which the row asks for steps of R positions.
        balance: int32 [B], eighths of tokens that such steps have brought beyond what they cost.
        price: int32 [B], eighths of tokens that such a step costs beyond one of a single position.
        steps: int32 [B * R], the counter of each position's random numbers.
        reports: int64 [N, B, 2 + R], pinned host memory or device memory. Row turn % N tells of each turn how many
            tokens it brought, ``WANTS`` if the row asks for R positions + ``FINISHED`` if it has ended, and the tokens.
        turn: int32 [1], turns so far.
    """

    tokens: torch.Tensor
    count: torch.Tensor
    seen: torch.Tensor
    first: torch.Tensor
    streak: torch.Tensor
    need: torch.Tensor
    balance: torch.Tensor
    price: torch.Tensor
    steps: torch.Tensor
    reports: torch.Tensor
    turn: torch.Tensor

    def arguments(self) -> DraftArguments:
        """Return the state as kernels take it."""
        return DraftArguments(
            self.tokens,
            self.count,
            self.seen,
            self.first,
            self.streak,
            self.need,
            self.balance,
            self.price,
            self.steps,
            self.reports,
            self.turn,
            self.reports.shape[0],
        )
