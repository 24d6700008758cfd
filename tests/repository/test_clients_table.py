"""Each row of docs/clients.md names a release and its proof: an existing test, or a dated trial by hand."""

import datetime
import re
from pathlib import Path

from test_fault_table import is_run

ROOT = Path(__file__).resolve().parents[2]
BY_HAND = re.compile(r"by hand on (\d{4}-\d\d-\d\d)")
NAMED = "PEFT trl bitsandbytes torchao quanto accelerate lm-eval LangChain LlamaIndex outlines xgrammar".split()


def rows() -> list[list[str]]:
    lines = [line for line in (ROOT / "docs" / "clients.md").read_text("utf-8").splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def faults(row: list[str]) -> list[str]:
    """Describe what is wrong with a row."""
    if len(row) != 5:
        return [f"{len(row)} cells instead of 5"]
    client, release, works, _, shown = row
    found = [name for name, cell in (("client", client), ("works", works)) if not cell]
    if not re.fullmatch(r"\d+(\.\d+)+", release):
        found.append(f"release {release!r}")
    references = re.findall(r"`(tests/[^`]+)`", shown)
    found += [f"no such test: {reference}" for reference in references if not is_run(reference)]
    dates = BY_HAND.findall(" ".join(row))
    if not references and not BY_HAND.search(shown):
        found.append("neither a test nor a date")
    for date in dates:
        try:
            datetime.date.fromisoformat(date)
        except ValueError:
            found.append(f"no date: {date}")
    return found


def test_every_row_is_shown_by_a_test_or_a_date():
    assert len(rows()) >= 13
    for row in rows():
        assert not faults(row), row
    clients = " ".join(row[0] for row in rows())
    assert not [name for name in NAMED if name not in clients]


def test_a_fault_is_noticed():
    good = ["x", "1.2", "all", "", "`tests/examples/test_clients.py::test_langchain`"]
    assert not faults(good)
    assert not faults([*good[:4], "by hand on 2026-11-29"])
    for place, cell in (
        (0, ""),
        (1, "new"),
        (2, ""),
        (4, "by hand"),
        (4, "`tests/examples/test_clients.py::test_nothing`"),
    ):
        assert faults([*good[:place], cell, *good[place + 1 :]]), cell
    assert faults([*good[:4], "by hand on 2026-13-40"]) and faults(good[:4])
