"""Estimate how much memory a generation takes, how much is free and what would fit."""

import os
from typing import Any

import torch

from .request import MOST_DRAFTED

# Bytes per sequence and id of the vocabulary: scores in float32, and what a full sort for top-p adds.
_SCORE_BYTES = 64
# cuBLAS' workspaces, and the scratch memory of the prompt's kernels and of the captured step.
_FIXED_BYTES = 256 << 20
_FIXED_BYTES_PER_SEQUENCE = 3 << 20
# Activations and scratch memory of a step of several positions, of which larger batches have none.
_DRAFT_BYTES, _DRAFT_BYTES_PER_SEQUENCE = 24 << 20, 14 << 20


def cache_bytes(model: Any, batch: int, capacity: int) -> int:
    """Return the bytes of keys and values of ``batch`` sequences of ``capacity`` tokens."""
    config = model.config
    return 2 * config.num_layers * batch * capacity * config.hidden_size * _element_size(model)


def workspace_bytes(model: Any, batch: int, prompt: int) -> int:
    """Return the most bytes that a generation without drafts takes beside weights and cache; an estimate on a CPU.

    Args:
        batch: number of sequences.
        prompt: tokens of the longest prompt, with its padding.
    """
    config, size = model.config, _element_size(model)
    # The input, residual, widened activations and output of one layer, in its MLP or its attention.
    widths = max(4 * config.hidden_size + 2 * config.inner_hidden_size, 10 * config.hidden_size)
    needed = batch * prompt * widths * size + batch * config.vocab_size * _SCORE_BYTES
    # The hidden keys, as a mask, as a bias and as an aligned copy of the bias.
    needed += batch * prompt * prompt * (2 * size + 2)
    if config.quantization_bit:
        needed += config.hidden_size * max(config.inner_hidden_size, 3 * config.hidden_size) * size
    if model.device.type == "cuda":
        return needed + _FIXED_BYTES + batch * _FIXED_BYTES_PER_SEQUENCE
    # The operators' definitions hold the scores of every pair of tokens and their softmax.
    return needed + 2 * batch * config.num_attention_heads * prompt * prompt * 4


def draft_bytes(batch: int) -> int:
    """Return the most bytes that drafts take as well on a GPU; an answer for which these are not free has no drafts."""
    return 0 if batch > max(MOST_DRAFTED) else _DRAFT_BYTES + batch * _DRAFT_BYTES_PER_SEQUENCE


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that this process could still take on the device; None if that cannot be told."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        fraction = getattr(torch.cuda, "get_per_process_memory_fraction", None)
        if fraction is not None:
            free = max(min(free, int(fraction(device) * total) - reserved), 0)
        return free + reserved - torch.cuda.memory_allocated(device)
    if device.type == "cpu":
        return _free_cpu_bytes()
    return None


def _free_cpu_bytes() -> int | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            free = next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            with open("/proc/self/statm", encoding="ascii") as file:
                free = min(free, limit - int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE"))
        return max(free, 0)
    except (OSError, ImportError, StopIteration):
        return None


def what_fits(model: Any, batch: int, prompt: int, total: int, free: int) -> str:
    """Describe, for an error message, the requests for which ``free`` bytes are enough."""
    tokens = most_tokens(model, batch, prompt, free)
    if tokens >= total:
        return "that would do, so something else took memory in between: try again, or ask for less"
    sequences = most_sequences(model, prompt, total, free)
    fits = []
    if tokens > prompt:
        fits.append(f"{tokens} tokens each (max_length)")
    if batch > 1 and sequences:
        fits.append(f"{sequences} sequence{'s' if sequences > 1 else ''} (batch times num_beams) of {total}")
    if not fits:
        return "not even one such prompt fits with its answer: shorten it, lower max_length or free memory"
    return f"about {' or '.join(fits)} would fit"


def most_tokens(model: Any, batch: int, prompt: int, free: int) -> int:
    """Return the tokens per sequence, prompt included, for which ``free`` bytes are enough."""
    room = free - workspace_bytes(model, batch, prompt)
    return max(room // _bytes_per_token(model, batch), 0)


def most_sequences(model: Any, prompt: int, total: int, free: int) -> int:
    """Return the number of sequences of ``total`` tokens for which ``free`` bytes are enough."""
    one, two = (workspace_bytes(model, n, prompt) + n * total * _bytes_per_token(model, 1) for n in (1, 2))
    return 0 if free < one else 1 + (free - one) // (two - one)


def _bytes_per_token(model: Any, batch: int) -> int:
    """Return the bytes per token of a cache that grows by copying layer after layer, as the plain path's does."""
    return cache_bytes(model, batch, 1) * (model.config.num_layers + 1) // model.config.num_layers


def _element_size(model: Any) -> int:
    # Asked of any parameter, because a wrapped embedding may have no ``weight``.
    return next((parameter.element_size() for parameter in model.transformer.word_embeddings.parameters()), 2)


def shown(size: int) -> str:
    """Format a number of bytes for a message."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 2**10:.1f} KiB"
