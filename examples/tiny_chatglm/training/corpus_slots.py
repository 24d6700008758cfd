"""Things that visitors may tell about themselves and ask for later: the part of the corpus with open values."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import corpus_values as values
from augment import augment
from dialogue import Turn


def _from(choices: dict[str, list[str]]) -> Callable[[str, random.Random, bool], str]:
    def draw(language: str, rng: random.Random, held_out: bool) -> str:
        return rng.choice(choices[language])

    return draw


@dataclass(frozen=True, eq=False)
class Slot:
    """One thing to remember: how it is told, confirmed, asked for and answered, per language; {} is the value."""

    name: str
    draw: Callable[[str, random.Random, bool], str]
    told: dict[str, list[str]]
    confirmed: dict[str, str]
    asked: dict[str, list[str]]
    answered: dict[str, str]
    unknown: dict[str, str]

    def value(self, language: str, rng: random.Random, held_out: bool = False) -> str:
        return self.draw(language, rng, held_out)

    def tell(self, language: str, rng: random.Random, value: str | None = None) -> Turn:
        """Make the turn in which the value is told."""
        value = self.value(language, rng) if value is None else value
        form = rng.choice(self.told[language])
        query = (form.lower() if rng.random() < 0.2 else form).format(value)
        if rng.random() < 0.15:
            query = (
                rng.choice(
                    {"en": ["Hello, ", "Hi, ", "Hi! ", "Hey, "], "zh": ["你好,", "嗨,", "您好,", "你好!"]}[language]
                )
                + query
            )
        if rng.random() < 0.4:
            query += {"en": ".", "zh": "。"}[language]
        return self._turn(query, language, {key: text.format(value) for key, text in self.confirmed.items()}, "told")

    def ask(self, language: str, value: str | None, rng: random.Random) -> Turn:
        """Make the turn in which the value is asked for; ``value`` None: it was never told."""
        query = augment(rng.choice(self.asked[language]), language, rng)
        answers = self.unknown if value is None else {key: text.format(value) for key, text in self.answered.items()}
        return self._turn(query, language, answers, "asked")

    def _turn(self, query: str, language: str, answers: dict[str, str], kind: str) -> Turn:
        return Turn(query, language, answers, f"{self.name}.{kind}")


SLOTS = [
    Slot(
        "name",
        values.name,
        {
            "en": [
                "My name is {}",
                "I am {}",
                "I'm {}",
                "Call me {}",
                "You can call me {}",
                "my name is {}",
                "I am called {}",
                "Please call me {}",
                "The name is {}",
                "My name's {}",
                "Remember my name: {}",
            ],
            "zh": [
                "我叫{}",
                "我的名字是{}",
                "我是{}",
                "叫我{}",
                "你可以叫我{}",
                "请叫我{}",
                "我的名字叫{}",
                "记住我的名字:{}",
                "我叫 {}",
            ],
        },
        {"en": "Nice to meet you, {}!", "zh": "很高兴认识你,{}!"},
        {
            "en": [
                "What is my name",
                "What's my name",
                "Who am I",
                "Do you remember my name",
                "Do you know my name",
                "Tell me my name",
                "Say my name",
                "What am I called",
                "Do you still know my name",
                "Can you tell me my name",
                "And what is my name",
            ],
            "zh": [
                "我叫什么",
                "我叫什么名字",
                "我是谁",
                "我的名字是什么",
                "你还记得我的名字吗",
                "你知道我叫什么吗",
                "说出我的名字",
                "还记得我叫什么吗",
                "你记得我是谁吗",
                "那我叫什么",
                "我叫啥",
                "你知道我的名字吗",
            ],
        },
        {"en": "Your name is {}.", "zh": "你叫{}。"},
        {"en": "You have not told me your name yet.", "zh": "你还没有告诉我你的名字。"},
    ),
    Slot(
        "number",
        values.number,
        {
            "en": [
                "Remember the number {}",
                "My number is {}",
                "My lucky number is {}",
                "Please remember {}",
                "Keep the number {} in mind",
                "The number is {}",
                "Remember this number: {}",
                "Do not forget the number {}",
                "My favorite number is {}",
            ],
            "zh": [
                "记住数字{}",
                "我的数字是{}",
                "我的幸运数字是{}",
                "请记住{}",
                "记住这个数字:{}",
                "请记住数字 {}",
                "别忘了数字{}",
                "记住{}这个数字",
                "我最喜欢的数字是{}",
            ],
        },
        {"en": "Okay, I will remember the number {}.", "zh": "好的,我记住了数字{}。"},
        {
            "en": [
                "What is the number",
                "What was the number",
                "Which number did I tell you",
                "What number did I say",
                "What is my number",
                "Do you remember the number",
                "Tell me the number",
                "What number should you remember",
                "Which number was it",
                "Do you still know the number",
                "What is my lucky number",
            ],
            "zh": [
                "数字是多少",
                "刚才的数字是多少",
                "我说的数字是什么",
                "我的数字是多少",
                "你还记得那个数字吗",
                "告诉我那个数字",
                "那个数字是多少",
                "我让你记住的数字是什么",
                "是哪个数字",
                "我的幸运数字是多少",
                "还记得数字吗",
            ],
        },
        {"en": "The number is {}.", "zh": "数字是{}。"},
        {"en": "You have not told me a number yet.", "zh": "你还没有告诉我数字。"},
    ),
    Slot(
        "word",
        values.word,
        {
            "en": [
                "Remember the word {}",
                "The secret word is {}",
                "Please remember the word {}",
                "My password is {}",
                "The word is {}",
                "Keep the word {} in mind",
                "Remember this word: {}",
            ],
            "zh": [
                "记住这个词:{}",
                "记住{}这个词",
                "暗号是{}",
                "请记住这个词:{}",
                "这个词是{}",
                "密码是{}",
                "别忘了这个词:{}",
            ],
        },
        {"en": "Okay, I will remember: {}", "zh": "好的,我记住了:{}"},
        {
            "en": [
                "What is the word",
                "What was the word",
                "Which word did I tell you",
                "What is the secret word",
                "Do you remember the word",
                "Tell me the word",
                "What is my password",
                "Which word was it",
            ],
            "zh": [
                "那个词是什么",
                "我说的词是什么",
                "暗号是什么",
                "你还记得那个词吗",
                "刚才的词是什么",
                "告诉我那个词",
                "我的密码是什么",
                "是哪个词",
            ],
        },
        {"en": "The word is: {}", "zh": "那个词是:{}"},
        {"en": "You have not told me a word yet.", "zh": "你还没有告诉我是什么词。"},
    ),
    Slot(
        "city",
        _from(values.CITIES),
        {
            "en": [
                "I live in {}",
                "I am from {}",
                "I'm from {}",
                "I come from {}",
                "My city is {}",
                "My home is in {}",
                "I live in {} now",
            ],
            "zh": [
                "我住在{}",
                "我来自{}",
                "我是{}人",
                "我家在{}",
                "我在{}",
                "我现在住在{}",
                "我的家乡是{}",
                "我在{}生活",
            ],
        },
        {"en": "{} is a nice place, I am sure.", "zh": "{}一定是个好地方。"},
        {
            "en": [
                "Where do I live",
                "Where am I from",
                "Do you remember where I live",
                "Which city do I live in",
                "What is my city",
                "Tell me where I live",
                "Do you know where I am from",
                "Where is my home",
                "Where do I come from",
            ],
            "zh": [
                "我住在哪里",
                "我来自哪里",
                "我住哪",
                "你记得我住在哪里吗",
                "我是哪里人",
                "我家在哪里",
                "我在哪个城市",
                "你知道我住在哪里吗",
                "还记得我来自哪里吗",
                "我在哪里",
            ],
        },
        {"en": "You told me: {}.", "zh": "你告诉过我:{}。"},
        {"en": "You have not told me where you live.", "zh": "你还没有告诉我你住在哪里。"},
    ),
    Slot(
        "colour",
        _from(values.COLOURS),
        {
            "en": [
                "My favorite color is {}",
                "I like the color {}",
                "My favourite colour is {}",
                "I love {} things",
                "The color I like is {}",
            ],
            "zh": ["我最喜欢的颜色是{}", "我喜欢{}", "我最喜欢{}", "我爱{}", "我喜欢的颜色是{}"],
        },
        {"en": "What a beautiful color, {}!", "zh": "{}很漂亮!"},
        {
            "en": [
                "What is my favorite color",
                "Which color do I like",
                "What's my favorite color",
                "Do you remember my favorite color",
                "What is my favourite colour",
                "What color do I like",
                "Tell me my favorite color",
            ],
            "zh": [
                "我最喜欢什么颜色",
                "我喜欢什么颜色",
                "我最喜欢的颜色是什么",
                "你记得我喜欢什么颜色吗",
                "我喜欢的颜色是什么",
                "我喜欢哪种颜色",
            ],
        },
        {"en": "Your favorite color is {}.", "zh": "你最喜欢{}。"},
        {"en": "You have not told me your favorite color.", "zh": "你还没有告诉我你喜欢的颜色。"},
    ),
    Slot(
        "food",
        _from(values.FOODS),
        {
            "en": [
                "I like to eat {}",
                "My favorite food is {}",
                "I love eating {}",
                "I eat {} every day",
                "The food I like is {}",
            ],
            "zh": ["我喜欢吃{}", "我最喜欢的食物是{}", "我爱吃{}", "我每天吃{}", "我最爱吃{}", "我喜欢的食物是{}"],
        },
        {"en": "I hear that {} can be delicious.", "zh": "听说{}很好吃。"},
        {
            "en": [
                "What is my favorite food",
                "What do I like to eat",
                "Do you remember my favorite food",
                "Which food do I like",
                "What's my favorite food",
                "Tell me my favorite food",
                "What do I eat",
            ],
            "zh": [
                "我喜欢吃什么",
                "我最喜欢的食物是什么",
                "你记得我喜欢吃什么吗",
                "我爱吃什么",
                "我喜欢什么食物",
                "我最爱吃什么",
            ],
        },
        {"en": "You like {}.", "zh": "你喜欢吃{}。"},
        {"en": "You have not told me what you like to eat.", "zh": "你还没有告诉我你喜欢吃什么。"},
    ),
    Slot(
        "pet",
        _from(values.PETS),
        {
            "en": [
                "I have a {}",
                "My pet is a {}",
                "I have got a {}",
                "I own a {}",
                "At home I have a {}",
                "I've got a {}",
            ],
            "zh": ["我养了一只{}", "我的宠物是{}", "我有一只{}", "我家有一只{}", "我养{}", "我家养了{}"],
        },
        {"en": "How nice! Say hello to your {} from me.", "zh": "真好!替我向你的{}问好。"},
        {
            "en": [
                "Which pet do I have",
                "What is my pet",
                "Do you remember my pet",
                "What pet do I have",
                "What animal do I have",
                "Which animal do I have at home",
            ],
            "zh": [
                "我养了什么",
                "我的宠物是什么",
                "你记得我的宠物吗",
                "我养了什么动物",
                "我有什么宠物",
                "我家有什么动物",
            ],
        },
        {"en": "You have a {}.", "zh": "你有一只{}。"},
        {"en": "You have not told me about a pet.", "zh": "你还没有说过你的宠物。"},
    ),
]
