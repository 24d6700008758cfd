"""Say in one sentence each what is wrong with a tokenizer's files and settings."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Files beside ice_text.model that transformers reads; far more bytes than any has.
_JSON_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_MOST_BYTES = 16 * 2**20

_MOST_IMAGE_TOKENS = 2**20
# transformers writes int(1e30) for "no limit" and takes everything above this for it.
_NO_LIMIT = 1e20


def check_files(name: Any, subfolder: str | None = None) -> None:
    """Check the JSON files of a tokenizer in the directory ``name``, as far as there are any.

    Raises:
        ValueError: a file, named by its path, is no JSON object that transformers can read.
    """
    try:
        folder = Path(name) / (subfolder or "")
        paths = [folder / file for file in _JSON_FILES if (folder / file).is_file()]
    except (TypeError, ValueError, OSError):
        # No directory: transformers says what is wrong, or downloads the files.
        return
    for path in paths:
        check_json_object(path)


def check_json_object(path: Path) -> None:
    """Check that a file holds a JSON object that transformers can read.

    Raises:
        ValueError: it does not; the path is named.
    """
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise _wrong_file(path, f"it has {size} bytes, and more than {_MOST_BYTES} are refused")
    try:
        content = json.loads(path.read_text("utf-8"))
    except RecursionError:
        raise _wrong_file(path, "it is nested too deeply") from None
    except ValueError as error:
        raise _wrong_file(path, str(error)) from None
    if not isinstance(content, dict):
        raise _wrong_file(path, f"it holds a {type(content).__name__}")


def _wrong_file(path: Path, what: str) -> ValueError:
    return ValueError(f"{path} is no JSON object with settings: {what}; take it from the checkpoint again.")


@contextmanager
def clear_errors(name: Any) -> Iterator[None]:
    """Turn what transformers raises for a wrong tokenizer_config.json into one sentence.

    Raises:
        ValueError: a setting has a value that transformers fails on. The constructor's own errors pass unchanged.
    """
    try:
        yield
    except ImportError as error:
        # transformers up to 5.0 asks for protobuf if a constructor raises anything, and hides what it raised.
        cause = error.__context__
        if isinstance(cause, (ValueError, OSError)):
            raise cause from None
        if isinstance(cause, _WRONG_TYPES):
            raise _wrong_setting(name, cause) from cause
        raise
    except (*_WRONG_TYPES, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _wrong_setting(name, error) from error


# transformers checks no types: it fails when it comes upon one that it did not expect.
_WRONG_TYPES = (TypeError, AttributeError, LookupError, AssertionError)


def _wrong_setting(name: Any, error: BaseException) -> ValueError:
    return ValueError(
        f"The tokenizer of {name} cannot be built from its tokenizer_config.json and the given arguments, of which one "
        f"has a wrong type; take the file from the checkpoint again. ({type(error).__name__}: {error})"
    )


def check_settings(model_max_length: Any) -> None:
    """Check settings that would fail only when a text is encoded.

    Raises:
        ValueError: ``model_max_length`` is no number.
    """
    if isinstance(model_max_length, bool) or not isinstance(model_max_length, (int, float)):
        raise ValueError(
            f"tokenizer_config.json gives model_max_length={model_max_length!r}, but a number is needed; take the "
            "file from the checkpoint again."
        )


def check_image_tokens(count: Any) -> None:
    """Check the number of ids before those of the pieces.

    Raises:
        ValueError: ``count`` cannot be that number.
    """
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= _MOST_IMAGE_TOKENS:
        raise ValueError(
            f"tokenizer_config.json or an argument gives num_image_tokens={count!r}, but a number from 0 to "
            f"{_MOST_IMAGE_TOKENS} is needed: 20000 with the first checkpoints (150528 ids), else 0."
        )


def is_unlimited(model_max_length: Any) -> bool:
    """Tell whether no limit is given: none at all, or the number that transformers saves for none."""
    return model_max_length is None or (type(model_max_length) in (int, float) and model_max_length > _NO_LIMIT)
