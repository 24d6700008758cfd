"""Saving over a checkpoint keeps the old one whole until the new one is complete.

Loads that run at the same time leave torch's default dtype alone.
"""

import inspect
import json
import os
import signal
import threading

import huggingface_hub
import pytest
import torch
import transformers
from transformers import AutoModel

from faster_chatglm_6b.checkpoint import loading
from faster_chatglm_6b.configuration_chatglm import ChatGLMConfig
from faster_chatglm_6b.disk import replacing as saving
from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration


def contents(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def full_disk(*args, **kwargs):
    raise OSError(28, "No space left on device")


def ctrl_c(*args, **kwargs):
    raise KeyboardInterrupt


def failing_after(number, function, failure):
    """Return ``function``, but with ``failure`` in place of the call of that number."""
    calls = []

    def call(*args, **kwargs):
        calls.append(args)
        return failure() if len(calls) == number else function(*args, **kwargs)

    return call


@pytest.mark.parametrize("failure", [full_disk, ctrl_c])
@pytest.mark.parametrize("where", ["first shard", "second shard", "config", "generation config"])
def test_an_interrupted_save_over_the_source(checkpoint, monkeypatch, where, failure):
    """A quantised save in shards may fail at any file: the old checkpoint stays to the byte, without leftovers."""
    model = ChatGLMForConditionalGeneration.from_pretrained(checkpoint).quantize(8)
    before = contents(checkpoint)
    if "shard" in where:
        number = 1 if where == "first shard" else 2
        save_file = transformers.modeling_utils.safe_save_file
        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", failing_after(number, save_file, failure))
    elif where == "config":
        monkeypatch.setattr(transformers.PretrainedConfig, "to_json_file", failure)
    else:
        monkeypatch.setattr(transformers.GenerationConfig, "save_pretrained", failure)
    with pytest.raises((OSError, KeyboardInterrupt)):
        model.save_pretrained(checkpoint, max_shard_size="300KB")
    assert contents(checkpoint) == before and not [path for path in checkpoint.iterdir() if path.is_dir()]
    monkeypatch.undo()
    model.save_pretrained(checkpoint, max_shard_size="300KB")
    assert ChatGLMForConditionalGeneration.from_pretrained(checkpoint).config.quantization_bit == 8
    with pytest.raises((OSError, KeyboardInterrupt)), monkeypatch.context() as patch:
        patch.setattr("transformers.modeling_utils.safe_save_file", failure)
        model.save_pretrained(checkpoint.parent / "new")
    assert not (checkpoint.parent / "new").exists()


@pytest.mark.parametrize("failure", [full_disk, ctrl_c])
@pytest.mark.parametrize("number", range(1, 7))
def test_a_failure_between_two_renames(checkpoint, monkeypatch, number, failure):
    model = ChatGLMForConditionalGeneration.from_pretrained(checkpoint).quantize(8)
    before = contents(checkpoint)
    moves = []
    monkeypatch.setattr(saving.os, "replace", failing_after(10**6, os.replace, failure))
    real = os.replace

    def replace(source, target):
        moves.append(target)
        return failure() if len(moves) == number and ".saving" in str(source) + str(target) else real(source, target)

    monkeypatch.setattr(ChatGLMConfig, "to_json_file", transformers.PretrainedConfig.to_json_file)
    monkeypatch.setattr(saving.os, "replace", replace)
    try:
        model.save_pretrained(checkpoint)
    except (OSError, KeyboardInterrupt):
        assert contents(checkpoint) == before and not [path for path in checkpoint.iterdir() if path.is_dir()]
    else:
        assert len(moves) < number
        assert number > 4, "fewer files are moved than are saved"


def test_ctrl_c_waits_for_the_renames(checkpoint, monkeypatch):
    model = ChatGLMForConditionalGeneration.from_pretrained(checkpoint).quantize(8)
    move = saving._move

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return move(*args)

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(saving, "_move", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(checkpoint)
    assert signal.getsignal(signal.SIGINT) is handler
    saved = ChatGLMForConditionalGeneration.from_pretrained(checkpoint)
    assert saved.config.quantization_bit == 8


def test_a_config_saved_over_itself(checkpoint, monkeypatch):
    config = ChatGLMConfig.from_pretrained(checkpoint)
    before = contents(checkpoint)
    monkeypatch.setattr(ChatGLMConfig, "to_json_string", full_disk)
    with pytest.raises(OSError, match="No space left"):
        config.save_pretrained(checkpoint)
    assert contents(checkpoint) == before


def test_files_of_earlier_saves_are_not_mixed_with_new_ones(checkpoint):
    """After one file, shards, fewer shards and one file again, the model that was saved last is loaded."""
    model = ChatGLMForConditionalGeneration.from_pretrained(checkpoint)
    (checkpoint / "model-notes.txt").write_text("mine")
    for number, size in enumerate(("200KB", "500KB", "1GB", "300KB")):
        with torch.no_grad():
            model.transformer.final_layernorm.bias.fill_(number)
        model.save_pretrained(checkpoint, max_shard_size=size)
        again = ChatGLMForConditionalGeneration.from_pretrained(checkpoint)
        assert again.transformer.final_layernorm.bias.unique().tolist() == [number]
        weights = {path.name for path in checkpoint.glob("*.safetensors*")}
        index = checkpoint / "model.safetensors.index.json"
        named = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
        assert weights - {index.name} == named
    assert {"model-notes.txt", "ice_text.model", "tokenizer_config.json"} <= set(contents(checkpoint))


def test_a_bin_save_is_not_hidden_by_older_safetensors(checkpoint):
    model = ChatGLMForConditionalGeneration.from_pretrained(checkpoint)
    with torch.no_grad():
        model.transformer.final_layernorm.bias.fill_(3)
    model.save_pretrained(checkpoint, safe_serialization=False)
    again = ChatGLMForConditionalGeneration.from_pretrained(checkpoint)
    assert again.transformer.final_layernorm.bias.unique().tolist() == [3]


def test_a_save_by_another_process_removes_nothing(checkpoint):
    """A process that is not transformers' main one removes no file."""
    model = ChatGLMForConditionalGeneration.from_pretrained(checkpoint)
    model.save_pretrained(checkpoint, max_shard_size="300KB")
    before = set(contents(checkpoint))
    model.save_pretrained(checkpoint, is_main_process=False)
    assert before <= set(contents(checkpoint))


@pytest.mark.parametrize("by_place", [False, True])
def test_a_repository_is_named_after_the_directory(checkpoint, monkeypatch, by_place):
    class Asked(Exception):
        pass

    def create_repo(repo_id, *args, **kwargs):
        raise Asked(repo_id)

    model = ChatGLMForConditionalGeneration.from_pretrained(checkpoint)
    # transformers 5 calls the hub's client itself; earlier releases call a method of the model.
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, repo_id, **kwargs: create_repo(repo_id))
    monkeypatch.setattr(type(model), "_create_repo", staticmethod(create_repo), raising=False)
    places = list(inspect.signature(transformers.PreTrainedModel.save_pretrained).parameters.values())[2:]
    before = [one.default for one in places[: [one.name for one in places].index("push_to_hub")]]
    arguments, named = ((*before, True), {}) if by_place else ((), {"push_to_hub": True})
    with pytest.raises(Asked, match=f"^{checkpoint.name}$"):
        model.save_pretrained(str(checkpoint), *arguments, **named)


def test_a_path_that_is_a_file(checkpoint):
    """transformers logs the mistake and returns; the file stays."""
    ChatGLMForConditionalGeneration.from_pretrained(checkpoint).save_pretrained(checkpoint / "config.json")
    assert json.loads((checkpoint / "config.json").read_text("utf-8"))["num_layers"] == 3


@pytest.mark.parametrize("settings", [{}, {"quantization_bit": 8}, {"quantization_bit": 4, "dtype": "bfloat16"}])
def test_loads_at_once_leave_the_default_dtype(tiny_dir, settings):
    """Eight threads load in different dtypes, and every model is right."""
    wanted = [torch.float16, torch.bfloat16, torch.float32, torch.float16] * 2
    found, start = [None] * len(wanted), threading.Barrier(len(wanted))

    def load(number):
        start.wait()
        arguments = {"dtype": wanted[number], **settings}
        if number % 2:
            model = AutoModel.from_pretrained(tiny_dir, trust_remote_code=True, **arguments)
        else:
            model = ChatGLMForConditionalGeneration.from_pretrained(tiny_dir, **arguments)
        found[number] = model.transformer.final_layernorm.weight.dtype

    threads = [threading.Thread(target=load, args=(number,)) for number in range(len(wanted))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.get_default_dtype() == torch.float32
    assert found == ([torch.bfloat16] * len(wanted) if "dtype" in settings else wanted)
    assert "DISABLE_SAFETENSORS_CONVERSION" not in os.environ


def test_one_load_waits_for_another(tiny_dir, monkeypatch):
    """The second load starts after the first one has restored the default dtype."""
    inside, go_on, seen = threading.Event(), threading.Event(), []
    check = loading.check_checkpoint

    def slow(*args):
        inside.set()
        assert go_on.wait(60)
        return check(*args)

    monkeypatch.setattr(loading, "check_checkpoint", slow)
    first = threading.Thread(target=ChatGLMForConditionalGeneration.from_pretrained, args=(tiny_dir,))
    first.start()
    assert inside.wait(60)
    second = threading.Thread(
        target=lambda: seen.append(ChatGLMForConditionalGeneration.from_pretrained(tiny_dir, quantization_bit=8))
    )
    second.start()
    second.join(0.2)
    assert second.is_alive() and not seen
    go_on.set()
    first.join()
    second.join()
    assert len(seen) == 1 and torch.get_default_dtype() == torch.float32


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_of_a_loading_process_can_load(tiny_dir):
    held, done = threading.Event(), threading.Event()

    def hold():
        with loading._lock:
            held.set()
            done.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(60)
    child = os.fork()
    if not child:
        os._exit(0 if loading._lock.acquire(timeout=5) else 1)
    status = os.waitpid(child, 0)[1]
    done.set()
    holder.join()
    assert os.waitstatus_to_exitcode(status) == 0
