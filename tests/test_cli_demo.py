"""examples/cli_demo.py as a person at a terminal uses it: through a pseudo-terminal."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest
from babbler import make_babbler

ROOT = Path(__file__).resolve().parents[1]
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
        "PROMPT_TOOLKIT_NO_CPR": "1",  # pexpect does not answer where the cursor is
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
        """What appears before this text."""
        self.demo.expect_exact(text)
        self.screen += self.demo.before + text
        return self.demo.before

    def prompt(self) -> None:
        self.until("User:")

    def answer(self) -> str:
        """The next answer, once the prompt is back."""
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
    """Starts the demo; ends it if the test has not."""
    started = []

    def start(*arguments: str) -> Terminal:
        started.append(Terminal(tmp_path, *arguments))
        return started[-1]

    yield start
    for one in started:
        # close(force=True) gives a process a tenth of a second to end, which a busy machine does not keep.
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


def test_what_was_said_before_ctrl_c_is_remembered():
    """The same stream, stopped after three steps, in this process: a terminal cannot be stopped at a given token."""
    script = (
        "import cli_demo, signal\n"
        "class Model:\n"
        "    def stream_chat(self, tokenizer, query, history, **settings):\n"
        "        for i in range(100):\n"
        "            if i == 3: signal.raise_signal(signal.SIGINT)\n"
        "            yield 'abcdefgh' * i, [*history, (query, 'abcdefgh' * i)]\n"
        "history = cli_demo.answer(Model(), None, 'q', [('a', 'b')], {})\n"
        "assert history == [('a', 'b'), ('q', 'abcdefgh' * 2)], history\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT / "examples",
        env=environment(ROOT),
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ChatGLM-6B: " + "abcdefgh" * 2 + "\n(stopped)\n"


def test_ctrl_d_ends_it_and_a_long_conversation_does_not(terminal):
    chat = terminal("--tiny", "--max-length", "20")
    chat.demo.send("hello " * 20 + "\r")
    chat.until("leaves no room for an answer")
    chat.prompt()
    chat.demo.send("\r")
    chat.prompt()
    chat.demo.send(CTRL_D)
    chat.ends()


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
