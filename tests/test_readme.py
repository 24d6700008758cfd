"""The READMEs say what was measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RECORDS = json.loads((ROOT / "images" / "data" / "benchmark_h200.json").read_text("utf-8"))


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_the_speed_table_holds_the_records(name):
    text = (ROOT / name).read_text("utf-8")
    decoding = {}
    for record in RECORDS:
        if record["new_tokens"] > 1:
            decoding.setdefault((record["mode"], record["batch"], record["prompt_tokens"]), record)
    assert len(decoding) == 6
    for record in decoding.values():
        row = f"| {record['ms_per_step']:.2f} | {record['tokens_per_s']:.0f} | {record['share']:.2f} |"
        assert row in text, row
    prefill = next(record for record in RECORDS if record["new_tokens"] == 1)
    assert f"{prefill['ms_per_step']:.1f}" in text and f"{RECORDS[0]['read_ceiling_gb_per_s']:.0f} GB/s" in text
    assert f"{RECORDS[0]['peak_memory_gb']:.2f} GB" in text
    assert {record["gpu"] for record in RECORDS} == {"NVIDIA H200"} and "H200" in text


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_the_transcript_is_what_the_demo_prints(name):
    """All but the speed, and what depends on versions and installed packages."""
    transcript = (ROOT / name).read_text("utf-8").split("```text\n")[1].split("```")[0].splitlines()
    command = [sys.executable, "examples/demo.py", "--tiny", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    printed = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT, env=environment, check=True)
    printed = printed.stdout.splitlines()
    assert transcript[:6] == printed[:6] and transcript[4].startswith("Answer:")
    of_versions = ("23 tokens", "  backend", "  transformers", "  torch", "    transformers.", "    config of")
    shown = [line for line in transcript if not line.startswith(of_versions)]
    assert shown == [line for line in printed if not line.startswith(of_versions)]
