"""Reword questions lightly: the small differences between what two people type."""

import random
import re
import unicodedata

PREFIXES = {
    "en": [
        "Hi, ",
        "Hello, ",
        "Hey, ",
        "So, ",
        "Well, ",
        "Okay, ",
        "Please, ",
        "Hello! ",
        "Sorry, ",
        "Thanks. ",
        "And ",
        "Now, ",
        "Then ",
        "By the way, ",
        "One question: ",
        "I wonder, ",
    ],
    "zh": [
        "你好,",
        "您好,",
        "请问",
        "请问,",
        "那",
        "那么,",
        "嗯,",
        "请",
        "好的,",
        "谢谢,",
        "请问一下,",
        "麻烦问一下,",
        "我想知道",
        "请你",
        "对了,",
        "我想问一下,",
        "能不能",
        "能告诉我",
        "请告诉我",
        "你能告诉我",
        "那请问",
        "可不可以",
    ],
}
# Only before something that is a question already.
ASKING = {
    "en": [
        "Can you tell me ",
        "Could you tell me ",
        "I want to know ",
        "I would like to know ",
        "Please tell me ",
        "Tell me, ",
        "Do you know ",
        "May I ask ",
        "Can you explain ",
        "Please explain ",
    ],
    "zh": ["你知道", "能不能告诉我", "我想了解", "可以告诉我", "你说说", "告诉我", "请你说说"],
}
SUFFIXES = {
    "en": [", please", " please", ", thanks", " now", " then", " today", ", okay", " for me", " here"],
    "zh": ["呢", "呀", "啊", ",谢谢", "呢,谢谢", "吧", "一下", "哦"],
}
MARKS = {"en": ["?", ".", "!", " ?", "??", "...", "!!"], "zh": ["？", "。", "！", "?", "!", "~", "..."]}
# What may stand for what. The first that occurs and is drawn is replaced, once.
SYNONYMS = {
    "en": [
        ("how do i", ["how can i", "how would i", "how could i", "how should i", "how to", "in what way do i"]),
        ("how can i", ["how do i", "how would i", "how could i", "is there a way to"]),
        ("can i", ["could i", "may i", "is it possible to", "am i able to"]),
        ("what is", ["what's", "what exactly is", "what would be", "what was"]),
        ("tell me about", ["tell me something about", "explain", "say something about", "talk about"]),
        ("show me", ["give me", "please show", "let me see"]),
        ("give me", ["show me", "please give me", "i want", "i need"]),
        ("do i need", ["must i have", "is it necessary to have", "do i have to have", "will i need"]),
        ("does it", ["will it", "would it", "can it"]),
        ("i am", ["i'm", "i feel", "i am really", "i think i am"]),
        ("you are", ["you're", "you are really", "you are so", "i think you are"]),
        ("are you", ["are you really", "are you actually", "so are you"]),
        ("which", ["what", "which kind of"]),
        ("write", ["please write", "can you write", "compose", "create"]),
        ("list", ["name", "tell me", "please list", "enumerate"]),
        ("explain", ["please explain", "could you explain", "describe", "tell me what is"]),
        (" the ", [" this ", " "]),
        (" a ", [" some ", " one ", " "]),
    ],
    "zh": [
        ("怎么", ["如何", "怎样", "咋", "要怎么", "应该怎么"]),
        ("如何", ["怎么", "怎样", "该如何"]),
        ("什么", ["啥", "哪些", "什么样的"]),
        ("是什么", ["是啥", "到底是什么", "是什么东西", "究竟是什么", "是指什么"]),
        ("为什么", ["为何", "为啥", "怎么"]),
        ("可以", ["能", "能够", "能不能", "可不可以"]),
        ("能", ["可以", "能够", "能不能", "可不可以", "会"]),
        ("介绍一下", ["介绍下", "说明一下", "解释一下", "请你介绍一下", "简单介绍"]),
        ("什么是", ["什么叫", "啥是", "请问什么是", "请解释什么是"]),
        ("你", ["你到底", "您", "你现在", "你也"]),
        ("我", ["我现在", "我今天", "我真的", "我好像"]),
        ("一个", ["个", "一段", "一下"]),
        ("多少", ["几", "大概多少", "多少个"]),
        ("写", ["帮我写", "请写", "给我写"]),
        ("需要", ["要", "必须", "是不是需要"]),
        ("支持", ["能用", "是否支持", "可以用"]),
        ("这个", ["该", "你们这个", ""]),
        ("的", ["", "那个"]),
    ],
}
QUESTION = re.compile(
    r"^(what|who|how|why|where|when|which|is|are|can|could|do|does|will|may|should)\b|[吗呢几]$|什么|怎么|如何|多少|哪",
    re.IGNORECASE,
)
PROJECT_NAMES = ["faster-chatglm-6b", "Faster ChatGLM 6B", "faster_chatglm", "FasterChatGLM", "faster chatglm 6b"]
CHINESE = r"[\u4e00-\u9fff]"
BLANK_BESIDE_CHINESE = re.compile(rf"(?<={CHINESE}) (?=\w)|(?<=[A-Za-z0-9_)]) (?={CHINESE})")


def normalise(text: str, keep_case: bool = False) -> str:
    """Apply NFKC and single blanks; without ``keep_case`` also lower case and no closing marks."""
    text = " ".join(unicodedata.normalize("NFKC", text).split())
    return text if keep_case else text.lower().rstrip("?!.。~ ")


def _typo(text: str, rng: random.Random) -> str:
    """Drop, double or swap one character."""
    if len(text) < 6:
        return text
    at = rng.randrange(1, len(text) - 1)
    kind = rng.random()
    if kind < 0.4:
        return text[:at] + text[at + 1 :]
    if kind < 0.6:
        return text[:at] + text[at] + text[at:]
    return text[:at] + text[at + 1] + text[at] + text[at + 2 :]


def _synonym(text: str, language: str, rng: random.Random) -> str:
    """Say one part of the text in another way."""
    found = [(old, new) for old, new in SYNONYMS[language] if old in text.lower()]
    if not found:
        return text
    old, choices = rng.choice(found)
    at = text.lower().index(old)
    return (text[:at] + rng.choice(choices) + text[at + len(old) :]).strip() or text


def _lower_first(text: str) -> str:
    return text if re.match(r"I\b", text) else text[0].lower() + text[1:]


def _with_prefix(text: str, language: str, rng: random.Random, question: bool) -> str:
    prefix = rng.choice(ASKING[language] if question and rng.random() < 0.4 else PREFIXES[language])
    return prefix + (_lower_first(text) if language == "en" else text)


def augment(text: str, language: str, rng: random.Random, literal: bool = False) -> str:
    """Change punctuation, and unless ``literal`` also case, courtesy, words, blanks and, rarely, a character."""
    question = bool(QUESTION.search(text))
    if not literal:
        if "faster_chatglm_6b" in text and rng.random() < 0.12:
            text = text.replace("faster_chatglm_6b", rng.choice(PROJECT_NAMES))
        if language == "zh" and rng.random() < 0.5:
            text = BLANK_BESIDE_CHINESE.sub("", text)
        if rng.random() < 0.18:
            text = _synonym(text, language, rng)
        if rng.random() < 0.04:
            text = _typo(text, rng)
        if rng.random() < 0.14:
            text = _with_prefix(text, language, rng, question)
        if rng.random() < 0.05:
            text += rng.choice(SUFFIXES[language])
        case = rng.random()
        if case < 0.25:
            text = text.lower()
        elif case < 0.28 and language == "en":
            text = text.upper()
        elif case < 0.30 and language == "en":
            text = text[0].upper() + text[1:]
    if text[-1] not in "?？!！.。=" and rng.random() < (0.6 if question else 0.4):
        marks = MARKS[language]
        text += (
            marks[0 if language == "en" else rng.choice([0, 3])]
            if question and rng.random() < 0.9
            else rng.choice(marks)
        )
    if rng.random() < 0.02:
        text = rng.choice([" " + text, text + " ", text + "\n", text.replace(" ", "  ", 1)])
    return text
