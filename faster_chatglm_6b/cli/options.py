"""The options that commands share, checked while they are parsed: nothing is loaded for a value that cannot work."""

import argparse
import math
from typing import Any, NoReturn

from ..recognition import HUB_ID


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, without the usage above it. Options are written in full."""

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **{"allow_abbrev": False} | settings)

    def error(self, message: str) -> NoReturn:
        """End the process with exit code 2."""
        shown = message.translate({code: "\N{REPLACEMENT CHARACTER}" for code in range(32)})
        self.exit(2, f"{self.prog}: {shown} (--help lists what there is)\n")


def add_checkpoint_argument(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the word MODEL, which says the same as ``--model``; ``default`` tells what it is if left out."""
    parser.add_argument(
        "word", nargs="?", metavar="MODEL", help=f"hub id or directory of a ChatGLM-6B checkpoint ({default})"
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for the checkpoint, the bits of its weights and the device."""
    parser.add_argument("--model", help=f"hub id or directory of a ChatGLM-6B checkpoint, such as {HUB_ID}")
    parser.add_argument("--tiny", action="store_true", help="use the tiny trained checkpoint: no download, no GPU")
    parser.add_argument("--bits", type=int, choices=(4, 8), help="quantise the weights while loading")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one, else cpu)")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for the length of answers and for how they are drawn."""
    parser.add_argument(
        "--max-length", type=_length, default=2048, help="tokens of prompt and answer (%(default)s)", metavar="N"
    )
    parser.add_argument(
        "--top-p", type=_share, default=0.7, help="draw from this share of probability (%(default)s)", metavar="P"
    )
    parser.add_argument(
        "--temperature", type=_temperature, default=0.95, help="0: no chance (%(default)s)", metavar="T"
    )


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the server."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all (%(default)s)")
    parser.add_argument("--port", type=_port, default=8000, help="0 takes a free one (%(default)s)", metavar="N")
    parser.add_argument(
        "--api-key", action="append", metavar="KEY",
        help="key that clients must send; several times for several keys (default: those in the environment's "
        "FASTER_CHATGLM_6B_API_KEY, separated by commas, else none is asked for)",
    )  # fmt: skip
    parser.add_argument(
        "--served-model-name", action="append", metavar="NAME", help="name for clients (default: the checkpoint's)"
    )
    parser.add_argument("--max-rows", type=_count, help="answers at once (default: 256, on a CPU 16)", metavar="N")
    parser.add_argument(
        "--memory", type=_share, default=0.9, help="share of free memory for keys and values (%(default)s)", metavar="P"
    )
    parser.add_argument(
        "--max-waiting", type=_whole, default=1024, help="answers that wait beyond the rows (%(default)s)", metavar="N"
    )
    parser.add_argument(
        "--shutdown-timeout", type=_whole, default=30, metavar="SECONDS",
        help="seconds that answers get to finish after SIGTERM or Ctrl-C (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--speculate", type=_draft, default=0, metavar="K",
        help="ids that a step drafts for each answer, if few run on a GPU: 0, 3, 7 or auto (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")


def generation_settings(max_length: int, top_p: float, temperature: float) -> dict[str, Any]:
    """Return the arguments of ``stream_chat``. A temperature of 0 takes the most likely token every time."""
    if temperature == 0:
        return {"max_length": max_length, "do_sample": False}
    return {"max_length": max_length, "do_sample": True, "top_p": top_p, "temperature": temperature}


def question(text: str) -> str:
    """Return a text that can be asked.

    Raises:
        argparse.ArgumentTypeError: it is empty, or holds bytes that are no UTF-8.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError("a question is a text that is not empty")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise argparse.ArgumentTypeError("the question holds bytes that are no UTF-8")
    return text


def _length(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9 or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens: a whole number from 1 on")
    return int(text)


def _whole(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 on")
    return int(text)


def _count(text: str) -> int:
    if not (number := _whole(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is too few: a whole number from 1 on")
    return number


def _draft(text: str) -> int | str:
    """Return what ``speculate`` takes."""
    if text not in ("0", "3", "7", "auto"):
        raise argparse.ArgumentTypeError(f"{text!r} is no draft: 0, 3, 7 or auto")
    return text if text == "auto" else int(text)


def _port(text: str) -> int:
    if (number := _whole(text)) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: a whole number up to 65535")
    return number


def _share(text: str) -> float:
    number = _number(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share: a number above 0, at most 1")
    return number


def _temperature(text: str) -> float:
    number = _number(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no temperature: 0 or a number above it")
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
