"""Look at PyTorch's .bin files before they are opened: nothing in one may ask for more memory than the file has."""

import pickletools
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO

# The tables of ChatGLM-6B's tensors have 50 KB.
_MOST_TABLE_BYTES = 16 << 20
# Bytes that may follow a record of a zip archive: its checksum and sizes once more, short or long, marked or not.
_DESCRIPTOR_SIZES = (0, 12, 16, 20, 24)
# Operations that may stand between others and do not change what those mean.
_MEMO = ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE", "FRAME")
# Allowed by torch's reader, of no use in weights, and able to reserve any memory.
_RESERVING = ("bytearray", "_rebuild_meta_tensor_no_storage", "_rebuild_wrapper_subclass")
# Magic number, protocol and sizes of types, before the table; then the names of the storages.
_LEGACY_TABLE, _LEGACY_PICKLES = 3, 5


def check_bin(path: str, size: int) -> bool:
    """Look at a .bin file's structure, without its tensors' content.

    Args:
        path: of the file.
        size: of the file, in bytes.

    Returns:
        whether it is an archive, which can be mapped into memory; files of torch before 1.6 are not.

    Raises:
        zipfile.BadZipFile, ValueError: its structure is not as torch writes it. A torn pickle in it is left to torch's
            reader.
    """
    with open(path, "rb") as file:
        is_archive = file.read(4) == b"PK\3\4"
        if not is_archive and (zipfile.is_zipfile(path) or tarfile.is_tarfile(path)):
            raise ValueError("it is an archive of another kind than torch writes")
        if is_archive:
            _check_archive(path, file, size)
        else:
            file.seek(0)
            for position in range(_LEGACY_PICKLES):
                _check_table(file, size, has_numbers=position >= _LEGACY_TABLE, is_legacy=True)
    return is_archive


def _check_archive(path: str, file: BinaryIO, size: int) -> None:
    """Refuse archives whose table of tensors has changed or is compressed, or whose records do not lie end to end.

    From memory that is mapped, torch would take the bytes of other records for a tensor's. The tensors' own checksums
    are not looked at.
    """
    with zipfile.ZipFile(path) as archive:
        records = sorted(archive.infolist(), key=lambda record: record.header_offset)
        ends = [record.header_offset for record in records[1:]] + [archive.start_dir]
        for record, end in zip(records, ends, strict=True):
            # Before anything is read: what is compressed may have any size.
            if record.compress_type != zipfile.ZIP_STORED or record.file_size > size:
                raise zipfile.BadZipFile(f"record {record.filename} is compressed, which torch never does")
            is_data = "/data/" in record.filename.lower()
            if not is_data and record.file_size > _MOST_TABLE_BYTES:
                raise zipfile.BadZipFile(f"record {record.filename} has {record.file_size} bytes, more than any table")
            with archive.open(record) as content:  # compares the record's own header with the directory
                if record.CRC and not is_data:  # torch can be told to leave checksums out
                    content.read()
            file.seek(record.header_offset + 26)
            name_and_padding = sum(struct.unpack("<HH", file.read(4)))
            rest = end - (record.header_offset + 30 + name_and_padding + record.file_size)
            if rest not in _DESCRIPTOR_SIZES:
                raise zipfile.BadZipFile(f"record {record.filename} is not where the archive's directory says")
            # torch's reader finds records whatever the case of their letters.
            if record.filename.lower().endswith("data.pkl"):
                with archive.open(record) as content:
                    _check_table(content, size, has_numbers=True, is_legacy=False)


def _check_table(file: Any, size: int, has_numbers: bool, is_legacy: bool) -> None:
    """Refuse a pickle of tensors that the file cannot hold.

    Its numbers (sizes, strides, offsets) must not exceed the file's bytes, nor all its storages together.
    """
    held, last = 0, []
    for name, argument in _operations(file):
        if name in ("GLOBAL", "STACK_GLOBAL", "INST") and str(argument).rsplit(" ", 1)[-1] in _RESERVING:
            raise ValueError(f"it calls {argument}, which is not run")
        if (
            has_numbers
            and isinstance(argument, int)
            and argument > size
            and name not in (*_MEMO, "BINGET", "LONG_BINGET")
        ):
            raise ValueError(f"it says that a tensor has {argument} numbers, but the file has {size} bytes only")
        if name == "BINPERSID" and is_legacy:
            # ("storage", type, key, device, how many numbers, None): torch reserves it before it reads.
            count = last[-3][1] if len(last) > 2 and [one for one, _ in last[-2:]] == ["NONE", "TUPLE"] else None
            if not isinstance(count, int):
                raise ValueError("its storages are not described as torch does")
            held += count
            if held > 2 * size:
                raise ValueError(f"its tensors have {held} numbers, but the file has {size} bytes only")
        if name not in _MEMO:
            last = [*last[-3:], (name, argument)]


def _operations(file: Any) -> Iterator[tuple[str, Any]]:
    """Yield (operation, argument) of the next pickle, up to where it is torn.

    Raises:
        ValueError: it is longer than any table of tensors.
    """
    start = file.tell()
    try:
        for operation, argument, _ in pickletools.genops(file):
            if file.tell() - start > _MOST_TABLE_BYTES:
                raise _TooLong
            yield operation.name, argument
    except _TooLong:
        raise ValueError("its table of tensors is longer than any") from None
    except Exception:
        # Torn, or no pickle at all: torch's reader finds the same and says it in its own words.
        return


class _TooLong(Exception):
    """More operations than a table of tensors has."""
