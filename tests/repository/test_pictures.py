"""Each script for the pages' pictures runs on the committed data, and the committed pictures show that data."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed; it comes with the extra `pictures`")

IMAGES = Path(__file__).resolve().parents[2] / "images"
sys.path.append(str(IMAGES))

import make_batches  # noqa: E402
import make_demo_gif  # noqa: E402
import make_first_token  # noqa: E402
import make_ms_per_token  # noqa: E402
import make_share  # noqa: E402
import records  # noqa: E402
import style  # noqa: E402
from made_up_records import with_first_tokens  # noqa: E402
from PIL import Image  # noqa: E402

CHARTS = {
    "tokens_per_second": make_batches,
    "ms_per_token": make_ms_per_token,
    "share_of_ceiling": make_share,
}
if records.first_tokens():
    CHARTS["first_token"] = make_first_token
LARGEST_GIF = 1_500_000


@pytest.fixture(scope="session")
def font():
    try:
        return style.chinese_font()
    except SystemExit as error:
        pytest.skip(str(error))


def run(script, *arguments) -> None:
    command = [sys.executable, script.__file__, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, timeout=120)
    assert done.returncode == 0 and "Glyph" not in done.stderr, done.stderr


@pytest.mark.parametrize("name", CHARTS)
def test_a_chart_in_both_languages_from_the_committed_data(name, tmp_path, font):
    run(CHARTS[name], "--out", tmp_path)
    for language in style.LANGUAGES:
        path = tmp_path / style.name_in(language, name)
        with Image.open(path) as image:
            assert image.width > 900 and len(image.getcolors()) > 8
        assert path.stat().st_size < 100_000
        assert style.digest_of(path) == records.digest(CHARTS[name].FILES)


@pytest.mark.parametrize("name", CHARTS)
@pytest.mark.parametrize("language", style.LANGUAGES)
def test_committed_charts_show_the_committed_data(name, language):
    path = IMAGES / style.name_in(language, name)
    assert style.digest_of(path) == records.digest(CHARTS[name].FILES), f"{path.name} is out of date: make pictures"


def test_no_chart_of_first_tokens_is_committed_before_they_are_measured():
    committed = {name for name in ("first_token.png", "first_token.zh.png") if (IMAGES / name).exists()}
    assert bool(committed) == bool(records.first_tokens())


def test_first_tokens_are_drawn_once_they_are_measured(tmp_path, font):
    without = tmp_path / "without"
    without.mkdir()
    (without / records.SUITE).write_text("[]")
    run(make_first_token, "--data", without, "--out", tmp_path)
    assert not list(tmp_path.glob("*.png"))
    data = with_first_tokens(tmp_path / "with")
    figure = make_first_token.draw(data, "en")
    prompts = [prompt for prompt in records.first_tokens(data)["fp16"] if prompt[0] == 1]
    assert len(prompts) == 5 and len(figure.axes[0].patches) == 3 * len(prompts)
    run(make_first_token, "--data", data, "--out", tmp_path)
    for language in style.LANGUAGES:
        path = tmp_path / style.name_in(language, "first_token")
        assert style.digest_of(path) == records.digest(make_first_token.FILES, data)


def test_first_tokens_are_no_steps_of_the_chart_of_batches(tmp_path):
    before, after = (make_batches.draw(data, "en") for data in (records.DATA, with_first_tokens(tmp_path)))
    drawn = [[line.get_xydata().tolist() for line in figure.axes[0].lines] for figure in (before, after)]
    assert drawn[0] == drawn[1]


def test_the_committed_animation_shows_the_committed_times():
    path = IMAGES / "demo.gif"
    if not records.has(records.TABLE):
        assert not path.exists(), f"{path} shows times that are not in images/data"
        pytest.skip(f"images/data/{records.TABLE} is not there yet, so there is nothing to animate")
    assert style.digest_of(path) == records.digest(make_demo_gif.FILES), "demo.gif is out of date: make pictures"
    assert path.stat().st_size < LARGEST_GIF
    times, _ = records.token_times()
    assert plays(path) >= max(arrivals[-1] for arrivals in times.values())


def plays(path: Path) -> float:
    """Return the seconds that an animation plays."""
    with Image.open(path) as image:
        durations = []
        for number in range(image.n_frames):
            image.seek(number)
            durations.append(image.info["duration"])
    return sum(durations) / 1000


@pytest.fixture
def made_up(tmp_path) -> Path:
    """Return a folder of data in which 40 tokens take Torch one second and us a tenth of it."""
    times = {"torch": [0.025 * (i + 1) for i in range(40)], "ours": [0.0025 * (i + 1) for i in range(40)]}
    table = {"finished": True, "gpu": "a GPU", "rows": [], "token_times": times}
    (tmp_path / records.TABLE).write_text(json.dumps(table))
    return tmp_path


def test_the_animation_runs_in_real_time(made_up, font):
    run(make_demo_gif, "--data", made_up, "--out", made_up)
    path = made_up / "demo.gif"
    waits = make_demo_gif.BEFORE + make_demo_gif.AFTER
    assert plays(path) == pytest.approx(1 + waits, abs=2.1 * make_demo_gif.FRAME)
    assert style.digest_of(path) == records.digest(make_demo_gif.FILES, made_up)
    times, gpu = records.token_times(made_up)
    fonts = make_demo_gif.Fonts(17), make_demo_gif.Fonts(14)
    half_way = make_demo_gif.frame(times, 0.5, *fonts, gpu)
    width = half_way.width // 2
    text = [
        half_way.crop((x, 80, x + width - 20, 300)).convert("L").point(lambda v: 255 * (v > 120)) for x in (15, width)
    ]
    torch_ink, our_ink = (sum(part.histogram()[200:]) for part in text)
    assert 0 < torch_ink < 0.8 * our_ink


def test_without_measured_times_the_animation_says_what_to_do(tmp_path):
    command = [sys.executable, make_demo_gif.__file__, "--data", str(tmp_path), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 1 and "python examples/benchmark.py --table --json" in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_without_a_chinese_font_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(style.font_manager.fontManager, "ttflist", [])
    monkeypatch.setattr(style.font_manager, "findSystemFonts", lambda: [])
    with pytest.raises(SystemExit, match="apt-get install fonts-noto-cjk"):
        style.chinese_font()


def test_a_newly_installed_font_is_found(monkeypatch, font):
    """matplotlib keeps a list of fonts from its first run."""
    manager = style.font_manager.fontManager
    monkeypatch.setattr(manager, "ttflist", [entry for entry in manager.ttflist if entry.fname != font.fname])
    assert style.chinese_font().name in style.FONTS


def test_a_later_run_of_the_benchmark_counts():
    old = {"backend": "ours", "weights": "int4", "group_size": 128, "head": "int8", "mode": "greedy", "batch": 1}
    old |= {"prompt_tokens": 20, "new_tokens": 128, "read_ceiling_gb_per_s": 4500.0, "ms_per_step": 2.0}
    again, new = old | {"ms_per_step": 1.9}, old | {"ms_per_step": 1.5, "read_ceiling_gb_per_s": 4400.0}
    assert [run["ms_per_step"] for run in records.one_per_run([old, again]).values()] == [2.0]
    assert [run["ms_per_step"] for run in records.one_per_run([old, again, new]).values()] == [1.5]
    assert records.precision(old) == "int4, groups of 128, int8 head"
