"""The files of one checkpoint: each is looked up and read once, and what was found is handed on."""

import copy
import os
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from transformers.utils import cached_file

from ..configuration_chatglm import ChatGLMConfig
from ..disk.json_files import check_readable, read_json

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# In transformers' order of preference.
SAFETENSORS_FILES = ("model.safetensors", "model.safetensors.index.json")
BIN_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# Far more than any shard of ChatGLM-6B.
_MOST_FILE_BYTES = 1 << 40


class Source:
    """The files of a checkpoint that ``from_pretrained`` was given. Each is read when it is first asked for.

    Args:
        name: of the checkpoint, a directory or hub id.
        kwargs: of ``from_pretrained``; those that say where the files are, and which, are taken.
    """

    def __init__(self, name: Any, kwargs: Mapping[str, Any]) -> None:
        self.name = name
        self.hub = only(kwargs, HUB_ARGUMENTS)
        self._use_safetensors, self._variant = kwargs.get("use_safetensors"), kwargs.get("variant")

    @cached_property
    def stored(self) -> dict[str, Any]:
        """The settings of config.json that are taken from a checkpoint; not to be changed.

        Raises:
            OSError, ValueError: there is no config.json, or it is none of a model.
        """
        return ChatGLMConfig.get_config_dict(self.name, **self.hub)[0]

    @cached_property
    def weights(self) -> dict[str, set[str]]:
        """The weight files and the tensors that an index says are in each, as ``weight_files`` finds them."""
        return weight_files(self.name, self.hub, self._use_safetensors, self._variant)

    def configuration(self, config_class: type[ChatGLMConfig], **settings: Any) -> ChatGLMConfig:
        """Build the configuration of config.json with a caller's own settings in it."""
        return config_class.from_dict(copy.deepcopy(self.stored), **settings)

    def other_file(self, file: str) -> str | None:
        """Return the path of a further file of the checkpoint; None if it has none of this name."""
        return cached_file(self.name, file, **self.hub, _raise_exceptions_for_missing_entries=False)


def only(kwargs: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Return the arguments of these names that were given."""
    return {name: kwargs[name] for name in names if kwargs.get(name) is not None}


def weight_files(
    name: Any, hub: dict[str, Any], use_safetensors: bool | None = None, variant: str | None = None
) -> dict[str, set[str]]:
    """Find the files with the weights of a directory or hub id, and download them if need be.

    Links are followed, as the caches of huggingface_hub are made of them; names in an index stay beside it.

    Args:
        name: of the checkpoint, a directory or hub id.
        hub: those of ``HUB_ARGUMENTS`` that the caller gave.
        use_safetensors, variant: of ``from_pretrained``.

    Returns:
        {path: the tensors that an index says are in it}; empty if there are no files.

    Raises:
        OSError: a file that the index names is missing, or one is a pipe, a device or the like.
        ValueError: an index that does not map names of tensors to names of files beside it.
    """
    wanted = () if use_safetensors is False else SAFETENSORS_FILES
    for file in (*wanted, *(() if use_safetensors else BIN_FILES)):
        path = cached_file(name, _of_variant(file, variant), **hub, _raise_exceptions_for_missing_entries=False)
        if path is not None:
            break
    else:
        return {}
    if not file.endswith(".index.json"):
        files: dict[str, set[str]] = {path: set()}
    else:
        promised: dict[str, set[str]] = {}
        for tensor, shard in _weight_map(path, name, os.path.splitext(file[: -len(".index.json")])[1]).items():
            promised.setdefault(shard, set()).add(tensor)
        files = {cached_file(name, shard, **hub): tensors for shard, tensors in promised.items()}
    for path in files:
        check_readable(path, _MOST_FILE_BYTES)
    return files


def _of_variant(file: str, variant: str | None) -> str:
    """Return transformers' name of a variant's file: model.fp16.safetensors, model.safetensors.index.fp16.json."""
    start, end = os.path.splitext(file)
    return f"{start}.{variant}{end}" if variant else file


def _weight_map(path: str, name: Any, ending: str) -> dict[str, str]:
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    is_sound = isinstance(weight_map, dict) and bool(weight_map) and isinstance(index.get("metadata"), dict)
    if not is_sound or not all(_is_beside(file, ending) for file in weight_map.values()):
        raise ValueError(
            f"The index of {name} must hold metadata and a weight_map from tensors to {ending} files beside it, but "
            "does not; copy or download it again."
        )
    return weight_map


def _is_beside(file: Any, ending: str) -> bool:
    return isinstance(file, str) and file.endswith(ending) and file != ending and not set(file) & {"/", "\\", "\0", ":"}
