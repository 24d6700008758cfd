"""Run checks of the captured loop on a CPU, with its kernels in Triton's interpreter and its steps run eagerly.

The interpreter is chosen by an environment variable when the kernels are imported, so the checks run in one process of
their own, for which a test file is started as a program.
"""

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"


def tiny_model() -> torch.nn.Module:
    """Load the tiny golden model in float32, for kernels with few large blocks."""
    from interpreter_blocks import use_large_blocks

    from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration

    torch.set_num_threads(1)
    use_large_blocks(keys=512)
    return ChatGLMForConditionalGeneration.from_pretrained(GOLDEN / "ckpt" / "tiny").float().eval()


def write_results(checks: Mapping[str, Callable[[], None]], output: str) -> None:
    """Map the name of each check to what went wrong, or to None, in a file."""
    results = {}
    for name, check in checks.items():
        start = time.perf_counter()
        try:
            check()
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
        print(f"{name} {time.perf_counter() - start:.1f} s", file=sys.stderr)
    Path(output).write_text(json.dumps(results))


def run_in_a_process(file: str, folder: Path) -> dict[str, str | None]:
    """Run a test file as a program with the name of an output file, and return the results it wrote there."""
    output = folder / "results.json"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path[1:]])
    done = subprocess.run(
        [sys.executable, file, str(output)], env=environment, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr
    print(done.stderr)
    return json.loads(output.read_text())
