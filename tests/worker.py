"""A process that answers one JSON line with another, for tests that may crash, hang or need their own environment."""

import json
import os
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class Worker:
    """Run a Python program that calls ``serve``, and start it anew after it died or was too slow.

    Args:
        program: path of the program.
        environment: variables in addition to the caller's own.
        timeout: seconds that one answer may take.
    """

    def __init__(self, program: Path, environment: dict[str, str], timeout: float):
        self._program, self._timeout, self._process = program, timeout, None
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        self._environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *sys.path[1:]])
        self._errors = tempfile.TemporaryFile()

    def ask(self, question: Any) -> Any:
        """Return the program's answer.

        Raises:
            AssertionError: the program died or took too long; the message holds the end of what it wrote to stderr.
        """
        if self._process is None:
            self._start()
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
            return json.loads(self._line())
        except (OSError, EOFError, TimeoutError) as error:
            self.close()
            raise AssertionError(f"{self._program.name} {error!r} at {question}\n{self._last_words()}") from error

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()

    def _start(self) -> None:
        self._errors.truncate(0)
        self._process = subprocess.Popen(
            [sys.executable, str(self._program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=self._environment,
        )
        assert json.loads(self._line()) == "ready"

    def _line(self) -> bytes:
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(self._timeout):
                raise TimeoutError(f"no answer within {self._timeout} s")
        line = self._process.stdout.readline()
        if not line:
            raise EOFError(f"the process ended with {self._process.wait()}")
        return line

    def _last_words(self) -> str:
        self._errors.seek(0)
        return self._errors.read()[-4000:].decode(errors="replace")


def serve(answer: Callable[[Any], Any]) -> None:
    """Answer every line of stdin until it ends. Everything else that is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)
