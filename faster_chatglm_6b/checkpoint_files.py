"""The weight files of a checkpoint: which they are, what is in them, and whether that can be a model at all.

transformers casts whatever it finds to the model's dtype and warns at most of names that it does not know. So integers
without their scales, for example, would become a model that talks nonsense.
"""

import json
import os
import struct
import zipfile
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import cached_file

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# In transformers' order of preference.
SAFETENSORS_FILES = ("model.safetensors", "model.safetensors.index.json")
BIN_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# Bytes that may follow a record of a zip archive: its checksum and sizes once more, short or long, marked or not.
_DESCRIPTOR_SIZES = (0, 12, 16, 20, 24)


class DamagedFile(Exception):
    """A weight file cannot be read; the message is the reader's."""


def only(kwargs: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The arguments of these names that were given."""
    return {name: kwargs[name] for name in names if kwargs.get(name) is not None}


def weight_files(name: Any, hub: dict[str, Any], use_safetensors: bool | None = None) -> dict[str, set[str]]:
    """The files with the weights of a directory or hub id, downloaded where need be.

    Args:
        hub: those of HUB_ARGUMENTS that the caller gave. use_safetensors: of ``from_pretrained``.

    Returns:
        {path: the tensors that an index says are in it}; empty if there are no files.

    Raises:
        OSError: a file that the index names is missing.
        ValueError: an index that does not map names of tensors to names of files beside it.
    """
    wanted = () if use_safetensors is False else SAFETENSORS_FILES
    for file in (*wanted, *(() if use_safetensors else BIN_FILES)):
        path = cached_file(name, file, **hub, _raise_exceptions_for_missing_entries=False)
        if path is not None:
            break
    else:
        return {}
    if not file.endswith(".index.json"):
        return {path: set()}
    promised: dict[str, set[str]] = {}
    for tensor, shard in _weight_map(path, name).items():
        promised.setdefault(shard, set()).add(tensor)
    return {cached_file(name, shard, **hub): tensors for shard, tensors in promised.items()}


def _weight_map(path: str, name: Any) -> dict[str, str]:
    try:
        with open(path, encoding="utf-8") as file:
            index = json.load(file)
        weight_map = index["weight_map"]
        files = set(weight_map.values())
        is_sound = bool(files) and isinstance(index.get("metadata"), dict)
    except (ValueError, LookupError, TypeError, AttributeError):
        is_sound = False
    if not is_sound or not all(isinstance(file, str) and file and not set(file) & {"/", "\\", "\0"} for file in files):
        raise ValueError(
            f"The index of {name} must hold metadata and a weight_map from tensors to files beside it, but does not; "
            "copy or download it again."
        )
    return weight_map


def tensors_of_file(path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of everything in a weight file, mapped into memory and read when it is used.

    Raises:
        DamagedFile: the file cannot be read as weights.
    """
    if path.endswith(".safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 safe_open is no mapping
                yield name, file.get_tensor(name)
        return
    try:
        # Files of torch before 1.6 are no archives, and cannot be mapped.
        is_archive = zipfile.is_zipfile(path)
        if is_archive:
            _check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
        if not all(isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in content.items()):
            raise TypeError("it is no dictionary of tensors")
    except Exception as error:
        # Its pickle may be torn anywhere, and torch's reader then fails in any way.
        raise DamagedFile(str(error) or type(error).__name__) from error
    yield from content.items()


def _check_archive(path: str) -> None:
    """Raise BadZipFile where a .bin file's table of tensors has changed or its records do not lie end to end: mapped
    into memory, torch would take the bytes of others for a tensor's. The tensors' own checksums are not looked at."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        records = sorted(archive.infolist(), key=lambda record: record.header_offset)
        ends = [record.header_offset for record in records[1:]] + [archive.start_dir]
        for record, end in zip(records, ends, strict=True):
            with archive.open(record) as content:  # compares the record's own header with the directory
                if record.CRC and "/data/" not in record.filename:  # torch can be told to leave checksums out
                    content.read()
            file.seek(record.header_offset + 26)
            name_and_padding = sum(struct.unpack("<HH", file.read(4)))
            behind = end - (record.header_offset + 30 + name_and_padding + record.file_size)
            if record.compress_type != zipfile.ZIP_STORED or behind not in _DESCRIPTOR_SIZES:
                raise zipfile.BadZipFile(f"record {record.filename} is not where the archive's directory says")


def check_contents(files: dict[str, set[str]], name: Any, quantization_bit: int | None) -> None:
    """Refuse what would load and be wrong: tensors that are not where the index says, integers that are not quantised
    weights, scales that are no numbers.

    Args:
        files: from ``weight_files``. quantization_bit: of config.json.

    Raises:
        DamagedFile, SafetensorError: a file cannot be read as weights.
        ValueError: see above; the message names the tensor.
    """
    if not has_meta_device():
        return  # such a framework maps no files into memory either: they would be read twice
    dtypes: dict[str, torch.dtype] = {}
    for path, promised in files.items():
        for key, tensor in tensors_of_file(path):
            dtypes[key] = tensor.dtype
            promised = promised - {key}
            if key.endswith(".weight_scale") and not bool(torch.isfinite(tensor).all()):
                raise ValueError(
                    f"The weights of {name} hold scales that are not finite in {key}; copy or download them again."
                )
        if promised:
            raise ValueError(
                f"The index of {name} says that {os.path.basename(path)} holds {min(promised)}, but it does not; copy "
                "or download both again."
            )
    for key, dtype in dtypes.items():
        if not key.endswith((".weight", ".bias", ".weight_scale")):
            continue
        is_quantised = bool(quantization_bit) and f"{key}_scale" in dtypes
        if dtype != torch.int8 if is_quantised else not dtype.is_floating_point:
            raise ValueError(
                f"The weights of {name} hold {key} as {dtype}, which does not go with quantization_bit="
                f"{quantization_bit!r} of its config.json; take both from the same checkpoint."
            )


def has_meta_device() -> bool:
    """Whether the framework has tensors without content, with which weights need not be read to be looked at."""
    try:
        torch.empty(0, device="meta")
    except RuntimeError:
        return False
    return True
