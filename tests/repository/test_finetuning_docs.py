"""The programs of docs/finetuning.md run with Trainer and trl, lower the loss, and save what loads again."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate", reason="the Trainer needs accelerate: pip install accelerate")

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "finetuning.md").read_text("utf-8")
SECTIONS = {
    title: re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    for title, body in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
}
EXAMPLES = next(blocks[0] for title, blocks in SECTIONS.items() if title.startswith("An example"))
(TRL,) = SECTIONS["With trl"]
KINDS = {"LoRA": ["peft"], "QLoRA": ["peft", "bitsandbytes"], "P-Tuning v2": [], "Full fine-tuning": []}
ROWS = [
    {"prompt": prompt, "completion": completion}
    for prompt, completion in (
        ("你好", "天气很好，世界"),
        ("hello", "a new answer"),
        ("What is int8?", "No idea."),
        ("一", "二"),
    )
] * 6


def test_every_program_is_run():
    named = {title for title, blocks in SECTIONS.items() if blocks}
    assert {title for title in named if not title.startswith("An example")} == {*KINDS, "With trl"}
    assert all(len(blocks) <= 1 for blocks in SECTIONS.values())
    for kind in KINDS:
        assert re.search(r"^trainer = Trainer\(\n.*?^\)\n", SECTIONS[kind][0], re.MULTILINE | re.DOTALL), kind


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Return a folder with the data, in which the document's first file can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    (tmp_path / "train.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "examples_of.py").write_text(on_the_tiny_model(EXAMPLES), encoding="utf-8")
    yield tmp_path
    sys.modules.pop("examples_of", None)


def on_the_tiny_model(program):
    """Return the program for the toy checkpoint on the CPU, without reports to a server.

    Also turn off trl's autocast, which stays in the trained model's forward and would round what is compared.
    """
    program = program.replace('"THUDM/chatglm-6b"', repr(str(ROOT / "examples" / "tiny_chatglm")))
    settings = r'\1\2, report_to=[], use_cpu=True, bf16=False, save_strategy="no"'
    return re.sub(r'(TrainingArguments\(|SFTConfig\(\s*)("\w+")', settings, program)


@pytest.mark.parametrize("with_trl", [False, True], ids=["Trainer", "trl"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_programs(place, kind, with_trl):
    for needed in [*KINDS[kind], *(["trl", "datasets"] if with_trl else [])]:
        pytest.importorskip(needed, reason=f"{kind} needs {needed}: pip install {needed}")
    program = SECTIONS[kind][0]
    if with_trl:
        rate = r"learning_rate=[\d.e-]+"
        lines = re.sub(rate, re.search(rate, program).group(), TRL)
        program = re.sub(r"^trainer = Trainer\(\n.*?^\)\n", lambda _: lines, program, flags=re.MULTILINE | re.DOTALL)
        assert "SFTTrainer(" in program
    namespace = {"__name__": "finetuning"}
    torch.manual_seed(0)
    exec(compile(on_the_tiny_model(program), f"docs/finetuning.md, {kind}", "exec"), namespace)
    losses = [entry["loss"] for entry in namespace["trainer"].state.log_history if "loss" in entry]
    assert len(losses) == 18
    assert sum(losses[-6:]) < 0.95 * sum(losses[:6]), losses
    model, again = (namespace[name].eval() for name in ("model", "again"))
    tokenizer = namespace["tokenizer"]
    # trl trains an adapter over quantised weights in bfloat16, and PEFT loads it in float32.
    tolerance = 0.2 if with_trl and kind == "QLoRA" else 0
    assert namespace["response"] == namespace["history"][0][1]
    for row in ROWS[:4]:
        ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
        settings = {"do_sample": False, "max_new_tokens": 8}
        expected = model.generate(input_ids=ids, **settings)
        if not tolerance:
            assert again.generate(input_ids=ids, **settings).tolist() == expected.tolist()
        with torch.no_grad():
            torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=tolerance)
