"""What callers ask of the decode loop, in Triton's interpreter; it may depend on the release of transformers."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels to interpret")

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "ops")]
import loop_checks  # noqa: E402
import release_checks  # noqa: E402
from interpreted_loop import GOLDEN, run_in_a_process, tiny_model, write_results  # noqa: E402

GOLDEN_NAMES = ["reppen1.2_ngram3|2023", "max_new_tokens|你好"]
LOOP = {check.__name__: check for check in loop_checks.EVERYWHERE + release_checks.EVERYWHERE}


def main() -> None:
    model = tiny_model()
    cases = json.loads((GOLDEN / "golden" / "tiny" / "generate.json").read_text("utf-8"))["cases"]
    cases = {case["name"]: case for case in cases}
    checks = {name: lambda name=name: LOOP[name](model) for name in LOOP}
    checks["golden_cases"] = lambda: loop_checks.golden_cases(model, cases, GOLDEN_NAMES)
    write_results(checks, sys.argv[1])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_in_a_process(__file__, tmp_path_factory.mktemp("loop"))


@pytest.mark.parametrize("name", [*LOOP, "golden_cases"])
def test_in_the_interpreter(results, name):
    assert results[name] is None, results[name]


if __name__ == "__main__":
    main()
