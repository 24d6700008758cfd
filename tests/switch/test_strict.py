"""A checkpoint that looks like ChatGLM-6B and is not recognised gets a warning before its code runs, or a refusal."""

import json

import pytest
import remote_code

EXTRA = {
    "a picture's key": {"vision_config": {}},
    "a key of ChatGLM2": {"seq_length": 1},
    "no text as model_type": {"model_type": 3},
    "another model_type": {"model_type": "llama"},
    "a foreign class": {"auto_map": {**remote_code.auto_map(), "AutoModel": "modeling_chatglm.Evil"}},
    "a foreign class everywhere": {
        "auto_map": {"AutoConfig": "configuration_chatglm.Evil", "AutoModel": "modeling_chatglm.Evil"}
    },
    "another vocabulary": {"vocab_size": 150528, "gmask_token_id": None, "multi_query_attention": False},
}
NEWER = {"chatglm2": {}, "chatglm3": {"original_rope": True}, "glm4": {"rope_ratio": 500, "padded_vocab_size": 151552}}

_SOURCE = """
import json, logging, sys
from pathlib import Path
import faster_chatglm_6b
from transformers import AutoConfig, AutoModel, AutoTokenizer

messages = []

class Keep(logging.Handler):
    def emit(self, record):
        messages.append([record.levelname, record.getMessage()])

logging.getLogger("faster_chatglm_6b").setLevel("INFO")
logging.getLogger("faster_chatglm_6b").addHandler(Keep())
found = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    messages.clear()
    before, errors = len(executed()), []
    for load in (AutoConfig, AutoTokenizer, AutoModel):
        try:
            load.from_pretrained(folder, trust_remote_code=True)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
    found[folder.name] = {
        "executed": executed()[before:], "errors": errors, "messages": [m for m in messages if folder.name in m[1]]
    }
status = faster_chatglm_6b.status()
found["status"] = [status.strict, str(status).splitlines()[0], sorted(status.passed_through)]
with faster_chatglm_6b.disabled():
    found["disabled"] = faster_chatglm_6b.status().strict
found["enabled again"] = faster_chatglm_6b.status().strict
faster_chatglm_6b.enable(strict=False)
found["lenient"] = faster_chatglm_6b.status().strict
faster_chatglm_6b.enable()
found["lenient still"] = faster_chatglm_6b.status().strict
faster_chatglm_6b.enable(strict=True)
found["strict"] = faster_chatglm_6b.status().strict
answer(found)
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory, golden_dir):
    """Return what each checkpoint did, by variable: {"executed", "errors", "messages"}."""
    directory = tmp_path_factory.mktemp("strict")
    tiny, root = golden_dir / "ckpt" / "tiny", directory / "checkpoints"
    for name, changes in EXTRA.items():
        checkpoint = remote_code.add_working_code(remote_code.chatglm_6b(root / name, tiny))
        remote_code.edit_json(checkpoint / "config.json", **changes)
    nothing = remote_code.add_working_code(remote_code.chatglm_6b(root / "two tokenizers", tiny))
    (nothing / "config.json").unlink()
    tokenizer_config = nothing / "tokenizer_config.json"
    remote_code.edit_json(tokenizer_config, remove=("num_image_tokens", "gmask_token"), eop_token="<eop>")
    for name, changes in NEWER.items():
        config = {**remote_code.CHATGLM2_CONFIG, **changes}
        remote_code.other_glm(root / name, config, remote_code.CHATGLM2_TOKENIZER_CONFIG)
    remote_code.chatglm_6b(root / "ours", tiny)
    other = remote_code.other_glm(root / "unrelated", {"model_type": "mine", "hidden_size": 3}, {})
    config = json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.MyConfig"}})
    (other / "config.json").write_text(config)
    source = (other / "configuration_chatglm.py").read_text().replace("ChatGLMConfig", "MyConfig")
    (other / "configuration_mine.py").write_text(source)
    (other / "tokenizer_config.json").unlink()
    return {
        variable: remote_code.run_python(_SOURCE, directory / f"process{variable}", root, **environment)
        for variable, environment in (("", {}), ("1", {"FASTER_CHATGLM_6B_STRICT": "1"}))
    }


@pytest.mark.parametrize("name", [*EXTRA, "two tokenizers"])
def test_what_looks_like_ours_is_warned_of_once(found, name):
    """Its own code runs, as the user asked, and the warning gives the reason and what to do."""
    now = found[""][name]
    assert now["executed"] or all("Evil" in error for error in now["errors"])
    assert [level for level, _ in now["messages"]] == ["WARNING"], now
    message = now["messages"][0][1]
    assert "looks like ChatGLM-6B and is not served, its own code runs:" in message
    assert "FASTER_CHATGLM_6B_STRICT=1 refuses such checkpoints" in message


@pytest.mark.parametrize("name", [*EXTRA, "two tokenizers", *NEWER])
def test_strict_refuses_all_that_call_themselves_chatglm(found, name):
    now = found["1"][name]
    assert now["executed"] == [] and now["messages"] == []
    refusals = [error for error in now["errors"] if "calls itself ChatGLM and is not taken for ChatGLM-6B (" in error]
    assert refusals and all(error.startswith("ValueError: ") and "\n" not in error for error in refusals)
    assert "FASTER_CHATGLM_6B_STRICT=1" in refusals[0] and "disabled()" in refusals[0]


@pytest.mark.parametrize("name", NEWER)
def test_newer_models_pass_quietly(found, name):
    now = found[""][name]
    assert now["errors"] == [] and len(set(now["executed"])) == 3
    assert [level for level, _ in now["messages"]] == ["INFO"]


@pytest.mark.parametrize("variable", ["", "1"])
def test_ours_and_unrelated_models_are_as_ever(found, variable):
    assert found[variable]["ours"]["errors"] == [] and found[variable]["ours"]["executed"] == []
    assert not [level for level, _ in found[variable]["ours"]["messages"] if level != "INFO"]
    assert found[variable]["unrelated"]["executed"] and not found[variable]["unrelated"]["messages"]
    assert not [error for error in found[variable]["unrelated"]["errors"] if "calls itself ChatGLM" in error]


def test_status_shows_strictness(found):
    strict, first_line, passed = found["1"]["status"]
    assert strict and first_line.endswith("enabled, strict: other checkpoints named ChatGLM are refused") and not passed
    strict, first_line, passed = found[""]["status"]
    assert not strict and first_line.endswith(": enabled") and len(passed) == len(EXTRA) + 1 + len(NEWER)


@pytest.mark.parametrize("variable", ["", "1"])
def test_strictness_lasts_until_it_is_changed(found, variable):
    names = ("disabled", "enabled again", "lenient", "lenient still", "strict")
    assert [found[variable][name] for name in names] == [False, variable == "1", False, False, True]


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_file_too_large_to_be_judged_is_no_way_around(tmp_path, tiny_dir, file):
    """The file is sparse, so that reading it would take the machine's memory."""
    checkpoint = remote_code.add_working_code(remote_code.chatglm_6b(tmp_path / "checkpoint", tiny_dir))
    with open(checkpoint / file, "r+b") as opened:
        opened.truncate(64 << 30)
    found = remote_code.run_python(
        """
import sys
import faster_chatglm_6b
from transformers.dynamic_module_utils import get_class_from_dynamic_module
errors = []
for name in ("configuration_chatglm.ChatGLMConfig", "tokenization_chatglm.ChatGLMTokenizer"):
    try:
        get_class_from_dynamic_module(name, sys.argv[1])
    except OSError as error:
        errors.append(str(error))
answer([errors, executed()])
""",
        tmp_path / "process",
        checkpoint,
    )
    errors, executed = found
    assert executed == [] and len(errors) == 2
    assert all("68719476736 bytes, but more than 16777216 are not read" in error and file in error for error in errors)
