"""The commands of ``python -m faster_chatglm_6b``: status, demo, chat, serve; the examples call ``main`` too.

A command's module is imported when it runs: ``--help`` and ``status`` load neither torch nor transformers.
"""

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence

from .. import __version__, status
from .errors import CommandError
from .options import (
    CommandParser,
    add_checkpoint_argument,
    add_model_options,
    add_sampling_options,
    add_server_options,
    question,
)
from .printing import harmless

FOLLOW_UP = "用英文再说一遍"  # "Say that again in English": it can only be answered with the history


def build_parser() -> argparse.ArgumentParser:
    """Every command with its options; each sets ``run``, which takes the parsed arguments."""
    parser = CommandParser(
        prog="faster_chatglm_6b",
        description="ChatGLM-6B on today's transformers. Without a command: the status report.",
    )
    parser.add_argument("--version", action="version", version=f"faster_chatglm_6b {__version__}")
    parser.set_defaults(run=_status)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    command = commands.add_parser("status", help="backend, versions, and what the import patched")
    command.set_defaults(run=_status)

    text = "one turn and a follow-up, the speed and the status report"
    command = commands.add_parser("demo", help=text, description=f"Show {text}.")
    add_checkpoint_argument(command, "the tiny one that comes with this package")
    add_model_options(command)
    command.add_argument("--query", type=question, default="你好", help="the first question (%(default)s)")
    command.add_argument("--follow-up", type=question, default=FOLLOW_UP, help="the second question (%(default)s)")
    command.set_defaults(run=_demo)

    text = "a conversation in the terminal; each answer appears while it is made"
    command = commands.add_parser("chat", help=text, description=f"Hold {text}.")
    add_checkpoint_argument(command, "THUDM/chatglm-6b, about 12 GB to download once")
    add_model_options(command)
    add_sampling_options(command)
    command.set_defaults(run=_chat)

    text = "an OpenAI-compatible server for many users (needs the extra 'serve')"
    command = commands.add_parser("serve", help=text, description=f"Run {text}.")
    add_checkpoint_argument(command, "THUDM/chatglm-6b, about 12 GB to download once")
    add_model_options(command)
    add_server_options(command)
    command.set_defaults(run=_serve)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words after the program's name; those of this process if None.

    Returns:
        the exit code: 0, 1 after an error, 130 after Ctrl-C.

    Raises:
        SystemExit: 2 for words and options that are not known, 0 for ``--help`` and ``--version``.
    """
    for stream in (sys.stdout, sys.stderr):
        # An answer may hold characters that a terminal's encoding lacks: better a question mark than half an answer.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    parsed = build_parser().parse_args(arguments)
    return run_command(parsed.run, parsed)


def run_command(run: Callable[[argparse.Namespace], None], arguments: argparse.Namespace) -> int:
    """Call ``run(arguments)``; what a user causes ends in one sentence and an exit code, not in a traceback."""
    try:
        run(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
        return 0
    except CommandError as error:
        print(harmless(str(error)), file=sys.stderr)
        return error.code
    except ImportError as error:
        print(f"A library that this command needs cannot be imported: {harmless(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has gone. Python flushes stdout once more on its way out, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"The output cannot be written: {error.strerror}.", file=sys.stderr)
        return 1


def _status(arguments: argparse.Namespace) -> None:
    print(status())


def _demo(arguments: argparse.Namespace) -> None:
    from .demo import run

    run(arguments)


def _chat(arguments: argparse.Namespace) -> None:
    from .chat import run

    run(arguments)


def _serve(arguments: argparse.Namespace) -> None:
    from .serve import run

    run(arguments)
