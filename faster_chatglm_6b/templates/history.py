"""Read a conversation as callers hold it: rounds of (query, response), or messages with a role and a content.

Both become arguments of ``prompts.build_prompt``. ChatGLM-6B knows no system role: the system text goes before the
first user text, on lines of its own, as if the user had typed it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .prompts import build_prompt

ROLES = ("system", "user", "assistant")
_ROUND_FORMS = "(query, response) pairs of texts, or messages such as {'role': 'user', 'content': 'hi'}"
_ORDER = "system messages come first, then user and assistant take turns, and user begins"


@dataclass(frozen=True)
class History:
    """Earlier rounds, oldest first, and the system text before them ('' for none)."""

    rounds: tuple[tuple[str, str], ...] = ()
    system: str = ""
    given: tuple[Any, ...] = ()
    is_messages: bool = False

    @classmethod
    def of(cls, history: Any) -> History:
        """Read a caller's ``history``.

        Args:
            history: None; or rounds, each a tuple or list of two texts; or messages in a form of ``read_messages``
                that end with an answer. An empty round is left out.

        Raises:
            ValueError: anything else.
        """
        if history is None or isinstance(history, cls):
            return history or cls()
        if isinstance(history, (str, bytes, Mapping)) or not isinstance(history, Iterable):
            raise ValueError(f"The history is {_shown(history)}, but it must be a list of {_ROUND_FORMS}.")
        given = tuple(item for item in history if not (isinstance(item, (list, tuple)) and not item))
        if any(_is_message(item) for item in given):
            return cls._of_messages(given)
        return cls(tuple(_round(number, item) for number, item in enumerate(given)), given=given)

    @classmethod
    def _of_messages(cls, given: tuple[Any, ...]) -> History:
        messages = read_messages(given, name="history")
        if messages[-1]["role"] == "user":
            raise ValueError(
                f"The last message of the history is the user's, {_shown(messages[-1]['content'])}; the history ends "
                "with an answer: give the text that is to be answered as the query."
            )
        system, texts = split_system(messages)
        return cls(tuple(zip(texts[::2], texts[1::2], strict=True)), system, given, is_messages=True)

    def prompt(self, query: str) -> str:
        """Build the prompt text in which ``query`` is the last turn."""
        rounds = [*self.rounds]
        if not self.system:
            return build_prompt(query, rounds)
        if not rounds:
            return build_prompt(f"{self.system}\n{query}", rounds)
        (question, answer), *later = rounds
        return build_prompt(query, [(f"{self.system}\n{question}", answer), *later])

    def with_round(self, query: str, response: str) -> list[Any]:
        """Return a new list in the given form, one round longer."""
        if not self.is_messages:
            return [*self.given, (query, response)]
        return [*self.given, {"role": "user", "content": query}, {"role": "assistant", "content": response}]


def read_messages(messages: Any, name: str = "conversation") -> list[dict[str, str]]:
    """Read the messages of one conversation, each as {"role": str, "content": str}.

    Args:
        messages: mappings with "role" and "content", or objects with these attributes. A content is a text, or a list
            of {"type": "text", "text": ...} parts, which are joined without anything between them.
        name: names the messages in an error.

    Raises:
        ValueError: something that is no message, a role other than system, user and assistant, a content that is no
            text, no message at all, or an order without turns.
    """
    if hasattr(messages, "messages"):
        messages = messages.messages
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise ValueError(
            f"The {name} is {_shown(messages)}, but it must be a list of messages such as "
            "{'role': 'user', 'content': 'hi'}."
        )
    read: list[dict[str, str]] = []
    for number, message in enumerate(messages):
        where = f"Message {number} of the {name}"
        role, content = _role_and_content(message, where)
        before = read[-1]["role"] if read else "system"
        allowed = {"system": ("system", "user"), "user": ("assistant",), "assistant": ("user",)}[before]
        if role not in allowed:
            place = f"after one of the {before}'s" if read else "at the beginning"
            raise ValueError(f"{where} has the role {role!r} {place}, but {_ORDER}.")
        read.append({"role": role, "content": _text(content, where)})
    if not read:
        raise ValueError(f"The {name} has no message; it needs one of the user's at least.")
    return read


def split_system(messages: list[dict[str, str]]) -> tuple[str, list[str]]:
    """Return the system texts of read messages, joined by line breaks without empty ones; and all other texts."""
    system = [message["content"] for message in messages if message["role"] == "system" and message["content"]]
    return "\n".join(system), [message["content"] for message in messages if message["role"] != "system"]


def _is_message(item: Any) -> bool:
    return isinstance(item, Mapping) or hasattr(item, "role")


def _round(number: int, item: Any) -> tuple[str, str]:
    if isinstance(item, (list, tuple)) and len(item) == 2 and all(isinstance(text, str) for text in item):
        return item[0], item[1]
    raise ValueError(f"Round {number} of the history is {_shown(item)}, but the history must be {_ROUND_FORMS}.")


def _role_and_content(message: Any, where: str) -> tuple[str, Any]:
    if isinstance(message, Mapping):
        fields = message
    else:
        fields = {key: getattr(message, key) for key in ("role", "content") if hasattr(message, key)}
    if not {"role", "content"} <= fields.keys():
        raise ValueError(f"{where} is {_shown(message)}, but it must be like {{'role': 'user', 'content': 'hi'}}.")
    if fields["role"] not in ROLES:
        raise ValueError(
            f"{where} has the role {fields['role']!r}, but ChatGLM-6B knows only {', '.join(ROLES)}; leave it out or "
            "write its text into one of the user's."
        )
    return fields["role"], fields["content"]


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, (list, tuple)) and content and all(_is_text_part(part) for part in content):
        return "".join(part["text"] for part in content)
    raise ValueError(
        f"{where} has the content {_shown(content)}, but it must be a text or a list of "
        "{'type': 'text', 'text': ...} parts."
    )


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
