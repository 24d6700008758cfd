"""The decode loop's prompts, rows, drafts, life and faults, on a CPU in Triton's interpreter."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels to interpret")
# They run on a CPU's own kernels in seconds (test_loop_cpu.py); test_triton_interpreter.py runs Triton's alone.
pytestmark = pytest.mark.long

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "ops")]
import draft_checks  # noqa: E402
import draft_life_checks  # noqa: E402
import fault_checks  # noqa: E402
import lifecycle_checks  # noqa: E402
import prompt_checks  # noqa: E402
import row_checks  # noqa: E402
import table_checks  # noqa: E402
import torch  # noqa: E402
from interpreted_loop import run_in_a_process, tiny_model, write_results  # noqa: E402

CHECKS = (
    prompt_checks.EVERYWHERE
    + lifecycle_checks.EVERYWHERE
    + fault_checks.EVERYWHERE
    + row_checks.EVERYWHERE
    + draft_checks.EVERYWHERE
    + draft_life_checks.EVERYWHERE
)
LOOP = {check.__name__: check for check in CHECKS}
TABLE = {check.__name__: check for check in table_checks.EVERYWHERE}


def main() -> None:
    model = tiny_model()
    checks = {name: lambda name=name: LOOP[name](model) for name in LOOP}
    checks |= {name: lambda name=name: TABLE[name](torch.device("cpu"), torch.float32) for name in TABLE}
    write_results(checks, sys.argv[1])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_in_a_process(__file__, tmp_path_factory.mktemp("loop"))


@pytest.mark.parametrize("name", [*LOOP, *TABLE])
def test_in_the_interpreter(results, name):
    assert results[name] is None, results[name]


if __name__ == "__main__":
    main()
