"""The house keeps its shape: small rooms, short files, a sentence for each room, and operators found by their names."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from faster_chatglm_6b.ops import OPERATOR_NAMES

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "faster_chatglm_6b"
PLACES = ("faster_chatglm_6b", "tests", "examples", "images")
MOST_MODULES = 12
LINES_TOO_MANY = 400
# Kernels that serve an operator under another name, because they do more than it.
KERNELS = {
    "fused_multi_head_attention_inference_v2": "decode_attention",
    "fused_attention_concat_past_key_value": "rotary_concat_past_key_value",
}


def rooms(package: Path) -> Iterator[Path]:
    """Yield the package and every folder in it that leads to a module."""
    for folder in [package, *sorted(package.rglob("*"))]:
        if folder.is_dir() and any(folder.rglob("*.py")):
            yield folder


def crowded_rooms(package: Path) -> list[str]:
    counts = {
        room.relative_to(package).as_posix(): len([path for path in room.glob("*.py") if path.name != "__init__.py"])
        for room in rooms(package)
    }
    return [f"{room}: {count} modules" for room, count in counts.items() if count > MOST_MODULES]


def rooms_without_a_sentence(package: Path) -> list[str]:
    return [
        room.relative_to(package.parent).as_posix()
        for room in rooms(package)
        if not (room / "__init__.py").is_file() or not ast.get_docstring(parsed(room / "__init__.py"))
    ]


def long_files(root: Path) -> list[str]:
    paths = sorted(path for place in PLACES for path in (root / place).rglob("*.py"))
    counts = {path.relative_to(root).as_posix(): len(path.read_text("utf-8").splitlines()) for path in paths}
    return [f"{path}: {count} lines" for path, count in counts.items() if count >= LINES_TOO_MANY]


def missing_parts(operator: str, root: Path) -> list[str]:
    """Name the parts of an operator that are not where its name says: definition, kernel, test."""
    ops = root / "faster_chatglm_6b" / "ops"
    kernel = KERNELS.get(operator, operator)
    kernels = [*(ops / "triton").rglob(f"{kernel}.py")]
    tests = (root / "tests" / "ops").glob("*.py")
    found = {
        "definition": operator in functions(ops / "reference.py"),
        "kernel": any(kernel in functions(path) for path in kernels),
        "test": any(kernel in names_used(path) for path in tests),
    }
    return [part for part, is_there in found.items() if not is_there]


def functions(path: Path) -> set[str]:
    return {node.name for node in parsed(path).body if isinstance(node, ast.FunctionDef)}


def names_used(path: Path) -> set[str]:
    """Return the names that the code uses, on their own or after a dot; words in comments and texts do not count."""
    nodes = [*ast.walk(parsed(path))]
    return {node.id for node in nodes if isinstance(node, ast.Name)} | {
        node.attr for node in nodes if isinstance(node, ast.Attribute)
    }


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def test_no_room_is_crowded():
    assert crowded_rooms(PACKAGE) == []


def test_every_room_begins_with_a_sentence():
    assert rooms_without_a_sentence(PACKAGE) == []


def test_no_file_is_long():
    assert long_files(ROOT) == []


@pytest.mark.parametrize("operator", OPERATOR_NAMES)
def test_every_operator_is_found_by_its_name(operator):
    assert missing_parts(operator, ROOT) == []


@pytest.fixture
def house(tmp_path) -> Path:
    """Return a small house without a fault."""
    files = {
        "faster_chatglm_6b/__init__.py": '"""The package."""\n',
        "faster_chatglm_6b/ops/__init__.py": '"""The operators."""\n',
        "faster_chatglm_6b/ops/reference.py": "def add():\n    pass\n",
        "faster_chatglm_6b/ops/triton/__init__.py": '"""The kernels."""\n',
        "faster_chatglm_6b/ops/triton/add.py": "def add():\n    pass\n",
        "tests/ops/test_add.py": "kernels.add()\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "faster_chatglm_6b" / "__pycache__").mkdir()
    return tmp_path


def faults(house: Path) -> list[str]:
    package = house / "faster_chatglm_6b"
    return [
        *crowded_rooms(package),
        *rooms_without_a_sentence(package),
        *long_files(house),
        *missing_parts("add", house),
    ]


def test_a_house_without_a_fault(house):
    assert faults(house) == []


@pytest.mark.parametrize(("room", "most"), [(".", 12), ("ops", 12), ("ops/triton", 12)])
def test_one_module_too_many_is_a_fault(house, room, most):
    folder = house / "faster_chatglm_6b" / room
    for number in range(most + 1 - len([path for path in folder.glob("*.py") if path.name != "__init__.py"])):
        assert faults(house) == []
        (folder / f"module_{number}.py").touch()
    assert faults(house) == [f"{room}: {most + 1} modules"]


@pytest.mark.parametrize("content", [None, "", "import os\n", "# The operators.\n"])
def test_a_room_without_a_sentence_is_a_fault(house, content):
    file = house / "faster_chatglm_6b" / "ops" / "__init__.py"
    file.unlink() if content is None else file.write_text(content)
    assert faults(house) == ["faster_chatglm_6b/ops"]


@pytest.mark.parametrize("place", PLACES)
def test_a_long_file_is_a_fault(house, place):
    path = house / place / "long.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text("pass\n" * 399)
    assert faults(house) == []
    path.write_text("pass\n" * 400)
    assert faults(house) == [f"{place}/long.py: 400 lines"]


@pytest.mark.parametrize(
    ("part", "path"),
    [
        ("definition", "faster_chatglm_6b/ops/reference.py"),
        ("kernel", "faster_chatglm_6b/ops/triton/add.py"),
        ("test", "tests/ops/test_add.py"),
    ],
)
def test_a_missing_part_of_an_operator_is_a_fault(house, part, path):
    (house / path).write_text('"""add"""  # add\nlater = "add"\n')
    assert faults(house) == [part]


def test_a_kernel_in_a_file_of_another_name_is_a_fault(house):
    triton = house / "faster_chatglm_6b" / "ops" / "triton"
    (triton / "add.py").rename(triton / "sum.py")
    assert faults(house) == ["kernel"]
    (triton / "float").mkdir()
    (triton / "float" / "__init__.py").write_text('"""Kernels of floats."""\n')
    (triton / "sum.py").rename(triton / "float" / "add.py")
    assert faults(house) == []
