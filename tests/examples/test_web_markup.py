"""``examples/_markup.py`` turns only Markdown into HTML, whatever a user or a model writes."""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("markdown_it", reason='markdown-it-py is not installed: pip install -e ".[web]"')

from hypothesis import given
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))

import _markup  # noqa: E402
from _markup import to_html  # noqa: E402

TAGS = set(
    "div p h1 h2 h3 h4 h5 h6 pre code a em strong s br hr ul ol li blockquote table thead tbody tr th td".split()
)
ATTRIBUTES = {"href", "title", "class", "start", "style"}
STYLES = {"white-space: pre-wrap", "text-align:left", "text-align:center", "text-align:right"}
HOSTILE = [
    "`a\n# <div style='position:fixed;inset:0'>x</div>`",
    "<form action=https://evil.example><input name=password></form>",
    "![i](https://evil.example/x.png) ![i][r]\n\n[r]: https://evil.example/y.png",
    "[a](javascript:alert(1)) [b](JaVaScRiPt:x) [c](data:text/html,x) [d](vbscript:x) [e](file:///etc/passwd)",
    "[a](\x01javascript:x) [b](java\nscript:x) <javascript:x> [c](//evil.example) [d](&#106;avascript:x)",
    "[a](https://x 'y\" onmouseover=\"alert(1)')",
    '```x" onload="alert(1)\n</code></pre><script>alert(1)</script>\n```',
    "$<img src=x onerror=alert(1)>$ $$</div><script>x</script>$$ \\(<b>\\) \\[<i>\\]",
    "&lt;script&gt; &#60;script&#62; &amp;lt;",
    "a\n\n</div>\n\n<style>*{display:none}</style>\r\r<b>",
    "<!-- x --> <![CDATA[ <b> ]]> <?php x ?>",
    "\0<\0script>\ud800<b>",
]


class Tags(HTMLParser):
    """A parser that collects every tag with its attributes, and the text."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.tags, self.text = [], ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data}")

    handle_decl = handle_pi = unknown_decl = handle_comment


def check(text: str) -> Tags:
    html = to_html(text)
    assert "\n" not in html and "\r" not in html and html.startswith("<div")
    html.encode("utf-8")
    found = Tags(html)
    for tag, attributes in found.tags:
        assert tag in TAGS and set(attributes) <= ATTRIBUTES, (tag, attributes)
        assert re.match("(https?://|mailto:)", attributes.get("href", "http://"), re.IGNORECASE), attributes
        assert attributes.get("style", "text-align:left") in STYLES
    return found


@pytest.mark.parametrize("text", HOSTILE)
def test_no_html_of_the_text_is_left(text):
    check(text)
    check(f"```\n{text}")
    check(f"> {text}\n- {text}")
    check(text + " " * _markup.LONGEST_MARKDOWN)


@given(st.lists(st.one_of(st.sampled_from(HOSTILE), st.text(alphabet="`$\\[]()<>!*_~#&|:-\n \"'=ax", max_size=30))))
def test_no_html_of_any_text_is_left(pieces):
    check("".join(pieces))


def test_tags_and_entities_are_shown_as_they_were_typed():
    for text in ("<script>alert(1)</script>", "&amp; &lt; &#60;", "a < b && c > d", "<https x>"):
        assert check(text).text == text


def test_images_are_links():
    found = check("![a cat](https://example.org/cat.png)")
    assert ("a", {"href": "https://example.org/cat.png"}) in found.tags and found.text == "!a cat"
    assert check("![x](data:image/png;base64,AAAA)").tags == [("div", {}), ("p", {})]


@pytest.mark.parametrize("address", ["https://example.org/a?b=c&d", "HTTP://example.org", "mailto:a@example.org"])
def test_safe_links_are_links(address):
    assert any(tag == "a" for tag, _ in check(f"[x]({address})").tags)


@pytest.mark.parametrize(
    "address", ["javascript:x", "data:text/html,x", "//example.org", "/local", "#top", "ftp://x", "blob:x", "x.html"]
)
def test_other_links_stay_text(address):
    assert all(tag != "a" for tag, _ in check(f"[x]({address}) <{address}>").tags)


def test_markdown_is_rendered():
    text = "# t\n\n**b** *e* ~~s~~ `c`\n\n- l\n\n1. o\n\n> q\n\n| a |\n|---|\n| 1 |\n\n---\n\none\ntwo"
    tags = {tag for tag, _ in check(text).tags}
    assert tags >= {"h1", "strong", "em", "s", "code", "ul", "ol", "blockquote", "table", "hr", "br"}


def test_code_keeps_its_characters():
    code = 'if a < b:\n\n\tprint("<i>&amp;</i>")  # $x$ \\(y\\)\n'
    found = check(f"```python\n{code}```")
    assert ("code", {"class": "language-python"}) in found.tags and found.text == code
    assert to_html(f"```\n{code}```").count("&#10;") == code.count("\n")


@pytest.mark.parametrize(
    "formula", ["$a_1*b*c_2$", "$$\\frac{a}{b} \\\\ x_1 * y * z$$", "\\(a*b*c\\)", "\\[a\\\\\nb_1_\\]"]
)
def test_formulas_are_left_to_the_browser(formula):
    found = check(f"so {formula} is")
    assert found.text == f"so {formula} is"
    assert {tag for tag, _ in found.tags} == {"div", "p"}


def test_the_parser_never_sees_a_long_text(monkeypatch):
    """The parser's time grows with the square of some texts' length; that of escaping depends on the length alone."""

    def parser():
        raise AssertionError("a long text was parsed")

    monkeypatch.setattr(_markup, "_parser", parser)
    long = "[" * (_markup.LONGEST_MARKDOWN + 1)
    assert Tags(to_html(long)).text == long
    with pytest.raises(AssertionError, match="parsed"):
        to_html(long[1:])
