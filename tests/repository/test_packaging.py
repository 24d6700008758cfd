"""The wheel and the source archive, built here by the installed setuptools, hold what pip should install."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import faster_chatglm_6b

ROOT = Path(__file__).resolve().parents[2]
TINY = {"config.json", "ice_text.model", "model.safetensors", "tokenizer_config.json"}
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"

pytestmark = pytest.mark.skipif(
    int(version("setuptools").split(".")[0]) < 77, reason="pyproject.toml asks for setuptools 77 or later"
)


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> tuple[Path, Path]:
    """Build the source archive, and the wheel from it as pip would: not from the clone."""
    folder = tmp_path_factory.mktemp("packages")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    clone = folder / "clone"
    for name in tracked.split("\0"):
        if name.startswith(("faster_chatglm_6b/", "examples/tiny_chatglm/")) or name and "/" not in name:
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            (clone / name).write_bytes((ROOT / name).read_bytes())
    source = build("build_sdist", clone, folder)
    with tarfile.open(source) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return source, build("build_wheel", unpacked, folder)


def build(kind: str, tree: Path, folder: Path) -> Path:
    before = set(folder.iterdir())
    command = [sys.executable, "-c", BUILD, kind, str(folder)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (archive,) = set(folder.iterdir()) - before
    return archive


def test_the_wheel_holds_the_package_the_types_and_one_tiny_checkpoint(archives):
    with zipfile.ZipFile(archives[1]) as wheel:
        names = set(wheel.namelist())
        weights = wheel.read("faster_chatglm_6b/tiny_chatglm/model.safetensors")
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "faster_chatglm_6b").rglob("*.py")}
    assert modules <= names and "faster_chatglm_6b/py.typed" in names
    assert {f"faster_chatglm_6b/tiny_chatglm/{name}" for name in TINY} <= names
    assert weights == (ROOT / "examples" / "tiny_chatglm" / "model.safetensors").read_bytes()
    assert [name for name in names if name.endswith("model.safetensors")] == [
        "faster_chatglm_6b/tiny_chatglm/model.safetensors"
    ]
    # Nothing else of the repository lands in site-packages.
    assert {name.split("/")[0].split("-")[0] for name in names} == {"faster_chatglm_6b"}
    assert not [name for name in names if "training/" in name or "test" in name]


def test_the_source_archive_holds_the_tiny_checkpoint_and_no_tests(archives):
    with tarfile.open(archives[0]) as source:
        names = {name.partition("/")[2] for name in source.getnames()}
    assert {f"examples/tiny_chatglm/{name}" for name in TINY} <= names
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "faster_chatglm_6b/py.typed"} <= names
    assert not [name for name in names if name.startswith("tests")]


def test_the_metadata(archives):
    with zipfile.ZipFile(archives[1]) as wheel:
        (information,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = wheel.read(information).decode("utf-8")
        commands = wheel.read(information.replace("METADATA", "entry_points.txt")).decode("utf-8")
    assert f"\nVersion: {faster_chatglm_6b.__version__}\n" in metadata
    assert "\nProject-URL: Model card, https://huggingface.co/THUDM/chatglm-6b\n" in metadata
    assert "faster_chatglm_6b = faster_chatglm_6b.cli:main" in commands


def test_the_classifiers_are_the_versions_of_python_that_were_tried():
    named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text("utf-8"))
    assert named == ["3.10", "3.11", "3.12", "3.13"]
    for name in ("docs/verified.md", "docs/zh/verified.md"):
        rows = [line for line in (ROOT / name).read_text("utf-8").splitlines() if line.startswith("| 3.1")]
        assert [row.split(" | ")[0].removeprefix("| ").rsplit(".", 1)[0] for row in rows] == named


def test_the_wheel_answers_where_no_clone_is(archives, tmp_path):
    """The wheel is unpacked as pip would, in front of everything else on the path."""
    with zipfile.ZipFile(archives[1]) as wheel:
        wheel.extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "faster_chatglm_6b", "demo", "--device", "cpu"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment | {"PYTHONIOENCODING": "utf-8"}, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert "Answer:   Hello! I am a tiny demo model of faster_chatglm_6b. How can I help you?" in done.stdout
    assert "model of site/faster_chatglm_6b/tiny_chatglm" in done.stdout
