"""Run the web demo in a process of its own."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEMO = str(ROOT / "examples" / "web_demo.py")


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """Run the demo to its end, for arguments with which it stops by itself."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}
    command = [sys.executable, DEMO, *arguments]
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, timeout=300)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def serving(folder: Path, *arguments: str, device: str | None = "cpu") -> Iterator[str]:
    """Start the demo and yield its address once it answers."""
    port = free_port()
    where = () if device is None else ("--device", device)
    command = [sys.executable, DEMO, "--port", str(port), *where, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_HOME": str(folder), "GRADIO_TEMP_DIR": str(folder), "NO_PROXY": "127.0.0.1"}
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        address = f"http://127.0.0.1:{port}/"
        _wait_until_it_answers(address, server, folder / "log")
        yield address
    finally:
        server.terminate()
        server.wait(30)


def _wait_until_it_answers(address: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(1200):
        assert server.poll() is None, log.read_text(encoding="utf-8")
        try:
            urllib.request.urlopen(address, timeout=10).close()
            return
        except urllib.error.HTTPError:  # such as 401: it asks for a login
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"no answer at {address}: {log.read_text(encoding='utf-8')}")
