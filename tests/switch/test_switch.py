"""The import switches the package on, ``disable()`` undoes it, and ``status()`` tells what happened."""

import re
import subprocess
import sys

import pytest
import remote_code
import torch

import faster_chatglm_6b
from faster_chatglm_6b import backend, report, versions
from faster_chatglm_6b.ops import availability


def test_import_is_light(tmp_path, record_property):
    found = remote_code.run_python(
        """
import sys, time
start = time.perf_counter()
import faster_chatglm_6b
milliseconds = 1e3 * (time.perf_counter() - start)
answer([milliseconds, sorted({name.split(".")[0] for name in sys.modules})])
""",
        tmp_path,
    )
    milliseconds, modules = found
    record_property("import_milliseconds", milliseconds)
    print(f"import faster_chatglm_6b took {milliseconds:.1f} ms")
    assert {"torch", "transformers", "numpy", "sentencepiece"}.isdisjoint(modules)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("jax", "ValueError: FASTER_CHATGLM_6B_BACKEND='jax' is not a backend"),
        ("oneflow", "ImportError: FASTER_CHATGLM_6B_BACKEND=oneflow asks for OneFlow"),
    ],
)
def test_unusable_backend_is_an_error_at_import(value, message, tmp_path):
    with pytest.raises(AssertionError, match=re.escape(message)):
        remote_code.run_python("import faster_chatglm_6b", tmp_path, FASTER_CHATGLM_6B_BACKEND=value)


def test_disabled_by_environment(tmp_path):
    found = remote_code.run_python(
        """
import sys
meta_path = list(sys.meta_path)
import faster_chatglm_6b
faster_chatglm_6b.enable()
with faster_chatglm_6b.disabled():
    pass
same_meta_path = sys.meta_path == meta_path
import transformers.dynamic_module_utils as utils
answer([
    same_meta_path,
    utils.get_class_from_dynamic_module.__module__ == utils.__name__
    and not hasattr(utils.get_class_from_dynamic_module, "__wrapped__"),
    faster_chatglm_6b.status().enabled,
    str(faster_chatglm_6b.status()),
])
""",
        tmp_path,
        FASTER_CHATGLM_6B_DISABLE="1",
    )
    assert found[:3] == [True, True, False]
    assert found[3].splitlines()[0].endswith("off, FASTER_CHATGLM_6B_DISABLE=1 is set")


_DISABLE_AND_ENABLE = """
import sys
meta_path = list(sys.meta_path)
from transformers import AutoConfig, AutoModel, AutoTokenizer
import transformers.dynamic_module_utils as utils
from transformers.models.auto import auto_factory, modeling_auto
path, working = sys.argv[1:]

def state():
    held = {
        name: vars(module)["get_class_from_dynamic_module"]
        for name, module in list(sys.modules.items())
        if "get_class_from_dynamic_module" in getattr(module, "__dict__", {})
    }
    mappings = {
        name: dict(auto_class._model_mapping._extra_content)
        for name, auto_class in vars(modeling_auto).items()
        if hasattr(getattr(auto_class, "_model_mapping", None), "_extra_content")
    }
    return held, list(sys.meta_path), mappings

before = state()
import faster_chatglm_6b
load = lambda: origin(AutoModel.from_pretrained(path, trust_remote_code=True))
steps = []
steps.append(["enabled", load(), state() == before])
faster_chatglm_6b.disable()
steps.append(["disabled", faster_chatglm_6b.status().enabled, state() == before])
faster_chatglm_6b.disable()
steps.append(["disabled twice", faster_chatglm_6b.status().patched, state() == before])
faster_chatglm_6b.enable()
faster_chatglm_6b.enable()
steps.append(["enabled again", load(), state() == before])
with faster_chatglm_6b.disabled():
    steps.append(["with disabled()", faster_chatglm_6b.status().enabled, state() == before])
    with faster_chatglm_6b.disabled():
        pass
    steps.append(["after a nested one", faster_chatglm_6b.status().enabled, state() == before])
    config = AutoConfig.from_pretrained(working, trust_remote_code=True)
    steps.append(["the checkpoint's own code", origin(config), executed()])
steps.append(["after", load(), faster_chatglm_6b.status().enabled])
again = AutoConfig.from_pretrained(path, trust_remote_code=True)

# What transformers does when a model is loaded with a config of the checkpoint's own class: an entry for that class.
AutoModel._model_mapping._extra_content[type(config)] = AutoModel._model_mapping._extra_content[type(again)]
try:
    with faster_chatglm_6b.disabled():
        steps.append(["its entry undone too", state() == before])
        raise KeyError("in the body")
except KeyError:
    steps.append(["after an error", load(), faster_chatglm_6b.status().enabled])
faster_chatglm_6b.disable()
model = AutoModel.from_config(config, trust_remote_code=True)
steps.append(["disabled at last", origin(model)])
answer(steps)
"""


def test_disable_restores_everything(tmp_path, golden_dir):
    tiny = golden_dir / "ckpt" / "tiny"
    tripwires = remote_code.chatglm_6b_with_tripwires(tmp_path / "tripwires", tiny)
    working = remote_code.add_working_code(remote_code.chatglm_6b(tmp_path / "working", tiny))
    steps = remote_code.run_python(_DISABLE_AND_ENABLE, tmp_path / "process", tripwires, working)
    assert steps == [
        ["enabled", "faster_chatglm_6b", False],
        ["disabled", False, True],
        ["disabled twice", [], True],
        ["enabled again", "faster_chatglm_6b", False],
        ["with disabled()", False, True],
        ["after a nested one", False, True],
        ["the checkpoint's own code", "transformers_modules", ["configuration_chatglm.py"]],
        ["after", "faster_chatglm_6b", True],
        ["its entry undone too", True],
        ["after an error", "faster_chatglm_6b", True],
        ["disabled at last", "transformers_modules"],
    ]


def test_module_prints_the_report(tmp_path):
    process = subprocess.run(
        [sys.executable, "-m", "faster_chatglm_6b"], capture_output=True, text=True, cwd=remote_code.REPOSITORY
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith(f"faster_chatglm_6b {faster_chatglm_6b.__version__}: enabled\n")
    assert f"THUDM/chatglm-6b at {faster_chatglm_6b.revision}" in process.stdout
    assert "an import hook waits for transformers.dynamic_module_utils" in process.stdout


def test_revision_is_a_commit():
    assert re.fullmatch("[0-9a-f]{40}", faster_chatglm_6b.revision)


@pytest.fixture
def empty_records(monkeypatch):
    """Give this test empty records of its own."""
    for name in ("_served", "_passed_through", "_operators", "_generations", "_notices"):
        monkeypatch.setattr(report, name, type(getattr(report, name))())


def test_report_of_everything(empty_records, monkeypatch):
    monkeypatch.setattr(versions, "installed_version", {"transformers": "4.30.2", "torch": "2.13.0"}.get)
    report.record_served("model", "some/where")
    report.record_served("model", "some/where")
    report.record_operators("cpu float32", {"fast_gelu": ("reference", "no CUDA device"), "x": ("reference", "why")})
    for path, reason in (("captured", ""), ("plain", "num_beams=3"), ("plain", "num_beams=3"), ("plain", "on CPU")):
        report.record_generation(path, reason)
    assert report.record_passed_through("other/model", "it is another model")
    assert not report.record_passed_through("other/model", "it is another model")
    for _ in range(2):
        report.record_notice("Something is new.")

    chosen = backend.Backend("torch", "because")
    now = report.report("1.2", "abc", True, "enabled", chosen, patched=("one thing",))
    assert now.served == {("model", "some/where"): 2}
    assert now.captured_generations == {"": 1}
    assert now.plain_generations == {"num_beams=3": 2, "on CPU": 1}
    assert now.notices == ("Something is new.",)
    assert str(now) == (
        """\
faster_chatglm_6b 1.2: enabled
  behaviour of   THUDM/chatglm-6b at abc
  backend        torch (because)
  transformers   4.30.2 (too old: 4.45 or newer is needed)
  torch          2.13.0
  noticed
    Something is new.
  patched
    one thing
  served
    model of some/where (2 times)
  left to its own code
    other/model: it is another model
  operators
    on cpu float32
      fast_gelu  reference (no CUDA device)
      x          reference (why)
  generations
    captured loop: 1
    plain path: 3
      num_beams=3 (2 times)
      on CPU"""
    )


def test_report_is_a_snapshot(empty_records):
    now = faster_chatglm_6b.status()
    report.record_served("model", "later")
    assert now.served == {}
    assert faster_chatglm_6b.status().served == {("model", "later"): 1}


def test_unknown_path_of_a_generation():
    with pytest.raises(ValueError, match="'captured' or 'plain', not 'fast'"):
        report.record_generation("fast", "")


@pytest.mark.parametrize(("version", "old"), [("3.4.0", True), ("3.5.0+git12", False), ("3.10.0", False)])
def test_kernels_tell_a_triton_that_is_too_old(version, old, monkeypatch):
    """The interpreter's device is enough, since no GPU is needed to read a version."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delenv(availability.SWITCH, raising=False)
    reason = availability.kernels_refusal.__wrapped__(torch.device("cpu"), torch.float16)
    expected = (
        f"Triton {version} is too old for the fused kernels, which need 3.5 or newer; torch 2.9 and later bring one"
    )
    assert reason == (expected if old else None)


def test_a_triton_that_cannot_be_imported_is_a_reason_and_no_error(tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text('raise ImportError("libtriton.so: cannot be opened")')
    found = remote_code.run_python(
        """
import torch
from faster_chatglm_6b.ops import availability
torch.cuda.get_device_capability = lambda device: (9, 0)
answer(availability.kernels_refusal(torch.device("cuda"), torch.float16))
""",
        tmp_path,
        TRITON_INTERPRET="0",
    )
    assert found == "Triton does not work here: libtriton.so: cannot be opened"
