"""Draw two terminals side by side, the same text at the measured times of Torch and of ours: images/demo.gif."""

import unicodedata
from pathlib import Path

from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont
from records import TABLE, digest, token_times
from style import arguments, chinese_font

FILES = (TABLE,)
QUESTION = "为什么生成每个 token 都要把权重读一遍？"
# An example of our own: the times are those of random weights, whose text is noise.
ANSWER = (
    "因为模型一次只生成一个 token：上一个 token 出来之前，下一个还无从算起。每走一步，输入都要依次经过全部 28 层，"
    "而每一层的每个权重都要参与乘法，所以 12 GB 的权重必须从显存里完整地读一遍。批量为 1 时，读进来的每个权重只用一次，"
    "计算单元大多在等数据，速度就由显存带宽决定。把权重压缩成 int8 或 int4，要读的字节少了，每个 token 也就更快；"
    "把主机的开销和多余的读写都去掉，才能接近这个下限。"
)
NOTES = (
    "real time from the call of generate(): {new} tokens, batch 1, fp16, {gpu}; random weights, an example text",
    "实时，自调用 generate() 起：{new} 个 token，批量 1，fp16，{gpu}；随机权重：文字只是示例",
)
TITLES = {"torch": "PyTorch, transformers' own loop", "ours": "faster_chatglm_6b"}

FRAME, BEFORE, AFTER = 0.05, 0.5, 3.0  # seconds
SIZE, MARGIN, BAR, LINE, CELL = (960, 376), 12, 30, 23, 9
PAPER, PANE, TITLE, INK, FAINT, PROMPT, DONE = (
    "#f4f5f7",
    "#1e222a",
    "#2c313c",
    "#e6e6e6",
    "#8b93a1",
    "#61afef",
    "#98c379",
)
TRAFFIC_LIGHTS = ("#ff5f56", "#ffbd2e", "#27c93f")


class Fonts:
    """A monospaced grid: DejaVu Sans Mono, which matplotlib brings, and Chinese two cells wide."""

    def __init__(self, size: int):
        entry = chinese_font()
        latin = Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono.ttf"
        self.latin = ImageFont.truetype(str(latin), size - 1)
        self.chinese = ImageFont.truetype(entry.fname, size, index=getattr(entry, "index", 0))

    def write(self, draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, color: str, cells: int) -> int:
        """Write ``text``, wrapped at ``cells`` cells, and return the place below it."""
        column, (left, y) = 0, place
        for character in text:
            width = _width(character)
            if column + width > cells and character not in "，。；：？、":
                column, y = 0, y + LINE
            if column == 0 and character == " " and y > place[1]:
                continue
            font = self.chinese if width == 2 else self.latin
            draw.text((left + column * CELL, y + LINE // 2), character, fill=color, font=font, anchor="lm")
            column += width
        return y + LINE


def _width(character: str) -> int:
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def frame(times: dict[str, list[float]], now: float, fonts: Fonts, small: Fonts, gpu: str) -> Image.Image:
    """Draw the picture ``now`` seconds after the calls of generate()."""
    image = Image.new("RGB", SIZE, PAPER)
    draw = ImageDraw.Draw(image)
    width = (SIZE[0] - 3 * MARGIN) // 2
    bottom = SIZE[1] - 2 * LINE - MARGIN
    for place, (name, arrivals) in enumerate(times.items()):
        left = MARGIN + place * (width + MARGIN)
        _terminal(draw, (left, MARGIN, left + width, bottom), fonts, TITLES[name], arrivals, now)
    new = len(next(iter(times.values())))
    for row, note in enumerate(NOTES):
        place = (MARGIN, bottom + 4 + row * (LINE - 3))
        draw.text(place, note.format(new=new, gpu=gpu), fill="#555d69", font=small.chinese)
    return image


def _terminal(
    draw: ImageDraw.ImageDraw, box: tuple, fonts: Fonts, title: str, arrivals: list[float], now: float
) -> None:
    left, top, right, bottom = box
    draw.rounded_rectangle(box, 8, fill=PANE)
    draw.rounded_rectangle((left, top, right, top + BAR), 8, fill=TITLE)
    draw.rectangle((left, top + BAR - 8, right, top + BAR), fill=TITLE)
    for light, color in enumerate(TRAFFIC_LIGHTS):
        draw.ellipse((left + 12 + light * 18, top + 10, left + 22 + light * 18, top + 20), fill=color)
    draw.text(((left + right) // 2, top + BAR // 2), title, fill=INK, font=fonts.latin, anchor="mm")
    cells = (right - left - 2 * MARGIN) // CELL
    y = fonts.write(draw, (left + MARGIN, top + BAR + 8), f"> {QUESTION}", PROMPT, cells)
    arrived = sum(time <= now for time in arrivals)
    fonts.write(draw, (left + MARGIN, y + 4), ANSWER[: len(ANSWER) * arrived // len(arrivals)], INK, cells)
    finished = arrived == len(arrivals)
    clock = arrivals[-1] if finished else max(now, 0)
    summary = f"{arrived:3d} tokens  {clock:5.2f} s"
    if finished:
        summary += f"  {1000 * (arrivals[-1] - arrivals[0]) / (len(arrivals) - 1):6.2f} ms/token"
    fonts.write(draw, (left + MARGIN, bottom - LINE - 6), summary, DONE if finished else FAINT, cells)


def main() -> None:
    options = arguments(__doc__)
    times, gpu = token_times(options.data)
    fonts, small = Fonts(17), Fonts(14)
    last = max(arrivals[-1] for arrivals in times.values())
    moments = [number * FRAME for number in range(int(last / FRAME) + 2)]
    frames = [frame(times, -1.0, fonts, small, gpu)] + [frame(times, now, fonts, small, gpu) for now in moments]
    # One palette for all, as the end has every colour, and no dithering: frames differ only by new text.
    palette = frames[-1].quantize(96, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    frames = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in frames]
    durations = [int(1000 * BEFORE)] + [int(1000 * FRAME)] * (len(moments) - 1) + [int(1000 * AFTER)]
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "demo.gif"
    frames[0].save(
        path,
        save_all=True,
        append_images=frames[1:],
        duration=durations,
        loop=0,
        comment=digest(FILES, options.data).encode(),
    )
    print(path)


if __name__ == "__main__":
    main()
