"""Settings of a ``config.json`` that would make transformers fetch, import, read or reserve something are not taken."""

import ast
import inspect
import json
import logging
import shutil
from pathlib import Path

import pytest
import remote_code
import transformers
from tampering import edit_config
from transformers import AutoConfig, AutoModel

from faster_chatglm_6b import config_keys
from faster_chatglm_6b.configuration_chatglm import ChatGLMConfig
from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration

# This package stands for the optional one that lets transformers run kernels of hub repositories.
FAKE_KERNELS = """
import enum
import os

__version__ = "0.18.2"


def _note(name):
    def called(*args, **kwargs):
        with open(os.environ["KERNEL_LOG"], "a") as log:
            log.write(f"{name} {args} {kwargs}\\n")
        raise RuntimeError("a kernel was fetched")
    return called


for _name in ("get_kernel", "load_kernel", "get_local_kernel", "has_kernel", "kernelize"):
    globals()[_name] = _note(_name)


class Mode(enum.Flag):
    INFERENCE = 1
    TRAINING = 2
    TORCH_COMPILE = 4
    FALLBACK = 8


class Device:
    def __init__(self, *args, **kwargs):
        pass


class LayerRepository(Device):
    pass


class LocalLayerRepository(Device):
    pass


class FuncRepository(Device):
    pass


def register_kernel_mapping(*args, **kwargs):
    pass


def replace_kernel_forward_from_hub(*args, **kwargs):
    pass


def use_kernel_forward_from_hub(*args, **kwargs):
    return lambda value: value


use_kernel_func_from_hub = use_kernelized_func = use_kernel_forward_from_hub


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Device
"""
KERNEL_KEYS = ("_attn_implementation", "_attn_implementation_internal", "attn_implementation",
               "experts_implementation", "_experts_implementation", "_experts_implementation_internal")  # fmt: skip


def test_no_kernel_of_a_config_is_fetched(tmp_path, tiny_dir):
    """With ``kernels`` installed, no kernel is fetched unless the caller asks for one, as the stand-in would show."""
    package = tmp_path / "packages" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE_KERNELS)
    (package / "layer").mkdir()
    (package / "layer" / "__init__.py").touch()
    (package / "layer" / "mode.py").write_text("from kernels import Mode")
    (tmp_path / "packages" / "kernels-0.18.2.dist-info").mkdir()
    (tmp_path / "packages" / "kernels-0.18.2.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n"
    )
    for key in (*KERNEL_KEYS, "all"):
        directory = remote_code.chatglm_6b(tmp_path / "checkpoints" / key, tiny_dir)
        keys = KERNEL_KEYS if key == "all" else (key,)
        remote_code.edit_json(directory / "config.json", **dict.fromkeys(keys, "someone/kernel"))
    log = tmp_path / "kernels.log"
    loaded, asked, from_constructor, native = remote_code.run_python(
        """
import json, sys
sys.path.insert(0, sys.argv[2])
import faster_chatglm_6b
from pathlib import Path
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from faster_chatglm_6b.configuration_chatglm import ChatGLMConfig
from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration

def error_of(function, *args, **kwargs):
    try:
        return str(function(*args, **kwargs))
    except Exception as error:
        return f"{type(error).__name__}: {error}"

loaded = []
for folder in sorted(Path(sys.argv[1]).iterdir()):
    for load in (
        lambda **kwargs: AutoModel.from_pretrained(folder, trust_remote_code=True, **kwargs),
        lambda **kwargs: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **kwargs),
        lambda **kwargs: ChatGLMForConditionalGeneration.from_pretrained(folder, **kwargs),
        lambda **kwargs: ChatGLMForConditionalGeneration(ChatGLMConfig.from_pretrained(folder)),
        lambda **kwargs: ChatGLMForConditionalGeneration.from_pretrained(folder, quantization_bit=8),
    ):
        loaded.append(type(load()).__module__)
asked = error_of(ChatGLMForConditionalGeneration.from_pretrained, folder, attn_implementation="someone/kernel")
settings = json.loads((folder / "config.json").read_text())
from_constructor = error_of(lambda: ChatGLMForConditionalGeneration(ChatGLMConfig(
    **{key: value for key, value in settings.items() if key != "attn_implementation"})).config._attn_implementation)
import os
before = os.path.exists(os.environ["KERNEL_LOG"])
tiny = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
native = error_of(LlamaForCausalLM, LlamaConfig(**tiny, attn_implementation="someone/kernel"))
answer([loaded, asked, from_constructor, [before, native]])
""",
        tmp_path / "process",
        tmp_path / "checkpoints",
        tmp_path / "packages",
        KERNEL_LOG=str(log),
    )
    assert set(loaded) == {"faster_chatglm_6b.modeling_chatglm"}
    assert "attn_implementation='someone/kernel' was asked for, but ChatGLM-6B here has its own" in asked
    assert from_constructor in ("eager", "sdpa")
    assert native[0] is False
    if not log.exists():
        pytest.skip(f"transformers {transformers.__version__} did not ask the stand-in for kernels: {native[1]}")
    assert "get_kernel" in log.read_text()


LEADS_SOMEWHERE = {
    "transformers_weights": "other.safetensors",
    "fusion_config": {"patch_embeddings": True},
    "distributed_config": {"tp_plan": "auto"},
    "base_model_tp_plan": {"layers.*": "colwise"},
    "configuration_files": ["config.4.0.0.json"],
    "custom_pipelines": {"chat": {"impl": "pipeline.Evil", "pt": ["AutoModel"]}},
    "custom_generate": "someone/recipe",
    "kernel_config": {"kernel_mapping": {"Linear": "someone/kernel"}},
    "use_kernels": True,
    "trust_remote_code": True,
    "sliding_window": 2,
    "layer_types": ["sliding_attention"] * 3,
    "per_layer_config": {"0": {"hidden_size": 4}},
    "text_config": {"hidden_size": 4},
    "pruned_heads": {"0": [1]},
    "is_encoder_decoder": True,
    "attribute_map": {"hidden_size": "vocab_size"},
    "to_dict": 3,
    "__class__": "str",
    "__dict__": {"hidden_size": 4},
    "_auto_class": "AutoModel",
    "model_type_of_tomorrow": "someone/repository",
    "file_of_tomorrow": ["..\\weights.bin"],
    "object_of_tomorrow": {"a": [{"b": "/etc/passwd"}]},
}


@pytest.mark.parametrize("key", LEADS_SOMEWHERE)
def test_settings_that_lead_somewhere_are_not_taken(checkpoint, caplog, key):
    value = LEADS_SOMEWHERE[key]
    # The Auto classes follow this file before they ask for our class.
    shutil.copy(checkpoint / "config.json", checkpoint / "config.4.0.0.json")
    edit_config(checkpoint, **{key: value})
    with caplog.at_level(logging.WARNING, "faster_chatglm_6b"):
        config = ChatGLMConfig.from_pretrained(checkpoint)
        AutoConfig.from_pretrained(checkpoint, trust_remote_code=True)
    assert getattr(config, key, None) != value and type(config) is ChatGLMConfig
    assert config.to_dict().get(key) == transformers.PretrainedConfig().to_dict().get(key)
    told = [message for message in caplog.messages if f"{key}=" in message]
    assert len(told) == 1 and "is not taken from a checkpoint" in told[0] and "config.json" in told[0]
    model = ChatGLMForConditionalGeneration.from_pretrained(checkpoint)
    assert type(model.config) is ChatGLMConfig and model.config.num_layers == 3


def test_settings_of_the_users_own_stay(checkpoint, tmp_path):
    """Plain values survive a round trip under any name, and a caller's own arguments are not checked."""
    own = {
        "my_rank": 8,
        "my_note": "tuned on 3 lists",
        "my_rates": [1e-4, 0.5],
        "my_map": {"a": {"b": None}},
        "ok": True,
    }
    edit_config(checkpoint, **own)
    model = ChatGLMForConditionalGeneration.from_pretrained(checkpoint)
    assert {key: getattr(model.config, key) for key in own} == own
    model.save_pretrained(tmp_path / "saved")
    again = ChatGLMConfig.from_pretrained(tmp_path / "saved")
    assert {key: getattr(again, key) for key in own} == own
    assert ChatGLMConfig(data="/data/lists").data == "/data/lists"


def test_foreign_entries_of_auto_map_are_not_taken(checkpoint):
    auto_map = json.loads((checkpoint / "config.json").read_text("utf-8"))["auto_map"]
    foreign = {"AutoProcessor": "someone/evil--processing.Evil", "AutoModelForCTC": 3}
    edit_config(checkpoint, auto_map={**auto_map, **foreign})
    assert ChatGLMConfig.from_pretrained(checkpoint).auto_map == auto_map


@pytest.mark.parametrize("method", ["gptq", "awq", "quark", "someone/plugin", None, 3])
def test_quantisation_by_plug_ins_is_refused(checkpoint, method):
    edit_config(checkpoint, quantization_config={"quant_method": method, "bits": 4})
    for load in (ChatGLMForConditionalGeneration, ChatGLMConfig):
        with pytest.raises(ValueError, match="hands to a plug-in; ChatGLM-6B's own quantisation is quantization_bit"):
            load.from_pretrained(checkpoint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_labels": 10**9}, "num_labels=1000000000, but a number from 0 to 10000"),
        ({"num_labels": -1}, "num_labels=-1"),
        ({"num_labels": "many"}, "num_labels='many'"),
        ({"num_hidden_layers": 2}, "num_layers=3 and num_hidden_layers=2, which are two names of one setting"),
        ({"max_position_embeddings": 10**12}, "two names of one setting"),
    ],
)
def test_numbers_that_cost_memory_or_contradict(checkpoint, changes, message):
    edit_config(checkpoint, **changes)
    with pytest.raises(ValueError, match=message):
        ChatGLMForConditionalGeneration.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(checkpoint, trust_remote_code=True)


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention", "someone/kernel", "paged|eager", "x"])
def test_a_caller_chooses_attention_from_a_list(tiny_dir, name):
    with pytest.raises(ValueError, match="has its own attention and takes eager or sdpa"):
        ChatGLMForConditionalGeneration.from_pretrained(tiny_dir, attn_implementation=name)
    with pytest.raises(ValueError, match="has its own attention and takes eager or sdpa"):
        AutoModel.from_pretrained(tiny_dir, trust_remote_code=True, attn_implementation=name)
    for allowed in config_keys.ATTENTIONS:
        model = ChatGLMForConditionalGeneration.from_pretrained(tiny_dir, attn_implementation=allowed)
        assert model.config._attn_implementation == allowed


# transformers' loaders and caches read the configuration in these modules.
READERS = ("modeling_utils", "configuration_utils", "cache_utils", "quantizers.auto", "masking_utils",
           "integrations.hub_kernels", "integrations.tensor_parallel", "generation.utils")  # fmt: skip


def keys_read_from_configurations():
    """Return the names that transformers reads from a configuration: by getattr, by hasattr, or as an attribute."""
    found = set()
    for name in READERS:
        path = Path(inspect.getfile(transformers)).parent.joinpath(*name.split(".")).with_suffix(".py")
        if not path.exists():
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
                owner, key = node.args[0], node.args[1]
                if _is_config(owner) and isinstance(key, ast.Constant):
                    found.add(key.value)
            elif isinstance(node, ast.Attribute) and _is_config(node.value):
                found.add(node.attr)
    return found


def _is_config(node):
    name = getattr(node, "attr", getattr(node, "id", ""))
    return name in ("config", "text_config", "decoder_config", "sub_config")


# These are read from other objects called config, or are methods.
ELSEWHERE = {
    "vocab_size", "hidden_size", "num_hidden_layers", "tie_word_embeddings", "quantization_config",
    # These belong to heads and caches of other models, which transformers 4.45 keeps in the same files.
    "conv_kernel", "end_n_top", "layer_norm_eps", "start_n_top", "state_size", "summary_activation",
    "summary_first_dropout", "summary_last_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
}  # fmt: skip


def test_every_setting_that_transformers_reads_is_known():
    """A release that reads a new setting fails here: somebody has to see where it leads."""
    read = keys_read_from_configurations()
    # Both old and new names count: the dtype's changed in 4.56, and 4.45 reads no transformers_weights.
    assert "sliding_window" in read and read & {"dtype", "torch_dtype"}
    own = config_keys.own_keys(ChatGLMConfig) | set(ChatGLMConfig.attribute_map)
    unknown = {
        key for key in read - own - config_keys.HARMLESS - ELSEWHERE if not config_keys.is_never(key, ChatGLMConfig)
    }
    assert not unknown, f"put each into HARMLESS or NEVER of config_keys.py: {sorted(unknown)}"
    assert not config_keys.HARMLESS & config_keys.NEVER and not own & config_keys.NEVER
