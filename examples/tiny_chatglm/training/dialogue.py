"""The two things that the corpus is made of."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Turn:
    """A question and its answer: ``answers`` has it in both languages, ``name`` says what it is about."""

    query: str
    language: str
    answers: dict[str, str]
    name: str

    @property
    def answer(self) -> str:
        """Return the answer in the language of the question."""
        return self.answers[self.language]


@dataclass(frozen=True)
class Dialogue:
    """Earlier (question, answer) rounds, a question and the answer wanted. ``kind`` names what is measured by it."""

    history: list[tuple[str, str]]
    query: str
    answer: str
    kind: str
    language: str
