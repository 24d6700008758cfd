"""The files of deployment name what exists and options that the command takes; the sizing table is the computed one."""

import configparser
import json
import re
import shlex
import subprocess
import sys

import pytest
from pages import ROOT, read

from faster_chatglm_6b.cli import build_parser

FOLDER = ROOT / "examples" / "deployment"
PAGES = {"en": "docs/serving.md", "zh": "docs/zh/serving.md"}


def test_the_image_is_made_of_files_that_exist_and_runs_the_command():
    lines = (FOLDER / "Dockerfile").read_text("utf-8").splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert {"pyproject.toml", "setup.py", "faster_chatglm_6b", "examples/tiny_chatglm"} <= set(copied)
    assert all((ROOT / path).exists() for path in copied)
    named = re.findall(r'^(?:readme = "([^"]+)"|license-files = \["([^"]+)"\])', read("pyproject.toml"), re.MULTILINE)
    assert {name for pair in named for name in pair if name} <= set(copied)
    (entry,) = (json.loads(line.removeprefix("ENTRYPOINT ")) for line in lines if line.startswith("ENTRYPOINT"))
    (words,) = (json.loads(line.removeprefix("CMD ")) for line in lines if line.startswith("CMD"))
    parsed = build_parser().parse_args([*entry[1:], *words])
    assert (parsed.host, parsed.port, parsed.word) == ("0.0.0.0", 8000, "THUDM/chatglm-6b")
    said = [line.removeprefix("#   ") for line in lines if line.startswith("#   docker run")]
    assert all(build_parser().parse_args(["serve", *line.split("faster-chatglm-6b ")[1].split()]) for line in said)
    assert len(said) == 2


def test_the_unit_runs_the_command_and_leaves_it_time_to_end():
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    unit.read(FOLDER / "faster-chatglm-6b.service", "utf-8")
    program, *words = shlex.split(unit["Service"]["ExecStart"])
    parsed = build_parser().parse_args(words)
    assert program.endswith("/faster-chatglm-6b") and parsed.word == "THUDM/chatglm-6b"
    assert int(unit["Service"]["TimeoutStopSec"]) > parsed.shutdown_timeout


@pytest.mark.parametrize("language", PAGES)
def test_the_sizing_table_is_computed(language):
    command = [sys.executable, "-m", "examples.measuring.sizing", "--language", language]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT, check=True)
    lines = done.stdout.strip()
    assert lines.count("\n") > 15 and f"\n\n{lines}\n\n" in read(PAGES[language])
