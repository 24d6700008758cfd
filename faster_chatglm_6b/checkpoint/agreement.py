"""Compare the tensors in a checkpoint's files with those that its config.json asks for: each one, and no other.

transformers fills what is missing with whatever the memory holds, skips what it does not know and casts integers to
floats. A checkpoint whose two halves disagree would answer nonsense, or nothing.
"""

import copy
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_HEAD, _PREFIX = "lm_head.", "prefix_encoder."
_AGAIN = "take both from the same checkpoint, or copy or download it again."
# What bitsandbytes stores beside a weight.
_PLUGIN = re.compile(
    r"\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+)$|\.(SCB|weight_format)$"
)


class Held(NamedTuple):
    """A tensor in a file: ``dtype`` is torch's, or the file's name for one that torch has not."""

    dtype: torch.dtype | str
    shape: tuple[int, ...]


def check_agreement(
    model_class: Any,
    config: Any,
    stored: Mapping[str, Any],
    held: Mapping[str, Held],
    name: Any,
    ignore_shapes: bool = False,
) -> None:
    """Compare the tensors of a model, built without memory, with those in the files.

    These may be missing: a head that is the embedding, or the embedding if the head is there; a whole P-Tuning prefix.
    These may be there in vain: rotary frequencies; a head if the model has none; layers and a prefix of config.json
    that a caller's own configuration leaves out.

    Args:
        model_class: of the package, or derived from it.
        config: with which the files are read.
        stored: config.json.
        held: what is in the files.
        name: of the checkpoint, for the messages.
        ignore_shapes: of ``from_pretrained``.

    Raises:
        ValueError: they disagree; the message names the tensor.
    """
    with torch.device("meta"):
        wanted = model_class(copy.deepcopy(config)).state_dict()
    found = _under_names_of(wanted, held, f"{model_class.base_model_prefix}.")
    has_plugin = bool(getattr(config, "quantization_config", None))
    if not has_plugin:
        _check_dtypes(wanted, found, config, name)
    _check_missing(wanted, found, config, name, getattr(model_class, "_keys_to_ignore_on_load_missing", None))
    for key, value in wanted.items():
        if key in found and found[key].shape != tuple(value.shape) and not (ignore_shapes or has_plugin):
            raise ValueError(
                f"The weights of {name} have other shapes than its config.json says; take both from the same "
                f"checkpoint. ({key}: {list(found[key].shape)} instead of {list(value.shape)})"
            )
    ignored = [*(getattr(model_class, "_keys_to_ignore_on_load_unexpected", None) or ()), r"rotary_emb\.inv_freq$"]
    for key in found.keys() - wanted.keys():
        is_known = any(re.search(pattern, key) for pattern in ignored) or (has_plugin and _PLUGIN.search(key))
        if not is_known and not _is_left_out(key, wanted, config, stored):
            raise ValueError(
                f"The weights of {name} hold {key}, which its config.json does not ask for (num_layers="
                f"{config.num_layers}, quantization_bit={config.quantization_bit!r}, pre_seq_len="
                f"{config.pre_seq_len!r}); {_AGAIN}"
            )


def _under_names_of(wanted: Mapping[str, Any], held: Mapping[str, Held], base: str) -> dict[str, Held]:
    """Give the files' tensors the model's names: either may be the model without a head."""
    has_base = any(key.startswith(base) for key in held)
    if any(key.startswith(base) for key in wanted):
        return dict(held) if has_base else {key if key in wanted else base + key: value for key, value in held.items()}
    return {key.removeprefix(base): value for key, value in held.items()}


def _check_dtypes(wanted: Mapping[str, Any], found: Mapping[str, Held], config: Any, name: Any) -> None:
    for key, (dtype, _) in found.items():
        if key not in wanted:
            fits = dtype in FLOATS or dtype == torch.int8
        elif wanted[key].is_floating_point():
            fits = dtype in FLOATS
        else:
            fits = dtype == wanted[key].dtype
        if not fits:
            raise ValueError(
                f"The weights of {name} hold {key} as {dtype}, which does not go with quantization_bit="
                f"{config.quantization_bit or None!r} of its config.json; take both from the same checkpoint."
            )


def _check_missing(
    wanted: Mapping[str, Any], found: Mapping[str, Held], config: Any, name: Any, ignored: Any = None
) -> None:
    may_miss = set()
    if config.tie_word_embeddings:
        embedding = next((key for key in wanted if key.endswith("word_embeddings.weight")), None)
        head = f"{_HEAD}weight"
        may_miss = {head, f"{head}_scale"} if embedding in found else set()
        if head in found and head in wanted:
            may_miss |= {embedding, f"{embedding}_scale"}
    missing = sorted(
        key
        for key in wanted.keys() - found.keys() - may_miss
        if _PREFIX not in key and not any(re.search(pattern, key) for pattern in ignored or ())
    )
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ValueError(
            f"The weights of {name} lack {shown}, which its config.json asks for; copy or download the checkpoint "
            "again."
        )


def _is_left_out(key: str, wanted: Mapping[str, Any], config: Any, stored: Mapping[str, Any]) -> bool:
    """Return whether config.json has what the configuration in use, a caller's own, does without."""
    layer = re.search(r"(^|\.)layers\.(\d+)\.", key)
    if layer and isinstance(stored.get("num_layers"), int):
        return config.num_layers <= int(layer[2]) < stored["num_layers"]
    if _PREFIX in key:
        return bool(stored.get("pre_seq_len")) and not config.pre_seq_len
    return key.startswith(_HEAD) and not any(one.startswith(_HEAD) for one in wanted)
