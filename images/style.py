"""Give the charts their look, and every picture its font and the form of its file."""

import argparse
import io
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import font_manager, pyplot  # noqa: E402
from PIL import Image, PngImagePlugin  # noqa: E402
from records import DATA, digest  # noqa: E402

HERE = Path(__file__).parent
LANGUAGES = ("en", "zh")
# Best first: simplified Chinese forms, then fonts that show the same characters in another country's forms.
FONTS = (
    "Noto Sans CJK SC",
    "Source Han Sans SC",
    "Source Han Sans CN",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "PingFang SC",
    "Hiragino Sans GB",
    "Microsoft YaHei",
    "SimHei",
    "Noto Sans CJK JP",
)
_FILES = ("notosanscjk", "sourcehansans", "wqy-", "pingfang", "hiraginosansgb", "msyh", "simhei")

OURS, OTHERS, FLOOR = "#1d6fb8", "#a9b1ba", "#c8321f"
PRECISIONS = {"fp16": "#1d6fb8", "int8": "#2a9d8f", "int4": "#e09f3e"}


def chinese_font() -> font_manager.FontEntry:
    """Find a font with Chinese characters, as matplotlib knows it: ``name``, ``fname``, and ``index`` in the file.

    Raises:
        SystemExit: there is none; the message says how to get one.
    """
    manager = font_manager.fontManager
    known = {entry.fname for entry in manager.ttflist}
    # matplotlib keeps a list of the fonts that were there when it ran first.
    for path in font_manager.findSystemFonts():
        if path not in known and Path(path).name.lower().replace("_", "").startswith(_FILES):
            manager.addfont(path)
    for name in FONTS:
        entries = [entry for entry in manager.ttflist if entry.name == name and entry.style == "normal"]
        if entries:
            return min(entries, key=_distance_from_regular)
    raise SystemExit(
        "No font with Chinese characters was found; install one: apt-get install fonts-noto-cjk (or fonts-wqy-zenhei)."
    )


def _distance_from_regular(entry: font_manager.FontEntry) -> int:
    return abs(font_manager.weight_dict.get(entry.weight, entry.weight) - 400)


def prepare() -> None:
    """Set matplotlib up for the charts."""
    matplotlib.rcParams.update(
        {
            "font.family": [chinese_font().name, "DejaVu Sans"],
            "font.size": 11,
            "axes.unicode_minus": False,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlelocation": "left",
            "axes.titlesize": 13,
            "figure.dpi": 110,
            "figure.constrained_layout.use": True,
            "hatch.linewidth": 0.6,
        }
    )


def save(figure: pyplot.Figure, path: Path, shows: str) -> None:
    """Write a chart as a small PNG that carries the digest ``shows`` of the data that it shows."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    pyplot.close(figure)
    info = PngImagePlugin.PngInfo()
    info.add_text("Data", shows)
    buffer.seek(0)
    image = Image.open(buffer).convert("RGB").quantize(64, dither=Image.Dither.NONE)
    image.save(path, optimize=True, pnginfo=info)
    print(path)


def digest_of(path: Path) -> str | None:
    """Read the digest that a PNG or GIF of ours carries."""
    with Image.open(path) as image:
        found: Any = image.info.get("Data") or image.info.get("comment", b"").decode("ascii", "replace")
    return found or None


def name_in(language: str, name: str) -> str:
    """Return the file name of the picture ``name`` for the README in a language."""
    return f"{name}.png" if language == "en" else f"{name}.{language}.png"


def arguments(description: str) -> argparse.Namespace:
    """Read the options of every script: where the data is, and where the pictures go."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the benchmark's records (%(default)s)")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for the pictures (%(default)s)")
    return parser.parse_args()


def draw_all(draw: Any, name: str, files: tuple[str, ...], description: str) -> None:
    """Run a chart's script: save ``draw(data, language)`` in both languages, unless it is None: not measured yet."""
    options = arguments(description)
    prepare()
    options.out.mkdir(parents=True, exist_ok=True)
    for language in LANGUAGES:
        path = options.out / name_in(language, name)
        figure = draw(options.data, language)
        if figure is None:
            print(f"{path} is not drawn: its records are not in {options.data} yet.")
        else:
            save(figure, path, digest(files, options.data))
