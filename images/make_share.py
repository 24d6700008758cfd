"""Draw the share of the read ceiling that decoding reaches, by precision: images/share_of_ceiling.png and .zh.png."""

from pathlib import Path

from matplotlib import pyplot
from records import ELSEWHERE, SUITE, TABLE, by_precision, floor, read, spelled
from style import OTHERS, PRECISIONS, draw_all

FILES = (SUITE, TABLE, ELSEWHERE)
WORDS = {
    "en": {
        "title": "Share of the card's read ceiling, batch 1, greedy (1.00: a token costs one reading of the weights)",
        "note": "others, {gpu}, measured earlier and by other means",
        "mine": "faster_chatglm_6b, {gpu}, through model.generate",
    },
    "zh": {
        "title": "读带宽上限的占比，批量 1，贪心（1.00：一个 token 的时间恰好把权重读一遍）",
        "note": "其他，{gpu}，更早、用别的方法测得",
        "mine": "faster_chatglm_6b，{gpu}，经 model.generate",
    },
}


def draw(data: Path, language: str) -> pyplot.Figure:
    """Draw one bar per precision of ours, then the others'."""
    words, elsewhere = WORDS[language], read(ELSEWHERE, data)
    ours = by_precision(data)
    others = [r for r in elsewhere["records"] if r["batch"] == 1 and r["ms_per_step"] < 8]
    figure, panel = pyplot.subplots(figsize=(9.6, 4.2))
    labels = []
    for name, run in ours.items():
        panel.bar(len(labels), run["share"], width=0.7, color=PRECISIONS[run["weights"]])
        panel.text(len(labels), run["share"] + 0.015, f"{run['share']:.2f}", ha="center", weight="bold")
        labels.append(spelled(name, language).replace(", ", ",\n").replace("，", "，\n"))
    for record in others:
        share = floor(record, elsewhere["read_ceiling_gb_per_s"]) / record["ms_per_step"]
        panel.bar(len(labels), share, width=0.7, color=OTHERS, hatch="////", edgecolor="white")
        panel.text(len(labels), share + 0.015, f"{share:.2f}", ha="center")
        labels.append(f"{record['system']}\n{record['weights']}")
    panel.axhline(1, color="#333333", linewidth=1)
    panel.set_xticks(range(len(labels)), labels, fontsize=9)
    panel.tick_params(axis="x", length=0)
    panel.set_ylim(0, 1.24)
    panel.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    panel.grid(axis="y", color="#e4e7ea")
    panel.set_axisbelow(True)
    panel.set_title(words["title"], fontsize=12)
    first = next(iter(ours.values()))
    handles = [
        pyplot.Rectangle((0, 0), 1, 1, color=PRECISIONS["fp16"], label=words["mine"].format(gpu=first["gpu"])),
        pyplot.Rectangle(
            (0, 0), 1, 1, facecolor=OTHERS, hatch="////", edgecolor="white", label=words["note"].format(**elsewhere)
        ),
    ]
    panel.legend(handles=handles, loc="upper right", fontsize=9)
    return figure


if __name__ == "__main__":
    draw_all(draw, "share_of_ceiling", FILES, __doc__)
