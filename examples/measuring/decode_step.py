"""The product's own decode step as one CUDA graph, captured anew and timed with the block shapes of the moment."""

import contextlib
import json
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from unittest import mock

import torch

from faster_chatglm_6b.decoding.request import SamplingPlan
from faster_chatglm_6b.decoding.session import Session, capacity_for
from faster_chatglm_6b.ops import triton as kernels

from .models import CONFIG_6B, bytes_per_step

_HIDDEN, _INNER, _VOCABULARY = (CONFIG_6B[name] for name in ("hidden_size", "inner_hidden_size", "vocab_size"))
# (N, K) of the weights [N, K] of the 6B shape: the keys of the tables of block shapes.
QKV, DENSE, UP, DOWN, HEAD = SHAPES = (
    (3 * _HIDDEN, _HIDDEN),
    (_HIDDEN, _HIDDEN),
    (_INNER, _HIDDEN),
    (_HIDDEN, _INNER),
    (_VOCABULARY, _HIDDEN),
)
_CHAT = {"invalid_rule": True, "temperature": 0.95, "top_p": 0.7}
PLANS = {
    "greedy": SamplingPlan(),
    "top_k": SamplingPlan("top_k", 64, top_k=50, **_CHAT),
    "full": SamplingPlan("full", **_CHAT),
}
PARTS = frozenset({"norm", "attention", "sampling"})


class TimedStep:
    """One decode step of a model for ``batch`` sequences that have ``context`` keys.

    Steps and buffers are those of a ``Session`` no longer than the context needs, whose keys and values are random.

    Args:
        model: one that the captured loop serves.
        sampler: a name of PLANS.
        without: those of PARTS to leave out, which shows what their kernels cost. Only a model with float weights can
            go without "norm".
    """

    def __init__(
        self,
        model: torch.nn.Module,
        batch: int,
        context: int,
        sampler: str = "greedy",
        without: Collection[str] = (),
    ):
        self.model, self.batch, self.context, self.sampler = model, batch, context, sampler
        self.without = frozenset(without)
        self._session = Session(model, batch, capacity_for(context + 1))
        self._session.step.cache.storage.normal_()
        self._session.sampler.configure(PLANS[sampler])
        self._session.numbers.set(limit=2**31 - 1)
        self._session.numbers.set_ids("eos_ids", ())
        self._session.numbers.send()

    @property
    def bytes(self) -> int:
        """What the step must read: weights, and the keys and values if it has its attention."""
        return bytes_per_step(self.model, self.batch, 0 if "attention" in self.without else self.context + 1)

    def measure(self, repeats: int = 15) -> float:
        """Return the step's milliseconds, captured with the tables as they are now."""
        with torch.inference_mode(), _kernels_left_out(self.without):
            self._reset()
            # Compiles the kernels, which a capture must not.
            self._run()
            return median_ms(self._captured() if self._session.on_gpu else self._run, repeats, self._reset)

    def _run(self) -> None:
        session = self._session
        # A session as short as this one splits attention for its whole capacity.
        logits = session.step.run(self.model, session.state.tokens, session.state.cache_length, session.capacity)
        if "sampling" not in self.without:
            session.sampler.run(PLANS[self.sampler], logits, session.state, session.step.workspace)

    def _captured(self) -> Callable[[], None]:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run()
        return graph.replay

    def _reset(self) -> None:
        """Take back what sampling advances."""
        state = self._session.state
        state.ids_length.fill_(self.context + 1)
        state.cache_length.fill_(self.context)


def median_ms(run: Callable[[], object], repeats: int, reset: Callable[[], object]) -> float:
    """Return the median milliseconds of ``run`` on the GPU, each time after ``reset``."""
    times = []
    for index in range(repeats + 3):
        reset()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        if index >= 3:
            times.append(start.elapsed_time(stop))
    return statistics.median(times)


@contextlib.contextmanager
def _kernels_left_out(parts: Collection[str]) -> Iterator[None]:
    """Put stand-ins in the place of the launchers of "attention" and "norm"."""
    stand_ins = {"attention": ("decode_attention", None), "norm": ("layer_norm_matmul_bias", _matmul_bias)}
    with contextlib.ExitStack() as stack:
        called = {
            name: stack.enter_context(mock.patch.object(kernels, name, side_effect=stand_in))
            for part, (name, stand_in) in stand_ins.items()
            if part in parts
        }
        yield
        for name, launcher in called.items():
            if not launcher.called:
                raise RuntimeError(f"The decode step does not launch kernels.{name}, so it was not left out.")


def _matmul_bias(x, weight, bias, eps, linear_weight, linear_bias, *, gelu, normed_out, out, workspace) -> None:
    """Multiply without the LayerNorm, whose parameters and rows are not touched."""
    kernels.fused_matmul_bias(x, linear_weight, linear_bias, gelu=gelu, out=out, workspace=workspace)


def report_records(records: Iterable[dict], path: Path | None) -> None:
    """Print each record as it comes, and append it to the JSON lines of a file if one is given."""
    for record in records:
        print(json.dumps(record), flush=True)
        if path is not None:
            with path.open("a") as file:
                file.write(json.dumps(record) + "\n")
