"""Turn Markdown into HTML without tags of the text's own and without images; links are safe ones only."""

import re
from functools import lru_cache
from html import escape

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline

# As in FORMULAS of _web.py, which KaTeX draws in the browser: Markdown must not touch what is between them.
_FORMULAS = (("$$", "$$"), ("\\[", "\\]"), ("\\(", "\\)"), ("$", "$"))
# Some inputs cost the parser the square of their length. Longer ones are shown without Markdown.
LONGEST_MARKDOWN = 8_192
_SCHEMES = re.compile(r"(https?://|mailto:)", re.IGNORECASE)


@lru_cache(maxsize=256)
def to_html(text: str) -> str:
    """Return the text as one line of HTML that the browser's own Markdown parser passes on unchanged.

    A block that begins with <div> lasts until a blank line, and there are no line breaks at all. Should that parser
    see it otherwise, no "<" of the text is left in it.
    """
    # Neither can be sent: a lone half of a surrogate pair as UTF-8, and "\0" as HTML.
    text = text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode("utf-8")
    if len(text) > LONGEST_MARKDOWN:
        html = f'<div style="white-space: pre-wrap">{escape(text)}</div>'
    else:
        html = f"<div>{_parser().render(text).strip()}</div>"
    return html.replace("\r\n", "&#10;").replace("\n", "&#10;").replace("\r", "&#10;")


def _formula(state: StateInline, silent: bool) -> bool:
    """Keep a formula as it was written."""
    for opening, closing in _FORMULAS:
        if not state.src.startswith(opening, state.pos):
            continue
        begin = state.pos + len(opening)
        end = state.src.find(closing, begin, state.posMax)
        if end <= begin or opening == "$" and "\n" in state.src[begin:end]:
            continue
        if not silent:
            state.push("text", "", 0).content = state.src[state.pos : end + len(closing)]
        state.pos = end + len(closing)
        return True
    return False


@lru_cache(maxsize=1)
def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "breaks": True, "maxNesting": 20}).enable(
        ["table", "strikethrough"]
    )
    # An entity stays as it was typed; an image becomes a link to it.
    parser.disable(["entity", "html_inline", "html_block", "image"])
    parser.inline.ruler.before("escape", "formula", _formula)
    parser.validateLink = lambda url: _SCHEMES.match(url.strip()) is not None
    return parser
