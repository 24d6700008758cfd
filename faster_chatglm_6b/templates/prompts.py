"""Put the text around a query and clean up an answer, as ChatGLM-6B was trained and published."""

import re

# The tokenizer's NFKC made these marks half-width: beside a Chinese character they become full-width again.
_MARKS = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}
_AFTER_CHINESE = [(re.compile(rf"(?<=[\u4e00-\u9fff]){re.escape(half)}"), full) for half, full in _MARKS.items()]
_BEFORE_CHINESE = [(re.compile(rf"{re.escape(half)}(?=[\u4e00-\u9fff])"), full) for half, full in _MARKS.items()]
_ANY_MARK = re.compile(f"[{''.join(_MARKS)}]")
_TRAINING_TIME, _YEAR = "[[训练时间]]", "2023年"


def build_prompt(query: str, history: list[tuple[str, str]]) -> str:
    """Build the prompt of a chat turn.

    Args:
        query: the user's text of this turn.
        history: earlier (query, response) rounds, oldest first; without any the prompt is the bare query.
    """
    if not history:
        return query
    rounds = [f"[Round {i}]\n问：{question}\n答：{answer}\n" for i, (question, answer) in enumerate(history)]
    return "".join(rounds) + f"[Round {len(history)}]\n问：{query}\n答："


def process_response(response: str) -> str:
    """Clean up decoded text: strip it, fill in the training date, make marks beside Chinese characters full-width."""
    response = response.strip().replace(_TRAINING_TIME, _YEAR)
    if not _ANY_MARK.search(response):
        return response
    for (after, full), (before, _) in zip(_AFTER_CHINESE, _BEFORE_CHINESE, strict=True):
        response = before.sub(full, after.sub(full, response))
    return response
