"""Draw tokens per second against the batch size: images/tokens_per_second.png and .zh.png."""

from pathlib import Path

from matplotlib import pyplot
from records import ELSEWHERE, SUITE, one_per_run, precision, read
from style import OTHERS, PRECISIONS, draw_all

FILES = (SUITE, ELSEWHERE)
WORDS = {
    "en": {
        "title": "Tokens per second of all rows together, greedy, 20-token prompts",
        "axis": "batch size",
        "ours": "faster_chatglm_6b {precision}, {gpu}",
        "other": "{system} {weights}, {gpu}, measured earlier",
    },
    "zh": {
        "title": "所有行合计的 token/秒，贪心，提示 20 个 token",
        "axis": "批量",
        "ours": "faster_chatglm_6b {precision}，{gpu}",
        "other": "{system} {weights}，{gpu}，更早测得",
    },
}


def draw(data: Path, language: str) -> pyplot.Figure:
    """Draw one line per precision, and fastllm's."""
    words, elsewhere = WORDS[language], read(ELSEWHERE, data)
    lines: dict[str, list] = {}
    for run in one_per_run(read(SUITE, data)).values():
        of_a_step = run["new_tokens"] > 1 and run["prompt_tokens"] == 20
        if run["backend"] == "ours" and run["mode"] == "greedy" and of_a_step:
            lines.setdefault(precision(run), []).append(run)
    figure, panel = pyplot.subplots(figsize=(9.6, 4.4))
    batches = set()
    for name, runs in lines.items():
        if len(runs) < 2:
            continue
        runs = sorted(runs, key=lambda run: run["batch"])
        style = "-" if name == runs[0]["weights"] else "--"
        x, y = [run["batch"] for run in runs], [run["tokens_per_s"] for run in runs]
        label = words["ours"].format(precision=name, gpu=runs[0]["gpu"])
        panel.plot(x, y, style, marker="o", linewidth=2.2, color=PRECISIONS[runs[0]["weights"]], label=label)
        batches.update(x)
        # The lines of the others lie between these two.
        if name == "fp16":
            _write_rates(panel, x, y, "black")
        elif name == "int4":
            _write_rates(panel, x, y, PRECISIONS["int4"], below=False)
    fastllm = [r for r in elsewhere["records"] if r["system"].startswith("fastllm") and r["weights"] == "fp16"]
    x, y = [r["batch"] for r in fastllm], [r["tokens_per_s"] for r in fastllm]
    label = words["other"].format(**fastllm[0], gpu=elsewhere["gpu"])
    panel.plot(x, y, ":", marker="s", color=OTHERS, linewidth=2.2, label=label)
    _write_rates(panel, x, y, "#6b7480")
    batches.update(x)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(sorted(batches), [str(batch) for batch in sorted(batches)])
    panel.set_yticks([100, 1000, 10000], ["100", "1,000", "10,000"])
    panel.set_ylim(80, 60000)
    panel.set_xlabel(words["axis"])
    panel.grid(color="#e4e7ea")
    panel.set_title(words["title"], fontsize=12)
    panel.legend(loc="upper left", fontsize=9)
    return figure


def _write_rates(panel: pyplot.Axes, batches: list[int], rates: list[float], color: str, below: bool = True) -> None:
    offset = (0, -16 if below else 7)
    for batch, rate in zip(batches, rates, strict=True):
        panel.annotate(f"{rate:,.0f}", (batch, rate), offset, textcoords="offset points", ha="center", color=color)


if __name__ == "__main__":
    draw_all(draw, "tokens_per_second", FILES, __doc__)
