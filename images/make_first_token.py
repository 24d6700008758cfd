"""Draw ms to the first token by the prompt's length, with the floor: images/first_token.png and .zh.png."""

from pathlib import Path

from matplotlib import pyplot
from records import SUITE, first_tokens
from style import FLOOR, PRECISIONS, draw_all

FILES = (SUITE,)
WIDTH = 0.28
WORDS = {
    "en": {
        "title": "ms to the first token, batch 1, greedy (lower is better)",
        "axis": "tokens of the prompt",
        "ours": "faster_chatglm_6b {precision}, {gpu}",
        "floor": "floor: the longer of reading the weights ({ceiling:.2f} TB/s)\n"
        "and computing at the rate of large fp16 products ({rate:.0f} TFLOP/s)",
    },
    "zh": {
        "title": "到第一个 token 的毫秒数，批量 1，贪心（越小越好）",
        "axis": "提示的 token 数",
        "ours": "faster_chatglm_6b {precision}，{gpu}",
        "floor": "下限，即两个时间中较长的一个：读完权重（{ceiling:.2f} TB/s），\n"
        "或按大矩阵 fp16 乘法的速率（{rate:.0f} TFLOP/s）完成运算",
    },
}


def draw(data: Path, language: str) -> pyplot.Figure | None:
    """Draw a group of bars for each length, with a bar per precision; None without records."""
    words = WORDS[language]
    bars = {
        name: {tokens: run for (batch, tokens), run in runs.items() if batch == 1}
        for name, runs in first_tokens(data).items()
        if name in PRECISIONS
    }
    bars = {name: runs for name, runs in bars.items() if runs}
    lengths = sorted({tokens for runs in bars.values() for tokens in runs})
    if not lengths:
        return None
    figure, panel = pyplot.subplots(figsize=(9.6, 4.8))
    slowest = max(run["ms_per_step"] for runs in bars.values() for run in runs.values())
    for index, (name, runs) in enumerate(bars.items()):
        first = next(iter(runs.values()))
        label = words["ours"].format(precision=name, gpu=first["gpu"])
        centres = {tokens: lengths.index(tokens) + (index - (len(bars) - 1) / 2) * WIDTH for tokens in runs}
        times = [run["ms_per_step"] for run in runs.values()]
        panel.bar(centres.values(), times, width=WIDTH * 0.92, color=PRECISIONS[name], label=label)
        for tokens, run in runs.items():
            centre, half, least = centres[tokens], WIDTH * 0.46, run["floor_ms"]
            panel.plot([centre - half, centre + half], [least, least], color=FLOOR, linewidth=2.2)
            text = f"{run['ms_per_step']:.1f}"
            panel.text(centre, run["ms_per_step"] + slowest * 0.012, text, ha="center", fontsize=10)
    note = words["floor"].format(ceiling=first["read_ceiling_gb_per_s"] / 1000, rate=first["matrix_rate_tflops"])
    panel.plot([], [], color=FLOOR, linewidth=2.2, label=note)
    panel.set_xticks(range(len(lengths)), [str(tokens) for tokens in lengths])
    panel.tick_params(axis="x", length=0)
    panel.set_xlabel(words["axis"])
    panel.grid(axis="y", color="#e4e7ea")
    panel.set_axisbelow(True)
    panel.set_title(words["title"], fontsize=12)
    panel.legend(loc="upper left", fontsize=9)
    return figure


if __name__ == "__main__":
    draw_all(draw, "first_token", FILES, __doc__)
