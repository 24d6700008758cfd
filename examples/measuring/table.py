"""The benchmark's table: both backends, quantised and not. ``python examples/benchmark.py --table --json FILE``

Every run is a process of its own that does nothing else, started with the command that its record names. The rows
take turns: each round runs every row once, ours and Torch alternating in who goes first, and every other round goes
backwards, so that neither a warm nor a cold machine favours one.

``python examples/measuring/table.py FILE`` prints the table of such a file. The file is one JSON object:

    command, model, gpu, clocks, torch, triton, transformers, date    strings; triton is null without one
    finished            true; false in a file whose runs were cut short
    batch, prompt_tokens, new_tokens, mode, iters, warmup_iters, runs
                        what every run did: ``runs`` runs of ``iters`` iterations of ``new_tokens`` tokens per row
    read_ceiling_gb_per_s    median over the runs; null on a CPU
    order               names of the rows in the order of the processes
    rows                a list, in the order of the table, of objects with
        name            "ours off", "ours int8", "ours int4", "ours int4 groups", "torch off", "torch int8" or
                        "torch int4"
        backend         "ours" or "torch"
        weights         "fp16" ("fp32" on a CPU), "int8" or "int4"; head the same; group_size a number or null
        quantization    what the table says: "Disable", "int8", ...
        durations_s     seconds of all iterations of a run, one number per run
        average_s       seconds per iteration, over all runs
        ms_per_step, tokens_per_s, gb_per_s, share    medians over the runs' records; share is null without a ceiling
        records         the records of the runs, with the keys of timing.KEYS
    token_times         {"ours": [...], "torch": [...]}: seconds after the call at which each of ``new_tokens`` tokens
                        arrived at a streamer, unquantised weights, greedy, in the first run of that row
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

HEADER = (
    "| Backend | Quantization | Duration(s) | average | tok/s | GB/s | share of read ceiling |\n"
    "|---|---|---|---|---|---|---|"
)
NAMES = {"ours": "faster_chatglm_6b", "torch": "Torch"}
GROUP_SIZE, HEAD_BITS = 128, 8
MEDIANS = ("ms_per_step", "tokens_per_s", "gb_per_s", "share")
OF_THE_MACHINE = ("gpu", "clocks", "torch", "triton", "date")


class Row(NamedTuple):
    """The backend and the weights of one row of the table."""

    backend: str
    bits: int
    group_size: int | None = None

    @property
    def name(self) -> str:
        weights = "off" if self.bits == 16 else f"int{self.bits}"
        return f"{self.backend} {weights}" + (" groups" if self.group_size else "")

    def options(self) -> list[str]:
        """Return the options of benchmark.py that measure this row."""
        options = ["--backend", self.backend, "--bits", str(self.bits)]
        if self.group_size:
            options += ["--group-size", str(self.group_size), "--head-bits", str(HEAD_BITS)]
        return options


def rows_of(group_size: int | None) -> list[Row]:
    """List the table's rows in its order; the last of ours, with groups, only if a group size is given."""
    plain = [Row(backend, bits) for backend in NAMES for bits in (16, 8, 4)]
    return plain[:3] + ([Row("ours", 4, group_size)] if group_size else []) + plain[3:]


def order_of(rows: list[Row], runs: int) -> Iterator[Row]:
    """Yield the row of each process: pairs alternate in who goes first, and every other round goes backwards."""
    once = []
    for index, bits in enumerate((16, 8, 4)):
        pair = [row for row in rows if row.bits == bits]
        once += pair if index % 2 == 0 else pair[::-1]
    for run in range(runs):
        yield from once if run % 2 == 0 else once[::-1]


def row_of(durations: list[float], records: list[dict[str, Any]], iters: int) -> dict[str, Any]:
    """Make a row of the table from its runs, with the keys of the file's layout except ``name``."""
    first = records[0]
    row = {key: first[key] for key in ("backend", "weights", "group_size", "head")}
    quantization = first["weights"] if first["weights"].startswith("int") else "Disable"
    extras = [f"groups of {first['group_size']}"] if first["group_size"] else []
    extras += [f"{first['head']} head"] if first["head"].startswith("int") else []
    row["quantization"] = quantization + (f" ({', '.join(extras)})" if extras else "")
    row["durations_s"] = [round(seconds, 3) for seconds in durations]
    row["average_s"] = round(sum(durations) / (iters * len(durations)), 4)
    for key in MEDIANS:
        values = [record[key] for record in records]
        row[key] = None if None in values else round(statistics.median(values), 4)
    return row | {"records": records}


def markdown_row(row: dict[str, Any]) -> str:
    """Write one line of the Markdown table."""
    durations = " ".join(f"{seconds:.2f}" for seconds in row["durations_s"])
    share = "-" if row["share"] is None else f"{row['share']:.2f}"
    cells = (
        NAMES[row["backend"]],
        row["quantization"],
        durations,
        f"{row['average_s']:.3f} s/it",
        f"{row['tokens_per_s']:.1f}",
        f"{row['gb_per_s']:.{0 if row['gb_per_s'] >= 10 else 1}f}",
        share,
    )
    return f"| {' | '.join(cells)} |"


def markdown(table: dict[str, Any]) -> str:
    """Write the Markdown table of a file's content, without a caption.

    Raises:
        ValueError: its runs were cut short.
    """
    if not table["finished"]:
        raise ValueError("The runs of this table were cut short; run `python examples/benchmark.py --table` again.")
    return "\n".join([HEADER, *map(markdown_row, table["rows"])])


def caption(table: dict[str, Any]) -> str:
    """Write what belongs under the table: where, with what, how much work, and how to repeat it."""
    ceiling = table["read_ceiling_gb_per_s"]
    sentences = (
        f"{table['gpu']}, clocks {table['clocks']}, torch {table['torch']}, Triton {table['triton']}, "
        f"transformers {table['transformers']}, {table['date']}; {table['model']}",
        f"{table['runs']} run(s) of {table['iters']} iterations of {table['new_tokens']} new tokens after a prompt of "
        f"{table['prompt_tokens']}, batch {table['batch']}, {table['mode']}"
        + (f"; read ceiling {ceiling:.0f} GB/s" if ceiling else ""),
        f"`{table['command']}`",
    )
    return "\n".join(sentences)


def run(args: argparse.Namespace) -> None:
    """Measure every row, print the table, and write it to ``args.json``, also after every run."""
    check_file(args.json)
    rows = rows_of(fitting_group_size(args))
    durations: dict[str, list[float]] = {row.name: [] for row in rows}
    records: dict[str, list[dict[str, Any]]] = {row.name: [] for row in rows}
    times: dict[str, list[float]] = {}
    order = list(order_of(rows, args.runs))
    table: dict[str, Any] = {}
    for index, row in enumerate(order):
        print(f"[{index + 1}/{len(order)}] {row.name}", file=sys.stderr, flush=True)
        result = in_new_process(row, args)
        durations[row.name].append(result["duration_s"])
        records[row.name].append(result["record"])
        if row.bits == 16:
            times.setdefault(row.backend, result["token_times"])
        measured = [
            {"name": one.name} | row_of(durations[one.name], records[one.name], args.iters)
            for one in rows
            if records[one.name]
        ]
        done = [one.name for one in order[: index + 1]]
        table = header_of(args, result["record"], measured) | {
            "finished": index + 1 == len(order),
            "order": done,
            "rows": measured,
            "token_times": times,
        }
        if args.json:
            write(Path(args.json), table)
    print(f"{markdown(table)}\n\n{caption(table)}")


def header_of(args: argparse.Namespace, record: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the file's keys that are not lists."""
    import transformers

    ceilings = [one["read_ceiling_gb_per_s"] for row in rows for one in row["records"]]
    return {
        "command": shlex.join(["python", "examples/benchmark.py", *sys.argv[1:]]),
        "model": args.model_name or "random weights of the 6B shape",
        **{key: record[key] for key in OF_THE_MACHINE},
        "transformers": transformers.__version__,
        **{key: record[key] for key in ("batch", "prompt_tokens", "new_tokens", "mode")},
        **{key: getattr(args, key) for key in ("iters", "warmup_iters", "runs")},
        "read_ceiling_gb_per_s": None if None in ceilings else statistics.median(ceilings),
    }


def in_new_process(row: Row, args: argparse.Namespace) -> dict[str, Any]:
    """Run ``benchmark.py --run-to`` once for a row, and return what it wrote.

    Raises:
        SystemExit: the process failed; it said why.
    """
    options = [*row.options(), "--new-tokens", str(args.new_tokens), "--batch", str(args.batch)]
    options += ["--iters", str(args.iters), "--warmup-iters", str(args.warmup_iters)]
    for name in ("model_name", "prompt", "prompt_tokens"):
        value = getattr(args, name)
        if value is not None:
            options += [f"--{name.replace('_', '-')}", str(value)]
    if args.mode != "greedy":
        options.append(f"--{args.mode}")
    program = Path(__file__).parents[1] / "benchmark.py"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.json"
        command = [sys.executable, str(program), *options, "--run-to", str(file)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL)
        if done.returncode:
            raise SystemExit(f"The table stops: its run of {row.name} failed (exit {done.returncode}), as said above.")
        result = json.loads(file.read_text(encoding="utf-8"))
    result["record"]["command"] = shlex.join(["python", "examples/benchmark.py", *options])
    return result


def check_file(path: str | None) -> None:
    """Raise SystemExit if the file to write holds something other than a table."""
    if path is None or not Path(path).exists():
        return
    try:
        is_table = isinstance(json.loads(Path(path).read_text(encoding="utf-8")), dict)
    except ValueError:
        is_table = False
    if not is_table:
        raise SystemExit(f"{path} holds something else than a table, which would be lost; name another file.")


def fitting_group_size(args: argparse.Namespace) -> int | None:
    """Return the columns per scale of the row with groups; None, and a line on stderr, if 128 does not divide.

    Raises:
        SystemExit: the group size that was asked for does not divide the model's widths.
    """
    from faster_chatglm_6b.configuration_chatglm import ChatGLMConfig
    from faster_chatglm_6b.network.quantization import check_quantization

    from .models import CONFIG_6B

    size = args.group_size or GROUP_SIZE
    try:
        config = ChatGLMConfig.from_pretrained(args.model_name) if args.model_name else ChatGLMConfig(**CONFIG_6B)
        check_quantization(config, 4, size, HEAD_BITS)
    except ValueError as error:
        if args.group_size:
            raise SystemExit(str(error)) from None
        print(f"No row with groups: {error}", file=sys.stderr)
        return None
    except OSError as error:
        raise SystemExit(f"{args.model_name} has no config.json that can be had: {error}") from None
    return size


def write(file: Path, table: dict[str, Any]) -> None:
    """Write the table's file, a line per key."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in table.items())
    file.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    table = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(f"{markdown(table)}\n\n{caption(table)}")
