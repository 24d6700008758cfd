"""The import in processes of its own: order, environment, ``disable()``, the demo, and what the compat layer adds."""

import importlib
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from faster_chatglm_6b.oneflow_compat import ENVIRONMENT, mock, polyfills

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "golden" / "ckpt" / "tiny"


HAS_TORCH = Path(sysconfig.get_path("purelib"), "torch").is_dir()
WITHOUT_TORCH = pytest.mark.skipif(HAS_TORCH, reason="torch is installed here, and auto takes it")
WITH_TORCH = pytest.mark.skipif(not HAS_TORCH, reason="needs torch 1.13.1 beside OneFlow, installed by hand")


def run(source: str, *paths: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run Python source in a fresh process without a network."""
    kept = {k: v for k, v in os.environ.items() if k not in ENVIRONMENT and not k.startswith("FASTER_CHATGLM_6B")}
    return subprocess.run(
        [sys.executable, "-c", source],
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        env={
            **kept,
            "PYTHONPATH": os.pathsep.join(map(str, (*paths, ROOT))),
            "PYTHONIOENCODING": "utf-8",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "FASTER_CHATGLM_6B_BACKEND": "oneflow",
            **environment,
        },
    )


def answer(done: subprocess.CompletedProcess):
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def fake_torch(tmp_path):
    """Return a directory with a package that is called torch, as real torch is."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("__version__ = '1.13.1'\nclass Tensor: pass\n")
    return tmp_path


def test_the_environment_is_set_before_oneflow_and_the_users_values_stay():
    source = f"""
import json, os, sys
import faster_chatglm_6b
import torch
linear = torch.nn.Linear(2, 2)
values = {{name: os.environ.get(name) for name in {tuple(ENVIRONMENT)!r}}}
print(json.dumps([values, linear.use_fused_matmul_bias, "transformers" in sys.modules]))
"""
    values, is_fused, has_transformers = answer(run(source))
    assert values == ENVIRONMENT and is_fused and not has_transformers
    values, is_fused, _ = answer(run(source, ONEFLOW_KERNEL_ENABLE_FUSED_LINEAR="0"))
    assert values["ONEFLOW_KERNEL_ENABLE_FUSED_LINEAR"] == "0" and not is_fused


@pytest.mark.parametrize("backend", ["oneflow", pytest.param("auto", marks=WITHOUT_TORCH)])
def test_transformers_imported_first(backend):
    source = "import transformers, faster_chatglm_6b"
    done = run(source, FASTER_CHATGLM_6B_BACKEND=backend)
    assert done.returncode == 1
    assert "ImportError: transformers was imported before faster_chatglm_6b" in done.stderr
    assert "put `import faster_chatglm_6b` above every other import" in done.stderr


def test_real_torch_imported_first(fake_torch):
    done = run("import torch, faster_chatglm_6b", fake_torch)
    assert done.returncode == 1
    assert "ImportError: torch was imported before faster_chatglm_6b and is bound to PyTorch" in done.stderr
    source = "import torch, faster_chatglm_6b as f; print(f.status().backend_reason)"
    done = run(source, fake_torch, FASTER_CHATGLM_6B_BACKEND="auto")
    assert done.stdout.strip().endswith("but torch was imported before and is bound to PyTorch")


def test_disable_gives_real_torch_back(fake_torch):
    """transformers gets it too and is imported anew, and ``enable()`` returns to OneFlow's."""
    done = run(
        f"""
import json, sys
import faster_chatglm_6b
import torch, transformers.modeling_utils, safetensors.torch
from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration as Model
model = Model.from_pretrained({str(TINY)!r}).float()
def logits():
    import oneflow
    with oneflow.no_grad():
        return model(oneflow.tensor([[5, 143, 321, 324]])).logits.sum().item()
before, with_oneflow = logits(), transformers
faster_chatglm_6b.disable()
import torch
found = [torch.__version__, torch.Tensor.__module__, "transformers" in sys.modules, "safetensors.torch" in sys.modules]
found.append(before == logits())
import safetensors, sentencepiece, numpy
found.append(safetensors.safe_open.__module__)
faster_chatglm_6b.enable()
import torch, transformers
found += [torch.Tensor.__module__.split(".")[0], transformers is with_oneflow, before == logits()]
with faster_chatglm_6b.disabled():
    import torch
    found.append(torch.__version__)
import torch
found.append(torch.Tensor.__module__.split(".")[0])
print(json.dumps(found))
""",
        fake_torch,
    )
    safe_open_module = answer(done)[5]
    assert not safe_open_module.startswith("faster_chatglm_6b")
    found = answer(done)
    del found[5]
    assert found == ["1.13.1", "torch", False, False, True, "oneflow", True, True, "1.13.1", "oneflow"]


@WITHOUT_TORCH
def test_auto_without_torch():
    done = run("import faster_chatglm_6b as f; print(f.status().backend_reason)", FASTER_CHATGLM_6B_BACKEND="auto")
    assert done.stdout.splitlines()[-1] == "auto: OneFlow is installed and PyTorch is not"


@WITH_TORCH
def test_real_torch_and_transformers_after_disable():
    """transformers' own model runs on PyTorch, and ours before and after it on OneFlow."""
    done = run(
        f"""
import json
import faster_chatglm_6b
from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration as Model
import torch
model, ids = Model.from_pretrained({str(TINY)!r}).float(), torch.tensor([[5, 143, 321, 324]])
first = model.generate(ids, do_sample=False, max_new_tokens=4).tolist()
with faster_chatglm_6b.disabled():
    import torch
    from transformers import BertConfig, BertModel
    bert = BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    found = type(bert(torch.tensor([[1, 2]])).last_hidden_state).__module__
print(json.dumps([found, first == model.generate(ids, do_sample=False, max_new_tokens=4).tolist()]))
"""
    )
    assert answer(done) == ["torch", True]


@WITH_TORCH
def test_auto_with_torch_and_an_old_transformers_says_what_to_choose():
    done = run(
        "import faster_chatglm_6b as f; from transformers import AutoConfig;"
        f"AutoConfig.from_pretrained({str(ROOT / 'examples' / 'tiny_chatglm')!r}, trust_remote_code=True)",
        FASTER_CHATGLM_6B_BACKEND="auto",
    )
    assert done.returncode == 1 and "set FASTER_CHATGLM_6B_BACKEND=oneflow" in done.stderr


def test_switched_off_by_the_environment():
    done = run(
        "import sys, faster_chatglm_6b; print('oneflow' in sys.modules, faster_chatglm_6b.status().enabled)",
        FASTER_CHATGLM_6B_DISABLE="1",
    )
    assert done.stdout.splitlines()[-1] == "False False"


def test_reloading_stays_on_oneflow():
    done = run(
        """
import importlib, json
import faster_chatglm_6b
importlib.reload(faster_chatglm_6b)
first = faster_chatglm_6b.status().backend
import torch, transformers
importlib.reload(faster_chatglm_6b)
print(json.dumps([first, faster_chatglm_6b.status().backend, torch.Tensor.__module__.split(".")[0]]))
"""
    )
    assert answer(done) == ["oneflow"] * 3


def test_after_the_users_own_mock():
    done = run(
        """
import json
import faster_chatglm_6b.oneflow_compat.libraries as libraries
libraries.preload_cuda_libraries()
import oneflow.mock_torch
oneflow.mock_torch.enable()
import torch
import faster_chatglm_6b
faster_chatglm_6b.disable()
import torch
print(json.dumps([faster_chatglm_6b.status().backend, torch.Tensor.__module__.split(".")[0]]))
""",
        FASTER_CHATGLM_6B_DISABLE="1",
    )
    assert answer(done) == ["oneflow", "oneflow"]


def test_the_auto_classes_and_no_code_of_the_checkpoint(tmp_path):
    import shutil

    for path in (ROOT / "examples" / "tiny_chatglm").iterdir():
        if path.is_file():
            shutil.copyfile(path, tmp_path / path.name)
    for name in ("configuration_chatglm.py", "modeling_chatglm.py", "tokenization_chatglm.py"):
        (tmp_path / name).write_text("raise RuntimeError('the code of the checkpoint was executed')")
    done = run(
        f"""
import json
import faster_chatglm_6b
from transformers import AutoModel, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)
model = AutoModel.from_pretrained({str(tmp_path)!r}, trust_remote_code=True).float()
print(json.dumps(model.chat(tokenizer, "你好", history=[], do_sample=False)[0]))
"""
    )
    assert answer(done) == "你好！我是 faster_chatglm_6b 的小小演示模型。有什么可以帮你的吗？"


def test_the_demo_with_the_tiny_checkpoint():
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "demo.py"), "--tiny"],
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONIOENCODING": "utf-8",
            "HF_HUB_OFFLINE": "1",
            "FASTER_CHATGLM_6B_BACKEND": "oneflow",
        },
    )
    assert done.returncode == 0, done.stderr
    assert "Answer:   你好！我是 faster_chatglm_6b 的小小演示模型。有什么可以帮你的吗？" in done.stdout
    assert "Answer:   Hello! I am a tiny demo model of faster_chatglm_6b. How can I help you?" in done.stdout
    assert "backend        oneflow (" in done.stdout


def test_a_mock_with_lazy_is_used_as_it_is():
    """OneFlow 1.0's mock is enabled without being lazy, and left by its own handle."""
    calls = []

    class Enable:
        def __init__(self, lazy=None, verbose=None, extra_dict=None, *, main_pkg=None, mock_version=None):
            calls.append(("enable", lazy))

        def __exit__(self, *_):
            calls.append(("disable",))

    modules = dict(sys.modules)
    switch_off = mock.enable(SimpleNamespace(mock_torch=SimpleNamespace(enable=Enable), __version__="1.0.0"))
    switch_off()
    assert calls == [("enable", None), ("disable",)]
    assert sys.modules == modules


@pytest.mark.parametrize("name", ["Embedding", "LayerNorm", "Linear"])
def test_skip_init(name):
    """``skip_init`` serves the seed's work-around: no initialisation, and a dtype that 0.9.0's classes do not take."""
    module_class = getattr(torch.nn, name)
    sizes = {"Embedding": (5, 4), "LayerNorm": (4,), "Linear": (4, 5)}[name]
    called = []
    original = module_class.reset_parameters
    module_class.reset_parameters = lambda self: called.append(self)
    try:
        module = torch.nn.utils.skip_init(module_class, *sizes, dtype=torch.float16)
        assert not called and module.weight.dtype == torch.float16
        module_class(*sizes)
        assert len(called) == 1
    finally:
        module_class.reset_parameters = original


def test_what_oneflow_has_is_not_replaced():
    owner = type("Owner", (), {"has": 1})
    polyfills._add(owner, "has", 2)
    polyfills._add(owner, "lacks", 3)
    assert (owner.has, owner.lacks) == (1, 3)


def test_bits_and_shifts_are_torchs():
    integers = torch.tensor([-128, -7, 0, 5, 127]).to(torch.int8)
    assert (integers << 4).tolist() == [0, -112, 0, 80, -16]
    assert (integers >> 4).tolist() == [-8, -1, 0, 0, 7]
    assert (integers & 0xF).tolist() == [0, 9, 0, 5, 15]
    assert (integers | torch.ones(5).to(torch.int8)).tolist() == [-127, -7, 1, 5, 127]
    assert {str((integers << 1).dtype), str((integers & 1).dtype)} == {"oneflow.int8"}
    flags = torch.tensor([True, False])
    assert (flags & ~flags).tolist() == [False, False] and (flags | ~flags).tolist() == [True, True]


def test_missing_things_of_torch_are_attribute_and_import_errors():
    assert not hasattr(torch, "no_such_function") and not hasattr(torch.nn, "no_such_module")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("torch.no_such_module")
