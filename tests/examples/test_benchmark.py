"""``examples/benchmark.py`` prints, writes and refuses the right things on the tiny checkpoint and a CPU. No times."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from faster_chatglm_6b.ops.cpu import serves_half_precision

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "images" / "data" / "benchmark_table_h200.json"
ROW = r"\| (?P<backend>\S+) \| (?P<weights>[^|]+) \| [\d. ]+ \| \d+\.\d{3} s/it \| [\d.]+ \| [\d.]+ \| - \|"
EACH = "backend weights group_size head mode batch prompt_tokens new_tokens gpu".split()


@pytest.fixture
def example(monkeypatch):
    """Import one of the examples' modules."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module


def run_benchmark(*options: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("FASTER_CHATGLM_6B_KERNELS", None)
    command = [sys.executable, "examples/benchmark.py", *options]
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, cwd=ROOT, timeout=500)


def test_one_run_prints_the_closing_line_and_a_row_and_appends_its_record(tmp_path, example):
    """The seed's options work in its spelling and with dashes."""
    file = tmp_path / "new" / "records.json"
    model = ("--model_name", "examples/tiny_chatglm", "--prompt", "你好")
    done = run_benchmark(*model, "--warmup_iters", "1", "--iters", "2", "--new_tokens", "4", "--json", str(file))
    assert done.returncode == 0, done.stderr
    closing, blank, *table = done.stdout.splitlines()
    total, average = re.fullmatch(r"Finish 2 iters in (\S+) seconds, average (\S+) s/it", closing).groups()
    assert float(average) == pytest.approx(float(total) / 2, abs=1e-3) and blank == ""
    assert table[:2] == example("measuring.table").HEADER.splitlines()
    row = re.fullmatch(ROW, table[2])
    assert (row["backend"], row["weights"]) == ("faster_chatglm_6b", "Disable")
    assert "without its captured loop" not in done.stderr

    plain = ("--no-fast", "--quant", "--batch", "2", "--prompt-tokens", "7", "--sample")
    options = (*plain, "--tiny", "--warmup-iters", "1", "--iters", "1", "--new-tokens", "3", "--json", str(file))
    done = run_benchmark(*options)
    assert done.returncode == 0, done.stderr
    row = re.fullmatch(ROW, done.stdout.splitlines()[-1])
    assert (row["backend"], row["weights"]) == ("Torch", "int8")

    first, second = records = json.loads(file.read_text("utf-8"))
    assert [tuple(record) for record in records] == [tuple(example("measuring.timing").KEYS)] * 2
    assert first["tokens_per_s"] > 0 and first["gpu"].startswith("CPU")
    # A CPU keeps half precision if the C kernel serves it; plain PyTorch does not.
    floats = "fp16" if serves_half_precision() else "fp32"
    assert [first[key] for key in EACH[:-1]] == ["ours", floats, None, floats, "greedy", 1, 3, 4]
    assert [second[key] for key in EACH[:-1]] == ["torch", "int8", None, "fp32", "sample", 2, 7, 3]
    assert first["read_ceiling_gb_per_s"] is None and first["share"] is None
    assert second["command"] == " ".join(["python", "examples/benchmark.py", *options])


def test_noise_does_not_make_a_step_negative(example, capsys):
    step_of = example("measuring.timing").step_of
    assert step_of([3.0, 1.0, 2.0], [0.5, 0.5, 0.5], 4) == pytest.approx(0.5) and step_of([2.0], [], 1) == 2.0
    assert capsys.readouterr().err == ""
    assert step_of([2.0], [2.0], 4) == step_of([2.0], [9.0], 4) == 0.5
    assert "One token took as long as 4: the machine is busy" in capsys.readouterr().err


def test_the_table_runs_every_row_in_turn(tmp_path, example):
    file = tmp_path / "table.json"
    done = run_benchmark(
        "--table", "--quick", "--tiny", "--group-size", "64", "--new_tokens", "5", "--iters", "1", "--json", str(file)
    )
    assert done.returncode == 0, done.stderr
    table = json.loads(file.read_text("utf-8"))
    benchmark_table = example("measuring.table")
    assert done.stdout == f"{benchmark_table.markdown(table)}\n\n{benchmark_table.caption(table)}\n"
    rows = [re.fullmatch(ROW, line) for line in done.stdout.splitlines()[2:9]]
    assert [(row["backend"], row["weights"]) for row in rows] == [
        ("faster_chatglm_6b", "Disable"),
        ("faster_chatglm_6b", "int8"),
        ("faster_chatglm_6b", "int4"),
        ("faster_chatglm_6b", "int4 (groups of 64, int8 head)"),
        ("Torch", "Disable"),
        ("Torch", "int8"),
        ("Torch", "int4"),
    ]
    assert sorted(table["order"]) == sorted(row["name"] for row in table["rows"])
    assert table["finished"] and table["command"].startswith("python examples/benchmark.py --table --quick --tiny")
    for row in table["rows"]:
        (record,) = row["records"]
        assert [record[key] for key in EACH[:4]] == [row[key] for key in EACH[:4]]
        assert record["new_tokens"] == table["new_tokens"] == 5 and len(row["durations_s"]) == table["runs"] == 1
        assert f"--backend {row['backend']} " in record["command"] and "--run-to" not in record["command"]
    for times in table["token_times"].values():
        assert len(times) == 5 and times[0] > 0 and times == sorted(times)
    assert set(table["token_times"]) == {"ours", "torch"}


def test_the_order_favours_neither_backend(example):
    benchmark_table = example("measuring.table")
    rows = benchmark_table.rows_of(None)
    names = [row.name for row in benchmark_table.order_of(rows, 2)]
    assert names[6:] == names[5::-1] and sorted(names[:6]) == sorted(row.name for row in rows)
    firsts = [names[index].split()[0] for index in range(0, 12, 2)]
    assert firsts.count("ours") == firsts.count("torch") == 3


@pytest.fixture
def two_runs(example):
    """Return a table's row of two runs as if measured on a GPU."""
    values = {"weights": "int4", "group_size": 128, "head": "int8", "ms_per_step": 2.0, "gb_per_s": 2000.4}
    record = dict.fromkeys(example("measuring.timing").KEYS) | values | {"backend": "ours", "tokens_per_s": 500.0}
    return example("measuring.table").row_of([5.0, 6.0], [record | {"share": 0.5}, record | {"share": 0.6}], 20)


def test_a_row_of_several_runs(example, two_runs):
    line = "| faster_chatglm_6b | int4 (groups of 128, int8 head) | 5.00 6.00 | 0.275 s/it | 500.0 | 2000 | 0.55 |"
    assert example("measuring.table").markdown_row(two_runs) == line


def test_a_table_that_was_cut_short_is_not_shown(example, two_runs):
    with pytest.raises(ValueError, match="cut short"):
        example("measuring.table").markdown({"finished": False, "rows": [two_runs]})


REFUSED = {
    ("--fast", "--backend", "torch"): "--fast means --backend ours, but --backend torch was given; keep one.",
    ("--no_fast", "--backend", "ours"): "--no-fast means --backend torch, but --backend ours was given; keep one.",
    ("--no-quant", "--bits", "4"): "--no-quant was given with --bits 4; keep one of the two.",
    ("--quant", "--bits", "16"): "--quant was given with --bits 16, which is no quantisation; keep one of the two.",
    ("--bits", "3"): "argument --bits: invalid choice: 3",
    ("--iters", "0"): "argument --iters: 0 was given, but it must be 1 or more",
    (
        "--prompt",
        "你好",
    ): "--prompt needs a tokenizer, and random weights have none; name a checkpoint with --model_name.",
    ("--prompt_tokens", "2"): "--prompt-tokens 2 was given, but a prompt has at least 3 tokens.",
    ("--tiny", "--random-weights"): "--random-weights was given with --model_name examples",
    ("--group-size", "128"): "--group-size and --head-bits need --bits 8 or --bits 4.",
    ("--table", "--no-fast"): "--table measures both backends, quantised and not; leave --fast out.",
    ("--table", "--suite"): "--table was given with --suite; run one after the other.",
    (
        "--suite",
        "--bits",
        "8",
    ): "--suite measures float16, int8 and int4 weights; leave the options of quantisation out.",
    ("--layers", "4"): "--layers belongs to --device cpu; give it too.",
    ("--dtype", "float32"): "--dtype belongs to --device cpu; give it too.",
    ("--device", "cpu", "--tiny"): "--device cpu measures random weights; leave --model_name, --table, --suite and",
    ("--device", "cpu", "--layers", "1"): "--layers 1 was given, but the time of a layer needs 2 to 28 of them.",
    ("--quick",): "--quick shortens --table, --suite and --serve; give one of them, or fewer --iters.",
}


@pytest.mark.parametrize("options", REFUSED, ids=" ".join)
def test_options_that_cannot_be_are_refused_in_one_sentence(example, capsys, monkeypatch, options):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        example("benchmark").parse(list(options))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and REFUSED[options] in said


@pytest.mark.parametrize("options", [(), ("--suite", "--tiny"), ("--table",)], ids=str)
def test_without_a_gpu_it_says_what_can_be_measured(example, monkeypatch, options):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    benchmark = example("benchmark")
    with pytest.raises(SystemExit, match="There is no CUDA device.*--model_name examples/tiny_chatglm"):
        benchmark.main(benchmark.parse(list(options)))


@pytest.mark.parametrize(
    ("content", "options"), [("{}", ("--tiny",)), ("not JSON", ("--tiny",)), ("[]", ("--tiny", "--table"))]
)
def test_a_file_with_something_else_in_it_is_left_alone(example, tmp_path, content, options):
    file = tmp_path / "file.json"
    file.write_text(content, "utf-8")
    benchmark = example("benchmark")
    with pytest.raises(SystemExit, match=f"{file} holds "):
        benchmark.main(benchmark.parse([*options, "--json", str(file)]))
    assert file.read_text("utf-8") == content


def test_a_group_size_that_does_not_divide_is_refused_before_anything_runs(example):
    benchmark = example("benchmark")
    for options in (["--table"], ["--bits", "4", "--iters", "1"]):
        with pytest.raises(SystemExit, match="group_size=128, but it must be even and divide both 192"):
            benchmark.main(benchmark.parse(["--tiny", "--group-size", "128", *options]))


def test_a_cpu_is_measured_on_fewer_layers(example, tmp_path, monkeypatch, capsys):
    """The real program on a small shape: what it prints and records, and that 28 layers are called extrapolated."""
    cpu = example("measuring.cpu")
    small = {"vocab_size": 130528, "hidden_size": 64, "num_attention_heads": 2, "inner_hidden_size": 256}
    monkeypatch.setattr(cpu, "CONFIG_6B", {**cpu.CONFIG_6B, **small})
    monkeypatch.setattr(cpu, "read_ceiling", lambda rounds=8: 20.0)
    # Times of a tiny model are noise: one token takes 10 ms and each layer 1 ms more.
    monkeypatch.setattr(cpu, "timed", timed_as_if(example("measuring.timing")))
    benchmark, file = example("benchmark"), tmp_path / "records.json"
    options = ["--random-weights", "--device", "cpu", "--bits", "4", "--layers", "3", "--iters", "1"]
    benchmark.main(benchmark.parse([*options, "--new-tokens", "3", "--json", str(file)]))
    (record,) = json.loads(file.read_text("utf-8"))
    assert list(record) == cpu.KEYS
    assert (record["layers"], record["extrapolated"], record["weights"], record["dtype"]) == (
        3,
        True,
        "int4",
        "float16",
    )
    assert record["ms_per_layer"] == pytest.approx(1) and record["ms_per_step"] == pytest.approx(10 + 28)
    layer = (12 * 64 * 64 // 2) + 2 * 12 * 64
    assert record["bytes_per_step"] == pytest.approx(28 * layer + 130528 * 64 * 2, rel=0.05)
    assert record["share"] == pytest.approx(record["bytes_per_step"] / 0.038 / 20e9, abs=2e-3)
    said = capsys.readouterr().out
    assert "3 layers: 13.0 ms for one more token" in said and "28 layers: 38.0 ms, extrapolated from 3 layers" in said


def timed_as_if(timing):
    """Return a ``timed`` that runs the call and tells 10 ms a token and 1 ms a layer and token."""

    def timed(call):
        timing.timed(call)
        model, _, _, tokens = call.args
        return tokens * (10 + model.config.num_layers) / 1e3

    return timed


def test_the_plain_baseline_concatenates_its_cache_in_transformers_loop(example, monkeypatch, tiny_model):
    """The switch, seen from inside, makes the Torch rows run stock's way."""
    from transformers.cache_utils import DynamicCache

    from faster_chatglm_6b import ops
    from faster_chatglm_6b.generation import search
    from faster_chatglm_6b.ops import availability

    timing, models = example("measuring.timing"), example("measuring.models")
    monkeypatch.setenv(availability.SWITCH, "off")
    monkeypatch.setattr(ops, "_chosen", {})
    availability.kernels_refusal.cache_clear()
    seen, served = [], []
    update = DynamicCache.update
    monkeypatch.setattr(
        DynamicCache, "update", lambda *args, **kwargs: seen.append(update(*args, **kwargs)) or seen[-1]
    )
    generate_ids = search.generate_ids
    monkeypatch.setattr(
        search,
        "generate_ids",
        lambda *args: generate_ids(*args[:-1], lambda: served.append("transformers") or args[-1]()),
    )
    try:
        timing.run_once(tiny_model, models.make_prompt(tiny_model, 1, 6), "greedy", 3)
        (table,) = ops._chosen.values()
    finally:
        availability.kernels_refusal.cache_clear()
    assert served == ["transformers"]
    assert set(table.choices.values()) == {("reference", f"{availability.SWITCH}=off")}
    lengths = [key.shape[2] for key, _ in seen[:: tiny_model.config.num_layers]]
    storages = {key.data_ptr() for key, _ in seen}
    assert lengths == [6, 7, 8] and len(storages) == len(seen)


@pytest.mark.skipif(not TABLE.exists(), reason=f"{TABLE.name} is not measured yet")
@pytest.mark.parametrize("name", ["docs/speed.md", "docs/zh/speed.md"])
def test_the_page_holds_the_table(example, name):
    table = json.loads(TABLE.read_text("utf-8"))
    text = (ROOT / name).read_text("utf-8")
    for row in example("measuring.table").markdown(table).splitlines()[2:]:
        assert row in text, row
    assert table["command"] in text and table["gpu"].removeprefix("NVIDIA ") in text
