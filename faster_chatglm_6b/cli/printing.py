"""Text for the terminal: an answer while it grows, and nothing that steers the terminal."""

from collections.abc import Iterable

# A model can spell any byte: those that would steer the terminal are shown as characters that cannot be read.
_HARMLESS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def harmless(text: str) -> str:
    """Return the text with every control character made visible, except line breaks and tabs."""
    return text.translate(_HARMLESS)


def print_growing(stream: Iterable[tuple[str, list]]) -> tuple[int, list | None]:
    """Print what each step of ``stream_chat`` adds, then a line break. What was printed stays: no redrawing.

    Returns:
        the number of steps, and the history with the last of them; None if there was no step.
    """
    steps, shown, response, history = 0, 0, "", None
    try:
        for step in stream:
            response, history = step
            steps += 1
            settled = _settled(response)
            print(harmless(response[shown:settled]), end="", flush=True)
            shown = max(shown, settled)
    finally:  # an error of the stream is told on a line of its own
        print(harmless(response[shown:]), flush=True)
    return steps, history


def _settled(response: str) -> int:
    """Count the characters that can no longer change.

    The last one can: a comma gets its Chinese form if a Chinese character follows. "[[训练时间]]" also turns into a
    year when it is complete.
    """
    tail = response[-len("[[训练时间]]") :]
    return len(response) - max(len(tail) - tail.find("[[") if "[[" in tail else 1, 1)
