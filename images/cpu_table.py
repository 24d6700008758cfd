"""Write the table of CPUs: our records, and what was measured of others on another machine."""

import json
from pathlib import Path

from records import DATA, Record, has, read, spelled

OURS = "benchmark_cpu.json"
ELSEWHERE = "elsewhere_cpu.json"
# What the table says, by language.
_WORDS = json.loads((Path(__file__).parent / "words.json").read_text("utf-8"))


def cpu(language: str, data: Path = DATA) -> str:
    """Return the tables for docs/speed.md; nothing before anything was measured."""
    if not has(OURS, data):
        return ""
    words, elsewhere = _WORDS[language], read(ELSEWHERE, data)
    records = read(OURS, data)
    lines = [words["cpu_header"], "|---|---|---|---|---|---|---|"]
    for record in records:
        if record["new_tokens"] > 1:
            prompt = next((other for other in records if _is_prompt_of(other, record)), None)
            seconds = f"{prompt['ms_per_step'] / 1e3:.1f}" if prompt else "-"
            values = (f"{record['ms_per_step']:.0f}", f"{record['gb_per_s']:.1f}", f"{record['share']:.2f}", seconds)
            lines.append(
                f"| {_weights(record, language)} | {record['threads']} | {record['layers']} | {' | '.join(values)} |"
            )
    first = records[0]
    conditions = words["cpu_conditions"].format(
        cpu=first["cpu"],
        torch=first["torch"],
        date=first["date"],
        low=min(record["read_ceiling_gb_per_s"] for record in records),
        high=max(record["read_ceiling_gb_per_s"] for record in records),
        command=first["command"],
    )
    others = [words["cpu_others_header"], "|---|---|---|---|---|"]
    for record in elsewhere["records"]:
        best, median = (_span(record.get(name)) for name in ("ms_best", "ms_median"))
        others.append(f"| {record['system']} | {record['weights']} | {best} | {median} | {record['prompt_128_s']} |")
    name = elsewhere["cpu" if language == "en" else "cpu_zh"]
    low, high = elsewhere["read_ceiling_gb_per_s"]
    where = words["cpu_others"].format(cpu=name, low=low, high=high, date=elsewhere["date"])
    return "\n".join([*lines, "", conditions, "", *others, "", where])


def _is_prompt_of(other: Record, record: Record) -> bool:
    """Tell whether a record has the first token, after 128 others, of the same weights."""
    same = all(other[key] == record[key] for key in ("weights", "dtype", "group_size", "head", "threads"))
    return same and other["new_tokens"] == 1 and other["prompt_tokens"] == 128


def _weights(record: Record, language: str) -> str:
    label = record["weights"] if record["weights"].startswith("int") else "-"
    label += f", groups of {record['group_size']}" if record["group_size"] else ""
    label += ", int8 head" if record["head"] == "int8" else ""
    return f"{spelled(label, language)}, {record['dtype']}".removeprefix("-, ")


def _span(times: list[float] | None) -> str:
    if not times:
        return "-"
    low, high = (f"{time:,}" for time in times)
    return low if low == high else f"{low}–{high}"
