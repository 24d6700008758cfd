"""Block shapes for Triton's interpreter.

It runs program after program: a few large blocks take seconds, while a GPU's small ones take minutes. For the same
reason prompts are not padded to the length of a graph there, nor batches to the rows of one, but where a check asks for
it (``padded_prompts``).
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch

from faster_chatglm_6b.decoding import session
from faster_chatglm_6b.decoding.steps import prompt
from faster_chatglm_6b.ops.triton import configs
from faster_chatglm_6b.ops.triton.quantized import gemv as quantized_gemv


def use_large_blocks(gemv: tuple[int, int, int] = (256, 512, 4), keys: int = 256) -> None:
    """Set block shapes for the rest of this process.

    Args:
        gemv: ``BLOCK_N``, ``BLOCK_K`` and warps of the product with a float weight.
        keys: keys in a block of attention.
    """
    attention = configs.Attention(keys, 4, 1)
    configs._CONSUMER = replace(
        configs.FAMILIES[8, 6],
        gemv_default=configs.Gemv(*gemv),
        attention=attention,
        attention_short=attention,
    )
    quantized_gemv.BLOCK_N = 256
    prompt.LENGTHS = ()
    session.ROW_BUCKETS = ()


@contextlib.contextmanager
def padded_prompts(
    model: torch.nn.Module, lengths: tuple[int, ...], most_rows: int = prompt.MOST_CAPTURED_ROWS
) -> Iterator[None]:
    """Pad prompts to one of these lengths, as where graphs serve them, if that makes ``most_rows`` rows at most."""
    kept = prompt.LENGTHS, prompt.MOST_CAPTURED_ROWS
    # A session's buffers have room for the rows of the time that made it.
    model.release_cache()
    prompt.LENGTHS, prompt.MOST_CAPTURED_ROWS = lengths, most_rows
    try:
        yield
    finally:
        prompt.LENGTHS, prompt.MOST_CAPTURED_ROWS = kept
        model.release_cache()
