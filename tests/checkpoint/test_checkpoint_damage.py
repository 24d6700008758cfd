"""A damaged checkpoint ends in one of two errors or in the model that its files describe, never in a crash or a hang.

The errors are ValueError (the files contradict each other or this package's model) and OSError (a file is missing or
cannot be read). transformers' Auto classes read the JSON files before this package does. They raise errors of their own
if such a file holds another kind of value than they expect. Loading happens in a process of its own: this file starts
itself as a program.
"""

import json
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[1])]
from checkpoint_damage import TOKENIZER_DAMAGES, apply, damages, weight_files  # noqa: E402
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from property_profiles import examples  # noqa: E402
from worker import Worker, serve  # noqa: E402

CHECKPOINTS = Path(__file__).parents[1] / "golden" / "ckpt"
BASES = ("tiny", "tiny-sharded", "tiny-sharded-safetensors", "tiny-int8", "tiny-int4")
# Limit the address space: what a damaged file asks for in vain must not take the machine's memory.
LIMIT = 16 << 30


@pytest.fixture(scope="module")
def loader():
    worker = Worker(Path(__file__), {"HF_HUB_OFFLINE": "1"}, timeout=60)
    yield worker
    worker.close()


@pytest.mark.parametrize("base", BASES)
@examples(short=120, long=3000)
@given(data=st.data())
def test_damaged_weights_and_config(loader, base, data):
    damage = data.draw(damages(base))
    problem = loader.ask(damage)
    assert problem is None, problem


@examples(short=120, long=3000)
@given(damage=TOKENIZER_DAMAGES)
def test_damaged_tokenizer_config(loader, damage):
    problem = loader.ask(damage)
    assert problem is None, problem


def main() -> None:
    """Answer each damage with None, or with what is wrong about how it ended."""
    import os
    import resource
    import shutil
    import tempfile
    import traceback

    import torch

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    with tempfile.TemporaryDirectory() as folder:
        # transformers guesses a model from the path if config.json does not say: no part of the path may be random.
        os.chdir(folder)
        bases = {base: _base(base, Path(folder)) for base in BASES}
        _load("class", bases["tiny"])

        def answer(damage):
            directory = shutil.copytree(bases[damage["base"]], Path("damaged"))
            try:
                apply(directory, damage)
                try:
                    loaded = _load(damage["entry"], directory)
                except (ValueError, OSError) as error:
                    return None if len(str(error)) > 20 else f"says too little: {error!r}"
                except Exception as error:
                    return None if _is_of_auto_classes(error) else traceback.format_exc()[-5000:]
                try:
                    return _difference(damage, loaded, directory)
                except Exception:
                    return traceback.format_exc()[-5000:]
            finally:
                shutil.rmtree(directory)

        serve(answer)


def _base(name: str, folder: Path) -> Path:
    """Return a whole checkpoint to copy."""
    import shutil

    from safetensors.torch import load_file, save_file

    if name != "tiny-sharded-safetensors":
        return CHECKPOINTS / name
    directory = shutil.copytree(CHECKPOINTS / "tiny", folder / name)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {}}
    for shard, names in enumerate((list(tensors)[::2], list(tensors)[1::2])):
        file = f"model-{shard + 1:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, directory / file, {"format": "pt"})
        index["weight_map"] |= dict.fromkeys(names, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def _load(entry: str, directory: Path):
    import faster_chatglm_6b  # noqa: F401 the hook, for "auto"

    if entry == "tokenizer":
        from faster_chatglm_6b.tokenization_chatglm import ChatGLMTokenizer

        return ChatGLMTokenizer.from_pretrained(directory)
    if entry == "auto tokenizer":
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    if entry == "auto":
        from transformers import AutoModel

        return AutoModel.from_pretrained(directory, trust_remote_code=True)
    from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration

    bits = {"quantization_bit": 8} if entry == "quantise" else {}
    return ChatGLMForConditionalGeneration.from_pretrained(directory, **bits)


def _is_of_auto_classes(error: Exception) -> bool:
    """Return True if transformers' Auto classes failed on a file before they asked for a class of ours."""
    import traceback

    last = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return last.name in ("tokenization_auto.py", "configuration_auto.py", "auto_factory.py", "configuration_utils.py")


def _difference(damage: dict, loaded, directory: Path) -> str | None:
    """Describe what is wrong with a load that succeeded: it must give what the files say, and work."""
    import torch

    if "tokenizer" in damage["entry"]:
        text = "晚上 Hello  x"
        if loaded.do_lower_case or loaded.remove_space:
            text = "hello"
        ids = loaded(text)["input_ids"]
        if loaded.decode(loaded.encode_text(text)) != text or ids[:-2] != loaded.encode_text(text):
            return f"the tokenizer gave {ids}"
        return None
    config = json.loads((directory / "config.json").read_text("utf-8"))
    for key in ("hidden_size", "num_layers", "num_attention_heads", "layernorm_epsilon", "position_encoding_2d"):
        if key in config and getattr(loaded.config, key) != config[key]:
            return f"{key} is {getattr(loaded.config, key)!r} instead of {config[key]!r}"
    stored = _read(directory)
    for name, value in loaded.state_dict().items():
        if name == "lm_head.weight" and loaded.config.tie_word_embeddings:
            name = "transformer.word_embeddings.weight"
        if name == "transformer.word_embeddings.weight" and loaded.config.tie_word_embeddings and name not in stored:
            name = "lm_head.weight"  # the one tensor may have either name
        if ".prefix_encoder." in name and name not in stored:
            continue
        if damage["entry"] == "quantise" and (name.endswith("weight_scale") or value.dtype == torch.int8):
            continue
        if name not in stored:
            return f"{name} is not in the files, but the model has it"
        if stored[name].is_floating_point() != value.is_floating_point():
            return f"{name} is {stored[name].dtype} in the files and {value.dtype} in the model"
        if not torch.equal(stored[name].to(value.dtype).nan_to_num(7), value.nan_to_num(7)):
            return f"{name} differs from what the files say"
        if name.endswith("weight_scale") and not value.isfinite().all():
            return f"{name} holds values that are not finite"
    ids = torch.tensor([[5, loaded.config.gmask_token_id, loaded.config.bos_token_id]])
    with torch.no_grad():
        logits = loaded(ids).logits
    return None if logits.shape == (1, 3, loaded.config.vocab_size) else f"logits of shape {list(logits.shape)}"


def _read(directory: Path) -> dict:
    """Read every tensor in the checkpoint's files without transformers or this package."""
    import torch
    from safetensors.torch import load_file

    tensors = {}
    for path in weight_files(directory):
        tensors |= load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    return tensors


if __name__ == "__main__":
    main()
