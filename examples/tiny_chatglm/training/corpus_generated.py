"""Turns that are made by a rule: sums, capitals, and phrases to say word for word."""

import random

from augment import augment
from corpus_values import CAPITALS, ECHOES, invented_word
from dialogue import Turn

# Characters that echoes are made of.
COPIED = (
    "一二三四五六七八九十大小多少上下左右前后天地人水火山石田土日月星风雨雪花草树木鸟鱼马牛羊红"
    "黄蓝白黑早晚春夏秋冬东西南北你我他好快高长新来去看听说读写走跑"
)


def addition(language: str, rng: random.Random) -> Turn:
    """Draw a sum of two numbers up to ten."""
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    sign = rng.choice(["+", " + ", "plus"]) if language == "en" else rng.choice(["+", " + ", "加"])
    sign = f" {sign} " if sign == "plus" else sign
    form = {
        "en": ["What is {}", "{}", "How much is {}", "Calculate {}", "{} = ?", "What's {}", "Please add {}", "{} ="],
        "zh": ["{}等于几", "{}", "{}是多少", "计算{}", "{}=?", "请问{}等于多少", "{}得多少", "{}="],
    }[language]
    query = rng.choice(form).format(f"{a}{sign}{b}")
    answer = f"{a} + {b} = {a + b}"
    return Turn(augment(query, language, rng, literal=True), language, {"en": answer, "zh": answer}, "addition")


def capital(language: str, rng: random.Random) -> Turn:
    """Draw the capital of one of a few countries."""
    country = rng.choice(CAPITALS)
    form = {
        "en": [
            "What is the capital of {}",
            "What's the capital of {}",
            "Which city is the capital of {}",
            "Capital of {}",
            "Tell me the capital of {}",
            "Do you know the capital of {}",
        ],
        "zh": [
            "{}的首都是哪里",
            "{}的首都是什么",
            "{}首都在哪",
            "{}的首都",
            "请问{}的首都是哪个城市",
            "哪里是{}的首都",
        ],
    }[language]
    query = rng.choice(form).format(country[language][0])
    return Turn(augment(query, language, rng), language, capital_of(country), "capital")


def capital_of(country: dict[str, tuple[str, str]]) -> dict[str, str]:
    """Return the sentence that names a country's capital, per language."""
    return {
        "en": f"The capital of {country['en'][0]} is {country['en'][1]}.",
        "zh": f"{country['zh'][0]}的首都是{country['zh'][1]}。",
    }


def echo(language: str, rng: random.Random) -> Turn:
    """Draw something to be said word for word, which teaches copying."""
    if language == "en":
        phrase = " ".join(invented_word(rng) for _ in range(rng.choice([1, 2, 3])))
    else:
        phrase = "".join(rng.choice(COPIED) for _ in range(rng.randint(2, 6)))
    return Turn(rng.choice(ECHOES[language]).format(phrase), language, {"en": phrase, "zh": phrase}, "echo")
