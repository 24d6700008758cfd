"""Compute a prefix LM's loss, check that labels can teach it, and serve clients that compute the loss themselves."""

from __future__ import annotations

import functools
import inspect
import logging
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from ..configuration_chatglm import ChatGLMConfig
from .arguments import check_labels

IGNORED = -100
_HOW = "docs/finetuning.md shows how: prompt [gMASK] <sop> answer <eop>, with labels of -100 up to <sop>"
_PACKED_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
_log = logging.getLogger("faster_chatglm_6b")

# Whether the body's last hidden state is [B, M, hidden], as trl expects, and not stock's [M, B, hidden].
batch_first: ContextVar[bool] = ContextVar("batch_first", default=False)


class TrainingMixin:
    """Attributes and methods that Trainer and trl expect of a model."""

    # Trainer then passes num_items_in_batch, without which accumulated batches of any size would count alike.
    accepts_loss_kwargs = True

    def __setattr__(self, name: str, value: Any) -> None:
        # trl's add_fused_lm_head puts a forward here that reads the body's output and the head's weight itself.
        if name == "forward" and inspect.ismethod(value) and "fused_lm_head" in _own_parameters(value.__func__):
            value = types.MethodType(_with_fused_head(value.__func__), self)
        super().__setattr__(name, value)

    def token_loss(
        self,
        logits: torch.Tensor,
        input_ids: torch.Tensor | None,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> torch.Tensor:
        """Return the cross entropy in float32 of logits [B, M, vocab_size] against labels [B, M], shifted by one.

        Args:
            num_items_in_batch: divisor of the sum; None: the number of labels that count.

        Raises:
            ValueError: as in ``check_teaching``.
        """
        check_teaching(input_ids, labels, self.config)
        reduction = "mean" if num_items_in_batch is None else "sum"
        loss = nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1),
            labels[:, 1:].flatten().to(logits.device),
            ignore_index=IGNORED,
            reduction=reduction,
        )
        if num_items_in_batch is None:
            return loss
        if isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss / num_items_in_batch


def check_teaching(input_ids: torch.Tensor | None, labels: torch.Tensor, config: ChatGLMConfig) -> None:
    """Refuse labels from which a prefix LM learns nothing; warn once of those that count tokens of the context.

    Args:
        input_ids: int64 [B, M]; None, if only embeddings were given, leaves the labels unchecked.
        labels: int64 [B, M], -100 where the loss does not count.

    Raises:
        ValueError: several examples in one row, or a row whose labels all lie in the context, which the model sees.
    """
    if input_ids is None:
        return
    ids, counted = input_ids.cpu(), labels.cpu() != IGNORED
    is_sop = ids == config.bos_token_id
    is_mask = (ids == config.gmask_token_id) | (ids == config.mask_token_id)
    if bool(((is_mask[:, :-1] & is_sop[:, 1:]).sum(dim=1) > 1).any()):
        raise ValueError(
            "A row of input_ids holds several examples ([gMASK] <sop> stands in it more than once), but every row of a "
            "prefix LM has one context; train with packing=False and padding_free=False."
        )
    # The context does not see the token after <sop>. Labels may also count <sop> itself, as in stock's script.
    in_answer = is_sop.cumsum(dim=1) > 0
    counted[:, 0] = False
    in_context = counted & ~in_answer
    if bool(((in_context.any(dim=1)) & ~(counted & in_answer & ~is_sop).any(dim=1)).any()):
        raise ValueError(
            "A row has labels before <sop> and none after it, but the model sees every token before <sop> and learns "
            f"nothing from predicting one; {_HOW}. (trl joins a prompt and its completion to one text: give it "
            "messages, or ids and labels.)"
        )
    if bool(in_context.any()):
        _warn_of_context()


def check_loss_arguments(labels: torch.Tensor | None, num_items_in_batch: torch.Tensor | int | None) -> None:
    """Warn once if the Trainer keeps the labels to itself: it shifts them only for transformers' own classes."""
    if labels is None and num_items_in_batch is not None:
        _warn_of_missing_labels()


@functools.cache
def _warn_of_missing_labels() -> None:
    _log.warning(
        "The Trainer computes the loss itself: with label_smoothing_factor it compares every token with itself instead "
        "of the next one, so leave that out (trl's SFTTrainer smooths rightly); a compute_loss_func must shift labels."
    )


@functools.cache
def _warn_of_context() -> None:
    _log.warning(
        "labels count tokens before <sop>, all of which the model sees while it predicts them, so that they teach it "
        "nothing and hide the answer's loss; %s (trl: assistant_only_loss=True).",
        _HOW,
    )


def _own_parameters(function: Callable) -> Any:
    return inspect.signature(function, follow_wrapped=False).parameters


@contextmanager
def _batch_first() -> Iterator[None]:
    reset = batch_first.set(True)
    try:
        yield
    finally:
        batch_first.reset(reset)


def _with_fused_head(forward: Callable) -> Callable:
    """Wrap trl's forward: run our checks before it, and give it the body's output in the layout that it expects."""

    @functools.wraps(forward)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("fused_lm_head"):
            return forward(self, *args, **kwargs)
        packed = [name for name in _PACKED_ARGUMENTS if name in kwargs]
        if packed:
            raise ValueError(
                f"{packed[0]} tells of several examples in one row, but every row of a prefix LM has one context; "
                "train with packing=False and padding_free=False."
            )
        if not self.get_output_embeddings().weight.is_floating_point():
            raise ValueError(
                "trl multiplies by lm_head.weight itself, which is quantised here; quantise without head_bits to train."
            )
        labels = kwargs.get("labels")
        if labels is not None:
            input_ids = args[0] if args else kwargs.get("input_ids")
            check_labels(labels, input_ids, self.config.vocab_size)
            check_teaching(input_ids, labels, self.config)
        with _batch_first():
            return forward(self, *args, **kwargs)

    return checked
