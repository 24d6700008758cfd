"""KeyboardInterrupt before a chosen line, to show that nothing is left half done wherever it comes."""

import sys
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any


class InterruptBefore:
    """``with`` it, KeyboardInterrupt comes before the ``stop``-th line, counted from 1, that runs in one of the files.

    No function of ``contextlib``, because that may be one of the files.

    Args:
        stop: number of the line in the order of running.
        files: paths of the files whose lines count.
        uncounted: beginnings of further lines that do not count. Lines that only open a block never do: Python enters
            the block without an interrupt between the two, but a trace function can raise there.
    """

    def __init__(self, stop: int, files: Iterable[str], uncounted: tuple[str, ...] = ()):
        self._left, self._uncounted = stop, ("with ", "try:", "finally:", *uncounted)
        self._sources = {file: Path(file).read_text("utf-8").splitlines() for file in files}

    def __enter__(self) -> None:
        self._before = sys.gettrace()
        sys.settrace(self._trace)

    def __exit__(self, *error: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename not in self._sources:
            return None
        line = self._sources[frame.f_code.co_filename][frame.f_lineno - 1].strip()
        if event == "line" and not line.startswith(self._uncounted):
            self._left -= 1
            if self._left == 0:
                raise KeyboardInterrupt
        return self._trace
