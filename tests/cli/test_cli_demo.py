"""``examples/cli_demo.py`` is the command ``chat``: it works at a terminal and with piped input."""

import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pexpect
import pytest
import torch
from babbler import make_babbler

from faster_chatglm_6b.checkpoint import by_name
from faster_chatglm_6b.cli import chat, main
from faster_chatglm_6b.tokenization_chatglm import ChatGLMTokenizer

ROOT = Path(__file__).resolve().parents[2]
DEMO = str(ROOT / "examples" / "cli_demo.py")
GREETING = "你好！我是 faster_chatglm_6b 的小小演示模型。有什么可以帮你的吗？"
BACKSPACE, UP, LEFT, CTRL_C, CTRL_D = "\x7f", "\x1b[A", "\x1b[D", "\x03", "\x04"
CLEARS_THE_SCREEN = "\x1b[2J"


def environment(folder: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONIOENCODING": "utf-8",
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(folder),
        "HF_HUB_OFFLINE": "1",
        "TERM": "xterm",
        "PROMPT_TOOLKIT_NO_CPR": "1",  # pexpect does not answer the question for the cursor's place
    }


class Terminal:
    """The demo on a screen of 200 columns: no line of these tests is wrapped."""

    def __init__(self, folder: Path, *arguments: str):
        command = [DEMO, "--device", "cpu", "--temperature", "0", *arguments]
        self.demo = pexpect.spawn(
            sys.executable, command, env=environment(folder), encoding="utf-8", timeout=30, dimensions=(40, 200)
        )
        self.screen = ""
        self.prompt()

    def until(self, text: str) -> str:
        """Return what appears before this text."""
        self.demo.expect_exact(text)
        self.screen += self.demo.before + text
        return self.demo.before

    def prompt(self) -> None:
        self.until("User:")

    def answer(self) -> str:
        """Return the next answer, once the prompt is back."""
        self.until("ChatGLM-6B: ")
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.until("User:")).replace("\r", "").strip()

    def say(self, text: str) -> str:
        self.demo.send(text + "\r")
        return self.answer()

    def ends(self) -> None:
        self.until("Goodbye")
        self.demo.expect(pexpect.EOF)
        self.demo.close()
        assert self.demo.exitstatus == 0


@pytest.fixture
def terminal(tmp_path):
    """Start the demo, and end it if the test has not."""
    started = []

    def start(*arguments: str) -> Terminal:
        started.append(Terminal(tmp_path, *arguments))
        return started[-1]

    yield start
    for one in started:
        # close(force=True) gives a process only a tenth of a second to end, too little on a busy machine.
        if one.demo.isalive():
            one.demo.kill(signal.SIGKILL)
            one.demo.wait()
        one.demo.close()


def test_two_turns_clear_and_stop(terminal):
    chat = terminal("--tiny")
    assert chat.say("你好") == GREETING
    assert chat.say("用英文再说一遍") == "Hello! I am a tiny demo model of faster_chatglm_6b. How can I help you?"
    assert chat.say("My name is Anna.") != ""
    assert "Anna" in chat.say("What is my name?")
    chat.demo.send("clear\r")
    chat.until("forgotten")
    chat.prompt()
    assert "Anna" not in chat.say("What is my name?")
    chat.demo.send("stop\r")
    chat.ends()
    assert CLEARS_THE_SCREEN not in chat.screen


def test_chinese_is_edited_by_characters(terminal):
    chat = terminal("--tiny")
    assert chat.say(f"你坏{BACKSPACE}好") == GREETING
    assert (
        chat.say(f"用英再说一遍{LEFT * 4}文")
        == "Hello! I am a tiny demo model of faster_chatglm_6b. How can I help you?"
    )


def test_earlier_input_comes_back(terminal):
    chat = terminal("--tiny")
    assert chat.say("你好") == GREETING
    chat.demo.send("clear\r")
    chat.until("forgotten")
    chat.prompt()
    assert chat.say(UP * 2) == GREETING


def test_an_answer_streams_and_ctrl_c_stops_it_only(terminal, tiny_dir, tmp_path):
    chat = terminal("--model", str(make_babbler(tiny_dir, tmp_path / "babbler")))
    chat.demo.send("hello\r")
    chat.until("ChatGLM-6B: ")
    pieces = [chat.demo.read_nonblocking(size=100_000, timeout=60) for _ in range(5)]
    assert all(pieces) and "User:" not in "".join(pieces)
    chat.demo.send(CTRL_C)
    chat.until("(stopped)")
    chat.prompt()
    chat.demo.send("again\r")
    chat.until("ChatGLM-6B: ")
    chat.demo.send(CTRL_C)
    chat.until("(stopped)")
    chat.prompt()
    chat.demo.send(CTRL_C)
    chat.ends()
    assert CLEARS_THE_SCREEN not in chat.screen


class Slow:
    """A model whose stream is interrupted at a given step: a terminal cannot be stopped at a given token."""

    config = SimpleNamespace(max_sequence_length=2048)

    def stream_chat(self, tokenizer, query, history, **settings):
        for i in range(100):
            if i == 3:
                signal.raise_signal(signal.SIGINT)
            yield "abcdefgh" * i, [*history, (query, "abcdefgh" * i)]


def test_what_was_said_before_ctrl_c_is_remembered(capsys):
    before = signal.getsignal(signal.SIGINT)
    history = chat.answer(Slow(), None, "q", [("a", "b")], {})
    assert history == [("a", "b"), ("q", "abcdefgh" * 2)]
    assert signal.getsignal(signal.SIGINT) is before
    assert capsys.readouterr().out == "ChatGLM-6B: " + "abcdefgh" * 2 + "\n(stopped)\n"


class Exhausted(Slow):
    """A model whose memory ends in the middle of an answer."""

    def stream_chat(self, tokenizer, query, history, **settings):
        yield "abcdefgh", [*history, (query, "abcdefgh")]
        raise torch.cuda.OutOfMemoryError("no room for 3 \x1b[31m tokens")


def test_an_answer_that_fails_in_the_middle_leaves_the_conversation_as_it_was(capsys):
    history = [("a", "b")]
    assert chat.answer(Exhausted(), None, "q", history, {}) is history
    assert capsys.readouterr().out.endswith("\nno room for 3 \N{REPLACEMENT CHARACTER}[31m tokens\n")


def test_ctrl_d_ends_it_and_a_long_conversation_does_not(terminal):
    chat = terminal("--tiny", "--max-length", "20")
    chat.demo.send("hello " * 20 + "\r")
    chat.until("leaves no room for an answer")
    chat.prompt()
    chat.demo.send("\r")
    chat.prompt()
    chat.demo.send(CTRL_D)
    chat.ends()


@pytest.fixture
def piped(monkeypatch, capsys):
    """Run the command ``chat`` in this process, with bytes as its input instead of a terminal; return what it shows."""

    def converse(text: bytes) -> str:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))
        assert main(["chat", "--tiny", "--device", "cpu", "--temperature", "0", "--max-length", "200"]) == 0
        shown = capsys.readouterr().out
        assert shown.endswith("Goodbye. 再见。\n")
        return shown

    return converse


def test_a_pipe_is_read_as_text(tmp_path):
    """The demo runs in a process of its own, in which ``prompt_toolkit`` would wait for the rest of a key."""
    command = [sys.executable, DEMO, "--device", "cpu", "--temperature", "0", "--tiny"]
    text = "\x1b[31mx\nstop\nand more\n"
    settings = {"env": environment(tmp_path), "capture_output": True, "encoding": "utf-8", "timeout": 300}
    done = subprocess.run(command, input=text, **settings)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert done.stdout.endswith("Goodbye. 再见。\n") and done.stdout.count("ChatGLM-6B: ") == 1
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        (b"\x1b\n\x1b[200~x\n\x1bO\nstop\nx\n", 3),
        (b"\xff\xfe\x80 what?\n\xc3\nstop", 2),
        (b"\x00\x03\x04\x07\xc2\x9b?\n\nstop\n", 1),
        (b"", 0),
        (b"hello", 1),
    ],
    ids=["unfinished keys", "no UTF-8", "control characters", "nothing", "no line break"],
)
def test_whatever_is_piped_in(piped, text, answers):
    shown = piped(text)
    assert shown.count("ChatGLM-6B: ") == answers
    assert not set(shown) & {"\x1b", "\x9b", "\x07", "\0"}


def test_a_piped_conversation_has_a_memory(piped):
    shown = piped(b"My name is Anna.\nWhat is my name?\nclear\nWhat is my name?\n")
    answers = re.findall("ChatGLM-6B: (.*)", shown)
    assert len(answers) == 3 and "Anna" in answers[1] and "Anna" not in answers[2]


def test_a_message_that_is_too_long_is_refused_by_its_length(piped, monkeypatch):
    tokenized = []
    encode = ChatGLMTokenizer.encode_text
    monkeypatch.setattr(
        ChatGLMTokenizer, "encode_text", lambda self, text, **more: tokenized.append(text) or encode(self, text, **more)
    )
    shown = piped(b"x" * 200_000 + "\n你好\n".encode())
    assert "The message has 200000 characters, but at most 32768 can be asked at once: send a part of it." in shown
    assert f"ChatGLM-6B: {GREETING}" in shown
    assert tokenized and max(map(len, tokenized)) < 1000


def test_an_encoding_without_chinese_loses_characters_and_nothing_else(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("What is int8?\n你好\n".encode()), encoding="utf-8"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert main(["chat", "--tiny", "--device", "cpu", "--temperature", "0"]) == 0
    sys.stdout.flush()
    shown = sys.stdout.buffer.getvalue()
    assert b"ChatGLM-6B: Call quantize(8) after loading" in shown and b"Goodbye. ???" in shown


def test_closed_streams(monkeypatch, capsys):
    """The commands cope with ``<&-`` and ``>&-``."""
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["chat", "--tiny"]) == 2
    assert capsys.readouterr().err == "The standard input is closed, but chat reads the messages there.\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"stop\n")))
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["status"]) == 0


def test_ctrl_c_while_loading_is_one_word(monkeypatch, capsys):
    monkeypatch.setattr(by_name, "load", lambda *arguments: signal.raise_signal(signal.SIGINT))
    assert main(["chat", "--tiny", "--device", "cpu"]) == 130
    assert capsys.readouterr() == ("", "Interrupted.\n")


def test_without_prompt_toolkit_lines_are_read_by_input(tmp_path):
    """The test uses a terminal, since ``prompt_toolkit`` would be used there."""
    script = (
        "import sys\n"
        "sys.modules['prompt_toolkit'] = None\n"
        "from faster_chatglm_6b.cli import main\n"
        "sys.exit(main(['chat', '--tiny', '--device', 'cpu', '--temperature', '0']))\n"
    )
    demo = pexpect.spawn(
        sys.executable, ["-c", script], env=environment(tmp_path), encoding="utf-8", timeout=120, dimensions=(40, 200)
    )
    demo.expect_exact("User: ")
    demo.send("你好\r")
    demo.expect_exact(GREETING)
    demo.send("stop\r")
    demo.expect_exact("Goodbye")
    demo.expect(pexpect.EOF)
    demo.close()
    assert demo.exitstatus == 0


def test_without_network_and_weights_it_says_what_to_do(tmp_path):
    done = subprocess.run(
        [sys.executable, DEMO, "--device", "cpu"],
        env=environment(tmp_path),
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 1 and done.stdout == ""
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("THUDM/chatglm-6b is neither on this machine nor") and "--tiny" in last


def test_bits_quantise_while_loading(terminal):
    chat = terminal("--tiny", "--bits", "8")
    assert chat.say("你好") == GREETING
