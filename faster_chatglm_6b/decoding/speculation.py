"""Draft ids from the prompt and the answer so far, verify several in one step, and tell the host how many were right.

Nothing here waits for the host: a step's own kernels draft for the next one, and every turn reports to a ring that the
host reads some turns behind.
"""

from typing import Any

import numpy as np
import torch

from ..ops.states import FINISHED, FIRST_BALANCE, FIRST_NEED, REPORT_HEAD, WANTS, DecodeState, DraftState
from ..ops.steps import step_kernels
from .numbers import RequestNumbers
from .request import Request, SamplingPlan
from .sampler import Sampler
from .steps.decode import DecodeStep
from .steps.draft import DraftStep

# What a step of 1 + k positions costs beyond one of a single position, in eighths of that, by the bits of the weights:
# the fewer bytes there are to read, the more the other positions weigh. By docs/speed.md, on an H200.
_PRICES = {None: 2, 8: 2, 4: 3}


def price_of(model: Any) -> int:
    """Return the price of a step of 1 + k positions, as ``DraftState`` has it."""
    return _PRICES.get(model.config.quantization_bit, _PRICES[None])


def first_numbers(length: int, price: int) -> dict[str, int]:
    """Return the numbers of drafts for a row that begins with ``length`` ids; names as of ``RequestNumbers``."""
    return {
        "seen": length,
        "draft_count": 0,
        "streak": 0,
        "need": FIRST_NEED,
        "balance": FIRST_BALANCE,
        "price": price,
    }


def draft_state(
    numbers: RequestNumbers,
    batch: int,
    first: torch.Tensor,
    tokens: torch.Tensor,
    steps: torch.Tensor,
    reports: int,
) -> DraftState:
    """Return the drafts of the first ``batch`` rows; ``first``, ``tokens`` and ``steps`` are a ``DraftState``'s.

    Args:
        reports: turns that the host may fall behind.
    """
    ring = torch.full((reports, batch, REPORT_HEAD + tokens.shape[1]), -1, dtype=torch.int64)
    return DraftState(
        tokens=tokens,
        count=numbers["draft_count"],
        first=first,
        steps=steps,
        reports=ring.pin_memory() if tokens.is_cuda else ring,
        turn=numbers["reported"],
        **{name: numbers[name] for name in ("seen", "streak", "need", "balance", "price")},
    )


def position_state(numbers: RequestNumbers, count: int) -> DecodeState:
    """Return the state of ``count`` positions. They share no ids: none of their tokens is kept there."""
    device = numbers["step"].device
    return DecodeState(
        tokens=torch.zeros(count, dtype=torch.int64, device=device),
        ids=torch.zeros(count, 1, dtype=torch.int64, device=device),
        ring=torch.zeros(1, count, dtype=torch.int64, device=device),
        **{name: numbers[name][:count] for name in DecodeState.NUMBERS},
    )


class Speculation:
    """A session's steps of 1 + k positions, and the tokens that came of them.

    The samplers know nothing of it: to them each position is a row, with its sequence's seed and lane, and the step
    that the position would have if it came alone. So a seeded answer is the same with and without drafts.

    Args:
        model: a ``ChatGLMForConditionalGeneration`` that ``refusal.check_model`` accepts.
        step: the session's step of one token, with room for B sequences.
        state: the session's.
        numbers: the session's.
        drafted: k, the ids of a draft: 3 or 7.
        reports: turns that the host may fall behind.

    Attributes:
        has_accepted: set by a turn of 1 + k positions that got so far that it cannot be left out any more.
    """

    def __init__(
        self,
        model: Any,
        step: DecodeStep,
        state: DecodeState,
        numbers: RequestNumbers,
        drafted: int,
        reports: int,
    ):
        batch, rows, device = step.batch, 1 + drafted, step.packed.device
        self.rows, self._state, self._numbers = rows, state, numbers
        self.has_accepted, self._kernels = False, step_kernels(device)
        self._price = price_of(model)
        self._step = DraftStep(model, step, rows, numbers)
        self._each = RequestNumbers(batch * rows, device)
        self._sampler = Sampler(batch * rows, step.vocab_size, device, self._each)
        with torch.inference_mode(False):
            tokens = torch.zeros(batch, rows, dtype=torch.int64, device=device)
            self._drafts = draft_state(numbers, batch, numbers["first_key"], tokens, self._each["step"], reports)
            self._positions = position_state(self._each, batch * rows)

    def begin(self, request: Request, seed: torch.Tensor) -> None:
        """Start a request; the session sends its numbers after this."""
        batch, length = request.input_ids.shape
        self._always, self._pad = request.draft_always, request.pad_id
        self._answers: list[list[int]] = [[] for _ in range(batch)]
        self._ended, self._asks, self._read, self._stopped = [False] * batch, False, 0, False
        self._numbers.set(**first_numbers(length, self._price), reported=0)
        self._sampler.configure(request.plan)
        lanes = np.repeat(np.arange(self._state.tokens.shape[0]), self.rows)
        self._each.set(
            ids_length=1, cache_length=0, step=0, turn=0, limit=2**31 - 1, finished=0, seed=seed.item(), lane=lanes
        )
        self._each.set_ids("eos_ids", ())
        self._each.send()

    def run(self, model: Any, plan: SamplingPlan, most_keys: int) -> None:
        """Compute or queue a turn of 1 + k positions."""
        logits = self._step.run(model, self._drafts.tokens, self._state.cache_length, most_keys)
        self._sampler.run(plan, logits, self._positions, self._step.workspace)
        self._kernels.accept(self._positions.tokens, self._state, self._drafts)
        self.has_accepted = True
        self.report(spent=True)

    def report(self, spent: bool = False) -> None:
        """Compute or queue what ends each turn: the report, and the next drafts."""
        self._kernels.propose(self._state, self._drafts, spent=spent, workspace=self._step.workspace)

    @property
    def asks(self) -> bool:
        """Whether the next turn should have 1 + k positions, by what was read so far."""
        return (self._always or self._asks) and not self._stopped

    def stop(self) -> None:
        """Ask for no more turns of 1 + k positions in this request."""
        self._stopped = True

    @property
    def turns_read(self) -> int:
        """Turns of this request whose reports were read."""
        return self._read

    def read(self) -> None:
        """Read the report of the next turn, which must have ended."""
        report = self._drafts.reports[self._read % len(self._drafts.reports), : len(self._answers)].tolist()
        self._read += 1
        self._asks = False
        for row, (count, flags, *tokens) in enumerate(report):
            if self._ended[row]:
                continue
            self._answers[row] += tokens[:count]
            self._ended[row] = bool(flags & FINISHED)
            self._asks |= bool(flags & WANTS)

    def has(self, index: int) -> bool:
        """Tell whether token ``index`` of every sequence was read, or its end."""
        return all(ended or len(answer) > index for ended, answer in zip(self._ended, self._answers, strict=True))

    def tokens(self, index: int) -> torch.Tensor:
        """Return token ``index`` of every sequence, int64 [B] on the CPU, and the pad id for those that ended."""
        found = [answer[index] if index < len(answer) else self._pad for answer in self._answers]
        return torch.tensor(found, dtype=torch.int64)

    def is_enough(self, launched: int, limit: int) -> bool:
        """Tell whether ``launched`` turns are sure to bring ``limit`` tokens, or its end, to every sequence."""
        coming = launched - self._read
        return all(
            ended or len(answer) + coming >= limit for ended, answer in zip(self._ended, self._answers, strict=True)
        )

    def most_tokens(self, launched: int) -> int:
        """Return the most tokens that a sequence may have after ``launched`` turns and one more."""
        return max(map(len, self._answers)) + (launched + 1 - self._read) * self.rows
