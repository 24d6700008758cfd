"""Several turns in the terminal, each answer shown while it is made."""

import argparse
import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from itertools import takewhile
from threading import Event
from typing import Any

from .checkpoint import load_asked, out_of_memory, too_long
from .errors import CommandError
from .options import HUB_ID, generation_settings
from .printing import harmless, print_growing

WELCOME = """Type a message. "clear" forgets the conversation, "stop" ends it, Ctrl-C stops an answer.
输入消息即可对话：clear 清空历史，stop 结束，Ctrl-C 停止当前回答。
"""


def run(arguments: argparse.Namespace) -> None:
    """Load, greet, converse, say goodbye.

    Raises:
        CommandError: no checkpoint, or nothing to read messages from.
    """
    if sys.stdin is None:
        raise CommandError("The standard input is closed, but chat reads the messages there.", code=2)
    tokenizer, model = load_asked(arguments, default=HUB_ID)
    print(WELCOME)
    converse(model, tokenizer, generation_settings(arguments.max_length, arguments.top_p, arguments.temperature))
    print("Goodbye. 再见。")


def converse(model: Any, tokenizer: Any, settings: dict) -> None:
    """Take turns until "stop", Ctrl-C or Ctrl-D (the end of what is piped in)."""
    ask, history = _prompt(), []
    while True:
        try:
            query = ask("User: ").strip()
        except (KeyboardInterrupt, EOFError):
            return
        if query == "stop":
            return
        if query == "clear":
            history = []
            print("(The conversation is forgotten.)")
        elif query:
            history = answer(model, tokenizer, query, history, settings)


def answer(model: Any, tokenizer: Any, query: str, history: list, settings: dict) -> list:
    """Print the answer as it comes; return the history with as much of it as was said."""
    if refusal := too_long(query, model):
        print(refusal)
        return history
    with ctrl_c_sets() as pressed:
        try:
            stream = model.stream_chat(tokenizer, query, history=history, **settings)
            print("ChatGLM-6B: ", end="", flush=True)
            _, longer = print_growing(takewhile(lambda _: not pressed.is_set(), stream))
        except (ValueError, *out_of_memory()) as error:  # such as a conversation that got too long
            print(harmless(str(error)))
            return history
        if pressed.is_set():
            print("(stopped)")
    return longer or history


@contextlib.contextmanager
def ctrl_c_sets() -> Iterator[Event]:
    """Give an event that Ctrl-C sets meanwhile, instead of interrupting the model in the middle of a step."""
    pressed = Event()
    before = signal.signal(signal.SIGINT, lambda *_: pressed.set())
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _prompt() -> Callable[[str], str]:
    """Return prompt_toolkit's line editor at a terminal if it is installed, else ``input``."""
    if not all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout)):
        # In a pipe prompt_toolkit takes text that begins with ESC for a key, and waits for the rest of it.
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")
        return input
    try:
        from prompt_toolkit import PromptSession
    except ImportError:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input edits its line with it)
        return input
    return PromptSession(reserve_space_for_menu=0).prompt
