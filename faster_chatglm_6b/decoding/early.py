"""Start a prompt before its request is read, so that the device computes while transformers prepares the request.

A prompt's logits depend on its ids and padding, not on how tokens are chosen. The request finds its prompt by the very
layout that ``generate`` read. Whatever else comes, an error, another search or another thread's request, a prompt that
started early is left alone, and the next request writes over it.
"""

import operator
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from ..network.prompt_layout import PromptLayout
from .shortage import is_out_of_memory

_BYTES = operator.attrgetter("nbytes")


@torch.no_grad()
def start_early(model: Any, input_ids: torch.Tensor, layout: PromptLayout) -> None:
    """Queue the graph of this prompt, if an earlier request left one and no other request runs.

    It holds the engine's lock only while it queues: what runs between this call and the decoding loop is not ours.

    Args:
        input_ids: int64 [B, L], on any device.
        layout: of the prompts; the same object reaches the decoding loop in its request.
    """
    engine = model.__dict__.get("_decode_engine")
    # A model that was never served has no engine. Where another request runs, this one waits in the loop.
    if engine is None or engine.lock.locked():
        return
    with engine.lock:
        try:
            engine.touch()
            session = engine.prepared(len(input_ids))
            if session is not None:
                session.start_early(model, input_ids, layout)
        except BaseException as error:
            # As in the loop: no request may continue from a step that ended half way.
            engine.give_up_sessions()
            # The loop tries again and says what is short.
            if not is_out_of_memory(error):
                raise
        finally:
            engine.end()


class EarlyPrompt:
    """Tell which prompt of a session started early, and whether the next one should.

    Starting early is in vain for requests that the captured loop does not serve, so it pauses until a request comes
    that would have found its prompt.
    """

    def __init__(self) -> None:
        self._layout: PromptLayout | None = None
        self._runs, self._pays = False, False

    def offer(self, layout: PromptLayout) -> bool:
        """Tell whether the prompt of this layout should start now."""
        if self._runs:
            # Another thread's, or one for which no request came.
            return False
        self._layout, self._runs = layout, self._pays
        return self._runs

    def take(self, layout: PromptLayout) -> bool:
        """Tell whether the prompt of a request that begins runs already; no other one is left."""
        if self._layout is not None:
            self._pays = self._layout is layout
        found = self._runs and self._layout is layout
        self._layout, self._runs = None, False
        return found


class Whereabouts:
    """Tell whether the weights still lie where they lay, in a fraction of the time of ``refusal.check_model``.

    Graphs read the weights at the addresses of their capture. Before a graph starts early, this shows that the memory
    is still there; whether the model may be served at all is checked while the device works.
    """

    def __init__(self, model: Any):
        weights = list(model.parameters())
        # Weak, so that the model can free them.
        self._weights, self._places = [weakref.ref(weight) for weight in weights], _places(weights)

    def hold(self) -> bool:
        """Tell whether all weights exist and are where they were."""
        weights = [weight() for weight in self._weights]
        return all(weight is not None for weight in weights) and _places(weights) == self._places


def _places(weights: Sequence[torch.Tensor]) -> list[Any]:
    # A smaller tensor may take the address of a freed one.
    return [*map(torch.Tensor.data_ptr, weights), *map(_BYTES, weights)]
