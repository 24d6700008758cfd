"""Write the table of docs/serving.md: how many answers fit into a GPU's memory at once, by the package's own estimates.

python -m examples.measuring.sizing             # 中文: add --language zh
"""

import argparse
from collections.abc import Iterator

import torch

from faster_chatglm_6b.configuration_chatglm import ChatGLMConfig
from faster_chatglm_6b.decoding.memory import cache_bytes
from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration
from faster_chatglm_6b.serving.rows import making

from .models import CONFIG_6B

GIB = 1 << 30
# GiB that nvidia-smi shows of cards of 8, 12, 16, 24, 48, 80 and 141 GB, roughly.
MEMORIES = (8, 12, 16, 24, 45, 80, 140)
LENGTHS = (256, 512, 1024, 2048)
BITS = {"fp16": None, "int8": 8, "int4": 4}
SHARE, MOST_ROWS = 0.9, 256
# CUDA's context, and the buffers of 256 rows.
BESIDE = GIB
WORDS = {
    "en": ("GPU memory, GiB", "weights", "tokens of keys and values", "answers of {} tokens", "too little"),
    "zh": ("GPU 内存（GiB）", "权重", "键和值的 token 数", "{} 个 token 的回答数", "不够"),
}


def empty_model(bits: int | None) -> torch.nn.Module:
    """Return a model of the 6B shape in half precision without memory for its weights."""
    config = ChatGLMConfig(**CONFIG_6B, **({} if bits is None else {"quantization_bit": bits}))
    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration(config).half()
    model.lm_head.weight = model.transformer.word_embeddings.weight
    return model


def tokens_that_fit(model: torch.nn.Module, memory: int) -> int:
    """Return for how many tokens of keys and values a server has room in ``memory`` bytes; 0 if for no whole answer."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    room = int((memory - weights - BESIDE) * SHARE) - making._RESERVED_BYTES
    tokens = room // cache_bytes(model, 1, 1)
    return tokens if tokens >= model.config.max_sequence_length else 0


def table(language: str) -> Iterator[str]:
    """Yield the lines of the table."""
    memory, weights, tokens, answers, too_little = WORDS[language]
    yield "| " + " | ".join((memory, weights, tokens, *(answers.format(length) for length in LENGTHS))) + " |"
    yield "|---" * (3 + len(LENGTHS)) + "|"
    models = {name: empty_model(bits) for name, bits in BITS.items()}
    for gib in MEMORIES:
        for name, model in models.items():
            fit = tokens_that_fit(model, gib * GIB)
            if fit:
                shown = [f"{fit // 100 * 100}", *(str(min(fit // length, MOST_ROWS)) for length in LENGTHS)]
            else:
                shown = [too_little] + ["-"] * len(LENGTHS)
            yield "| " + " | ".join((str(gib), name, *shown)) + " |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language", choices=WORDS, default="en")
    print("\n".join(table(parser.parse_args().language)))


if __name__ == "__main__":
    main()
