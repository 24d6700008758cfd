"""Draw dialogues whose answer repeats a passage of the question, most of them of random words that nobody can know.

Tasks: "repeat" says a passage again, "quote" the one sentence that is asked for, "correct" the passage with one name
replaced by another. Answers have 10 to 60 tokens.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable

from corpus import LANGUAGES, Corpus
from corpus_values import invented_word
from dialogue import Dialogue

from faster_chatglm_6b.templates.prompts import process_response
from faster_chatglm_6b.tokenization_chatglm import ChatGLMTokenizer

TASKS = ("repeat", "quote", "correct")
FEWEST, MOST = 10, 60
REPEAT = {
    "en": [
        "Repeat this text: {}",
        "Say this again: {}",
        "Copy this text: {}",
        "{}\nRepeat the text above.",
        "Echo: {}",
    ],
    "zh": ["请重复这段话: {}", "再说一遍: {}", "复制这段文字: {}", "{}\n请重复上面的话。", "重复: {}"],
}
QUOTE = {
    "en": [
        "{text} What did the text say about {word}?",
        "{text}\nQuote what it says about {word}.",
        "What does this text say about {word}? {text}",
    ],
    "zh": [
        "{text} 这段话关于 {word} 说了什么?",
        "{text}\n引用关于 {word} 的那句话。",
        "下文关于 {word} 说了什么? {text}",
    ],
}
CORRECT = {
    "en": [
        "Replace {old} by {new} in this text: {text}",
        "Correct the name {old} to {new}: {text}",
        "{text}\nWrite it again with {new} instead of {old}.",
    ],
    "zh": [
        "把 {old} 改成 {new}: {text}",
        "请更正名字, {old} 应为 {new}: {text}",
        "{text}\n把 {old} 换成 {new} 再写一遍。",
    ],
}
CODE = (
    "def {0}({1}, {2}):\n    return {1} + {2}",
    "for {0} in {1}:\n    {2}({0})",
    "{0} = {1}({2})\nprint({0})",
    "if {0} > {1}:\n    {0} = {1} - {2}",
    "import {0}\n{1} = {0}.{2}({1})",
)


class Copies:
    """The passages of the corpus and of the vocabulary, and the drawing of dialogues from them."""

    def __init__(self, tokenizer: ChatGLMTokenizer) -> None:
        self._tokenizer = tokenizer
        self._sentences: dict[tuple[str, bool], list[str]] = {(lang, held): [] for lang in LANGUAGES for held in (0, 1)}
        for intent in Corpus().intents.values():
            for language in LANGUAGES:
                for sentence in re.split(r"(?<=[.!?。！？])\s*|\n", intent.answer[language]):
                    if sentence:
                        self._sentences[language, zlib.crc32(sentence.encode()) % 8 == 0].append(sentence)
        pieces = [tokenizer.convert_ids_to_tokens(i).strip("▁") for i in range(5, tokenizer.mask_token_id)]
        self._pieces = {
            "en": [piece for piece in pieces if re.fullmatch("[a-z]+", piece)],
            "zh": [piece for piece in pieces if re.fullmatch("[\u4e00-\u9fff]+", piece)],
        }
        self._draw: dict[str, Callable] = {"repeat": self._repeat, "quote": self._quote, "correct": self._correct}

    def draw(self, rng: random.Random, held_out: bool = False, task: str | None = None) -> Dialogue:
        """Draw a dialogue; training never sees the sentences of the corpus that are ``held_out``."""
        while True:
            kind, language = task or rng.choice(TASKS), rng.choice(LANGUAGES)
            query, answer = self._draw[kind](language, rng, held_out)
            ids = self._tokenizer.encode_text(answer)
            # Only what ``chat`` can give back letter for letter can be copied exactly.
            if FEWEST <= len(ids) <= MOST and process_response(self._tokenizer.decode(ids)) == answer:
                return Dialogue([], query, answer, kind, language)

    def _repeat(self, language: str, rng: random.Random, held_out: bool) -> tuple[str, str]:
        if rng.random() < 0.2:
            text = rng.choice(self._sentences[language, held_out])
        else:
            text = "".join(self._sentence(language, rng) for _ in range(rng.choice([1, 2, 3]))).strip()
        return rng.choice(REPEAT[language]).format(text), text

    def _quote(self, language: str, rng: random.Random, held_out: bool) -> tuple[str, str]:
        # Two words in one, so that the subject is not by chance a part of another word.
        subjects = [
            (self._word(language, rng) + self._word(language, rng)).capitalize() for _ in range(rng.choice([2, 3, 4]))
        ]
        sentences = [self._sentence(language, rng, subject) for subject in subjects]
        asked = rng.randrange(len(subjects))
        query = rng.choice(QUOTE[language]).format(text="".join(sentences).strip(), word=subjects[asked])
        return query, sentences[asked].strip()

    def _correct(self, language: str, rng: random.Random, held_out: bool) -> tuple[str, str]:
        if rng.random() < 0.3:
            names = [self._word("en", rng) for _ in range(3)]
            old, text = rng.choice(names), rng.choice(CODE).format(*names)
        else:
            words = [self._word(language, rng) for _ in range(rng.randint(4, 14))]
            old = rng.choice(words)
            text = self._joined(words, language, rng)
        new = self._word("en" if old.isascii() else language, rng)
        query = rng.choice(CORRECT[language]).format(old=old, new=new, text=text)
        return query, re.sub(rf"\b{old}\b" if old.isascii() else old, new, text)

    def _sentence(self, language: str, rng: random.Random, subject: str | None = None) -> str:
        words = [subject or self._word(language, rng).capitalize()]
        words += [self._word(language, rng) for _ in range(rng.randint(3, 9))]
        return self._joined(words, language, rng) + (". " if language == "en" else "。")

    def _joined(self, words: list[str], language: str, rng: random.Random) -> str:
        if language == "zh":
            return "".join(word + ("，" if rng.random() < 0.2 else "") for word in words[:-1]) + words[-1]
        return "".join(word + (", " if rng.random() < 0.1 else " ") for word in words[:-1]) + words[-1]

    def _word(self, language: str, rng: random.Random) -> str:
        """Draw a word without a meaning: of letters, or of pieces of the vocabulary."""
        if language == "en" and rng.random() < 0.4:
            return invented_word(rng)
        return "".join(rng.choice(self._pieces[language]) for _ in range(rng.choice([1, 2, 2, 3])))
