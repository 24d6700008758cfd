"""transformers' logits processors and OpenAI's penalties, row by row on float32 scores."""

import math

import torch


def copy_scores(logits: torch.Tensor, scores: torch.Tensor) -> None:
    """Copy logits to scores as float32, both [B, V]; the functions below change this copy."""
    scores.copy_(logits)


def repetition_penalty(
    logits: torch.Tensor,
    scores: torch.Tensor,
    ids: torch.Tensor,
    ids_length: torch.Tensor,
    penalty: torch.Tensor,
) -> None:
    """Write logit * penalty (negative) or / penalty to scores at every id so far; the first processor.

    Arguments and meaning are those of ``triton.repetition_penalty``.
    """
    for row, length in enumerate(ids_length[: len(scores)].tolist()):
        # A number in float32, as the kernels have it.
        factor, seen = penalty[row], ids[row, :length]
        value = logits[row, seen].float()
        scores[row, seen] = torch.where(value < 0, value * factor, value / factor)


def no_repeat_ngram(
    scores: torch.Tensor, ids: torch.Tensor, ids_length: torch.Tensor, ngram_size: torch.Tensor
) -> None:
    """Write -inf for every token that would complete an n-gram already in ids.

    Arguments and meaning are those of ``triton.no_repeat_ngram``.
    """
    sizes = ngram_size[: len(scores)].tolist()
    for row, (length, size) in enumerate(zip(ids_length.tolist(), sizes, strict=False)):
        history = ids[row, :length]
        if not 0 < size <= len(history):
            continue
        grams = history.unfold(0, size, 1)
        newest = history[len(history) - size + 1 :]
        banned = grams[(grams[:, :-1] == newest).all(dim=1), -1]
        scores[row, banned] = -math.inf


def min_length(scores: torch.Tensor, ids_length: torch.Tensor, minimum: torch.Tensor, eos_ids: torch.Tensor) -> None:
    """Write -inf at the end tokens while fewer than ``minimum`` ids exist.

    Arguments and meaning are those of ``triton.min_length``.
    """
    for row in range(len(scores)):
        if ids_length[row] < minimum[row]:
            ends = eos_ids[row]
            scores[row, ends[(ends >= 0) & (ends < scores.shape[1])]] = -math.inf


def logit_bias(scores: torch.Tensor, bias_ids: torch.Tensor, bias_values: torch.Tensor) -> None:
    """Add a number to the scores of some ids; arguments and meaning are those of ``triton.logit_bias``."""
    for row in range(len(scores)):
        there = (bias_ids[row] >= 0) & (bias_ids[row] < scores.shape[1])
        scores[row, bias_ids[row, there].long()] += bias_values[row, there]


def token_count_penalty(
    scores: torch.Tensor,
    ids: torch.Tensor,
    answer_start: torch.Tensor,
    ids_length: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
) -> None:
    """Subtract presence + frequency * n from the score of a token that an answer has n > 0 times.

    Arguments and meaning are those of ``triton.token_count_penalty``.
    """
    for row in range(len(scores)):
        if presence[row] == 0 and frequency[row] == 0:
            continue
        answer = ids[row, int(answer_start[row]) : int(ids_length[row])]
        tokens, counts = answer[(answer >= 0) & (answer < scores.shape[1])].unique(return_counts=True)
        scores[row, tokens] -= presence[row] + frequency[row] * counts.float()
