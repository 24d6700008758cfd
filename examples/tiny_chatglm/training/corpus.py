"""The corpus: read the text files beside this one, and draw training dialogues and held-out dialogues from them.

Format of ``corpus_*.txt``, one thing per line:

    == install after project use   an intent; with ``after``: only as the round that follows one of those
    weight: 14                     how often the intent is drawn as a first question (default 1)
    en: How {do I|can I} {|please }install <p>     ways to ask in English; braces are choices, <p> is a macro
    en~ Could you tell me how to install it        a way to ask that is never trained on: it measures generalisation
    en> Clone the repository and run ...           the answer; \\n is a line break
    same: int4                                     instead of answers: the answers of that intent
    @p = {this project|it}                         a macro; what those of corpus_followups.txt mean is said here

``zh`` lines are the same in Chinese. Every intent has both languages, so that it can be asked for in the other one.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from augment import augment, normalise
from corpus_generated import addition, capital, capital_of, echo
from corpus_slots import SLOTS, Slot
from corpus_values import CAPITALS
from dialogue import Dialogue, Turn

FOLDER = Path(__file__).parent
LANGUAGES = ("en", "zh")
# Their wording is the point: no added greetings, typos or changes of case.
LITERAL_INTENTS = {"html", "gibberish", "special_tokens"}
MACRO_FILE, FILES = "corpus_followups.txt", ["smalltalk", "self", "project", "general", "unknown"]


@dataclass
class Intent:
    """One thing that can be asked, in both languages: ``train`` and ``held_out`` wordings and the ``answer``."""

    name: str
    after: tuple[str, ...] = ()
    weight: float = 1.0
    same: str | None = None
    train: dict[str, list[str]] = field(default_factory=lambda: {"en": [], "zh": []})
    held_out: dict[str, list[str]] = field(default_factory=lambda: {"en": [], "zh": []})
    answer: dict[str, str] = field(default_factory=dict)


def expand(template: str, macros: dict[str, str]) -> list[str]:
    """List all strings that a template stands for."""
    template = re.sub(r"<(\w+)>", lambda found: macros.get(found[1], found[0]), template)
    match = re.search(r"\{([^{}]*)\}", template)
    if not match:
        return [" ".join(template.split())]
    head, tail = template[: match.start()], template[match.end() :]
    # Nested braces are expanded from the inside, which builds what does not hold them once per choice.
    return list(dict.fromkeys(text for choice in match[1].split("|") for text in expand(head + choice + tail, macros)))


def _content_lines(path: Path) -> Iterator[str]:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            yield line


class Corpus:
    """All intents, and the drawing of dialogues from them."""

    def __init__(self) -> None:
        self.macros: dict[str, str] = {}
        self.intents: dict[str, Intent] = {}
        for name in [MACRO_FILE, *(f"corpus_{stem}.txt" for stem in FILES)]:
            self._read(FOLDER / name)
        for intent in self.intents.values():
            if intent.same:
                intent.answer = self.intents[intent.same].answer
        self._check()
        self.forbidden = self._held_out_wordings()
        self.first = [intent for intent in self.intents.values() if not intent.after]
        self.following = [intent for intent in self.intents.values() if intent.after]

    def _read(self, path: Path) -> None:
        intent: Intent | None = None
        for line in _content_lines(path):
            if line.startswith("@"):
                name, _, value = line[1:].partition(" = ")
                self.macros[name] = value
            elif line.startswith("== "):
                name, _, after = line[3:].partition(" after ")
                intent = self.intents[name] = Intent(name, tuple(after.split()))
            elif line.startswith("weight: "):
                intent.weight = float(line[8:])
            elif line.startswith("same: "):
                intent.same = line[6:]
            else:
                language, mark, text = line[:2], line[2], line[4:]
                if language not in LANGUAGES or mark not in ":~>":
                    raise ValueError(f"{path.name}: cannot read the line {line!r}")
                if mark == ">":
                    intent.answer[language] = text.replace("\\n", "\n").replace("\\\\", "\\")
                else:
                    wordings = intent.train if mark == ":" else intent.held_out
                    wordings[language] += expand(text, self.macros)

    def _check(self) -> None:
        """Refuse a corpus that asks for two answers to one question, or trains on a held-out wording."""
        owner: dict[str, str] = {}
        for intent in self.intents.values():
            cleaned = [text for text in intent.answer.values() if re.search(r" ([.,?!]|n't|'(m|s|ve|re)\b)", text)]
            if cleaned:
                raise ValueError(f"intent {intent.name}: the tokenizer's decode would take blanks out of {cleaned}")
            missing = [lang for lang in LANGUAGES if not (intent.train[lang] and intent.answer.get(lang))]
            if missing:
                raise ValueError(f"intent {intent.name}: no wordings or no answer in {missing}")
            for language in LANGUAGES:
                intent.train[language] = list(dict.fromkeys(intent.train[language]))
                for text in intent.train[language] if not intent.after else []:
                    other = owner.setdefault(normalise(text), intent.name)
                    if other != intent.name:
                        raise ValueError(f"{text!r} belongs to two intents: {other} and {intent.name}")
        for intent in self.intents.values():
            trained = {normalise(text) for language in LANGUAGES for text in intent.train[language]}
            second = [query for name, query, _ in second_held_out() if name == intent.name]
            for text in [*intent.held_out["en"], *intent.held_out["zh"], *second]:
                if normalise(text) in trained or (not intent.after and normalise(text) in owner):
                    raise ValueError(f"{intent.name}: {text!r} is both trained and held out")

    def _held_out_wordings(self) -> set[str]:
        """Return everything that ``draw`` must not ask, since the augmentation might happen to build it."""
        found = {normalise(text) for i in self.intents.values() for lang in LANGUAGES for text in i.held_out[lang]}
        for macro in REFERENCES:
            for language in LANGUAGES:
                found |= {normalise(text) for text in self.wordings(macro, language, held_out=True)}
        return found | {normalise(query) for _, query, _ in second_held_out()}

    def wordings(self, macro: str, language: str, held_out: bool = False) -> list[str]:
        """Return the wordings of a follow-up macro, for example wordings("repeat", "en")."""
        return expand(f"<{macro}_{language}>" if not held_out else self.macros[f"{macro}_{language}~"], self.macros)

    def sizes(self) -> dict[str, int]:
        """Count what there is of each kind."""
        trained = [len(i.train[lang]) for i in self.intents.values() for lang in LANGUAGES]
        held = [len(i.held_out[lang]) for i in self.intents.values() for lang in LANGUAGES]
        return {
            "intents": len(self.intents),
            "intents_and_languages": 2 * len(self.intents),
            "trained_wordings": sum(trained),
            "held_out_wordings": sum(held),
            "memory_slots": len(SLOTS),
            "answers": len({a for i in self.intents.values() for a in i.answer.values()}),
        }

    # ---- turns -------------------------------------------------------------------------------------------------------

    def turn(self, intent: Intent, language: str, rng: random.Random, light: bool = True) -> Turn:
        """Draw one wording of an intent; ``light`` changes its punctuation, case or greeting now and then."""
        query = rng.choice(intent.train[language])
        if light:
            query = augment(query, language, rng, literal=intent.name in LITERAL_INTENTS)
        return Turn(query, language, intent.answer, intent.name)

    def any_turn(self, rng: random.Random, language: str | None = None) -> Turn:
        """Draw a question that stands alone: an intent, a sum, a capital, or something that the toy is told."""
        language = language or rng.choice(LANGUAGES)
        kind = rng.random()
        if kind < 0.84:
            weights = [intent.weight for intent in self.first]
            return self.turn(rng.choices(self.first, weights)[0], language, rng)
        if kind < 0.89:
            return addition(language, rng)
        if kind < 0.92:
            return capital(language, rng)
        if kind < 0.94:
            return echo(language, rng)
        return rng.choice(SLOTS).tell(language, rng)

    # ---- dialogues ---------------------------------------------------------------------------------------------------

    def draw(self, rng: random.Random) -> Dialogue:
        """Draw a training dialogue whose question is not a held-out wording."""
        while True:
            dialogue = self._draw(rng)
            if normalise(dialogue.query) not in self.forbidden:
                return dialogue

    def _draw(self, rng: random.Random) -> Dialogue:
        kind = rng.random()
        if kind < 0.30:
            turn = self.any_turn(rng)
            return Dialogue([], turn.query, turn.answer, "single", turn.language)
        if kind < 0.48:
            turn = self.any_turn(rng)
            history = self.rounds(rng, rng.choice([1, 1, 1, 2, 2, 3, 4]))
            return Dialogue(history, turn.query, turn.answer, "later", turn.language)
        if kind < 0.61:
            return self.followup(rng.choice(self.following), rng.choice(LANGUAGES), rng)
        if kind < 0.63:
            return self.next_capital(rng.choice(LANGUAGES), rng)
        if kind < 0.82:
            return self.reference(rng.choice(REFERENCES), rng.choice(LANGUAGES), rng)
        return self.memory(rng.choice(SLOTS), rng.choice(LANGUAGES), rng)

    def rounds(self, rng: random.Random, count: int) -> list[tuple[str, str]]:
        """Draw ``count`` rounds that have nothing to do with each other, mostly in one language."""
        language = rng.choice(LANGUAGES)
        turns = [self.any_turn(rng, language if rng.random() < 0.8 else None) for _ in range(count)]
        return [(turn.query, turn.answer) for turn in turns]

    def followup(
        self, intent: Intent, language: str, rng: random.Random, query: str | None = None, light: bool = True
    ) -> Dialogue:
        """Draw a round that only makes sense after one of the intents named by ``after``."""
        before = self.intents[rng.choice(intent.after)]
        history = self.rounds(rng, rng.choice([0, 0, 0, 1, 2])) if light else []
        if before.after:
            start = self.intents[
                rng.choice([name for name in before.after if not self.intents[name].after] or ["hello"])
            ]
            turn = self.turn(start, language, rng, light)
            history = [(turn.query, turn.answer)]
        turn = self.turn(before, language, rng, light)
        history = [*history, (turn.query, turn.answer)]
        if query is None:
            query = self.turn(intent, language, rng, light).query
        return Dialogue(history, query, intent.answer[language], "followup", language)

    def reference(
        self, macro: str, language: str, rng: random.Random, query: str | None = None, light: bool = True
    ) -> Dialogue:
        """Draw a round about what was said before: say it again, say it in the other language, what did I ask."""
        if query is None:
            query = rng.choice(self.wordings(macro, language))
            query = augment(query, language, rng) if light else query
        if light and rng.random() < 0.04:
            return Dialogue([], query, NOTHING_YET[language], "reference", language)
        source = {"to_en": "zh", "to_zh": "en"}.get(macro, language)
        if light and rng.random() < 0.15:
            source = rng.choice(LANGUAGES)
        history = self.rounds(rng, rng.choice([0, 0, 0, 1, 1, 2, 3])) if light else []
        last = self.any_turn(rng, source)
        while last.name == "echo" and macro.startswith("to_"):
            last = self.any_turn(rng, source)
        history.append((last.query, last.answer))
        if macro == "repeat":
            answer = last.answer
        elif macro in ("to_en", "to_zh"):
            answer = last.answers[macro[3:]]
        else:
            quoted = history[-1 if macro == "last_question" else 0][0]
            answer = {"en": "You said: ", "zh": "你说的是:"}[language] + normalise(quoted, keep_case=True)
        return Dialogue(history, query, answer, f"reference.{macro}", language)

    def next_capital(self, language: str, rng: random.Random) -> Dialogue:
        """Draw a capital, and then only the name of another country."""
        first, country = capital(language, rng), rng.choice(CAPITALS)
        name = country[language][0]
        forms = {
            "en": [f"{start} {name}" for start in self.wordings("and_country", "en")],
            "zh": [f"那{name}呢", f"{name}呢", f"{name}的呢"],
        }
        history = [*self.rounds(rng, rng.choice([0, 0, 1])), (first.query, first.answer)]
        query = augment(rng.choice(forms[language]), language, rng, literal=True)
        return Dialogue(history, query, capital_of(country)[language], "followup.capital", language)

    def memory(
        self, slot: Slot, language: str, rng: random.Random, held_out: bool = False, between: int | None = None
    ) -> Dialogue:
        """Draw something that is told (a name, a number ...) and asked for later, or asked for without being told."""
        if not held_out and rng.random() < 0.1:
            history = [(t.query, t.answer) for t in self._small_turns(rng, rng.choice([0, 0, 1, 2]), language, slot)]
            question = slot.ask(language, None, rng)
            return Dialogue(history, question.query, question.answer, "memory.untold", language)
        value = slot.value(language, rng, held_out)
        told = slot.tell(language, rng, value)
        before = rng.choice([0, 0, 0, 1]) if between is None else 0
        after = rng.choice([0, 0, 0, 1, 1, 2]) if between is None else between
        turns = [*self._small_turns(rng, before, language, slot), told, *self._small_turns(rng, after, language, slot)]
        history = [(t.query, t.answer) for t in turns]
        if slot.name == "name" and not held_out and rng.random() < 0.15:
            # Whose name? The toy's own, for once.
            answer = self.intents["your_name"].answer[language]
            query = augment(rng.choice(self.wordings("and_your_name", language)), language, rng)
            return Dialogue(history, query, answer, "memory.your_name", language)
        question = slot.ask(language, value, rng)
        return Dialogue(history, question.query, question.answer, "memory", language)

    def _small_turns(self, rng: random.Random, count: int, language: str, slot: Slot) -> list[Turn]:
        """Draw turns in between that tell nothing about ``slot``."""
        turns: list[Turn] = []
        while len(turns) < count:
            if rng.random() < 0.3:
                turns.append(rng.choice([other for other in SLOTS if other is not slot]).tell(language, rng))
            else:
                turns.append(self.turn(rng.choice(self.first), language, rng))
        return turns

    # ---- what is measured --------------------------------------------------------------------------------------------

    def held_out(self, seed: int = 1) -> list[Dialogue]:
        """Return the dialogues that measure generalisation: wordings, names and numbers that training never sees."""
        rng = random.Random(seed)
        found = []
        for intent in self.intents.values():
            for language in LANGUAGES:
                for query in intent.held_out[language]:
                    if intent.after:
                        dialogue = self.followup(intent, language, rng, query=query, light=False)
                        found.append(_as(dialogue, "two_turn.followup"))
                        continue
                    answer = intent.answer[language]
                    found.append(Dialogue([], query, answer, "single.held_out_wording", language))
                    mark = {"en": "?", "zh": "？"}[language]
                    found.append(Dialogue([], query.lower() + mark, answer, "single.held_out_wording_marked", language))
        for name, query, language in second_held_out():
            found.append(Dialogue([], query, self.intents[name].answer[language], "single.second_held_out", language))
        for macro in REFERENCES:
            for language in LANGUAGES:
                for query in self.wordings(macro, language, held_out=True):
                    for _ in range(6):
                        dialogue = self.reference(macro, language, rng, query=query, light=False)
                        found.append(_as(dialogue, f"two_turn.{macro}"))
        for slot in SLOTS:
            for language in LANGUAGES:
                for between in (0, 1):
                    for _ in range(6):
                        dialogue = self.memory(slot, language, rng, held_out=True, between=between)
                        found.append(_as(dialogue, "two_turn.memory" if between == 0 else "three_turn.memory"))
        return found


REFERENCES = ("repeat", "to_en", "to_zh", "last_question", "first_question")
NOTHING_YET = {
    "en": "Nothing has been said yet: this is the start of our conversation.",
    "zh": "我们的对话刚刚开始,还什么都没有说。",
}


def _as(dialogue: Dialogue, kind: str) -> Dialogue:
    return Dialogue(dialogue.history, dialogue.query, dialogue.answer, kind, dialogue.language)


def second_held_out() -> list[tuple[str, str, str]]:
    """Return (intent, question, language) of held_out.txt, written after a look at the first trained model."""
    return [tuple(line.split(" | ")) for line in _content_lines(FOLDER / "held_out.txt")]
