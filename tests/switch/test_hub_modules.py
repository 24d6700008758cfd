"""Scripts import names from the files that transformers copies out of a checkpoint; a served one has none there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from faster_chatglm_6b import modeling_chatglm
from faster_chatglm_6b.layers import quantized as quantization

CODE = """
import importlib, json, shutil, sys
from pathlib import Path
import faster_chatglm_6b

folder = Path(sys.argv[1])


def tried(name):
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        return type(error).__name__
    return f"{module.__name__} {getattr(module, 'WRITTEN_BY_THE_TEST', '')}".strip()


before = [tried("transformers_modules"), tried("transformers_modules.chatglm_6b.modeling_chatglm")]
from transformers import AutoConfig, AutoTokenizer

AutoConfig.from_pretrained(folder, trust_remote_code=True)
AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
from transformers.dynamic_module_utils import HF_MODULES_CACHE

copied = [str(path) for path in Path(HF_MODULES_CACHE).rglob("*chatglm*")]
files = ("modeling_chatglm", "configuration_chatglm", "tokenization_chatglm", "quantization")
served = {file: tried(f"transformers_modules.chatglm-6b.{file}") for file in files}
spellings = [
    tried(f"transformers_modules.{package}.modeling_chatglm")
    for package in ("chatglm_6b", "chatglm_hyphen_6b", "chatglm-6b.1d240ba371910e9282298d4592532d7f0f3e9f3e")
]
from transformers_modules.chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration
from transformers_modules.chatglm_6b.modeling_chatglm import InvalidScoreLogitsProcessor
from transformers_modules.chatglm_6b.quantization import QuantizedLinear
import faster_chatglm_6b.modeling_chatglm as ours

same = ours.InvalidScoreLogitsProcessor is InvalidScoreLogitsProcessor
same = same and ours.ChatGLMForConditionalGeneration is ChatGLMForConditionalGeneration
same = same and ours.QuantizedLinear is QuantizedLinear
same = same and ours.__spec__.name == ours.__name__ == "faster_chatglm_6b.modeling_chatglm"
names = ("bert.modeling_chatglm", "chatglm_6b.modeling_bert", "bert")
others = [tried(f"transformers_modules.{name}") for name in names]

# Another checkpoint's code, which transformers copies there as ever.
package = Path(HF_MODULES_CACHE) / "transformers_modules" / "other"
package.mkdir(parents=True)
(package / "__init__.py").write_text("")
(package / "modeling_other.py").write_text("WRITTEN_BY_THE_TEST = 'run'")
importlib.invalidate_caches()
beside = tried("transformers_modules.other.modeling_other")

faster_chatglm_6b.disable()
importlib.invalidate_caches()
left = sorted(name for name in sys.modules if name.startswith("transformers_modules") and "chatglm" in name)
gone = [tried("transformers_modules.chatglm_6b.modeling_chatglm"), left]

# What lies there from earlier comes first.
faster_chatglm_6b.enable()
package = Path(HF_MODULES_CACHE) / "transformers_modules" / "chatglm_6b"
package.mkdir()
(package / "__init__.py").write_text("")
(package / "quantization.py").write_text("WRITTEN_BY_THE_TEST = 'of earlier'")
importlib.invalidate_caches()
earlier = tried("transformers_modules.chatglm_6b.quantization")
told = ("before", "copied", "served", "spellings", "same", "others", "beside", "gone", "earlier")
print(json.dumps({name: globals()[name] for name in told}))
"""


@pytest.fixture(scope="module")
def told(tiny_dir, tmp_path_factory):
    """Return what a script sees; it runs on its own, because it fills ``sys.modules`` and a cache of modules."""
    place = tmp_path_factory.mktemp("modules")
    folder = place / "chatglm-6b"
    folder.mkdir()
    for path in tiny_dir.iterdir():
        (folder / path.name).symlink_to(path)
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "HF_HOME": str(place / "home"), "HF_MODULES_CACHE": str(place / "cache")}
    environment["PYTHONPATH"] = os.pathsep.join((root, environment.get("PYTHONPATH", "")))
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(folder)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_files_of_a_served_checkpoint_are_ours(told):
    assert told["before"] == ["ModuleNotFoundError"] * 2 and told["copied"] == []
    ours = {**{file: file for file in told["served"]}, "quantization": "layers.quantized"}
    assert told["served"] == {file: f"faster_chatglm_6b.{ours[file]}" for file in ours} and len(told["served"]) == 4
    assert told["spellings"] == ["faster_chatglm_6b.modeling_chatglm"] * 3
    assert told["same"] is True


def test_nothing_else_is_answered(told):
    assert told["others"] == ["ModuleNotFoundError"] * 3
    assert told["beside"] == "transformers_modules.other.modeling_other run"


def test_disable_undoes_it_and_files_of_earlier_come_first(told):
    assert told["gone"] == ["ModuleNotFoundError", []]
    assert told["earlier"] == "transformers_modules.chatglm_6b.quantization of earlier"


def test_names_under_the_models_own_module(tiny_model):
    """``sys.modules[model.__module__]`` offers ``QuantizedLinear`` and stock's other names."""
    module = sys.modules[type(tiny_model).__module__]
    assert module is modeling_chatglm and module.QuantizedLinear is quantization.QuantizedLinear
    for name in module.__all__:
        assert getattr(module, name).__name__ == name
    block = tiny_model.transformer.layers[0]
    assert type(block) is module.GLMBlock and type(block.attention) is module.SelfAttention
    assert type(block.mlp) is module.GLU
