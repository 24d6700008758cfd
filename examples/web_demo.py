"""ChatGLM-6B in the browser: streamed answers, several users at once, each with their own conversation.

python examples/web_demo.py                    # THUDM/chatglm-6b, about 12 GB to download once
python examples/web_demo.py --tiny             # the toy checkpoint of this repository: no download, no GPU
"""

import argparse
import contextlib
import socket
import sys

from faster_chatglm_6b.cli import run_command
from faster_chatglm_6b.cli.errors import CommandError
from faster_chatglm_6b.cli.options import HUB_ID, CommandParser, add_model_options

WAITING = 16  # messages in the queue; a later one is told at once that it is full


def parse_arguments() -> argparse.Namespace:
    """Read which model to load, and where and by whom it may be reached."""
    parser = CommandParser(prog="web_demo.py", description="Chat with ChatGLM-6B in the browser.")
    add_model_options(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: every one (%(default)s)")
    parser.add_argument("--port", type=port, default=7860, help="port to listen at (%(default)s)")
    parser.add_argument("--share", action="store_true", help="also a public link, through Gradio's servers")
    parser.add_argument("--auth", type=user_and_password, metavar="USER:PASSWORD", help="ask for this login")
    return parser.parse_args()


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


def serve(arguments: argparse.Namespace) -> None:
    """Load, then serve until Ctrl-C.

    Raises:
        CommandError: no checkpoint, or no address to listen at.
    """
    try:
        import _web
    except ImportError as error:
        raise CommandError(f'The web demo needs Gradio 6: pip install "gradio>=6,<7" ({error})') from error
    from faster_chatglm_6b.cli.checkpoint import load_asked

    check_that_it_can_listen(arguments.host, arguments.port)
    tokenizer, model = load_asked(arguments, default=HUB_ID)
    try:
        _web.launch(
            _web.build(model, tokenizer).queue(max_size=WAITING),
            server_name=arguments.host,
            server_port=arguments.port,
            share=arguments.share,
            auth=arguments.auth,
        )
    except OSError as error:  # the port was taken meanwhile
        raise CommandError(str(error)) from error


if __name__ == "__main__":
    sys.exit(run_command(serve, parse_arguments()))
