"""Block shapes for Triton's interpreter.

It runs program after program: a few large blocks take seconds, while a GPU's small ones take minutes.
"""

from dataclasses import replace

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
