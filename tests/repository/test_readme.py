"""The pages say what was measured and what the demo prints, name every option, and point at things that exist."""

import inspect
import json
import os
import re
import subprocess
import sys

import pytest
from made_up_records import with_first_tokens
from pages import LOG, PAGES, ROOT, TRANSLATED, anchors, prose, read, shared

from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration

sys.path.append(str(ROOT / "images"))

import make_tables  # noqa: E402

LANGUAGES = {"README.md": "en", "README.zh.md": "zh"}
BOTH = pytest.mark.parametrize("name", LANGUAGES)
# Each page has these generated parts.
GENERATED = {
    "README.md": ["headline", "picture"],
    "docs/speed.md": ["speed", "first_token", "aims", "drafts", "experiment", "comparison", "cpu"],
    "docs/serving.md": ["serving"],
}


@pytest.mark.parametrize("english", GENERATED)
@pytest.mark.parametrize("language", make_tables.READMES)
def test_the_generated_parts_hold_the_records(english, language):
    name = english if language == "en" else TRANSLATED[english]
    text = read(name)
    assert make_tables.updated(text, language) == text, f"{name} is out of date: make pictures"
    assert re.findall(r"<!-- (\w+):", text) == GENERATED[english]
    assert text.count("<!-- end -->") == len(GENERATED[english])


def test_no_other_page_has_generated_parts():
    written = {
        name for pages in (make_tables.READMES, make_tables.SPEED, make_tables.SERVING) for name in pages.values()
    }
    assert {name for name in PAGES if "<!-- end -->" in read(name).splitlines()} == written


def test_the_tables_are_made_of_the_records():
    """The records are read from the file itself, because the program that writes the tables might drop a row."""
    records = json.loads((ROOT / "images" / "data" / "benchmark_h200.json").read_text("utf-8"))
    speed = make_tables.speed("en", make_tables.DATA)
    for record in records:
        again = [r for r in records if all(r[k] == record[k] for k in ("weights", "mode", "batch", "prompt_tokens"))]
        rows = [f"| {r['ms_per_step']:.2f} | {r['tokens_per_s']:.0f} | {r['share']:.2f} |" for r in again]
        assert record["new_tokens"] == 1 or any(row in speed for row in rows), rows
    assert {record["gpu"] for record in records} == {"NVIDIA H200"} and "NVIDIA H200" in speed
    assert f"{records[0]['read_ceiling_gb_per_s']:.0f}" in speed and records[0]["clocks"] in speed


def test_the_tables_of_the_server_and_of_drafts_are_made_of_the_records():
    """Every record of a load shows, and the worst loss of drafts by weights."""
    folder = ROOT / "images" / "data"
    records = json.loads((folder / "serving_h200.json").read_text("utf-8"))
    text = make_tables.serving("en", make_tables.DATA)
    for record in records:
        if record["kind"] == "offline":
            assert f"{record['tokens_per_s']:.0f}" in text
        if record["kind"] == "http":
            first, between = record["ms_first_token_p50"], record["ms_between_tokens_p99"]
            row = f"| {record['weights']} | {record['clients']} | {record['tokens_per_s']:.0f} | {first:.1f}, "
            (line,) = [line for line in text.splitlines() if line.startswith(row)]
            assert line.endswith(f", {between:.1f} |")
    records = json.loads((folder / "speculation_h200.json").read_text("utf-8"))
    losses = [record for record in records if record["kind"] == "unforced"]
    text = make_tables.drafts("en", make_tables.DATA)
    for weights in ("fp16", "int8", "int4"):
        worst = max(record["times_as_long"] for record in losses if record["weights"] == weights)
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {weights} |")]
        assert line.endswith(f"| {worst:.3f} x |")


@pytest.mark.parametrize("name", ["docs/demos.md", TRANSLATED["docs/demos.md"]])
def test_the_transcript_is_what_the_demo_prints(name):
    """Everything agrees but the speed and what depends on versions, installed packages, the CPU and its compiler."""
    transcript = read(name).split("```text\n")[1].split("```")[0].splitlines()
    command = [sys.executable, "examples/demo.py", "--tiny", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    printed = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT, env=environment, check=True)
    printed = printed.stdout.splitlines()
    assert transcript[:6] == printed[:6] and transcript[4].startswith("Answer:")
    of_versions = ("23 tokens", "  backend", "  transformers", "  torch", "    transformers.", "    config of")
    of_the_cpu = re.compile(r"^(    on cpu|      (?:fused_\w+|fast_gelu)) .*")
    shown, said = (
        [of_the_cpu.sub(r"\1", line) for line in lines if not line.startswith(of_versions)]
        for lines in (transcript, printed)
    )
    assert shown == said and sum(line.startswith("      fused_linear") for line in shown) == 1


@BOTH
def test_every_environment_variable_is_explained_and_exists(name):
    pattern = re.compile(r"FASTER_CHATGLM_6B_[A-Z_]+[A-Z]")
    sources = [
        *(ROOT / "faster_chatglm_6b").rglob("*.py"),
        *(ROOT / "tests").rglob("*.py"),
        *(ROOT / "examples").glob("*.py"),
    ]
    used = {variable for path in sources for variable in pattern.findall(path.read_text("utf-8"))}
    assert len(used) >= 5
    assert set(pattern.findall(read(name))) == used


@BOTH
def test_the_public_calls_are_listed_with_their_arguments(name):
    text = read(name)
    for method in ("chat", "quantize"):
        signature = inspect.signature(getattr(ChatGLMForConditionalGeneration, method))
        parameters = [str(p.replace(annotation=p.empty)) for p in list(signature.parameters.values())[1:]]
        shown = text.split(f"`model.{method}(")[1].split(")`")[0]
        assert shown.split(", ") == [p for p in parameters if method == "chat" or not p.startswith("**")]
    for call in ("chat_batch", "stream_chat", "stream_generate", "stream_tokens", "generate", "release_cache"):
        assert hasattr(ChatGLMForConditionalGeneration, call) and f"`model.{call}(" in text
    for setting in ("quantization_bit", "quantization_group_size", "quantization_head_bits", "generator="):
        assert setting in text


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    text = prose(read(name))
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert len(targets) > 10 or name not in LANGUAGES
    for target in targets:
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), f"{name}: {target}"
        if anchor:
            assert anchor in anchors(file.resolve().relative_to(ROOT).as_posix()), f"{name}: {target}"
    if name != LOG:
        for path in re.findall(r"`((?:docs|examples|images|tests|faster_chatglm_6b)/[\w./]+)`", text):
            assert (ROOT / path).exists(), f"{name}: {path}"


@BOTH
def test_every_page_is_linked_from_the_readme(name):
    """The Chinese README links a page's Chinese version, or the English one if there is no other."""
    linked = set(re.findall(r"\]\(([^)#]+)\)", prose(read(name))))
    for page in PAGES:
        if not page.startswith("docs/zh/") and page not in LANGUAGES:
            wanted = page if name == "README.md" else TRANSLATED.get(page, page)
            assert wanted in linked, f"{name} does not link {wanted}"


@pytest.mark.parametrize("english", TRANSLATED)
def test_the_versions_of_a_page_link_to_each_other(english):
    chinese = TRANSLATED[english]
    for name, other in ((english, chinese), (chinese, english)):
        assert f"]({os.path.relpath(other, os.path.dirname(name) or '.')})" in read(name)


@pytest.mark.parametrize("english", TRANSLATED)
def test_both_languages_have_the_same_sections_tables_and_pictures(english):
    shapes = []
    for text in (shared(english), read(TRANSLATED[english])):
        text = prose(text)
        headings = re.findall(r"^(#+) ", text, re.MULTILINE)
        rows = [line.count(" | ") for line in text.splitlines() if line.startswith("|")]
        pictures = [path.replace(".zh.", ".").lstrip("./") for path in re.findall(r"!\[.*?\]\((.*?)\)", text)]
        questions = len(re.findall(r"^\*\*", text, re.MULTILINE))
        bullets = sum(line.startswith("- ") for line in text.splitlines())
        shapes.append((headings, rows, pictures, questions, bullets))
    assert shapes[0] == shapes[1]


def test_contributing_lists_the_rooms_in_the_order_of_the_contract():
    """pyproject.toml has the contract for import-linter; names in brackets may be missing in both."""
    contract = read("pyproject.toml").split("layers = [")[1].split("]")[0]
    layers = [set(line.split(" | ")) for line in re.findall(r'"(\w+(?: \| \w+)*)"', contract)]
    assert len(layers) > 10
    table = read("CONTRIBUTING.md").split("| where | what |")[1].split("\n\n")[0]
    cells = [set(re.findall(r"`(\w+)(?:/|\.py)`", line.split(" | ")[0])) for line in table.splitlines()]
    rows = [row for layer in layers for row, names in enumerate(cells) if layer <= names]
    assert len(rows) == len(layers), "a room without a row of its own, or with two"
    assert rows == sorted(rows)


def test_the_first_screen_of_the_readmes():
    """Within 40 lines come what it is, the one line, the numbers and the two commands."""
    for name in LANGUAGES:
        first = "\n".join(read(name).splitlines()[:40])
        for part in ("import faster_chatglm_6b", "| fp16 | 3.02 |", "images/demo.gif", "make demo", "make test"):
            assert part in first, f"{name}: {part}"
        assert len(read(name).splitlines()) < 200


def test_the_ratios_are_those_of_the_table():
    """The rows are read from the file itself, as above."""
    rows = {row["name"]: row for row in make_tables.read(make_tables.TABLE)["rows"]}
    text, whole = make_tables.experiment("en", make_tables.DATA).split("By the averages")
    shown = text.split("Over their own fp16")
    for bits in ("off", "int8", "int4"):
        ours, torch = rows[f"ours {bits}"], rows[f"torch {bits}"]
        assert f"{ours['tokens_per_s'] / torch['tokens_per_s']:.2f} ({ours['weights']})" in shown[0]
        for row, part in zip((ours, torch), shown[1].split("; Torch"), strict=True):
            times = row["tokens_per_s"] / rows[f"{row['backend']} off"]["tokens_per_s"]
            assert (f"{times:.2f} ({row['weights']})" in part) == (bits != "off")
        assert f"{torch['average_s'] / ours['average_s']:.2f} ({ours['weights']})" in whole


def test_a_token_takes_less_time_than_in_any_other_system():
    """Our times are shorter as measured on a faster card, and also with the same shares on the others' card."""
    ours, others = make_tables.on_the_other_card()
    measured = make_tables.by_precision()
    assert set(others) >= {"fp16", "int8", "int4"}
    assert (others["fp16"], others["int8"], others["int4"]) == (5.88, 4.53, 4.82)
    for name, fastest in others.items():
        assert measured[name]["ms_per_step"] < ours[name] < fastest, name


@BOTH
def test_the_first_screen_compares_on_one_card_and_says_what_was_not_at_hand(name):
    """The headline compares us with plain PyTorch on the same GPU, as the files themselves say."""
    headline = read(name).split("<!-- headline")[1].split("<!-- end -->")[0]
    rows = {row["name"]: row for row in make_tables.read(make_tables.TABLE)["rows"]}
    plain = rows["torch off"]["records"][0]
    assert f"{rows['torch off']['ms_per_step']:.2f}" == "25.97" and plain["gpu"] == "NVIDIA H200"
    for part in ("25.97", "3.02", "1.79", "1.23", plain["gpu"]):
        assert part in headline
    assert "H100" not in headline
    assert {"en": "The real weights were never at hand", "zh": "真实的权重一直不在手头"}[LANGUAGES[name]] in headline


def test_without_a_row_of_the_same_card_the_headline_does_not_compare(monkeypatch):
    monkeypatch.setattr(make_tables, "table_rows", lambda backend, data: [])
    for language in make_tables.READMES:
        headline = make_tables.headline(language, make_tables.DATA)
        assert "3.02" in headline and "25.97" not in headline and "PyTorch" not in headline


def test_aims_that_were_missed_are_counted():
    for language in make_tables.READMES:
        words, text = make_tables.WORDS[language], make_tables.aims(language, make_tables.DATA)
        rows = [line for line in text.splitlines() if line.startswith("|")][2:]
        missed = sum(line.endswith(f"| {words['missed']} |") for line in rows)
        assert len(rows) == missed + sum(line.endswith(f"| {words['met']} |") for line in rows)
        summary = words["some_missed" if missed else "all_met"]
        assert text.splitlines()[-1] == summary.format(missed=missed, count=len(rows))
        for check in make_tables.read(make_tables.CHECKS_FILE):
            what = check["what"] if language == "en" else make_tables.WORDS["checks_zh"][check["what"]]
            verdict = words["met" if check["met"] else "missed"]
            aim = check["must"] + (words["goal"].format(goal=check["goal"]) if "goal" in check else "")
            assert f"| {what} | {check['measured']:.4g} | {aim} | {verdict} |" in rows


@pytest.mark.parametrize("language", make_tables.READMES)
def test_the_pages_say_nothing_of_first_tokens_before_they_are_measured(tmp_path, language):
    records = [record for record in make_tables.read(make_tables.SUITE) if not make_tables.has_prompt_floor(record)]
    (tmp_path / make_tables.SUITE).write_text(json.dumps(records), "utf-8")
    page = "<!-- first_token: written -->\n{}<!-- end -->\n"
    assert make_tables.updated(page.format("a table\n"), language, tmp_path) == page.format("")
    assert make_tables.WORDS[language]["headline_first"] not in make_tables.headline(language, tmp_path)


@pytest.mark.parametrize("language", make_tables.READMES)
def test_first_tokens_are_shown_once_they_are_measured(tmp_path, language):
    """They have a table of their own, a column in the headline, and no sentence among the steps."""
    data, words = with_first_tokens(tmp_path), make_tables.WORDS[language]
    found = [record for record in make_tables.read(make_tables.SUITE, data) if make_tables.has_prompt_floor(record)]
    shown = make_tables.first_token(language, data)
    for record in found:
        assert f" {record['ms_per_step']:.2f} ({record['share']:.2f}) |" in shown
    assert len([line for line in shown.splitlines() if line.startswith("|")]) == 2 + 6
    headline = make_tables.headline(language, data).splitlines()
    assert headline[0].endswith(f"| {words['headline_first']} |") and headline[2].endswith("| 26.0 / 1030.0 |")
    speed = make_tables.speed(language, data)
    assert not any(words["prefill"].format(precision=record["weights"], **record) in speed for record in found)


def test_a_goal_stands_beside_its_aim(tmp_path):
    data = with_first_tokens(tmp_path)
    check = {"what": "first token of 20 tokens, fp16, ms", "measured": 6, "must": "<= 7", "met": True, "goal": "<= 5"}
    (data / make_tables.CHECKS_FILE).write_text(json.dumps([check]), "utf-8")
    assert "| first token of 20 tokens, fp16, ms | 6 | <= 7 (goal <= 5) | met |" in make_tables.aims("en", data)
