"""Check what ``forward`` and ``generate`` are given: each wrong tensor ends in one sentence, before any work.

Shapes and dtypes cost nothing to check. Values are read when the forward waits for the device anyway.
"""

from __future__ import annotations

from typing import Any

import torch

# OneFlow has no layouts.
_STRIDED = getattr(torch, "strided", None)
_ID_DTYPES = (torch.int64, torch.int32)
# Far beyond any prompt; a table of so many positions still fits into memory.
_MOST_POSITIONS = 2**20


def check_tensor(name: str, value: Any, needed: str) -> None:
    """Raise ValueError unless ``value`` is a dense tensor that holds values.

    Args:
        needed: what to pass, for the message: "int64 [batch, length]".
    """
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}, but a tensor is needed; pass {needed}.")
    if value.device.type == "meta":
        raise ValueError(f"{name} lies on the device meta and holds no values; pass {needed} on a real device.")
    if getattr(value, "is_sparse", False) or (_STRIDED and value.layout != _STRIDED):
        raise ValueError(f"{name} is a sparse tensor, but a dense one is needed; pass {name}.to_dense().")


def check_ids(input_ids: Any) -> None:
    """Raise ValueError unless ``input_ids`` are integers [batch, length], both at least 1."""
    check_tensor("input_ids", input_ids, "int64 [batch, length]")
    if input_ids.dtype not in _ID_DTYPES:
        raise ValueError(f"input_ids are {input_ids.dtype}, but ids are integers; pass int64 [batch, length].")
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(
            f"input_ids have shape {list(input_ids.shape)}, but [batch, length] with a batch and a length of 1 or more "
            "is needed."
        )


def check_mask(attention_mask: Any, batch: int, rows: int, keys: int) -> None:
    """Raise ValueError unless a mask is [batch, keys], or 4-D and broadcasts to [batch, 1, rows, keys]."""
    check_tensor("attention_mask", attention_mask, "one 0 or 1 for each token")
    shape = list(attention_mask.shape)
    if len(shape) not in (2, 4):
        raise ValueError(
            f"attention_mask has shape {shape}; pass [batch, length] with 0 for padding, or a bool "
            "[batch, 1, query, key] with True where hidden."
        )
    if len(shape) == 2 and shape[1] != keys:
        raise ValueError(
            f"attention_mask has shape {shape} and covers {shape[1]} tokens, but {keys} are attended to; pass one 0 "
            "or 1 for each of them."
        )
    wanted = [batch, keys] if len(shape) == 2 else [batch, 1, rows, keys]
    if any(one not in (1, other) for one, other in zip(shape, wanted, strict=True)) or shape[-1] != keys:
        raise ValueError(
            f"attention_mask has shape {shape}, but {wanted} is needed for {batch} sequences, {rows} new tokens and "
            f"{keys} tokens in all."
        )


def check_positions(position_ids: Any, batch: int, rows: int, two_dimensional: bool) -> None:
    """Raise ValueError unless ``position_ids`` are integers [batch or 1, 2, rows], or [batch or 1, rows]."""
    wanted = [batch, 2, rows] if two_dimensional else [batch, rows]
    check_tensor("position_ids", position_ids, f"int64 {wanted}")
    shape = list(position_ids.shape)
    if shape[:1] not in ([1], [batch]) or shape[1:] != wanted[1:]:
        raise ValueError(f"position_ids have shape {shape}, but {wanted} is needed; leave them out, or pass that.")
    if position_ids.dtype not in _ID_DTYPES:
        raise ValueError(f"position_ids are {position_ids.dtype}, but positions are integers; pass int64 {wanted}.")


def check_embeddings(inputs_embeds: Any, input_ids: torch.Tensor | None, hidden_size: int) -> None:
    """Raise ValueError unless ``inputs_embeds`` are floats [batch, length, hidden_size] that go with the ids."""
    check_tensor("inputs_embeds", inputs_embeds, f"floats [batch, length, {hidden_size}]")
    shape = list(inputs_embeds.shape)
    if len(shape) != 3 or shape[2] != hidden_size or 0 in shape or not inputs_embeds.is_floating_point():
        raise ValueError(
            f"inputs_embeds are {inputs_embeds.dtype} of shape {shape}; pass floats [batch, length, {hidden_size}]."
        )
    if input_ids is not None and shape[:2] != list(input_ids.shape):
        raise ValueError(
            f"inputs_embeds have shape {shape}, but input_ids {list(input_ids.shape)}; pass one embedding for each id."
        )


def check_labels(labels: Any, inputs: Any, vocab_size: int) -> None:
    """Raise ValueError unless ``labels`` are ids or -100, one for each token of ``inputs`` [batch, length, ...].

    Values are read only on the CPU, where nothing waits for a device.
    """
    check_tensor("labels", labels, "int64 [batch, length]")
    wanted = list(getattr(inputs, "shape", ()))[:2]
    if list(labels.shape) != wanted or labels.dtype != torch.int64:
        raise ValueError(
            f"labels are {labels.dtype} of shape {list(labels.shape)}; pass int64 {wanted}, one for each token and "
            "-100 where the loss does not count."
        )
    if labels.device.type == "cpu":
        wrong = labels[((labels < 0) & (labels != -100)) | (labels >= vocab_size)]
        if wrong.numel():
            raise ValueError(
                f"labels hold {int(wrong[0])}, but this model's vocabulary goes from 0 to {vocab_size - 1}; pass -100 "
                "where the loss does not count."
            )


def highest_position(position_ids: torch.Tensor, input_ids: torch.Tensor | None, vocab_size: int) -> int:
    """Return the highest position; positions and ids are read from the device together.

    Args:
        input_ids: the ids to embed, or None if embeddings are given.

    Raises:
        ValueError: a negative or absurdly high position, or an id out of the vocabulary.
    """
    ends = [position_ids.min(), position_ids.max()]
    if input_ids is not None:
        ends += [end.to(ends[0].device) for end in (input_ids.min(), input_ids.max())]
    low, high, *ids = torch.stack([end.long() for end in ends]).tolist()
    if low < 0 or high >= _MOST_POSITIONS:
        raise ValueError(
            f"position_ids hold {low if low < 0 else high}, but positions go from 0 to {_MOST_POSITIONS - 1}; leave "
            "position_ids out to have them derived from input_ids."
        )
    if ids:
        check_range(*ids, vocab_size)
    return high


def check_range(low: int, high: int, vocab_size: int) -> None:
    """Raise ValueError unless the lowest and the highest id are in the vocabulary."""
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"input_ids hold the id {low if low < 0 else high}, but this model's vocabulary goes from 0 to "
            f"{vocab_size - 1}; use the tokenizer that belongs to the checkpoint."
        )


def check_inputs(
    input_ids: Any, inputs_embeds: Any, position_ids: Any, attention_mask: Any, config: Any, past_length: int
) -> None:
    """Raise ValueError unless the inputs of one forward after ``past_length`` cached tokens fit together."""
    if input_ids is None and inputs_embeds is None:
        raise ValueError("Neither input_ids nor inputs_embeds are given; pass one of them.")
    if input_ids is not None:
        check_ids(input_ids)
    if inputs_embeds is not None:
        check_embeddings(inputs_embeds, input_ids, config.hidden_size)
    batch, rows = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
    if position_ids is not None:
        check_positions(position_ids, batch, rows, config.position_encoding_2d)
    if attention_mask is not None:
        check_mask(attention_mask, batch, rows, past_length + rows)
