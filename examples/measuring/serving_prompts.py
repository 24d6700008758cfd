"""Prompts of an exact number of tokens, and random weights that answer in a tokenizer's characters."""

import random
import unicodedata
from pathlib import Path
from typing import Any

import torch

TINY = Path(__file__).resolve().parents[1] / "tiny_chatglm"
# [gMASK] <sop>, which a prompt ends in.
_ENDS = 2


def tokenizer_for(model: Any) -> Any:
    """Return the tiny checkpoint's tokenizer for a model of random weights, whose config takes its control tokens.

    The model's embeddings of all ids but the Chinese characters become so small that these are never the most likely:
    so each token of a greedy answer has a text, and a tester hears of it at once.
    """
    from faster_chatglm_6b.tokenization_chatglm import ChatGLMTokenizer

    tokenizer = ChatGLMTokenizer.from_pretrained(TINY)
    for name in ("bos", "eos", "mask", "gmask", "pad"):
        setattr(model.config, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    weight = model.transformer.word_embeddings.weight
    is_text = torch.zeros(len(weight), dtype=torch.bool)
    is_text[[index for index, _ in _characters(tokenizer)]] = True
    with torch.no_grad():
        weight[~is_text.to(weight.device)] *= 0.01
    return tokenizer


def prompts_of(tokenizer: Any, count: int, tokens: int, seed: int = 0) -> list[str]:
    """Return different texts, each a prompt of exactly so many tokens, with its [gMASK] <sop>."""
    draw = random.Random(f"{seed} {tokens}")
    characters = [text for _, text in _characters(tokenizer)]
    return [_prompt_of(tokenizer, draw, characters, tokens - _ENDS) for _ in range(count)]


def _prompt_of(tokenizer: Any, draw: random.Random, characters: list[str], tokens: int) -> str:
    text = ""
    while True:
        count = len(tokenizer.encode_text(text))
        if count == tokens:
            return text
        # Neighbours can be one token together: so the text grows until it is enough, and is cut by single characters.
        text = text + "".join(draw.choices(characters, k=tokens - count)) if count < tokens else text[:-1]


def _characters(tokenizer: Any) -> list[tuple[int, str]]:
    """Return ids and texts of the vocabulary's pieces of one Chinese character."""
    model = tokenizer.sp_tokenizer.model
    pieces = ((index, model.IdToPiece(index)) for index in range(model.GetPieceSize()))
    first = tokenizer.num_image_tokens
    return [
        (first + index, piece)
        for index, piece in pieces
        if len(piece) == 1 and unicodedata.name(piece, "").startswith("CJK UNIFIED")
    ]
