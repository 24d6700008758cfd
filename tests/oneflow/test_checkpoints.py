"""Checkpoint files are read and written without torch, quantised ones too."""

import json
import pickle
import shutil
import zipfile
from collections import OrderedDict

import pytest
import torch
from golden_checks import assert_close

from faster_chatglm_6b.layers.quantized import quantize_weight
from faster_chatglm_6b.oneflow_compat import safetensors_files, torch_files

PROMPT = [[5, 143, 321, 324]]


def logits_of(model):
    with torch.no_grad():
        return model(torch.tensor(PROMPT)).logits


@pytest.fixture(scope="module")
def expected(tiny_model):
    return logits_of(tiny_model)


def test_sharded_bin(load, golden_dir, expected):
    """Real torch wrote the two shards."""
    assert_close(logits_of(load(golden_dir / "ckpt" / "tiny-sharded").float()), expected)


@pytest.mark.parametrize(
    ("options", "files"),
    [
        ({}, {"pytorch_model.bin"}),
        ({"max_shard_size": "600KB"}, {"pytorch_model.bin.index.json", "pytorch_model-00001-of-00003.bin"}),
        ({"safe_serialization": True}, {"model.safetensors"}),
        (
            {"safe_serialization": True, "max_shard_size": "600KB"},
            {"model.safetensors.index.json", "model-00001-of-00003.safetensors"},
        ),
    ],
    ids=["bin", "sharded bin", "safetensors", "sharded safetensors"],
)
def test_save_and_load(load, tiny_dir, tmp_path, expected, options, files):
    load(tiny_dir).save_pretrained(tmp_path, **options)
    written = {path.name for path in tmp_path.iterdir()}
    assert files <= written and not any(path.suffix == ".py" for path in tmp_path.iterdir()), written
    model = load(tmp_path)
    assert {str(parameter.dtype) for parameter in model.parameters()} == {"oneflow.float16"}
    assert_close(logits_of(model.float()), expected)


@pytest.mark.parametrize("options", [{}, {"safe_serialization": True}], ids=["bin", "safetensors"])
@pytest.mark.parametrize("bits", [8, 4])
def test_save_and_load_of_quantised_models(load, tiny_dir, tmp_path, bits, options):
    model = load(tiny_dir).quantize(bits)
    model.save_pretrained(tmp_path, **options)
    again = load(tmp_path)
    state = again.state_dict()
    for name, value in model.state_dict().items():
        assert state[name].dtype == value.dtype and torch.equal(state[name], value), name
    assert_close(logits_of(again.float()), logits_of(model.float()))


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_checkpoints_against_stock(load, golden_dir, golden_tensors, bits):
    tensors = golden_tensors("quant")
    model = load(golden_dir / "ckpt" / f"tiny-int{bits}").float()
    for i in range(3):
        with torch.no_grad():
            logits = model(tensors[f"input_ids.{i}"].view(1, -1)).logits[0]
        assert_close(logits, tensors[f"int{bits}_from_half.exact_f32.logits.{i}"], i)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantising_gives_stocks_integers(load, tiny_dir, golden_dir, golden_tensors, golden_json, bits):
    """Half weights give stock's integers by hand and while loading, and so do float32 weights."""
    from safetensors.torch import load_file

    stored = load_file(golden_dir / "ckpt" / f"tiny-int{bits}" / "model.safetensors")
    for model in (load(tiny_dir).quantize(bits), load(tiny_dir, quantization_bit=bits)):
        state = model.state_dict()
        for name in (name for name in stored if not name.endswith("inv_freq")):
            assert state[name].dtype == stored[name].dtype and torch.equal(state[name], stored[name]), name
    tensors, case = golden_tensors("quant"), f"int{bits}_from_float32"
    state = load(tiny_dir).float().quantize(bits).state_dict()
    names = [key.removeprefix(f"{case}.") for key in tensors if key.startswith(f"{case}.transformer")]
    assert len(names) == 24
    for name in names:
        assert torch.equal(state[name], tensors[f"{case}.{name}"]), name
    micro = golden_json("quant_micro")
    integers, scale = quantize_weight(torch.tensor(micro["weight"]), bits)
    assert integers.tolist() == micro[f"int{bits}_float32"]["weight_int8_storage"]
    assert scale.tolist() == micro[f"int{bits}_float32"]["weight_scale_fp16"]


TENSORS = {
    "float32": lambda: torch.randn(3, 4),
    "float16": lambda: torch.randn(3, 4).half(),
    "bfloat16": lambda: torch.randn(3, 4).to(torch.bfloat16),
    "int64": lambda: torch.tensor([[1, -(2**40)], [3, 4]]),
    "int8": lambda: torch.tensor([-128, 127, 5]).to(torch.int8),
    "uint8": lambda: torch.tensor([0, 255]).to(torch.uint8),
    "bool": lambda: torch.tensor([True, False]),
    "scalar": lambda: torch.tensor(2.5),
    "transposed": lambda: torch.randn(3, 4).transpose(0, 1),
}


@pytest.mark.parametrize("save, load_again", [(torch.save, torch.load), (None, None)], ids=["bin", "safetensors"])
def test_every_dtype_comes_back(tmp_path, save, load_again):
    tensors = OrderedDict((name, make()) for name, make in TENSORS.items())
    path = tmp_path / "file"
    if save is None:
        safetensors_files.save_file(tensors, path, metadata={"format": "pt"})
        found = safetensors_files.load_file(path)
        with safetensors_files.SafeOpen(path) as file:
            assert file.metadata() == {"format": "pt"} and set(file.keys()) == set(tensors)
    else:
        save(tensors, path)
        found = load_again(path)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and tuple(found[name].shape) == tuple(tensor.shape), name
        assert found[name].float().tolist() == tensor.float().tolist(), name


def test_tied_weights_are_written_once(tmp_path):
    tensor = torch.randn(100, 100)
    torch.save({"first": tensor, "second": tensor.detach()}, tmp_path / "file")
    with zipfile.ZipFile(tmp_path / "file") as archive:
        assert len([name for name in archive.namelist() if "/data/" in name]) == 1


def test_code_in_a_pickle_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "written"), "w")

    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"weight": Trap()}, protocol=2))
    with pytest.raises(pickle.UnpicklingError, match="which no checkpoint needs; it is not loaded"):
        torch.load(path)
    assert not (tmp_path / "written").exists()


def test_a_tensor_past_the_end_of_its_storage_is_refused(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"weight": torch.ones(8)}, path)
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read("archive/data.pkl")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", bytes(16))
    with pytest.raises(pickle.UnpicklingError, match="past the end of its storage"):
        torch.load(path)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs", b"PK\x03\x04damaged"])
def test_a_damaged_bin_says_so(load, tiny_dir, tmp_path, content):
    shutil.copyfile(tiny_dir / "config.json", tmp_path / "config.json")
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(OSError):
        load(tmp_path)


@pytest.mark.parametrize("keep", [4, 100, 5000, -10])
def test_a_damaged_safetensors_says_so(load, tiny_dir, tmp_path, keep):
    shutil.copyfile(tiny_dir / "config.json", tmp_path / "config.json")
    content = (tiny_dir / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:keep])
    with pytest.raises(OSError, match="truncated or corrupt"):
        load(tmp_path)


def test_weights_that_are_missing_are_an_error(load, tiny_dir, tmp_path):
    shutil.copyfile(tiny_dir / "config.json", tmp_path / "config.json")
    state = safetensors_files.load_file(tiny_dir / "model.safetensors")
    del state["transformer.layers.1.mlp.dense_4h_to_h.weight"]
    torch_files.save_file(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="lack transformer.layers.1.mlp.dense_4h_to_h.weight"):
        load(tmp_path)


def test_what_is_saved_names_our_classes(load, tiny_dir, tmp_path):
    load(tiny_dir).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert config["auto_map"]["AutoModel"] == "modeling_chatglm.ChatGLMForConditionalGeneration"
