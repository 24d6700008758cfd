"""Markdown in which HTML is text: ``<script>`` is shown, not run, and code keeps its characters."""

import re

# Markdown shows these literally. A fence that is still open, as while it streams in, reaches to the end.
_FENCE = r"^ {0,3}(?P<fence>`{3,}|~{3,})[^`\n]*$(?:.*?^ {0,3}(?P=fence)[`~]*[ \t]*$|.*\Z)"
_SPAN = r"(?<![`\\])(?P<ticks>`+)(?!`)(?:(?!\n[ \t]*\n).)+?(?<!`)(?P=ticks)(?!`)"
_CODE = re.compile(f"{_FENCE}|{_SPAN}", re.MULTILINE | re.DOTALL)
_ENTITIES = {ord("&"): "&amp;", ord("<"): "&lt;"}


def html_as_text(markdown: str) -> str:
    """Markdown that a renderer shows with every tag and entity of ``markdown`` as it was written.

    What it misjudges is still sanitised by Gradio's side in the browser: a tag may then vanish, but it never runs.
    Code that is marked by indentation alone shows "&lt;" for "<".
    """
    pieces, end = [], 0
    for code in _CODE.finditer(markdown):
        pieces += [markdown[end : code.start()].translate(_ENTITIES), code.group()]
        end = code.end()
    return "".join([*pieces, markdown[end:].translate(_ENTITIES)])
