"""Read the Markdown pages of the repository for the tests."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Each page that has a Chinese version, and that version.
TRANSLATED = {
    "README.md": "README.zh.md",
    **{f"docs/{path.name}": f"docs/zh/{path.name}" for path in sorted((ROOT / "docs" / "zh").glob("*.md"))},
}
# Only the English version has these sections; the Chinese one links to it.
ENGLISH_ONLY = {"docs/verified.md": ("The vocabulary of 150528 ids", "Long runs of the property tests")}
ENGLISH = [
    *TRANSLATED,
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")) if f"docs/{path.name}" not in TRANSLATED),
    "CONTRIBUTING.md",
    "CHANGELOG.md",
]
PAGES = [*ENGLISH, *TRANSLATED.values()]
# The log names files as they were called when it was written.
LOG = "docs/benchmark_log.md"


def read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def prose(text: str) -> str:
    """Drop the fenced blocks of a text."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def shared(name: str) -> str:
    """Drop the sections of a page that its Chinese version does not have."""
    text = read(name)
    for title in ENGLISH_ONLY.get(name, ()):
        text, dropped = re.subn(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", "", text, flags=re.DOTALL | re.MULTILINE)
        assert dropped == 1, f"{name} has no section {title!r}"
    return text


def blocks(name: str) -> list[tuple[str, str]]:
    """List (language, content) of the fenced blocks of a page."""
    text = read(name)
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(found) * 2 == len(re.findall(r"^```", text, re.MULTILINE)), "a block that is not closed"
    return found


def anchors(name: str) -> set[str]:
    """List the anchors of a page's headings as GitHub makes them: lower case, no punctuation, hyphens for blanks."""
    titles = re.findall(r"^#+ (.+)$", prose(read(name)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
