"""How large a model a config.json asks for, so that one that asks for too much is refused before memory is taken."""

import os
from collections.abc import Iterable
from typing import Any

# Far above every ChatGLM-6B, and far below what would fill a machine by a slip or on purpose.
MOST_PARAMETERS = 10**11
# Smaller models are loaded, and their missing tensors named, whatever their files hold.
_WORTH_A_LOOK = 2**30


def parameter_count(config: Any) -> int:
    """Parameters of the embedding, the layers and the P-Tuning prefix, the head being the embedding."""
    hidden, inner, layers = config.hidden_size, config.inner_hidden_size, config.num_layers
    attention = 4 * hidden * hidden + 4 * hidden
    mlp = 2 * hidden * inner + hidden + inner
    prefix = (config.pre_seq_len or 0) * layers * hidden * 2
    return config.vocab_size * hidden + layers * (attention + mlp + 4 * hidden) + 2 * hidden + prefix


def check_size(config: Any) -> None:
    """Raise ValueError for sizes that are each plausible and together ask for terabytes."""
    count = parameter_count(config)
    if count > MOST_PARAMETERS:
        raise ValueError(
            f"config.json asks for a model of {count / 1e9:.0f} billion parameters (vocab_size={config.vocab_size}, "
            f"hidden_size={config.hidden_size}, inner_hidden_size={config.inner_hidden_size}, "
            f"num_layers={config.num_layers}, pre_seq_len={config.pre_seq_len}), but ChatGLM-6B has 6 and more than "
            f"{MOST_PARAMETERS // 10**9} are refused; take config.json from the checkpoint again."
        )


def check_weight_files(config: Any, paths: Iterable[str], name: Any) -> None:
    """Compare what config.json asks for with the bytes of the weight files, whatever is in them.

    Raises:
        ValueError: a large model that the files cannot hold, even with a byte per parameter (half a one in 4 bits).
    """
    held = sum(map(os.path.getsize, paths))
    asked = parameter_count(config) // (2 if config.quantization_bit == 4 else 1)
    if held and asked > max(held, _WORTH_A_LOOK):
        raise ValueError(
            f"config.json of {name} asks for {parameter_count(config) / 1e9:.1f} billion parameters, but the weight "
            f"files beside it hold {held / 1e9:.3f} GB only; take both from the same checkpoint, or copy or download "
            "it again."
        )
