"""Save over a checkpoint: everything is written beside the old files first, so that none of them is lost or mixed."""

import os
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Names that transformers and peft give to weights: what, variant, which shard, how.
_WEIGHTS = re.compile(r"(model|pytorch_model|adapter_model)((?:\.[^.]+)?)(-\d{5}-of-\d{5})?(\.safetensors|\.bin)")


@contextmanager
def saved_beside(directory: str, removes_old: bool = True) -> Iterator[str]:
    """Give a folder to save into, whose files take their places in ``directory`` at the end, all or none.

    The folder lies in ``directory``, which is made if need be: on one file system, moving a file only renames it. Space
    is needed for the old files and the new ones at once. Old weight files that a loader would read with the new ones,
    or before them, are removed.

    Args:
        directory: where the checkpoint goes.
        removes_old: this process may remove files of an earlier save.

    Raises:
        BaseException: whatever the body or a move raises, ``KeyboardInterrupt`` included; ``directory`` is then as it
            was.
    """
    is_new = not os.path.isdir(directory)
    os.makedirs(directory, exist_ok=True)
    beside = tempfile.mkdtemp(prefix=".saving-", dir=directory)
    try:
        yield beside
        with _interrupts_wait():
            _move(beside, directory, removes_old)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        if is_new and not os.listdir(directory):
            os.rmdir(directory)
        raise
    shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def replaced_file(path: Any) -> Iterator[str]:
    """Give a path to write to, which takes the place of ``path`` at the end; on an error, ``path`` is as it was."""
    path = os.fspath(path)
    beside = f"{path}.saving-{os.getpid()}-{threading.get_ident()}"
    try:
        yield beside
        os.replace(beside, path)
    except BaseException:
        if os.path.exists(beside):
            os.unlink(beside)
        raise


def _move(beside: str, directory: str, removes_old: bool) -> None:
    new = [os.path.relpath(os.path.join(root, file), beside) for root, _, files in os.walk(beside) for file in files]
    stale = _stale(set(new), set(os.listdir(directory))) if removes_old else []
    old = tempfile.mkdtemp(prefix="old-", dir=beside)
    done: list[tuple[str, str]] = []

    def move(source: str, target: str) -> None:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.replace(source, target)
        done.append((source, target))

    try:
        for name in (*new, *stale):
            if os.path.lexists(os.path.join(directory, name)):
                move(os.path.join(directory, name), os.path.join(old, name))
        for name in new:
            move(os.path.join(beside, name), os.path.join(directory, name))
    except BaseException:
        for source, target in reversed(done):
            os.replace(target, source)
        raise


def _stale(new: set[str], present: set[str]) -> list[str]:
    """List the weight files of earlier saves that would be loaded with the new ones, or in their place."""
    stale = set()
    for what, variant, _, ending in {match.groups() for match in map(_WEIGHTS.fullmatch, new) if match}:
        families = [(what, ending)]
        if ending == ".bin" and what == "pytorch_model":
            families.append(("model", ".safetensors"))  # which loaders prefer
        for kind, form in families:
            stale |= {
                name
                for name in present
                if name == f"{kind}{form}.index{variant}.json"
                or ((match := _WEIGHTS.fullmatch(name)) and (match[1], match[2], match[4]) == (kind, variant, form))
            }
    return sorted(stale - new)


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Let Ctrl-C wait for the end of the body. Only the main thread ever gets it."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return
    came: list[tuple] = []
    signal.signal(signal.SIGINT, lambda *arguments: came.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came and callable(before):
        before(*came[0])
