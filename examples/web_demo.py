"""ChatGLM-6B in the browser: streamed answers, several users at once, each with their own conversation.

python examples/web_demo.py                    # THUDM/chatglm-6b, about 12 GB to download once
python examples/web_demo.py --tiny             # the toy checkpoint of this repository: no download, no GPU
python examples/web_demo.py --api http://127.0.0.1:8000     # the model of a server: a page and an API share it
"""

import argparse
import contextlib
import socket
import sys
from collections.abc import Sequence
from typing import Any

from faster_chatglm_6b.cli import run_command
from faster_chatglm_6b.cli.errors import CommandError
from faster_chatglm_6b.cli.options import HUB_ID, CommandParser, add_model_options

WAITING = 16  # messages in the queue; a later one is told at once that it is full
AT_ONCE = 32  # answers of a server at once


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read which model to load, and where and by whom it may be reached; end the process if that cannot be."""
    parser = CommandParser(prog="web_demo.py", description="Chat with ChatGLM-6B in the browser.")
    add_model_options(parser)
    parser.add_argument("--api", metavar="URL", help="load no model: show what the server at this address says")
    parser.add_argument("--api-key", metavar="KEY", help="of that server (default: FASTER_CHATGLM_6B_API_KEY)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: every one (%(default)s)")
    parser.add_argument("--port", type=port, default=7860, help="port to listen at (%(default)s)")
    parser.add_argument("--share", action="store_true", help="also a public link, through Gradio's servers")
    parser.add_argument("--auth", type=user_and_password, metavar="USER:PASSWORD", help="ask for this login")
    arguments = parser.parse_args(words)
    if wrong := contradiction(arguments):
        parser.error(wrong)
    return arguments


def port(text: str) -> int:
    """Read the number of a port."""
    if not text.isascii() or not text.isdigit() or len(text) > 5 or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: a whole number from 1 to 65535")
    return int(text)


def user_and_password(text: str) -> tuple[str, str]:
    """Split --auth in two; the password may hold colons."""
    user, _, password = text.partition(":")
    if not user or not password:
        raise argparse.ArgumentTypeError("it has to be user:password, neither part empty")
    return user, password


def check_that_it_can_listen(host: str, number: int) -> None:
    """Try the address before anything is loaded.

    Raises:
        CommandError: another program has it, or it is not an address of this machine.
    """
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[:1]:
            with contextlib.closing(socket.socket(family, kind, protocol)) as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CommandError(f"--host {host} --port {number}: this machine cannot listen there ({reason}).") from error


def contradiction(arguments: argparse.Namespace) -> str | None:
    """Return one sentence on options that do not go with --api or --api-key, or None."""
    if not arguments.api:
        return "--api-key is for the server at --api URL; give that too" if arguments.api_key else None
    given = [f"--{name}" for name in ("model", "tiny", "bits", "device") if getattr(arguments, name)]
    return f"--api shows the model of a server, which loads it; leave {given[0]} out" if given else None


def load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Return tokenizer and model; those of a server are asked for there.

    Raises:
        CommandError: no checkpoint, or no server.
    """
    if arguments.api:
        from _remote import RemoteModel

        return None, RemoteModel(arguments.api, arguments.api_key)
    from faster_chatglm_6b.cli.checkpoint import load_asked

    return load_asked(arguments, default=HUB_ID)


def serve(arguments: argparse.Namespace) -> None:
    """Load, then serve until Ctrl-C.

    Raises:
        CommandError: no checkpoint, no server, or no address to listen at.
    """
    try:
        import _web
    except ImportError as error:
        raise CommandError(f'The web demo needs Gradio 6: pip install "gradio>=6,<7" ({error})') from error
    check_that_it_can_listen(arguments.host, arguments.port)
    tokenizer, model = load(arguments)
    try:
        _web.launch(
            _web.build(model, tokenizer, AT_ONCE if arguments.api else 1).queue(max_size=WAITING),
            server_name=arguments.host,
            server_port=arguments.port,
            share=arguments.share,
            auth=arguments.auth,
        )
    except OSError as error:  # the port was taken meanwhile
        raise CommandError(str(error)) from error


if __name__ == "__main__":
    sys.exit(run_command(serve, parse_arguments()))
