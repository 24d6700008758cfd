"""docs/faults.md names tests that exist and run, and docs/questions.md gives the code's own memory bound."""

import ast
import re
from pathlib import Path

import pytest
import torch

from faster_chatglm_6b.configuration_chatglm import ChatGLMConfig
from faster_chatglm_6b.decoding import memory, session
from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration

ROOT = Path(__file__).resolve().parents[2]
TABLES = ("docs/faults.md", "docs/zh/faults.md")


def rows(name: str) -> list[list[str]]:
    """Return the cells of the table's rows, without its head."""
    lines = [line for line in (ROOT / name).read_text("utf-8").splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1:]]


def references(row: list[str]) -> list[str]:
    return re.findall(r"`(tests/[\w/]+\.py::[\w:]+)`", row[1])


def is_run(reference: str) -> bool:
    """Return True if pytest collects the function, or a test file runs it as one of its checks."""
    path, *classes, function = reference.split("::")
    if not (ROOT / path).is_file():
        return False
    module = ast.parse((ROOT / path).read_text("utf-8"))
    for name in classes:
        module = next((node for node in module.body if isinstance(node, ast.ClassDef) and node.name == name), None)
        if module is None:
            return False
    if function not in {node.name for node in module.body if isinstance(node, ast.FunctionDef)}:
        return False
    if not path.endswith("_checks.py"):
        return Path(path).name.startswith("test_") and function.startswith("test_")
    listed = [node for node in module.body if isinstance(node, ast.Assign) and node.targets[0].id == "EVERYWHERE"]
    return function in {element.id for element in listed[0].value.elts}


@pytest.mark.parametrize("name", TABLES)
def test_every_row_of_the_fault_table_is_a_test(name):
    for row in rows(name):
        assert len(row) == 3 and all(row), row
        assert references(row), f"no test in the row {row[0]!r} of {name}"
        missing = [reference for reference in references(row) if not is_run(reference)]
        assert not missing, f"{name}, {row[0]!r}: no such test: {missing}"


def test_both_languages_have_the_same_rows():
    english, chinese = (list(map(references, rows(name))) for name in TABLES)
    assert english == chinese and len(english) >= 14


def test_a_missing_test_is_noticed():
    assert is_run("tests/decoding/fault_checks.py::out_of_memory_in_capture")
    assert not is_run("tests/decoding/fault_checks.py::out_of_memory")
    assert not is_run("tests/decoding/fault_checks.py::nothing")
    assert not is_run("tests/decoding/test_faults.py::out_of_memory")
    assert is_run("tests/checkpoint/test_foreign_quantization.py::TestBitsAndBytes::test_qlora")
    assert not is_run("tests/checkpoint/test_foreign_quantization.py::test_qlora")
    assert not is_run("tests/checkpoint/test_foreign_quantization.py::TestNothing::test_qlora")
    assert not is_run("tests/decoding/test_nothing.py::test_nothing")


def test_checks_are_run_by_both_loops():
    """The checks run in the interpreter and on a GPU: one that nobody imports would be listed in vain."""
    for kind in ("fault_checks", "lifecycle_checks"):
        runners = [
            path.name
            for path in (ROOT / "tests" / "decoding").glob("test_*.py")
            if f"{kind}.EVERYWHERE" in path.read_text("utf-8")
        ]
        assert "test_loop_life_interpreter.py" in runners and any(name.endswith("_gpu.py") for name in runners), kind


@pytest.mark.parametrize("name", ["docs/questions.md", "docs/zh/questions.md"])
def test_the_memory_bound_is_the_codes(name):
    """The page's numbers for the real float16 model come from functions that the GPU test compares with the peak."""
    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration(ChatGLMConfig()).half()
    model.tie_head()
    text = (ROOT / name).read_text("utf-8")
    per_token = memory.cache_bytes(model, 1, 1)
    fixed = memory._FIXED_BYTES
    per_sequence = memory._FIXED_BYTES_PER_SEQUENCE + memory._SCORE_BYTES * model.config.vocab_size
    widths = 4 * model.config.hidden_size + 2 * model.config.inner_hidden_size
    weights = sum(parameter.nbytes for parameter in set(model.parameters()))
    for number in (
        f"{weights / 1e9:.1f} GB",
        f"{per_token / 1e6:.2f} MB",
        f"{2048 * per_token / 1e9:.2f} GB",
        f"{fixed / 1e9:.2f} GB",
        f"{per_sequence / 1e6:.1f} MB",
        f"{memory.draft_bytes(0) / 1e6:.1f} MB",
        f"{(memory.draft_bytes(2) - memory.draft_bytes(1)) / 1e6:.1f} MB",
        f"{widths * 2 / 1e6:.1f} MB",
    ):
        assert number in text, number
    assert [session.capacity_for(tokens) for tokens in (1, 257, 513, 1025, 2049)] == [256, 512, 1024, 2048, 3072]
