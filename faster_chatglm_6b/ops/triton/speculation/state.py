"""What speculation keeps of each row, all in device memory, beside its ``DecodeState``."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

# A report's numbers before its tokens: how many tokens follow, and the two flags.
REPORT_HEAD = 2
WANTS, FINISHED = 1, 2


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
