"""``examples/demo.py`` runs as a visitor runs it: in a process of its own, without a network."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_demo(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONIOENCODING": "utf-8",
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), *arguments]
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, timeout=300)


def test_transcript_of_the_tiny_checkpoint(tmp_path):
    done = run_demo(tmp_path, "--tiny", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:5] == [
        "Question: 你好",
        "Answer:   你好！我是 faster_chatglm_6b 的小小演示模型。有什么可以帮你的吗？",
        "",
        "Question: 用英文再说一遍",
        "Answer:   Hello! I am a tiny demo model of faster_chatglm_6b. How can I help you?",
    ]
    assert re.fullmatch(r"23 tokens in \d+\.\d\d s: \d+\.\d tokens/s on cpu", lines[6])
    assert lines[8].startswith("faster_chatglm_6b ") and "enabled" in lines[8]
    assert any(line.strip().startswith("model of ") and line.endswith("tiny_chatglm") for line in lines)


def test_own_questions_and_a_streamed_chinese_answer(tmp_path):
    """The streamed text has its full-width marks, although they are decided one character late."""
    done = run_demo(tmp_path, "--tiny", "--device", "cpu", "--query", "What is int8?", "--follow-up", "翻译成中文")
    assert done.returncode == 0, done.stderr
    assert "Answer:   Call quantize(8) after loading:\nmodel = model.quantize(8)\n" in done.stdout
    translated = "加载之后调用 quantize(8):\nmodel = model.quantize(8)\n各层的权重变成 int8，占用的内存是 fp16 的一半。"
    assert f"Answer:   {translated}\n" in done.stdout


@pytest.mark.parametrize("name", ["THUDM/chatglm-6b", "somebody/some-chatglm"])
def test_without_network_and_weights_it_says_what_to_do(tmp_path, name):
    done = run_demo(tmp_path, "--device", "cpu", "--model", name)
    assert done.returncode == 1
    assert done.stdout == ""
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        f"{name} is neither on this machine nor to be had from the hub: connect to the network, pass a local directory "
        "with --model, or try the toy checkpoint with --tiny."
    )
    assert "Traceback" not in done.stderr


def test_damaged_weights_are_called_damaged(tmp_path):
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in ("config.json", "tokenizer_config.json", "ice_text.model"):
        (folder / file).write_bytes((ROOT / "examples" / "tiny_chatglm" / file).read_bytes())
    (folder / "model.safetensors").write_bytes(b"not weights")
    done = run_demo(tmp_path, "--device", "cpu", "--model", str(folder))
    assert done.returncode == 1
    assert "neither on this machine" not in done.stderr
    assert str(folder) in done.stderr.strip().splitlines()[-1] and "Traceback" not in done.stderr


def test_no_example_needs_no_grad():
    examples = list((ROOT / "examples").glob("*.py"))
    assert examples
    assert [path.name for path in examples if "no_grad" in path.read_text(encoding="utf-8")] == []
