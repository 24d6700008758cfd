"""Draw ms per token at batch 1, next to what reading the weights takes: images/ms_per_token.png and .zh.png."""

from pathlib import Path

from matplotlib import pyplot
from records import ELSEWHERE, SUITE, TABLE, Record, by_precision, floor, read, spelled, table_rows
from style import FLOOR, OTHERS, OURS, draw_all

FILES = (SUITE, TABLE, ELSEWHERE)
# ms per token: slower ones would leave no room for the differences between the others.
FAST = 8
WORDS = {
    "en": {
        "title": "ms per token, batch 1, 128 new tokens, greedy (lower is better)",
        "fast": "The fast ones, enlarged",
        "axis": "ms per token",
        "floor": "floor: reading what the step must read, at the same card's ceiling",
        "ours": "faster_chatglm_6b {precision}",
        "torch": "PyTorch, transformers' own loop, {precision}",
        "stock": "THUDM's own code {precision}",
        "here": "solid: measured on {gpu}, {ceiling:.2f} TB/s",
        "elsewhere": "hatched: measured earlier, by other means, on another card: {gpu}, {ceiling:.2f} TB/s",
    },
    "zh": {
        "title": "每个 token 的毫秒数，批量 1，新生成 128 个 token，贪心（越小越好）",
        "fast": "放大看快的几种",
        "axis": "毫秒/token",
        "floor": "下限：以同一块卡的读带宽上限读完这一步必须读的内容",
        "ours": "faster_chatglm_6b {precision}",
        "torch": "PyTorch，transformers 自己的循环，{precision}",
        "stock": "官方代码 {precision}",
        "here": "实色：在 {gpu} 上测得，读带宽 {ceiling:.2f} TB/s",
        "elsewhere": "斜线：更早在另一块卡上用别的方法测得：{gpu}，读带宽 {ceiling:.2f} TB/s",
    },
}


def draw(data: Path, language: str) -> pyplot.Figure:
    """Draw two panels: ours next to the slow ones, and the fast ones."""
    words, elsewhere = WORDS[language], read(ELSEWHERE, data)
    ours = by_precision(data)
    plain = [row for row in table_rows("torch", data) if not row["weights"].startswith("int")]
    others = [record for record in elsewhere["records"] if record["batch"] == 1]
    ceiling = elsewhere["read_ceiling_gb_per_s"]

    bars = [
        (words["ours"].format(precision=spelled(name, language)), run, floor(run), True) for name, run in ours.items()
    ]
    bars += [(words["torch"].format(precision=run["weights"]), run, floor(run), True) for run in plain]
    for record in others:
        label = words["stock"] if record["system"] == "stock" else record["system"] + " {precision}"
        bars.append((label.format(precision=record["weights"]), record, floor(record, ceiling), False))
    fast = [bar for bar in bars if bar[1]["ms_per_step"] < FAST]
    panels = [(words["title"], bars[:1] + [bar for bar in bars if bar not in fast]), (words["fast"], fast)]
    sizes = [len(shown) for _, shown in panels]
    figure, axes = pyplot.subplots(2, 1, figsize=(9.6, 2.4 + 0.29 * sum(sizes)), height_ratios=sizes)
    for panel, (title, shown) in zip(axes, panels, strict=True):
        _panel(panel, shown)
        panel.set_title(title)
    axes[1].set_xlabel(words["axis"])
    figure.legend(handles=_legend(words, bars[0][1], elsewhere), loc="outside lower left", fontsize=10, frameon=False)
    return figure


def _panel(panel: pyplot.Axes, bars: list[tuple[str, Record, float, bool]]) -> None:
    widest = max(record["ms_per_step"] for _, record, _, _ in bars)
    for row, (_, record, least, here) in enumerate(bars):
        value = record["ms_per_step"]
        mine = record.get("backend") == "ours"
        panel.barh(
            row,
            value,
            height=0.72,
            color=OURS if mine else OTHERS,
            hatch=None if here else "////",
            edgecolor="white" if not here else "none",
        )
        panel.plot([least, least], [row - 0.42, row + 0.42], color=FLOOR, linewidth=2.2)
        text = "{}–{}".format(*record["ms_range"]) if "ms_range" in record else f"{value:.2f}"
        panel.text(value + widest * 0.008, row, text, va="center", weight="bold" if mine else "normal")
    panel.set_yticks(range(len(bars)), [label for label, *_ in bars])
    panel.tick_params(axis="y", length=0)
    panel.invert_yaxis()
    panel.set_xlim(0, widest * 1.09)
    panel.grid(axis="x", color="#e4e7ea")
    panel.set_axisbelow(True)


def _legend(words: dict[str, str], ours: Record, elsewhere: dict) -> list:
    here = words["here"].format(gpu=ours["gpu"], ceiling=ours["read_ceiling_gb_per_s"] / 1000)
    there = words["elsewhere"].format(gpu=elsewhere["gpu"], ceiling=elsewhere["read_ceiling_gb_per_s"] / 1000)
    return [
        pyplot.Rectangle((0, 0), 1, 1, color=OURS, label=here),
        pyplot.Rectangle((0, 0), 1, 1, facecolor=OTHERS, hatch="////", edgecolor="white", label=there),
        pyplot.Line2D([], [], color=FLOOR, linewidth=2.2, label=words["floor"]),
    ]


if __name__ == "__main__":
    draw_all(draw, "ms_per_token", FILES, __doc__)
