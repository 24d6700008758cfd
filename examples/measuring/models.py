"""The models and prompts that are measured, and what a step of them must read and compute."""

import sys
from typing import Any

import torch

# THUDM/chatglm-6b's config.json.
CONFIG_6B = {
    "vocab_size": 130528,
    "hidden_size": 4096,
    "num_layers": 28,
    "num_attention_heads": 32,
    "inner_hidden_size": 16384,
    "max_sequence_length": 2048,
    "bos_token_id": 130004,
    "eos_token_id": 130005,
    "mask_token_id": 130000,
    "gmask_token_id": 130001,
    "pad_token_id": 3,
    "position_encoding_2d": True,
}


def build_model(name: str | None) -> torch.nn.Module:
    """Return the model of ``load``, for uses without a tokenizer."""
    return load(name)[0]


def load(name: str | None) -> tuple[torch.nn.Module, Any]:
    """Load model and tokenizer of a checkpoint, in the dtype that the commands take on this device.

    Without a name, return ``random_model()`` and no tokenizer.

    Raises:
        SystemExit: after a sentence on what to do, if the checkpoint cannot be loaded.
    """
    if name is None:
        return random_model(), None
    from faster_chatglm_6b.cli import checkpoint
    from faster_chatglm_6b.cli.errors import CommandError

    try:
        tokenizer, model = checkpoint.load(name)
    except CommandError as error:
        sys.exit(str(error))
    return model.eval(), tokenizer


def random_model(dtype: torch.dtype = torch.float16) -> torch.nn.Module:
    """Make a model of the 6B shape with random weights, on the GPU in seconds."""
    from faster_chatglm_6b.configuration_chatglm import ChatGLMConfig
    from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            model = ChatGLMForConditionalGeneration(ChatGLMConfig(**CONFIG_6B))
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator("cuda").manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0, 0.02, generator=generator)
    model.lm_head.weight = model.transformer.word_embeddings.weight
    return model.eval()


def make_prompt(model: torch.nn.Module, batch: int, tokens: int) -> torch.Tensor:
    """Make random ids [batch, tokens] that end in [gMASK] <sop>; no tokenizer is needed."""
    config = model.config
    words = min(20000, config.mask_token_id)
    text = torch.randint(20, words, (batch, tokens - 2), generator=torch.Generator().manual_seed(tokens))
    end = torch.tensor([[config.gmask_token_id, config.bos_token_id]]).expand(batch, 2)
    return torch.cat((text, end), dim=1).to(model.device)


def encode_prompt(model: torch.nn.Module, tokenizer: Any, text: str, batch: int) -> torch.Tensor:
    """Encode a text to ids [batch, length] as ``chat`` asks it, the same in every row."""
    ids = [*tokenizer.encode_text(text), tokenizer.gmask_token_id, tokenizer.bos_token_id]
    return torch.tensor([ids], device=model.device).expand(batch, -1).contiguous()


def bytes_per_step(model: torch.nn.Module, batch: int, keys: float) -> int:
    """Count what a step must read: every layer, the head, and ``keys`` keys and values of every sequence."""
    layers = sum(p.numel() * p.element_size() for p in model.transformer.layers.parameters())
    head = model.lm_head.weight.numel() * model.lm_head.weight.element_size()
    config = model.config
    of_a_key = model.transformer.word_embeddings.weight.element_size()
    return int(layers + head + 2 * config.num_layers * config.hidden_size * of_a_key * batch * keys)


def operations_of_prompt(model: torch.nn.Module, batch: int, tokens: int) -> int:
    """Count the multiplications and additions of the first token of ``batch`` prompts of ``tokens`` tokens.

    Every row goes through every layer's products and attends to every key; the head sees the last row of each prompt.
    """
    config = model.config
    rows, hidden = batch * tokens, config.hidden_size
    products = 2 * rows * (4 * hidden**2 + 2 * hidden * config.inner_hidden_size)
    attention = 4 * rows * tokens * hidden
    return config.num_layers * (products + attention) + 2 * batch * config.vocab_size * hidden


def weights_of(model: torch.nn.Module) -> str:
    """Return what the layers' weights are: "fp16", "bf16", "fp32", "int8" or "int4"."""
    bits = model.config.quantization_bit
    return f"int{bits}" if bits else _float_name(model)


def head_of(model: torch.nn.Module) -> str:
    """Return what the output head's weight is, in the words of ``weights_of``."""
    bits = model.config.quantization_head_bits
    return f"int{bits}" if bits else _float_name(model)


def _float_name(model: torch.nn.Module) -> str:
    return {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(model.transformer.word_embeddings.weight.dtype, "fp32")
