"""An answer in the terminal while it grows."""

from collections.abc import Iterable

# A model can spell any byte: the ones that would steer the terminal are shown as what they are, nothing readable.
_HARMLESS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def print_growing(stream: Iterable[tuple[str, list]]) -> tuple[int, list | None]:
    """Print what each step of ``stream_chat`` adds, then a line break. What was printed stays: no redrawing.

    Returns:
        the number of steps, and the history with the last of them; None if there was no step.
    """
    steps, shown, response, history = 0, 0, "", None
    for step in stream:
        response, history = step
        steps += 1
        settled = _settled(response)
        print(response[shown:settled].translate(_HARMLESS), end="", flush=True)
        shown = max(shown, settled)
    print(response[shown:].translate(_HARMLESS), flush=True)
    return steps, history


def _settled(response: str) -> int:
    """How many characters can no longer change.

    The last one can: a comma gets its Chinese form when a Chinese character follows. And "[[训练时间]]" turns into a
    year when it is complete.
    """
    tail = response[-len("[[训练时间]]") :]
    return len(response) - max(len(tail) - tail.find("[[") if "[[" in tail else 1, 1)
