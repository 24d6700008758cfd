"""Hold the device state of the requests of similar batch sizes, and queue their steps."""

import functools
from typing import Any

import torch

from ..network.prompt_layout import PromptLayout
from ..ops.states import DecodeState
from ..ops.steps import step_kernels
from .early import EarlyPrompt
from .graphs import StepGraphs
from .numbers import RequestNumbers
from .request import Request
from .sampler import Sampler
from .shortage import is_out_of_memory
from .speculation import Speculation
from .steps.decode import DecodeStep
from .steps.prompt import PromptStep

# Steps that may be queued on the device before the host has read their tokens; the ring has room for more.
LOOKAHEAD = 3
_RING_ROWS = 16
_SMALLEST_CAPACITY = 256
_DOUBLED_UP_TO = 2048
# Batches between these run with rows that are done from the start: those read no keys.
ROW_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
# The most keys that there can be decide how attention is split, so each bucket has a graph of its own.
_SHORTEST_KEYS = 512
_KEYS_GROW_BY = 4


def capacity_for(tokens: int) -> int:
    """Round ``tokens`` up to a number of cache slots, so that requests of similar length share a session."""
    capacity = _SMALLEST_CAPACITY
    while capacity < min(tokens, _DOUBLED_UP_TO):
        capacity *= 2
    step = _DOUBLED_UP_TO // 2
    return max(capacity, -(-tokens // step) * step if tokens > capacity else 0)


def rows_for(batch: int, captures: bool = True) -> int:
    """Round a number of sequences up to one of a few, each with buffers and graphs of its own, if there are graphs."""
    if not captures:
        return batch
    return next((rows for rows in ROW_BUCKETS if batch <= rows), batch)


def key_bucket(keys: int, capacity: int) -> int:
    """Round a number of keys up to one of a few, each with its own split of attention and its own graph."""
    most_keys = _SHORTEST_KEYS
    while most_keys < keys:
        most_keys *= _KEYS_GROW_BY
    return min(most_keys, capacity)


class Session:
    """Serve one request after the other on the same buffers.

    On a GPU each kind of step runs eagerly once, which compiles its kernels, and is then captured as a CUDA graph. On
    a CPU and in Triton's interpreter every step runs eagerly.

    Args:
        model: a ``ChatGLMForConditionalGeneration`` that ``refusal.check_model`` accepts.
        rows: the most sequences.
        capacity: the most tokens per sequence.
    """

    def __init__(self, model: Any, rows: int, capacity: int):
        self.device = model.lm_head.weight.device
        self.rows, self.capacity = rows, capacity
        self._prefix = model.config.pre_seq_len or 0
        # A CPU computes a step when it is asked for: earlier would only be sooner than needed.
        self._lookahead = LOOKAHEAD if step_kernels(self.device).CAPTURES else 0
        self.numbers = numbers = RequestNumbers(rows, self.device)
        self.step = DecodeStep(model, rows, capacity, numbers)
        self.prompt = PromptStep(model, self.step, numbers)
        self.sampler = Sampler(rows, self.step.vocab_size, self.device, numbers)
        with torch.inference_mode(False):
            ring = torch.full((_RING_ROWS, rows), -1, dtype=torch.int64)
            self.state = DecodeState(
                tokens=torch.zeros(rows, dtype=torch.int64, device=self.device),
                ids=torch.zeros(rows, capacity, dtype=torch.int64, device=self.device),
                ring=ring.pin_memory() if self.on_gpu else ring,
                **{name: numbers[name] for name in DecodeState.NUMBERS},
            )
        self.graphs = StepGraphs(self.device)
        self._early = EarlyPrompt()
        self._speculations: dict[int, Speculation] = {}
        self._stream: torch.cuda.Stream | None = None
        if self.on_gpu:
            # A blocking event lets the CPU sleep until the token is there. Nothing is queued behind a prompt's first
            # token, so waking up would come on top of it.
            self._events = [torch.cuda.Event(blocking=True) for _ in range(_RING_ROWS)]
            self._first = torch.cuda.Event()
            self._last: torch.cuda.Event | None = None
            self._early_end = torch.cuda.Event()

    @property
    def bytes(self) -> int:
        """Bytes of the cache."""
        return self.step.cache.storage.nbytes

    @property
    def on_gpu(self) -> bool:
        """Whether steps are queued on a device and captured."""
        return self.device.type == "cuda"

    def begin(self, model: Any, request: Request, seed: torch.Tensor) -> None:
        """Start a request: place its prompt, run it through the model, and choose the first token."""
        self._follow()
        self._plan, self._launched = request.plan, 0
        self._batch = request.input_ids.shape[0]
        self._prompt_keys = self._prefix + request.input_ids.shape[1]
        self._speculation = self._speculation_of(model, request)
        self._reset(request, seed)
        if self._early.take(request.layout):
            # After the prompt: it reads some of these numbers, which are the same.
            self.numbers.send()
            self._finish_step(self.step.logits)
            self._mark()
            return
        ids, has_graph = self._place(model, request.input_ids, request.layout)
        most_keys, key = self._prompt_key(*ids.shape)
        run = functools.partial(self.prompt.run, model, ids, self.state.cache_length, most_keys)
        replayed = has_graph and self.graphs.replay(key)
        self._finish_step(self.step.logits if replayed else run())
        self._mark()
        if has_graph and not replayed:
            # Only now, while the device computes the first token.
            self.graphs.keep(key, run, self.state.step)

    def start_early(self, model: Any, input_ids: torch.Tensor, layout: PromptLayout) -> None:
        """Queue a prompt whose request is not read yet, if it has a graph; see ``early``.

        It runs on another stream than the current one, for which transformers waits several times.

        Args:
            input_ids: int64 [B, L], on any device.
        """
        batch, length = input_ids.shape
        rows = self.prompt.graph_rows(batch, length)
        # What reads a prefix is a module, and the kernels read a table from the position of the mask token.
        if rows is None or self._prefix or length >= self.capacity or min(layout.mask_position.tolist()) < 0:
            return
        key = self._prompt_key(batch, rows)[1]
        if key not in self.graphs or not self._early.offer(layout):
            return
        self._follow()
        self._place(model, input_ids, layout)
        if not self.on_gpu:
            self.graphs.replay(key)
            return
        self.graphs.stream.wait_stream(self._stream)
        self._stream, self._last = self.graphs.stream, self._early_end
        with torch.cuda.stream(self._stream):
            self.graphs.replay(key)
            self._last.record()

    def _prompt_key(self, batch: int, rows: int) -> tuple[int, tuple]:
        """Return the most keys of prompts of so many rows each, and the key of their graph."""
        most_keys = key_bucket(self._prefix + rows, self.capacity)
        return most_keys, ("prompt", batch, rows, most_keys)

    def _place(self, model: Any, input_ids: torch.Tensor, layout: PromptLayout) -> tuple[torch.Tensor, bool]:
        """Send all numbers, of which a prompt needs how many rows there are and where they lie; see ``PromptStep``."""
        batch, length = input_ids.shape
        # The prompt's last logits give the first token, which advances this counter to the prompt's own length.
        self.numbers.set(cache_length=self._prefix + length - 1, finished=1)
        self.numbers.set(finished=[0] * batch)
        placed = self.prompt.place(model, input_ids, layout)
        self.numbers.send()
        return placed

    def _reset(self, request: Request, seed: torch.Tensor) -> None:
        batch, length = request.input_ids.shape
        self.sampler.configure(request.plan)
        self.state.ids[:batch, :length].copy_(request.history())
        self.numbers.set(
            ids_length=length,
            step=0,
            turn=0,
            limit=min(request.max_length, 2**31 - 1),
            seed=seed.item(),
            lane=range(self.rows),
            pad_id=request.pad_id,
        )
        self.numbers.set_ids("eos_ids", request.eos_ids)
        if self._speculation is not None:
            self._speculation.begin(request, seed)

    def _speculation_of(self, model: Any, request: Request) -> Speculation | None:
        """Return what drafts for the request; None if it asks for none or there is no memory for more positions."""
        drafted = request.draft_tokens
        if not request.draft_always and not step_kernels(self.device).DRAFTS_PAY:
            return None
        if drafted and drafted not in self._speculations:
            try:
                made = Speculation(model, self.step, self.state, self.numbers, drafted, _RING_ROWS)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                return None
            # Graphs hold the addresses of its buffers, so it stays as long as the session.
            self._speculations[drafted] = made
        return self._speculations.get(drafted)

    def lacks(self, index: int, limit: int) -> bool:
        """Tell whether to queue another turn before token ``index`` of at most ``limit`` is read."""
        speculation = self._speculation
        if speculation is None:
            return self._launched < min(index + 1 + self._lookahead, limit)
        wanted = speculation.turns_read + self._lookahead + (not speculation.has(index))
        return self._launched < wanted and not speculation.is_enough(self._launched, limit)

    def advance(self, model: Any) -> None:
        """Compute or queue one more turn: a token of every sequence, or several where drafts are right."""
        self._follow()
        speculation, tokens = self._speculation, self._launched
        if speculation is not None:
            tokens = speculation.most_tokens(self._launched)
        most_keys = key_bucket(self._prompt_keys + tokens, self.capacity)
        key = (most_keys, self._plan.graph_key)
        run = functools.partial(self._run, model, most_keys)
        if speculation is not None:
            key = (*key, speculation.rows)
        # Most texts never ask for it, so it is compiled and captured only where one does.
        if speculation is None or not (speculation.asks and self._advance_drafted(model, key, most_keys)):
            self.graphs.run(key, run, self.state.step)
        self._mark()

    def _advance_drafted(self, model: Any, key: tuple, most_keys: int) -> bool:
        """Queue a turn of 1 + k positions, and tell whether there was memory for it; without, it changes nothing."""
        speculation = self._speculation
        run = functools.partial(speculation.run, model, self._plan, most_keys)
        speculation.has_accepted = False
        try:
            self.graphs.run((*key, "drafts"), run, self.state.step)
        except (RuntimeError, MemoryError) as error:
            if speculation.has_accepted or not is_out_of_memory(error):
                raise
            speculation.stop()
            return False
        return True

    def _run(self, model: Any, most_keys: int) -> None:
        self._finish_step(self.step.run(model, self.state.tokens, self.state.cache_length, most_keys))

    def _finish_step(self, logits: torch.Tensor) -> None:
        self.sampler.run(self._plan, logits, self.state, self.step.workspace)
        if self._speculation is not None:
            self._speculation.report()

    def _follow(self) -> None:
        """Wait on the device for the last work, of this request or an abandoned one, if another stream runs it."""
        if self.on_gpu:
            stream = torch.cuda.current_stream(self.device)
            if self._last is not None and stream != self._stream:
                stream.wait_event(self._last)
            self._stream = stream

    def _mark(self) -> None:
        if self.on_gpu:
            self._last = self._event(self._launched)
            self._last.record(self._stream)
        self._launched += 1

    def _event(self, index: int) -> torch.cuda.Event:
        return self._events[index % _RING_ROWS] if index else self._first

    def read(self, index: int) -> torch.Tensor:
        """Wait for token ``index`` of every sequence and return it, int64 [B] on the CPU.

        Only the last ``_RING_ROWS`` launched turns can be read.
        """
        if self._speculation is not None:
            return self._read_drafted(index)
        if self.on_gpu:
            self._event(index).synchronize()
        return self.state.ring[index % _RING_ROWS, : self._batch].clone()

    def _read_drafted(self, index: int) -> torch.Tensor:
        """Read as many turns as have token ``index`` of every sequence; those that bring more are ahead."""
        speculation = self._speculation
        while not speculation.has(index):
            if self.on_gpu:
                self._event(speculation.turns_read).synchronize()
            speculation.read()
        return speculation.tokens(index)

    def ids(self, length: int) -> torch.Tensor:
        """Return the first ``length`` ids of every sequence, a view [B, length] in device memory."""
        return self.state.ids[: self._batch, :length]

    def wait(self) -> None:
        """Wait for everything that is queued, before the buffers are released."""
        if self._stream is not None:
            self._stream.synchronize()
