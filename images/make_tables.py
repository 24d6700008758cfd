"""Write what was measured into README.md and README.zh.md, between the marks <!-- NAME: ... --> and <!-- end -->."""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from cpu_table import cpu
from records import (
    DATA,
    ELSEWHERE,
    SUITE,
    TABLE,
    Record,
    by_precision,
    first_tokens,
    floor,
    has,
    has_prompt_floor,
    of_the_suite,
    one_per_run,
    precision,
    read,
    spelled,
    table_rows,
)
from serving_table import drafts, serving

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "examples"))

from measuring.table import markdown  # noqa: E402

READMES = {"en": "README.md", "zh": "README.zh.md"}
# What the generated parts say, by language, and the names of the suite's checks in Chinese.
WORDS = json.loads((Path(__file__).parent / "words.json").read_text("utf-8"))
# Prompt tokens of the first tokens that the headline has.
_HEADLINE_PROMPTS = (20, 1024)
# docs/ has such parts too.
SPEED = {"en": "docs/speed.md", "zh": "docs/zh/speed.md"}
SERVING = {"en": "docs/serving.md", "zh": "docs/zh/serving.md"}
CHECKS_FILE = "benchmark_h200_checks.json"
_BLOCK = re.compile(r"(<!-- (\w+): [^\n]* -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def picture(language: str, data: Path) -> str:
    """Show the animation if the times for it were measured, else the bars."""
    words = WORDS[language]
    if has(TABLE, data):
        return f"![{words['gif']}](images/demo.gif)"
    name = "ms_per_token.png" if language == "en" else "ms_per_token.zh.png"
    return f"![{words['bars']}](images/{name})"


def headline(language: str, data: Path) -> str:
    """State ms per token by precision, next to plain PyTorch on the same card, and what the weights were."""
    words, ours = WORDS[language], by_precision(data)
    gpu = ours["fp16"]["gpu"]
    # Only rows of the same card: another one has another memory.
    plain = {precision(row): f"{row['ms_per_step']:.2f}" for row in table_rows("torch", data) if row["gpu"] == gpu}
    first = {name: _first(runs, gpu) for name, runs in first_tokens(data).items()}
    # A column with gaps would raise more questions than it answers.
    first = first if all(first.get(name) for name in ("fp16", "int8", "int4") if name in ours) else {}
    rows = [words["headline_header"]]
    for name in ("fp16", "int8", "int4"):
        if name in ours:
            rows.append([name, f"{ours[name]['ms_per_step']:.2f}", f"{ours[name]['share']:.0%}"])
            rows[-1] += [plain.get(name, "")] if plain else []
            rows[-1] += [first[name]] if first else []
    rows[0] = [*rows[0], *([words["headline_plain"]] if plain else []), *([words["headline_first"]] if first else [])]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:], "", words["headline"].format(gpu=gpu)])


def _first(runs: dict[tuple[int, int], Record], gpu: str) -> str:
    """Write the times to the first token on this card; nothing if one of them was not measured."""
    times = [runs.get((1, tokens)) for tokens in _HEADLINE_PROMPTS]
    if any(run is None or run["gpu"] != gpu for run in times):
        return ""
    return " / ".join(f"{run['ms_per_step']:.1f}" for run in times)


def speed(language: str, data: Path) -> str:
    """List the conditions, the suite's records, and what a table row cannot say."""
    words = WORDS[language]
    runs = [run for run in one_per_run(read(SUITE, data)).values() if run["backend"] == "ours"]
    first = runs[0]
    ceiling = _span(run["read_ceiling_gb_per_s"] for run in runs)
    setting = {key: "; ".join(dict.fromkeys(run[key] for run in runs)) for key in ("clocks", "torch", "triton", "date")}
    conditions = words["conditions"].format(**{**first, **setting}, ceiling=ceiling)
    lines = [conditions, "", words["speed_header"], "|---|---|---|---|---|"]
    for run in sorted(runs, key=_place):
        if run["new_tokens"] > 1:
            what = _what(run, words)
            numbers = f"{run['ms_per_step']:.2f} | {run['tokens_per_s']:.0f} | {run['share']:.2f}"
            lines.append(f"| {spelled(precision(run), language)} | {what} | {numbers} |")
    lines.append("")
    if not {"int8", "int4"} & {run["weights"] for run in runs}:
        lines.append(words["no_integers"])
    for run in runs:
        if run["new_tokens"] == 1 and not has_prompt_floor(run):
            lines.append(words["prefill"].format(precision=precision(run), **run))
    peaks: dict[str, float] = {}
    for run in runs:
        # Integers are made from the float model here, whose peak theirs would repeat.
        if run["batch"] == 1 and run["prompt_tokens"] == 20 and run["weights"] == "fp16":
            peaks.setdefault(precision(run), run["peak_memory_gb"])
    listed = words["and"].join(f"{peak:.2f} GB ({name})" for name, peak in peaks.items())
    commands = list(dict.fromkeys(f"`{run['command']}`" for run in runs))
    made = words["records"].format(commands=words["and"].join(commands[:1] if len(commands) > 2 else commands))
    if len(commands) > 2:
        made += words["other_commands"].format(count=len(commands) - 1)
    return "\n".join([*lines, words["memory"].format(peaks=listed), "", made])


def _place(run: Record) -> tuple[int, bool, bool, int]:
    """Sort by weights; one row first, then the batches, then those with long prompts."""
    names = ("fp16", "bf16", "fp32", "int8", "int4")
    long = run["prompt_tokens"] > 20 and run["batch"] > 1
    return names.index(run["weights"]), run["batch"] > 1, long, run["batch"]


def _what(run: Record, words: dict[str, str]) -> str:
    what = words[run["mode"]]
    if run["batch"] > 1:
        what += words["batch"].format(**run)
    if run["prompt_tokens"] != 20:
        what += words["context"].format(**run)
    return what


def first_token(language: str, data: Path) -> str:
    """Show the times to the first token, with their picture; nothing before they are measured."""
    found, words = first_tokens(data), WORDS[language]
    names = [name for name in ("fp16", "int8", "int4") if name in found]
    if not names:
        return ""
    lines = [
        f"## {words['first_title']}",
        "",
        f"| {words['first_prompt']} | {' | '.join(names)} |",
        "|---" * (len(names) + 1) + "|",
    ]
    for batch, tokens in sorted({prompt for name in names for prompt in found[name]}):
        cells = [words["first_batch" if batch > 1 else "first_single"].format(batch=batch, tokens=tokens)]
        for name in names:
            run = found[name].get((batch, tokens))
            cells.append(f"{run['ms_per_step']:.2f} ({run['share']:.2f})" if run else "")
        lines.append(f"| {' | '.join(cells)} |")
    runs = [run for name in names for run in found[name].values()]
    limits = {key: _span(run[key] for run in runs) for key in ("read_ceiling_gb_per_s", "matrix_rate_tflops")}
    lines += ["", words["first"].format(**limits, gpu=runs[0]["gpu"]), ""]
    folder, name = ("../", "first_token.png") if language == "en" else ("../../", "first_token.zh.png")
    return "\n".join([*lines, f"![{words['first_picture']}]({folder}images/{name})"])


def _span(values: Iterable[float]) -> str:
    """Write the least and the greatest of some values, or one number if they are equal."""
    values = sorted(f"{value:.0f}" for value in values)
    return "–".join(dict.fromkeys((values[0], values[-1])))


def experiment(language: str, data: Path) -> str:
    """Show the benchmark's own table, as it prints it, and its conditions."""
    if not has(TABLE, data):
        return WORDS[language]["no_experiment"]
    table = read(TABLE, data)
    lines = markdown(table).splitlines()
    words = WORDS[language]
    model = table["model"].replace("random weights of the 6B shape", words["random"])
    conditions = words["experiment"].format(**table | {"mode": words[table["mode"]], "model": model})
    return "\n".join([words["experiment_header"], *lines[1:], "", _ratios(language, data), "", conditions])


def _ratios(language: str, data: Path) -> str:
    """Compare the rows of the table with each other, and with the suite's records of the same calls."""
    words = WORDS[language]
    ours, torch = ({precision(row): row for row in table_rows(name, data)} for name in ("ours", "torch"))
    rates = [{name: row["tokens_per_s"] for name, row in rows.items()} for rows in (ours, torch)]

    def listed(times: dict[str, float]) -> str:
        shown = (words["ratio"].format(precision=spelled(name, language), times=times[name]) for name in times)
        return words["between"].join(shown)

    faster, slower = ({name: rate / rows["fp16"] for name, rate in rows.items() if name != "fp16"} for rows in rates)
    against = {name: rates[0][name] / rate for name, rate in rates[1].items()}
    text = words["ratios"].format(ours=listed(against), faster=listed(faster), torch=listed(slower))
    whole = {name: torch[name]["average_s"] / ours[name]["average_s"] for name in torch}
    text += "\n" + words["whole_calls"].format(times=listed(whole))
    pairs = [
        words["pair"].format(precision=name, suite=run["ms_per_step"], table=ours[name]["ms_per_step"])
        for name, run in of_the_suite(1, data).items()
        if name in ours
    ]
    return f"{text}\n{words['again'].format(pairs=words['between'].join(pairs))}"


def comparison(language: str, data: Path) -> str:
    """Compare ours, plain Torch, and what was measured of others on another card."""
    words, elsewhere = WORDS[language], read(ELSEWHERE, data)
    rows = [
        (
            f"**faster_chatglm_6b** {spelled(name, language)}",
            run,
            run["gpu"],
            run["share"],
            words["baseline" if "durations_s" in run else "through"],
        )
        for name, run in by_precision(data).items()
    ]
    rows += [
        (words["torch"].format(precision=row["weights"]), row, row["gpu"], row["share"], words["baseline"])
        for row in table_rows("torch", data)
    ]
    for record in elsewhere["records"]:
        if record["batch"] == 1:
            share = floor(record, elsewhere["read_ceiling_gb_per_s"]) / record["ms_per_step"]
            name = words["stock"] if record["system"] == "stock" else record["system"]
            rows.append((f"{name} {record['weights']}", record, "NVIDIA H100", share, _how(record, language)))
    lines = [words["comparison_header"], "|---|---|---|---|---|"]
    for name, record, gpu, share, how in rows:
        time = "{}–{}".format(*record["ms_range"]) if "ms_range" in record else f"{record['ms_per_step']:.2f}"
        lines.append(f"| {name} | {gpu.removeprefix('NVIDIA ')} | {time} | {share:.2f} | {how} |")
    ceiling = elsewhere["read_ceiling_gb_per_s"]
    ours, others = on_the_other_card(data)
    times, best = (
        words["and"].join(words["scaled"].format(precision=name, ms=ms) for name, ms in found.items())
        for found in (ours, others)
    )
    return "\n".join([*lines, "", words["estimate"].format(ceiling=ceiling, times=times, others=best)])


def on_the_other_card(data: Path = DATA) -> tuple[dict[str, float], dict[str, float]]:
    """Return ms per token by precision on the card of ``ELSEWHERE``: by our shares, and of the fastest other."""
    elsewhere = read(ELSEWHERE, data)
    ours, others = {}, {}
    for name, run in by_precision(data).items():
        # int4g is int4 in groups.
        times = [r["ms_per_step"] for r in elsewhere["records"] if r["batch"] == 1 and r["weights"].rstrip("g") == name]
        if times:
            ours[name] = floor(run, elsewhere["read_ceiling_gb_per_s"]) / run["share"]
            others[name] = min(times)
    return ours, others


def _how(record: Record, language: str) -> str:
    return record["how" if language == "en" else f"how_{language}"]


# Least share of the read ceiling, and how many times as fast as fp16.
_INTEGER_AIMS = {"int8": (0.82, 1.65), "int4": (0.68, 2.4)}
# The batch at which int4 has to be no slower than fp16.
_INT4_BATCH = 8


def aims(language: str, data: Path) -> str:
    """Hold the suite's checks and the integer weights' records against what was asked for."""
    words = WORDS[language]
    lines, missed = [words["aims_header"], "|---|---|---|---|"], []

    def line(what: str, measured: float, aim: str, met: bool) -> None:
        missed.append(not met)
        lines.append(f"| {what} | {measured:.4g} | {aim} | {words['met'] if met else words['missed']} |")

    for check in read(CHECKS_FILE, data):
        what = check["what"] if language == "en" else WORDS["checks_zh"].get(check["what"], check["what"])
        aim = check["must"] + (words["goal"].format(**check) if "goal" in check else "")
        line(what, check["measured"], aim, check["met"])
    plain = by_precision(data)
    for name, (share, faster) in _INTEGER_AIMS.items():
        if name in plain:
            times = plain["fp16"]["ms_per_step"] / plain[name]["ms_per_step"]
            line(
                words["share_aim"].format(name=name), plain[name]["share"], f">= {share}", plain[name]["share"] >= share
            )
            line(words["faster_aim"].format(name=name), times, f">= {faster}", times >= faster)
    batch = of_the_suite(_INT4_BATCH, data)
    if "int4" in batch:
        times = batch["int4"]["ms_per_step"] / batch["fp16"]["ms_per_step"]
        line(words["at_batch"].format(name="int4", batch=_INT4_BATCH), times, "<= 1", times <= 1)
    summary = words["some_missed" if any(missed) else "all_met"].format(missed=sum(missed), count=len(missed))
    return "\n".join([*lines, "", words["cards"], "", summary])


BLOCKS: dict[str, Callable[[str, Path], str]] = {
    function.__name__: function
    for function in (picture, headline, speed, first_token, experiment, comparison, aims, cpu, serving, drafts)
}


def updated(text: str, language: str, data: Path = DATA) -> str:
    """Return a README with its blocks written anew.

    Raises:
        KeyError: a block that no function here writes.
    """

    def anew(block: re.Match) -> str:
        content = BLOCKS[block[2]](language, data)
        return f"{block[1]}{content}\n{block[4]}" if content else block[1] + block[4]

    return _BLOCK.sub(anew, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the benchmark's records (%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT, help="folder for the pages (%(default)s)")
    options = parser.parse_args()
    for language in READMES:
        for name in (READMES[language], SPEED[language], SERVING[language]):
            text = updated((ROOT / name).read_text("utf-8"), language, options.data)
            path = options.out / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
            print(path)


if __name__ == "__main__":
    main()
