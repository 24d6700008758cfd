"""Read the JSON files of a checkpoint if their size allows it; errors name the file in one sentence."""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

# An index of ChatGLM-6B has 40 KB, and a merged tokenizer_config.json a few.
MOST_BYTES = 16 << 20
_AGAIN = "copy or download it again."
# Content by path, inside ``each_read_once()``; None outside.
_kept: ContextVar[dict[str, bytes] | None] = ContextVar("faster_chatglm_6b_kept_json", default=None)


@contextmanager
def each_read_once() -> Iterator[None]:
    """Have ``read_json`` open each file once in the body: whoever reads it again gets the same content.

    So what was checked is what is used, also if a file is replaced in between. Nothing is kept afterwards.
    """
    token = _kept.set({} if _kept.get() is None else _kept.get())
    try:
        yield
    finally:
        _kept.reset(token)


def read_json(path: Any) -> Any:
    """Return the content of a JSON file. NaN and Infinity are read as Python's ``json`` does.

    Raises:
        OSError: it is no regular file, larger than ``MOST_BYTES``, empty, cut short, nested too deeply, or not UTF-8.
        ValueError: an object in it gives the same key twice, which readers take differently.
    """
    path = os.fspath(path)
    kept = _kept.get()
    content = None if kept is None else kept.get(os.path.abspath(path))
    if content is None:
        check_readable(path, MOST_BYTES)
        with open(path, "rb") as file:
            content = file.read()
        if kept is not None:
            kept[os.path.abspath(path)] = content
    if content.startswith(b"\xef\xbb\xbf"):
        raise OSError(f"{path} begins with a byte order mark, which JSON has not; save it as UTF-8 without one.")
    if not content.strip():
        raise OSError(f"{path} is empty; {_AGAIN}")
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=lambda pairs: _object(pairs, path))
    except RecursionError:
        raise OSError(f"{path} is nested too deeply to be read; {_AGAIN}") from None
    except _TwiceGiven:
        raise
    except ValueError as error:  # bytes that are not UTF-8, and numbers of thousands of digits, too
        raise OSError(f"{path} is not a valid JSON file ({error}); {_AGAIN}") from error


def check_readable(path: str, most_bytes: int) -> None:
    """Refuse what open() would wait for (a pipe, a device), and a file of more bytes than expected.

    Links are followed, as the caches of huggingface_hub are made of them; their target is checked.

    Raises:
        OSError: it is refused, or there is no such file.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"{path} is no regular file; {_AGAIN}")
    if found.st_size > most_bytes:
        raise OSError(f"{path} has {found.st_size} bytes, but more than {most_bytes} are not read; {_AGAIN}")


class _TwiceGiven(ValueError):
    """An object with the same key twice."""


def _object(pairs: list[tuple[str, Any]], path: str) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _TwiceGiven(f"{path} gives {twice!r} twice; leave one of them.")
    return result
