"""A ChatGLM-6B checkpoint gets our classes and runs no code of its own, however it is loaded; others get their own.

Everything runs in one fresh process that imports none of the tests' modules.
"""

import pytest
import remote_code

# One process runs all ways to load; each check stores what it found, or its error, under its own name.
_WAYS_TO_LOAD = """
import json, logging, os, sys, traceback
from pathlib import Path
import faster_chatglm_6b
import torch, transformers
from faster_chatglm_6b import versions
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, pipeline,
)

checkpoints = Path(sys.argv[1])
found, messages = {}, []

class Keep(logging.Handler):
    def emit(self, record):
        messages.append((record.levelname, record.getMessage()))

logging.getLogger("faster_chatglm_6b").setLevel("INFO")
logging.getLogger("faster_chatglm_6b").addHandler(Keep())

def check(function):
    before = len(executed())
    try:
        value = function()
    except Exception as error:
        value = {"error": type(error).__name__, "message": str(error), "trace": traceback.format_exc()}
    found[function.__name__] = {"value": value, "executed": executed()[before:]}

def load(auto_class, name, **options):
    return auto_class.from_pretrained(str(name), trust_remote_code=True, **options)

def load_everything(name, **options):
    return sorted({origin(load(auto, name, **options)) for auto in (AutoTokenizer, AutoConfig, AutoModel)})

def error_of(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as error:
        return [type(error).__name__, str(error)]

ids = torch.tensor([[5, 6, 7, 321, 324]])

@check
def causal_lm():
    return origin(load(AutoModelForCausalLM, checkpoints / "tripwires"))

@check
def seq2seq_lm():
    return origin(load(AutoModelForSeq2SeqLM, checkpoints / "tripwires"))

@check
def text_generation_pipeline():
    pipe = pipeline("text-generation", model=str(checkpoints / "tripwires"), trust_remote_code=True)
    return [origin(pipe.model), origin(pipe.tokenizer)]

@check
def fine_tune_with_upstream_code():
    config = load(AutoConfig, checkpoints / "fine_tune")
    return load_everything(checkpoints / "fine_tune") + [
        origin(AutoModel.from_config(config, trust_remote_code=True))
    ]

@check
def no_code():
    return load_everything(checkpoints / "no_code")

@check
def hub_id_with_revision():
    return load_everything("someone/chatglm-demo", revision="v1.1")

@check
def hub_id_at_a_missing_revision():
    return error_of(load, AutoConfig, "someone/chatglm-demo", revision="v9")[0]

@check
def config_file():
    return origin(load(AutoConfig, checkpoints / "tripwires" / "config.json"))

@check
def config_object_of_remote_code():
    with faster_chatglm_6b.disabled():
        config = load(AutoConfig, checkpoints / "working")
    assert origin(config) == "transformers_modules"
    return origin(load(AutoModel, checkpoints / "tripwires", config=config))

@check
def quantised():
    return [origin(load(AutoConfig, checkpoints / name)) for name in ("int8", "int4")]

@check
def planted_custom_generate():
    model = load(AutoModel, checkpoints / "custom_generate").float().eval()
    return model.generate(ids, max_new_tokens=2, do_sample=False).shape[1]

@check
def custom_generate_on_request():
    if not hasattr(transformers.GenerationMixin, "load_custom_generate"):
        return "this transformers has none"
    model = load(AutoModel, checkpoints / "no_code").float().eval()
    name = str(checkpoints / "recipe")
    return [
        model.generate(ids, custom_generate=name, trust_remote_code=True),
        error_of(model.generate, ids, custom_generate=str(checkpoints / "tripwires"), trust_remote_code=True)[0],
    ]

@check
def tokenizer_only():
    tokenizer = load(AutoTokenizer, checkpoints / "tokenizer_only")
    return [origin(tokenizer), tokenizer("a")["input_ids"][-2:]]

@check
def other_models():
    return {name: load_everything(checkpoints / name) for name in ("chatglm2", "visualglm")}

@check
def other_models_without_us():
    with faster_chatglm_6b.disabled():
        return {name: load_everything(checkpoints / name) for name in ("chatglm2_again", "visualglm_again")}

@check
def other_models_log():
    load_everything(checkpoints / "chatglm2")
    return [m for m in messages if "chatglm2" in m[1] or "visualglm" in m[1]]

@check
def other_tokenizer_only():
    return origin(load(AutoTokenizer, checkpoints / "chatglm2_tokenizer_only"))

@check
def missing_size():
    return error_of(load, AutoModel, checkpoints / "missing_size")

@check
def contradictory_sizes():
    return error_of(load, AutoModel, checkpoints / "contradictory_sizes")

@check
def foreign_class():
    return error_of(load, AutoModelForSequenceClassification, checkpoints / "foreign_class")

@check
def trust_is_still_asked_for():
    path = str(checkpoints / "tripwires")
    ours = [error_of(auto.from_pretrained, path, trust_remote_code=False) for auto in (AutoConfig, AutoTokenizer)]
    with faster_chatglm_6b.disabled():
        assert ours == [
            error_of(auto.from_pretrained, path, trust_remote_code=False) for auto in (AutoConfig, AutoTokenizer)
        ]
    return ours

@check
def old_transformers():
    real, versions.installed_version = versions.installed_version, {"transformers": "4.44.2"}.get
    try:
        return [
            [error_of(load, auto, checkpoints / "no_code") for auto in (AutoTokenizer, AutoConfig, AutoModel)],
            load_everything(checkpoints / "chatglm2"),
        ]
    finally:
        versions.installed_version = real

@check
def old_torch():
    real = versions.installed_version
    versions.installed_version = {"transformers": transformers.__version__, "torch": "2.3.1"}.get
    try:
        return [
            error_of(load, AutoModel, checkpoints / "no_code"),
            load_everything(checkpoints / "chatglm2"),
        ]
    finally:
        versions.installed_version = real

@check
def status():
    now = faster_chatglm_6b.status()
    return {
        "served": [[kind, os.path.basename(name)] for kind, name in now.served],
        "passed_through": {os.path.basename(name): why for name, why in now.passed_through.items()},
        "patched": now.patched,
        "text": str(now),
    }

answer(found)
"""


@pytest.fixture(scope="module")
def ways_to_load(tmp_path_factory, golden_dir):
    """Return the outcome of every check of ``_WAYS_TO_LOAD``: {"value": ..., "executed": [...]}."""
    directory = tmp_path_factory.mktemp("ways")
    tiny, root = golden_dir / "ckpt" / "tiny", directory / "checkpoints"
    tripwires = remote_code.chatglm_6b_with_tripwires(root / "tripwires", tiny)
    remote_code.chatglm_6b(root / "no_code", tiny)
    remote_code.chatglm_6b(root / "fine_tune", tiny, upstream="THUDM/chatglm-6b")
    remote_code.add_working_code(remote_code.chatglm_6b(root / "working", tiny))
    remote_code.plant_custom_generate(remote_code.chatglm_6b_with_tripwires(root / "custom_generate", tiny))
    remote_code.plant_custom_generate(root / "recipe", "def generate(model, **kwargs):\n    return 'the recipe'\n")
    for bits in (8, 4):
        quantised = remote_code.chatglm_6b_with_tripwires(root / f"int{bits}", tiny)
        remote_code.edit_json(quantised / "config.json", quantization_bit=bits)
    (remote_code.chatglm_6b_with_tripwires(root / "tokenizer_only", tiny) / "config.json").unlink()

    broken = remote_code.chatglm_6b_with_tripwires(root / "missing_size", tiny)
    remote_code.edit_json(broken / "config.json", remove=("hidden_size",))
    broken = remote_code.chatglm_6b_with_tripwires(root / "contradictory_sizes", tiny)
    remote_code.edit_json(broken / "config.json", num_attention_heads=5)
    foreign = remote_code.chatglm_6b_with_tripwires(root / "foreign_class", tiny)
    references = {**remote_code.auto_map(), "AutoModelForSequenceClassification": "modeling_chatglm.ChatGLMClassifier"}
    remote_code.edit_json(foreign / "config.json", auto_map=references)

    chatglm2 = (remote_code.CHATGLM2_CONFIG, remote_code.CHATGLM2_TOKENIZER_CONFIG)
    remote_code.other_glm(root / "chatglm2", *chatglm2)
    remote_code.other_glm(root / "chatglm2_again", *chatglm2)
    (remote_code.other_glm(root / "chatglm2_tokenizer_only", *chatglm2) / "config.json").unlink()
    for name in ("visualglm", "visualglm_again"):
        remote_code.other_glm(
            root / name,
            {**remote_code.OLD_VOCABULARY_CONFIG, "eva_config": {}},
            {"tokenizer_class": "ChatGLMTokenizer", "gmask_token": "[gMASK]"},
        )
    # main and v1.1 hold different models: the one that is served shows that the revision was heeded
    hf_home = directory / "process" / "hf_home"
    remote_code.put_into_hub_cache(hf_home, "someone/chatglm-demo", "v1.1", tripwires)
    remote_code.put_into_hub_cache(hf_home, "someone/chatglm-demo", "main", root / "chatglm2")
    source = "from transformers import AutoModelForSequenceClassification\n" + _WAYS_TO_LOAD
    return remote_code.run_python(source, directory / "process", root)


OURS, THEIRS = "faster_chatglm_6b", "transformers_modules"
ALL_CODE = {"configuration_chatglm.py", "tokenization_chatglm.py", "modeling_chatglm.py"}


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        ("causal_lm", OURS),
        ("seq2seq_lm", OURS),
        ("text_generation_pipeline", [OURS, OURS]),
        ("fine_tune_with_upstream_code", [OURS, OURS]),
        ("no_code", [OURS]),
        ("hub_id_with_revision", [OURS]),
        ("hub_id_at_a_missing_revision", "OSError"),
        ("config_file", OURS),
        ("quantised", [OURS, OURS]),
        ("planted_custom_generate", 7),
        ("tokenizer_only", [OURS, [321, 324]]),
    ],
)
def test_way_to_load(way, expected, ways_to_load):
    assert ways_to_load[way] == {"value": expected, "executed": []}


def test_config_object_of_remote_code(ways_to_load):
    found = ways_to_load["config_object_of_remote_code"]
    assert found == {"value": OURS, "executed": ["configuration_chatglm.py"]}  # disabled() ran it before


def test_custom_generate_on_request(ways_to_load):
    value = ways_to_load["custom_generate_on_request"]["value"]
    assert value in (["the recipe", "OSError"], "this transformers has none")


def test_other_models_run_exactly_their_own_code(ways_to_load):
    found, without_us = ways_to_load["other_models"], ways_to_load["other_models_without_us"]
    assert found["value"] == {"chatglm2": [THEIRS], "visualglm": [THEIRS]}
    assert found["executed"] == without_us["executed"]
    assert set(found["executed"]) == ALL_CODE


def test_other_models_are_logged_once_each(ways_to_load):
    messages = ways_to_load["other_models_log"]["value"]
    assert [level for level, _ in messages] == ["INFO", "WARNING"]
    (_, chatglm2), (_, visualglm) = messages
    assert "chatglm2: left to the checkpoint's own code, config.json has ffn_hidden_size" in chatglm2
    assert "visualglm: looks like ChatGLM-6B and is not served, its own code runs: config.json has" in visualglm
    assert "eva_config, as VisualGLM" in visualglm


def test_other_tokenizer_without_a_model(ways_to_load):
    found = ways_to_load["other_tokenizer_only"]
    assert found == {"value": THEIRS, "executed": ["tokenization_chatglm.py"]}


def test_missing_size_is_an_error_and_no_reason_to_run_remote_code(ways_to_load):
    found = ways_to_load["missing_size"]
    assert found["executed"] == []
    assert found["value"][0] == "ValueError"
    assert "hidden_size" in found["value"][1]


def test_contradictory_sizes_are_an_error(ways_to_load):
    found = ways_to_load["contradictory_sizes"]
    assert found["executed"] == []
    assert found["value"][0] == "ValueError"
    assert "num_attention_heads=5" in found["value"][1]


def test_class_that_we_have_not(ways_to_load):
    found = ways_to_load["foreign_class"]
    assert found["executed"] == []
    assert found["value"][0] == "ValueError"
    assert "its class ChatGLMClassifier is not one of ChatGLMConfig," in found["value"][1]


def test_trust_is_still_asked_for(ways_to_load):
    found = ways_to_load["trust_is_still_asked_for"]
    assert found["executed"] == []
    for kind, message in found["value"]:
        assert kind == "ValueError"
        assert "trust_remote_code" in message


def test_old_transformers_is_an_error_for_our_checkpoints_only(ways_to_load):
    ours, theirs = ways_to_load["old_transformers"]["value"]
    assert theirs == [THEIRS]
    for kind, message in ours:
        assert kind == "ImportError"
        assert "needs transformers 4.45 or newer to load a ChatGLM-6B checkpoint and found 4.44.2" in message


def test_old_torch_is_an_error_for_our_checkpoints_only(ways_to_load):
    (kind, message), theirs = ways_to_load["old_torch"]["value"]
    assert theirs == [THEIRS]
    assert kind == "ImportError"
    assert "needs torch 2.4 or newer to load a ChatGLM-6B checkpoint and found 2.3.1" in message


def test_status_tells_what_was_served(ways_to_load):
    now = ways_to_load["status"]["value"]
    for entry in (["model", "tripwires"], ["config", "no_code"], ["tokenizer", "no_code"], ["model", "chatglm-demo"]):
        assert entry in now["served"]
    assert not [name for _, name in now["served"] if name in now["passed_through"]]
    assert {"chatglm2", "visualglm", "chatglm2_tokenizer_only"} == set(now["passed_through"])
    for module in ("dynamic_module_utils", "models.auto.auto_factory", "models.auto.tokenization_auto"):
        assert f"transformers.{module}.get_class_from_dynamic_module" in now["patched"]
    assert "AutoModelForCausalLM knows ChatGLMConfig" in now["patched"]
    assert "tokenizer of someone/chatglm-demo" in now["text"]
