"""Write the tables of the server and of speculation."""

import json
import statistics
from pathlib import Path

from records import DATA, Record, has, read

SERVING = "serving_h200.json"
DRAFTS = "speculation_h200.json"
# What the tables say, by language.
_WORDS = json.loads((Path(__file__).parent / "words.json").read_text("utf-8"))


def serving(language: str, data: Path = DATA) -> str:
    """Return the tables for docs/serving.md; nothing before anything was measured."""
    if not has(SERVING, data):
        return ""
    words, records = _WORDS[language], read(SERVING, data)
    lines = [words["serving_offline"], "|---|---|---|---|"]
    offline = [record for record in records if record["kind"] == "offline"]
    for first in offline:
        if first["prompt_tokens"] == 20:
            longer = next(other for other in offline if _same(other, first, "rows") and other["prompt_tokens"] == 128)
            speeds = f"{first['tokens_per_s']:.0f} | {longer['tokens_per_s']:.0f}"
            lines.append(f"| {first['weights']} | {first['rows']} | {speeds} |")
    lines += ["", words["serving_http"], "|---|---|---|---|---|"]
    over_http = [record for record in records if record["kind"] == "http"]
    for record in over_http:
        cells = [record["weights"], record["clients"], f"{record['tokens_per_s']:.0f}"]
        cells += [
            f"{record[f'{name}_p50']:.1f}, {record[f'{name}_p99']:.1f}"
            for name in ("ms_first_token", "ms_between_tokens")
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    first = over_http[0]
    named = {name: first[name] for name in ("gpu", "torch", "date", "command")}
    note = words["serving_conditions"].format(new=first["new_tokens"], prompt=first["prompt_tokens"], **named)
    return "\n".join([*lines, "", note])


def drafts(language: str, data: Path = DATA) -> str:
    """Return the table of speculation for docs/speed.md; nothing before anything was measured."""
    if not has(DRAFTS, data):
        return ""
    words, records = _WORDS[language], read(DRAFTS, data)
    lines = [words["drafts_header"], "|---|---|---|---|---|---|---|"]
    for one in (record for record in records if record["kind"] == "cost"):
        forced = {
            (other["k"], other["accepted"]): other
            for other in records
            if other["kind"] == "forced" and _same(other, one, "batch")
        }
        unforced = [other for other in records if other["kind"] == "unforced" and _same(other, one, "batch")]
        cells = [one["weights"], *(f"{forced[k, 0]['cost']:.2f}" for k in (3, 7))]
        cells += [f"{forced[7, n]['tokens_per_s']:.0f} ({forced[7, n]['gain']:.2f} x)" for n in (1, 3, 7)]
        slowest = max(other["times_as_long"] for other in unforced)
        lines.append(f"| {' | '.join([*cells, f'{slowest:.3f} x'])} |")
    first = records[0]
    note = words["drafts_conditions"].format(gpu=first["gpu"], torch=first["torch"], date=first["date"])
    return "\n".join([*lines, "", note, *_copies(words, records)])


def _copies(words: dict[str, str], records: list[Record]) -> list[str]:
    """Return what steps bring where answers repeat a passage, after an empty line; nothing if it was not measured."""
    found: dict[tuple[str, int | str], list[Record]] = {}
    for record in records:
        if record["kind"] == "copies":
            found.setdefault((record["task"], record["k"]), []).append(record)
    if not found:
        return []
    questions = {record["query"]: record["exact"] for ones in found.values() for record in ones}
    tasks = []
    for task in dict.fromkeys(task for task, _ in found):
        three, seven, auto = (
            f"{statistics.mean(one['tokens_per_turn'] for one in found[task, k]):.1f}" for k in (3, 7, "auto")
        )
        tasks.append(words["drafts_task"].format(task=task, three=three, seven=seven, auto=auto))
    joined = "; ".join(tasks)
    return ["", words["drafts_copies"].format(count=len(questions), exact=sum(questions.values()), tasks=joined)]


def _same(one: Record, other: Record, name: str) -> bool:
    return one["weights"] == other["weights"] and one[name] == other[name]
