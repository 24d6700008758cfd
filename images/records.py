"""Read what the benchmark measured and wrote to images/data, for the pictures and the README's tables."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"
SUITE = "benchmark_h200.json"
TABLE = "benchmark_table_h200.json"
ELSEWHERE = "elsewhere_h100.json"

Record = dict[str, Any]


def read(name: str, data: Path = DATA) -> Any:
    """Read a file of images/data.

    Raises:
        SystemExit: it is not there; the message says which command makes it.
    """
    path = data / name
    if not path.is_file():
        option = "--table" if name == TABLE else "--suite"
        path = Path(os.path.relpath(path))
        raise SystemExit(f"{path} is not there; make it on a GPU: python examples/benchmark.py {option} --json {path}")
    return json.loads(path.read_text("utf-8"))


def has(name: str, data: Path = DATA) -> bool:
    """Tell if a file of images/data is there: the suite and the table are measured one by one."""
    return (data / name).is_file()


def digest(names: tuple[str, ...], data: Path = DATA) -> str:
    """Return the SHA-256 of those files of images/data that are there; each picture carries it, to show its age."""
    found = [name for name in names if has(name, data)]
    content = [json.dumps([name, read(name, data)], sort_keys=True, ensure_ascii=False) for name in found]
    return hashlib.sha256("\n".join(content).encode()).hexdigest()


def precision(record: Record) -> str:
    """Name the weights: "fp16", "int4", "int4, int8 head" or "int4, groups of 128"."""
    label = record["weights"]
    if record.get("group_size"):
        label += f", groups of {record['group_size']}"
    if record.get("head", "fp16") != "fp16":
        label += f", {record['head']} head"
    return label


def spelled(name: str, language: str) -> str:
    """Write a name that ``precision`` gave in a language."""
    if language == "zh":
        name = re.sub(r"groups of (\d+)", r"每组 \1 列", name).replace("head", "输出层").replace(", ", "，")
    return name


def one_per_run(records: list[Record]) -> dict[tuple, Record]:
    """Keep one record of each (backend, precision, mode, batch, prompt_tokens, new_tokens), in the file's order.

    The suite measures its first row twice: the first counts. Of two processes, which have different read ceilings, the
    later one counts.
    """
    runs: dict[tuple, Record] = {}
    for record in records:
        key = (
            record["backend"],
            precision(record),
            *(record[k] for k in "mode batch prompt_tokens new_tokens".split()),
        )
        if key not in runs or runs[key]["read_ceiling_gb_per_s"] != record["read_ceiling_gb_per_s"]:
            runs[key] = record
    return runs


def of_the_suite(batch: int, data: Path = DATA) -> dict[str, Record]:
    """Return the suite's records of ours, greedy, short prompt, by precision."""
    wanted = {"backend": "ours", "mode": "greedy", "batch": batch, "prompt_tokens": 20, "new_tokens": 128}
    runs = one_per_run(read(SUITE, data)).values()
    return {precision(run): run for run in runs if all(run[key] == value for key, value in wanted.items())}


def by_precision(data: Path = DATA) -> dict[str, Record]:
    """Return ours, greedy, batch 1, short prompt, by precision: the suite's record, else the table's row."""
    found = of_the_suite(1, data)
    for row in table_rows("ours", data):
        found.setdefault(precision(row), row)
    return found


def table_rows(backend: str, data: Path = DATA) -> list[Record]:
    """Return the table's rows of a backend as records, with the medians over the runs; none without a table."""
    if not has(TABLE, data):
        return []
    rows = [row for row in read(TABLE, data)["rows"] if row["backend"] == backend]
    return [row["records"][0] | {key: value for key, value in row.items() if key != "records"} for row in rows]


def floor(record: Record, ceiling: float | None = None) -> float:
    """Return the ms in which the bytes of a step can be read at the read ceiling."""
    return record["bytes_per_step"] / (ceiling or record["read_ceiling_gb_per_s"]) / 1e6


def first_tokens(data: Path = DATA) -> dict[str, dict[tuple[int, int], Record]]:
    """Return ours, greedy, for one new token, by precision and (batch, prompt tokens), in the order of the prompts.

    Records of releases that had no floor for prompts are left out: their share is that of the read ceiling.
    """
    found: dict[str, dict[tuple[int, int], Record]] = {}
    for run in one_per_run(read(SUITE, data)).values():
        if run["backend"] == "ours" and run["mode"] == "greedy" and has_prompt_floor(run):
            found.setdefault(precision(run), {})[run["batch"], run["prompt_tokens"]] = run
    return {name: dict(sorted(runs.items())) for name, runs in found.items()}


def has_prompt_floor(record: Record) -> bool:
    """Tell if a record is of a first token, with the floor of reading and computing."""
    return record["new_tokens"] == 1 and record.get("floor_ms") is not None


def token_times(data: Path = DATA) -> tuple[dict[str, list[float]], str]:
    """Return the seconds from ``generate``'s call to each token, plain Torch's first, then ours; and the GPU's name."""
    table = read(TABLE, data)
    return {name: table["token_times"][name] for name in ("torch", "ours")}, table["gpu"]
