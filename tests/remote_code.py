"""Checkpoints that bring their own code, and fresh Python processes to load them in.

A tripwire file notes its name in the file ``$TRIPWIRE_LOG`` and raises when it is executed. Executed code thus shows
twice: in that log, and as an error of the load.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

REPOSITORY = Path(__file__).parent.parent

_NOTE = """
import os
with open(os.environ["TRIPWIRE_LOG"], "a") as log:
    log.write(__file__ + "\\n")
"""
_TRIPWIRE = _NOTE + 'raise RuntimeError("the code of the checkpoint was executed: " + __file__)\n'

# Stand-ins for the code of a checkpoint that must be left alone: the smallest classes that transformers can load.
_WORKING_CODE = {
    "configuration_chatglm.py": """
from transformers import PretrainedConfig

class ChatGLMConfig(PretrainedConfig):
    model_type = "chatglm"
""",
    "tokenization_chatglm.py": """
from transformers import PreTrainedTokenizer

class ChatGLMTokenizer(PreTrainedTokenizer):
    vocab_files_names = {}

    @property
    def vocab_size(self):
        return 1

    def get_vocab(self):
        return {"a": 0}

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return 0

    def _convert_id_to_token(self, index):
        return "a"
""",
    "modeling_chatglm.py": """
import torch
from transformers import PreTrainedModel
from .configuration_chatglm import ChatGLMConfig

class ChatGLMForConditionalGeneration(PreTrainedModel):
    config_class = ChatGLMConfig

    def __init__(self, config, **kwargs):
        super().__init__(config)
        self.linear = torch.nn.Linear(2, 2)
        self.post_init()

    def _init_weights(self, module):
        pass
""",
}

# The keys that tell these configurations apart, as published on the hub; sizes do not matter here.
CHATGLM2_CONFIG = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "ffn_hidden_size": 13696,
    "hidden_size": 4096,
    "kv_channels": 128,
    "layernorm_epsilon": 1e-05,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 32,
    "num_layers": 28,
    "padded_vocab_size": 65024,
    "rmsnorm": True,
    "seq_length": 32768,
}
OLD_VOCABULARY_CONFIG = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "bos_token_id": 150004,
    "eos_token_id": 150005,
    "hidden_size": 4096,
    "inner_hidden_size": 16384,
    "max_sequence_length": 2048,
    "num_attention_heads": 32,
    "num_layers": 28,
    "position_encoding_2d": True,
    "vocab_size": 150528,
}
CHATGLM2_TOKENIZER_CONFIG = {"tokenizer_class": "ChatGLMTokenizer", "remove_space": False, "do_lower_case": False}


def auto_map(upstream: str = "") -> dict[str, str]:
    """Return the ``auto_map`` of ChatGLM-6B's config.json; ``upstream`` is a hub id that holds the code."""
    prefix = upstream and f"{upstream}--"
    return {
        "AutoConfig": f"{prefix}configuration_chatglm.ChatGLMConfig",
        "AutoModel": f"{prefix}modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForSeq2SeqLM": f"{prefix}modeling_chatglm.ChatGLMForConditionalGeneration",
    }


def tokenizer_auto_map(upstream: str = "") -> dict[str, list[str | None]]:
    """Return the ``auto_map`` of tokenizer_config.json."""
    return {"AutoTokenizer": [f"{upstream and f'{upstream}--'}tokenization_chatglm.ChatGLMTokenizer", None]}


def chatglm_6b(directory: Path, tiny: Path, upstream: str = "") -> Path:
    """Copy the tiny checkpoint without any code in it."""
    directory.mkdir(parents=True)
    for name in ("config.json", "tokenizer_config.json", "ice_text.model", "model.safetensors"):
        shutil.copyfile(tiny / name, directory / name)
    edit_json(directory / "config.json", auto_map=auto_map(upstream))
    edit_json(directory / "tokenizer_config.json", auto_map=tokenizer_auto_map(upstream))
    return directory


def chatglm_6b_with_tripwires(directory: Path, tiny: Path, upstream: str = "") -> Path:
    """Copy the tiny checkpoint with a tripwire in every file of code that the published one has."""
    chatglm_6b(directory, tiny, upstream)
    for name in (*_WORKING_CODE, "quantization.py"):
        (directory / name).write_text(_TRIPWIRE)
    return directory


def plant_custom_generate(directory: Path, source: str = _TRIPWIRE) -> None:
    """Add the folder whose generate.py transformers would run in place of ``generate``."""
    (directory / "custom_generate").mkdir(parents=True)
    (directory / "custom_generate" / "generate.py").write_text(source)


def add_working_code(directory: Path) -> Path:
    """Add code that loads and notes in the log that it was executed."""
    for name, source in _WORKING_CODE.items():
        (directory / name).write_text(_NOTE + source)
    return directory


def other_glm(directory: Path, config: dict[str, Any], tokenizer_config: dict[str, Any]) -> Path:
    """Make a checkpoint of another model with the same model type and class names, and with working code."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({**config, "auto_map": auto_map()}))
    (directory / "tokenizer_config.json").write_text(json.dumps({**tokenizer_config, "auto_map": tokenizer_auto_map()}))
    save_file(
        {"linear.weight": torch.zeros(2, 2), "linear.bias": torch.zeros(2)},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    return add_working_code(directory)


def put_into_hub_cache(hf_home: Path, hub_id: str, revision: str, checkpoint: Path) -> None:
    """Put ``checkpoint`` into the cache as a download of ``hub_id`` at the branch or tag ``revision``."""
    commit = hashlib.sha1(f"{hub_id} {revision}".encode()).hexdigest()
    repository = hf_home / "hub" / f"models--{hub_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(commit)
    shutil.copytree(checkpoint, repository / "snapshots" / commit)


def edit_json(path: Path, remove: tuple[str, ...] = (), **changes: Any) -> None:
    """Change or remove keys of a JSON file."""
    content = {**json.loads(path.read_text("utf-8")), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if key not in remove}))


def run_python(source: str, working_directory: Path, *arguments: Any, **environment: str) -> Any:
    """Run ``source`` in a fresh process without network and return, through JSON, what it gave to ``answer(...)``.

    The process has its own Hugging Face home in ``working_directory``. It lists executed files with ``executed()``.
    """
    working_directory.mkdir(parents=True, exist_ok=True)
    script, answer = working_directory / "script.py", working_directory / "answer.json"
    answer.unlink(missing_ok=True)
    script.write_text(_PRELUDE + source)
    hf_home = working_directory / "hf_home"
    process = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=working_directory,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("FASTER_CHATGLM_6B_")},
            "PYTHONPATH": str(REPOSITORY),
            "HF_HOME": str(hf_home),
            "HF_HUB_CACHE": str(hf_home / "hub"),
            "HF_MODULES_CACHE": str(hf_home / "modules"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TRIPWIRE_LOG": str(working_directory / "tripwire.log"),
            "ANSWER": str(answer),
            **environment,
        },
    )
    assert process.returncode == 0, f"the process ended with {process.returncode}:\n{process.stdout}\n{process.stderr}"
    return json.loads(answer.read_text())


# Import nothing of transformers or of ours here: the tests are about the order of imports.
_PRELUDE = '''
def answer(value):
    import json, os
    with open(os.environ["ANSWER"], "w") as file:
        json.dump(value, file)

def executed():
    """Names of the files of remote code that were executed, in order."""
    import os
    if not os.path.exists(os.environ["TRIPWIRE_LOG"]):
        return []
    with open(os.environ["TRIPWIRE_LOG"]) as log:
        return [os.path.basename(line.strip()) for line in log]

def origin(value):
    """The first part of the name of the module that the class of value comes from."""
    return type(value).__module__.split(".")[0]

'''
