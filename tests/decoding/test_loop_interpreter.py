"""The decode loop on a CPU, with its kernels in Triton's interpreter and its steps run eagerly instead of captured.

The interpreter is chosen by an environment variable when the kernels are imported, so the checks run in one process of
their own, which this file starts as a program.
"""

import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels to interpret")

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "ops")]
import draft_checks  # noqa: E402
import fault_checks  # noqa: E402
import lifecycle_checks  # noqa: E402
import loop_checks  # noqa: E402
import prompt_checks  # noqa: E402
import release_checks  # noqa: E402
import row_checks  # noqa: E402
import table_checks  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
GOLDEN_NAMES = ["reppen1.2_ngram3|2023", "max_new_tokens|你好"]
CHECKS = (
    loop_checks.EVERYWHERE
    + prompt_checks.EVERYWHERE
    + lifecycle_checks.EVERYWHERE
    + fault_checks.EVERYWHERE
    + row_checks.EVERYWHERE
    + draft_checks.EVERYWHERE
    + release_checks.EVERYWHERE
)
LOOP = {check.__name__: check for check in CHECKS}
TABLE = {check.__name__: check for check in table_checks.EVERYWHERE}


def run_all() -> dict[str, str | None]:
    """Map the name of each check to what went wrong, or to None."""
    import torch
    from interpreter_blocks import use_large_blocks

    from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration

    torch.set_num_threads(1)
    use_large_blocks(keys=512)
    model = ChatGLMForConditionalGeneration.from_pretrained(GOLDEN / "ckpt" / "tiny").float().eval()
    cases = json.loads((GOLDEN / "golden" / "tiny" / "generate.json").read_text("utf-8"))["cases"]
    cases = {case["name"]: case for case in cases}
    results = {}
    checks = {name: lambda name=name: LOOP[name](model) for name in LOOP}
    checks |= {name: lambda name=name: TABLE[name](torch.device("cpu"), torch.float32) for name in TABLE}
    checks["golden_cases"] = lambda: loop_checks.golden_cases(model, cases, GOLDEN_NAMES)
    for name, check in checks.items():
        start = time.perf_counter()
        try:
            check()
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
        print(f"{name} {time.perf_counter() - start:.1f} s", file=sys.stderr)
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    output = tmp_path_factory.mktemp("loop") / "results.json"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path[1:]])
    done = subprocess.run(
        [sys.executable, __file__, str(output)], env=environment, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr
    print(done.stderr)
    return json.loads(output.read_text())


@pytest.mark.parametrize("name", [*LOOP, *TABLE, "golden_cases"])
def test_in_the_interpreter(results, name):
    assert results[name] is None, results[name]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(run_all()))
