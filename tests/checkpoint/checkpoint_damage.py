"""Draw the ways in which the files of a checkpoint go wrong, and apply them to a directory.

A damage is a dict of plain values, so that it can be sent to another process.
"""

import json
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

JSON_VALUES = st.sampled_from(
    [None, True, False, 0, 1, 2, 3, -1, 7, 128, 705, 1.5, float("nan"), 1e308, 10**12, -(10**12), 2**70, "", "3", "8",
     "float16", "int8", "../../etc/passwd", "你好", [], [1], {}, {"a": 1}, [[]], "x" * 10_000]
)  # fmt: skip
CONFIG_KEYS = (
    "vocab_size", "hidden_size", "num_layers", "num_attention_heads", "inner_hidden_size", "layernorm_epsilon",
    "max_sequence_length", "position_encoding_2d", "use_cache", "bos_token_id", "eos_token_id", "mask_token_id",
    "gmask_token_id", "pad_token_id", "torch_dtype", "dtype", "architectures", "auto_map", "model_type",
    "quantization_bit", "quantization_embeddings", "quantization_group_size", "quantization_head_bits",
    "pre_seq_len", "prefix_projection", "tie_word_embeddings", "transformers_version", "_name_or_path",
    "quantization_config", "generation_config", "id2label", "num_labels", "use_return_dict", "pruned_heads",
)  # fmt: skip
TOKENIZER_KEYS = (
    "bos_token", "eos_token", "end_token", "gmask_token", "mask_token", "pad_token", "unk_token", "remove_space",
    "do_lower_case", "tokenizer_class", "num_image_tokens", "auto_map", "padding_side", "added_tokens_decoder",
    "model_max_length", "clean_up_tokenization_spaces", "extra_special_tokens", "additional_special_tokens",
)  # fmt: skip
DTYPES = ("float64", "float32", "bfloat16", "int8", "uint8", "int16", "int32", "int64", "bool")


def _json_edits(keys: tuple[str, ...]) -> st.SearchStrategy[dict[str, Any]]:
    edit = st.fixed_dictionaries(
        {"key": st.sampled_from(keys), "value": st.one_of(st.just("<gone>"), JSON_VALUES, JSON_VALUES)}
    )
    return st.fixed_dictionaries({"kind": st.just("json"), "edits": st.lists(edit, min_size=1, max_size=2)})


_WHERE = st.fixed_dictionaries({"from": st.sampled_from(["start", "end", "anywhere"]), "at": st.floats(0, 1)})
_BYTES = st.one_of(
    st.fixed_dictionaries(
        {
            "kind": st.just("flip"),
            "where": st.lists(_WHERE, min_size=1, max_size=3),
            "value": st.integers(1, 255),
        }
    ),
    st.fixed_dictionaries({"kind": st.just("cut"), "where": _WHERE}),
    st.fixed_dictionaries(
        {"kind": st.just("content"), "content": st.sampled_from(["", "{}", "[]", "null", "[1", "\0"])}
    ),
    st.fixed_dictionaries(
        {"kind": st.just("content"), "content": st.just("version https://git-lfs.github.com/spec/v1\n")}
    ),
    st.fixed_dictionaries({"kind": st.just("remove")}),
)
_TENSORS = st.fixed_dictionaries(
    {
        "kind": st.just("tensor"),
        "index": st.integers(0, 200),
        "how": st.sampled_from(["remove", "rename", "transpose", "shorten", "longer", "flatten", "scalar", "empty"])
        | st.sampled_from(DTYPES).map(lambda name: f"to {name}"),
    }
)
_SCALES = st.fixed_dictionaries(
    {
        "kind": st.just("scale"),
        "index": st.integers(0, 200),
        "how": st.sampled_from(["nan", "inf", "negative", "transpose", "shorten", "remove", "to float32", "to int8"]),
    }
)
_INDEX = st.one_of(
    st.fixed_dictionaries(
        {
            "kind": st.just("map"),
            "how": st.sampled_from(["swap", "all in one", "to nowhere", "outside", "to a number", "drop", "no map"]),
            "index": st.integers(0, 200),
        }
    ),
    st.just({"kind": "swap shards"}),
    _json_edits(("weight_map", "metadata")),
)


def damages(base: str) -> st.SearchStrategy[dict[str, Any]]:
    """Return a strategy for damages of a copy of the checkpoint ``base``: {"base", "file", "entry", "kind", ...}."""
    config = st.builds(lambda damage: {"file": "config.json", **damage}, _json_edits(CONFIG_KEYS) | _BYTES)
    weights = [_BYTES, _TENSORS]
    if "int" in base:
        weights.append(_SCALES)
    if "sharded" in base:
        weights.append(_INDEX)
    entries = ["class", "auto"] if "int" in base else ["class", "class", "auto", "quantise"]
    entry = st.sampled_from(entries)
    return st.builds(
        lambda damage, entry: {"file": "weights", **damage, "base": base, "entry": entry},
        config | st.one_of(weights) | st.one_of(weights),
        entry,
    )


TOKENIZER_DAMAGES = st.builds(
    lambda damage, entry: {"file": "tokenizer_config.json", **damage, "base": "tiny", "entry": entry},
    _json_edits(TOKENIZER_KEYS) | _json_edits(TOKENIZER_KEYS) | _BYTES,
    st.sampled_from(["tokenizer", "tokenizer", "auto tokenizer"]),
)


def weight_files(directory: Path) -> list[Path]:
    """List the files that hold tensors, in order."""
    return sorted(path for path in directory.iterdir() if path.suffix in (".safetensors", ".bin"))


def apply(directory: Path, damage: dict[str, Any]) -> None:
    """Damage the files in ``directory``."""
    kind = damage["kind"]
    files = weight_files(directory)
    index = next(directory.glob("*.index.json"), None)
    path = files[-1] if damage["file"] == "weights" else directory / damage["file"]
    if kind == "json":
        _edit_json(index if damage["file"] == "weights" else path, damage["edits"])
    elif kind in ("tensor", "scale"):
        _change_tensor(files[damage["index"] % len(files)], kind == "scale", damage["index"], damage["how"])
    elif kind == "map":
        _change_map(index, damage["how"], damage["index"])
    elif kind == "swap shards":
        one, other = files[0].read_bytes(), files[-1].read_bytes()
        files[0].write_bytes(other)
        files[-1].write_bytes(one)
    elif kind == "remove":
        path.unlink()
    elif kind == "content":
        path.write_text(damage["content"])
    else:
        content = bytearray(path.read_bytes())
        if kind == "cut":
            del content[_offset(damage["where"], len(content)) :]
        else:
            for where in damage["where"]:
                content[_offset(where, len(content))] ^= damage["value"]
        path.write_bytes(content)


def _offset(where: dict[str, Any], length: int) -> int:
    span = length if where["from"] == "anywhere" else min(length, 6000)
    place = min(int(where["at"] * span), span - 1)
    return length - 1 - place if where["from"] == "end" else place


def _edit_json(path: Path, edits: list[dict[str, Any]]) -> None:
    content = json.loads(path.read_text("utf-8"))
    for edit in edits:
        content.pop(edit["key"], None)
        if edit["value"] != "<gone>":
            content[edit["key"]] = edit["value"]
    path.write_text(json.dumps(content), "utf-8")


def _change_map(path: Path, how: str, index: int) -> None:
    content = json.loads(path.read_text("utf-8"))
    names, shards = list(content["weight_map"]), sorted(set(content["weight_map"].values()))
    name = names[index % len(names)]
    if how == "swap":
        content["weight_map"] = {n: shards[1 - shards.index(shard)] for n, shard in content["weight_map"].items()}
    elif how == "all in one":
        content["weight_map"] = dict.fromkeys(names, shards[0])
    elif how == "drop":
        del content["weight_map"][name]
    elif how == "no map":
        content = {"metadata": {}}
    else:
        content["weight_map"][name] = {"to nowhere": "nothing.bin", "outside": "../config.json", "to a number": 3}[how]
    path.write_text(json.dumps(content), "utf-8")


def _change_tensor(path: Path, is_scale: bool, index: int, how: str) -> None:
    is_safetensors = path.suffix == ".safetensors"
    tensors = load_file(path) if is_safetensors else dict(torch.load(path, weights_only=True))
    names = [name for name in tensors if not name.endswith("inv_freq") and name.endswith("weight_scale") >= is_scale]
    name = names[index % len(names)]
    tensor = tensors.pop(name)
    if how == "rename":
        tensors[f"{name}.x"] = tensor
    elif how != "remove":
        tensors[name] = _changed(tensor, how).contiguous()
    save_file(tensors, path, {"format": "pt"}) if is_safetensors else torch.save(tensors, path)


def _changed(tensor: torch.Tensor, how: str) -> torch.Tensor:
    if how.startswith("to "):
        return tensor.to(getattr(torch, how[3:]))
    if how in ("nan", "inf", "negative"):
        tensor = tensor.clone()
        tensor.view(-1)[0] = {"nan": torch.nan, "inf": torch.inf, "negative": -1.0}[how]
        return tensor
    return {
        "transpose": lambda: tensor.t() if tensor.dim() == 2 else tensor[None],
        "shorten": lambda: tensor[:-1],
        "longer": lambda: torch.cat((tensor, tensor[:1])),
        "flatten": lambda: tensor.flatten() if tensor.dim() > 1 else tensor[:, None],
        "scalar": lambda: tensor.view(-1)[0],
        "empty": lambda: tensor[:0],
    }[how]()
