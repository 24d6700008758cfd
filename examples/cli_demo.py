"""ChatGLM-6B in the terminal: several turns, each answer shown while it is made.

python examples/cli_demo.py                    # THUDM/chatglm-6b, about 12 GB to download once
python examples/cli_demo.py --tiny             # the toy checkpoint of this repository: no download, no GPU
"""

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from threading import Event

from _loading import add_model_options, generation_settings, load_or_exit
from _printing import print_growing

try:
    from prompt_toolkit import PromptSession
except ImportError:
    sys.exit("The terminal demo edits its input line with prompt_toolkit: pip install prompt_toolkit")

WELCOME = """Type a message. "clear" forgets the conversation, "stop" ends it, Ctrl-C stops an answer.
输入消息即可对话：clear 清空历史，stop 结束，Ctrl-C 停止当前回答。
"""


def parse_arguments() -> argparse.Namespace:
    """What to load, where, and how to draw the answers."""
    parser = argparse.ArgumentParser(description="Chat with ChatGLM-6B in the terminal.")
    add_model_options(parser)
    parser.add_argument("--max-length", type=int, default=2048, help="tokens of prompt and answer (%(default)s)")
    parser.add_argument("--top-p", type=float, default=0.7, help="draw from this share of probability (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.95, help="0: no chance (%(default)s)")
    return parser.parse_args()


@contextmanager
def ctrl_c_sets() -> Iterator[Event]:
    """An event that Ctrl-C sets meanwhile, instead of interrupting the model in the middle of a step."""
    pressed = Event()
    before = signal.signal(signal.SIGINT, lambda *_: pressed.set())
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def answer(model, tokenizer, query: str, history: list, settings: dict) -> list:
    """Print the answer as it comes; the history with as much of it as was said."""
    with ctrl_c_sets() as pressed:
        try:
            stream = model.stream_chat(tokenizer, query, history=history, **settings)
        except ValueError as error:  # such as a conversation that got too long
            print(error)
            return history
        print("ChatGLM-6B: ", end="", flush=True)
        _, longer = print_growing(takewhile(lambda _: not pressed.is_set(), stream))
        if pressed.is_set():
            print("(stopped)")
    return longer or history


def converse(model, tokenizer, settings: dict) -> None:
    """Turns until "stop", Ctrl-C or Ctrl-D."""
    session, history = PromptSession(reserve_space_for_menu=0), []
    while True:
        try:
            query = session.prompt("User: ").strip()
        except (KeyboardInterrupt, EOFError):
            return
        if query == "stop":
            return
        if query == "clear":
            history = []
            print("(The conversation is forgotten.)")
        elif query:
            history = answer(model, tokenizer, query, history, settings)


def main() -> None:
    """Load, greet, converse, say goodbye."""
    arguments = parse_arguments()
    tokenizer, model = load_or_exit(arguments)
    print(WELCOME)
    converse(model, tokenizer, generation_settings(arguments.max_length, arguments.top_p, arguments.temperature))
    print("Goodbye. 再见。")


if __name__ == "__main__":
    main()
