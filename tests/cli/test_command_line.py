"""``python -m faster_chatglm_6b`` has known words and options, and one sentence for everything else."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import remote_code
import torch

import faster_chatglm_6b
from faster_chatglm_6b.checkpoint import by_name
from faster_chatglm_6b.cli import build_parser, main, options

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "tiny_chatglm"


def refused(arguments: list[str], capsys) -> tuple[int, str]:
    """Return the exit code and the one line that is shown instead of a traceback."""
    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    return code, lines[0]


def test_help_and_status_load_neither_torch_nor_transformers(tmp_path):
    program = """
import contextlib, io, sys
from faster_chatglm_6b.cli import main
for words in ([], ["status"]):
    main(words)
for words in (["--help"], ["demo", "--help"], ["chat", "--help"], ["--version"], ["evil"]):
    with contextlib.suppress(SystemExit):
        main(words)
answer(sorted({name.split(".")[0] for name in sys.modules}))
"""
    modules = remote_code.run_python(program, tmp_path)
    assert {"torch", "transformers", "numpy", "sentencepiece", "prompt_toolkit"}.isdisjoint(modules)


@pytest.mark.parametrize("words", [[], ["status"]])
def test_status_is_what_no_word_means(words, capsys):
    assert main(words) == 0
    assert capsys.readouterr().out == f"{faster_chatglm_6b.status()}\n"


@pytest.mark.parametrize("command", ["status", "demo", "chat"])
def test_help_names_the_command(command, capsys):
    for words in (["--help"], [command, "--help"]):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 0 and command in capsys.readouterr().out


def test_the_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"faster_chatglm_6b {faster_chatglm_6b.__version__}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["evil"], "'evil'"),
        (["Status"], "'Status'"),
        (["--evil"], "--evil"),
        (["status", "more"], "more"),
        (["demo", "--bits", "3"], "--bits"),
        (["demo", "--tin"], "--tin"),
        (["demo", "--query", ""], "a question is a text that is not empty"),
        (["demo", "--query", " \n "], "a question is a text that is not empty"),
        (["demo", "--follow-up", "\udcff"], "no UTF-8"),
        (["chat", "--max-length", "0"], "'0' is no number of tokens"),
        (["chat", "--max-length", "1e3"], "'1e3' is no number of tokens"),
        (["chat", "--max-length", "²"], "is no number of tokens"),
        (["chat", "--max-length", "9" * 5000], "is no number of tokens"),
        (["chat", "--top-p", "0"], "'0' is no share"),
        (["chat", "--top-p", "1.1"], "'1.1' is no share"),
        (["chat", "--top-p", "nan"], "'nan' is no share"),
        (["chat", "--temperature", "-1"], "'-1' is no temperature"),
        (["chat", "--temperature", "inf"], "'inf' is no temperature"),
        (["chat", "--temperature", "warm"], "'warm' is no temperature"),
        (["chat", "a", "b"], "b"),
        (["chat", "\x1b[31m", "\x1b[0m"], "\N{REPLACEMENT CHARACTER}[0m"),
        (["chat", "a", "--tiny"], "More than one checkpoint is named"),
        (["chat", "a", "--model", "b"], "More than one checkpoint is named"),
        (["demo", "--tiny", "--model", "b"], "More than one checkpoint is named"),
        (["chat", "", "--device", "cpu"], "name is empty"),
        (["chat", "--device", "evil"], "--device evil: this machine has no such device"),
        (["chat", "--device", ""], "this machine has no such device"),
        (["chat", "--device", "cuda:99"], "--device cuda:99: this machine has no such device"),
        (["chat", "--device", "meta"], "--device meta: this machine has no such device"),
        (["chat", "--device", "cpu:-7"], "--device cpu:-7: this machine has no such device"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_what_cannot_work_is_one_sentence_and_exit_code_2(words, said, capsys, monkeypatch):
    monkeypatch.setattr(by_name, "load", lambda *arguments: pytest.fail("loaded before the options were checked"))
    code, line = refused(words, capsys)
    assert code == 2 and said in line


def test_a_checkpoint_is_named_in_any_of_three_ways():
    parse = build_parser().parse_args
    assert parse(["chat", "a"]).word == parse(["chat", "--model", "a"]).model == "a"
    assert parse(["demo", "--tiny"]).tiny


def test_only_chatglm_6b_is_loaded(tmp_path, capsys):
    """``trust_remote_code`` would run the code of any other model."""
    config = json.loads((TINY / "config.json").read_text("utf-8"))
    for name, keys, reason in (
        ("newer", {"multi_query_attention": True}, "as ChatGLM2, ChatGLM3 and GLM-4 do"),
        ("foreign", {"model_type": "gpt2"}, "its model_type is 'gpt2'"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config | keys | {"auto_map": {"AutoConfig": "evil.Evil"}}))
        (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        code, line = refused(["chat", str(folder), "--device", "cpu"], capsys)
        assert code == 1 and str(folder) in line and reason in line
    assert not (tmp_path / "ran").exists()


def test_a_directory_without_a_checkpoint(tmp_path, capsys):
    code, line = refused(["demo", str(tmp_path), "--device", "cpu"], capsys)
    assert code == 1 and line == (
        f"{tmp_path} is not a checkpoint of ChatGLM-6B: it holds no config.json that can be read."
    )


def test_nothing_is_loaded_while_the_library_is_switched_off(capsys):
    """Hugging Face's own classes would then run a checkpoint's code."""
    with faster_chatglm_6b.disabled():
        code, line = refused(["demo", "--device", "cpu"], capsys)
    assert code == 1 and "switched off" in line


def test_an_absent_library_is_one_sentence(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_chatglm_6b.cli.demo", None)
    code, line = refused(["demo"], capsys)
    assert code == 1 and line.startswith("A library that this command needs cannot be imported:")


def test_memory_that_ends_while_loading_is_one_sentence(capsys, monkeypatch):
    def load(*arguments):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(by_name, "load", load)
    assert refused(["chat", "--tiny", "--device", "cpu"], capsys) == (1, "CUDA out of memory.")


def test_questions_that_leave_no_room_are_one_sentence(capsys):
    assert main(["demo", "--device", "cpu", "--query", "hello " * 3000]) == 1
    assert "this model was trained for at most 2048" in capsys.readouterr().err.splitlines()[-1]
    assert main(["demo", "--device", "cpu", "--query", "x" * 200_000]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("The message has 200000 characters")


def test_a_reader_that_goes_away_is_no_traceback():
    """``| head`` may close the pipe early; the command runs in a process of its own, whose output closes at its end."""
    program = f"{sys.executable} -m faster_chatglm_6b status | true; exit ${{PIPESTATUS[0]}}"
    for _ in range(3):
        done = subprocess.run(
            ["bash", "-c", program], capture_output=True, encoding="utf-8", cwd=ROOT, env=dict(os.environ), timeout=120
        )
        assert done.stderr == "" and done.returncode in (0, 1)


def test_a_closed_output_is_exit_code_1(monkeypatch, tmp_path):
    class Closed(io.TextIOWrapper):
        def write(self, text):
            raise BrokenPipeError

    with open(tmp_path / "out", "wb") as file:
        monkeypatch.setattr(sys, "stdout", Closed(file))
        assert main(["status"]) == 1


def test_the_settings_of_sampling():
    assert options.generation_settings(64, 0.7, 0) == {"max_length": 64, "do_sample": False}
    drawn = {"max_length": 64, "do_sample": True, "top_p": 0.7, "temperature": 0.95}
    assert options.generation_settings(64, 0.7, 0.95) == drawn


def test_the_tiny_checkpoint_is_found_where_it_is_packaged_and_in_a_clone(monkeypatch, tmp_path):
    assert by_name.tiny_checkpoint() == TINY
    packaged = tmp_path / "tiny_chatglm"
    packaged.mkdir()
    monkeypatch.setattr(by_name, "TINY", (packaged, TINY))
    assert by_name.tiny_checkpoint() == TINY
    (packaged / "config.json").write_text("{}")
    assert by_name.tiny_checkpoint() == packaged
    monkeypatch.setattr(by_name, "TINY", (tmp_path / "a", tmp_path / "b"))
    with pytest.raises(FileNotFoundError, match="install the package again"):
        by_name.tiny_checkpoint()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a file on a full disk")
def test_a_full_disk_is_one_sentence():
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(
            [sys.executable, "-m", "faster_chatglm_6b", "status"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert "The output cannot be written: No space left on device." in done.stderr and "Traceback" not in done.stderr
