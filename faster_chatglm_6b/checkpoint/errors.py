"""Errors of reading weights, in one sentence each."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError


class DamagedFile(Exception):
    """A weight file cannot be read; the message is the reader's."""


# How torch, safetensors and transformers say that a file cannot be read.
_DAMAGE = (SafetensorError, UnpicklingError, EOFError, DamagedFile)
_DAMAGE_WORDS = ("PytorchStreamReader", "Unable to load weights from pytorch checkpoint file")


@contextmanager
def clear_errors(name: Any) -> Iterator[None]:
    """Say in one sentence that a weight file is damaged or does not fit, and put torch's default dtype back."""
    default_dtype = torch.get_default_dtype()
    try:
        yield
    except _DAMAGE as error:
        raise _unreadable(name, error) from error
    except AttributeError as error:
        if "'NoneType' object has no attribute 'get'" not in str(error):
            raise
        raise OSError(
            f"A safetensors file of {name} carries no format, which this version of transformers cannot read; use "
            'transformers 4.57 or newer, or save the file again with metadata={"format": "pt"}.'
        ) from error
    except (OSError, RuntimeError) as error:
        causes = (error, error.__cause__, error.__context__)
        if any(isinstance(cause, _DAMAGE) for cause in causes) or any(words in str(error) for words in _DAMAGE_WORDS):
            raise _unreadable(name, error) from error
        if "size mismatch" in str(error) or "mismatched" in str(error):
            raise ValueError(
                f"The weights of {name} have other shapes than its config.json says; take both from the same "
                f"checkpoint. ({error})"
            ) from error
        raise
    finally:
        # transformers 4 leaves the checkpoint's dtype as the process' default if loading fails half way.
        torch.set_default_dtype(default_dtype)


def _unreadable(name: Any, error: BaseException) -> OSError:
    """Return the error to raise for a damaged file: what its reader said, without advice to run what it holds."""
    cause: BaseException | None = error
    while cause is not None:
        # torch's reader that takes nothing but tensors names what else it met, and has not run it.
        met = re.search(r"GLOBAL ([\w.]+)", str(cause)) if isinstance(cause, UnpicklingError) else None
        if met:
            return OSError(
                f"A weight file of {name} holds a Python object besides tensors, {met[1]}, which is not run; use the "
                "checkpoint's safetensors files, or take it from a source that you trust."
            )
        cause = cause.__cause__ or cause.__context__
    detail = str(error).splitlines()[0].split(" In PyTorch 2.6")[0] if str(error) else type(error).__name__
    return OSError(
        f"A weight file of {name} is truncated or corrupt and cannot be read; copy or download the checkpoint again. "
        f"({detail})"
    )
