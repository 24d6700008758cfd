"""examples/batch_inference.py: every line is answered once, also if it was interrupted in between."""

import contextlib
import json
import sys
from pathlib import Path

import pytest
import torch

from faster_chatglm_6b.serving.rows.captured import CapturedRows
from faster_chatglm_6b.serving.rows.plain import PlainRows

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PROMPTS = [
    {"prompt": "你好"},
    {"prompt": "What is int8?", "id": "mine"},
    {"messages": [{"role": "system", "content": "Hi\u2028there"}, {"role": "user", "content": "1+2"}]},
    {"prompt": "hello " * 3000},
    {"prompt": "Who are you?"},
]


@pytest.fixture
def batch(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import batch_inference

    return batch_inference


@pytest.fixture
def files(tmp_path):
    asked, answered = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in PROMPTS), "utf-8")
    return asked, answered


def run(batch, files, *options) -> int:
    words = [*map(str, files), "--tiny", "--device", "cpu", "--max-tokens", "6", *options]
    return batch.run_command(batch.run, batch.parser().parse_args(words))


def lines(path: Path) -> dict[int, dict]:
    read = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert len({line["line"] for line in read}) == len(read), "a line is answered twice"
    return {line["line"]: line for line in read}


def test_an_interrupted_run_goes_on_where_it_stopped(batch, files, capsys, monkeypatch):
    asked, answered = files
    assert run(batch, files, "--temperature", "3", "--top-p", "1") == 0
    whole = lines(answered)
    assert sorted(whole) == [0, 1, 2, 3, 4] and "2048" in whole[3]["error"]
    assert all(whole[number]["tokens"] == 6 for number in (0, 1, 2, 4))
    # What is left of a run that ended in the middle of a line.
    kept = answered.read_bytes().splitlines(keepends=True)
    answered.write_bytes(b"".join(kept[:2]) + kept[2][:9])
    assert run(batch, files, "--temperature", "3", "--top-p", "1") == 0
    assert lines(answered) == whole
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "faster_chatglm_6b.cli.checkpoint", None)
    assert run(batch, files) == 0 and "All 5 lines have an answer" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["{", "5", '{"text": "a"}', '"a"', '{"prompt": "a"}\n\n{"prompt": "a"}'])
def test_an_input_that_holds_no_prompts(batch, files, content, capsys):
    files[0].write_text(content)
    assert run(batch, files) == 1
    assert "is no prompt: each line is" in capsys.readouterr().err and not files[1].exists()


def test_files_that_cannot_be_used(batch, files, capsys):
    files[1].write_text("something else\n")
    assert run(batch, files) == 1
    assert "something else than answers" in capsys.readouterr().err
    assert files[1].read_text() == "something else\n"
    files[0].unlink()
    assert run(batch, files) == 1 and "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("is_engine", [True, False])
def test_a_model_that_fails_leaves_no_lines_and_the_next_run_asks_again(batch, files, is_engine, capsys, monkeypatch):
    @contextlib.contextmanager
    def turn(rows):
        with torch.inference_mode():
            yield
        raise OSError("the device is gone")

    def step(rows):
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as patch:
        for kind in (CapturedRows, PlainRows):
            patch.setattr(kind, *(("turn", turn) if is_engine else ("step", step)))
        assert run(batch, files) == 1
    said = capsys.readouterr().err
    assert "the device is gone" in said and "4 lines have no answer yet" in said and "Traceback" not in said
    assert sorted(lines(files[1])) == [3]  # the prompt that is too long
    assert run(batch, files) == 0
    assert sorted(lines(files[1])) == [0, 1, 2, 3, 4] and "2048" in lines(files[1])[3]["error"]
