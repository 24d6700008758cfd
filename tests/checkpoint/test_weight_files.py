"""Checking weight files reads them at most once and costs no more memory than they have bytes."""

import io
import os
import resource
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tampering import BOTH_PATHS, DENSE, EMBEDDING, as_bin, refused

from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration


def memory_limit(function):
    """Run the function with 1 GB of address space above what the process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30), before[1]))
    try:
        function()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@BOTH_PATHS
@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="the memory of this process cannot be told without /proc"
)
def test_bin_files_cost_no_more_than_they_hold(checkpoint, settings):
    """Compressed tables, tensors that repeat one number and absent storages stay within the memory limit."""
    path = as_bin(checkpoint)
    whole = path.read_bytes()

    def deflated():
        with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            for record in old.infolist():
                content = old.read(record)
                if record.filename.endswith("data.pkl"):
                    with new.open(record.filename, "w", force_zip64=True) as file:
                        file.write(content)
                        for _ in range(3 << 10):
                            file.write(bytes(1 << 20))
                else:
                    new.writestr(record.filename, content)

    def long_table():
        with zipfile.ZipFile(path, "w") as new:
            new.writestr("archive/data.pkl", bytes(17 << 20))
            new.writestr("archive/version", b"3")

    def repeated():
        tensors = torch.load(io.BytesIO(whole), weights_only=True)
        torch.save(tensors | {EMBEDDING: torch.ones(1).expand(1 << 20, 1 << 20)}, path)

    def repeated_in_shape():
        tensors = torch.load(io.BytesIO(whole), weights_only=True)
        torch.save(tensors | {EMBEDDING: torch.ones(1).half().expand(704, 128)}, path)

    def shared():
        one = torch.ones(128 << 10)
        torch.save({f"{number}": one.view(-1) for number in range(1 << 12)}, path)

    def legacy():
        torch.save({"a": torch.ones(256).half()}, path, _use_new_zipfile_serialization=False)
        content = path.read_bytes()
        assert content.count(b"K\x00M\x00\x01\x85") == 1 and content.count(b"cpuq\x06M\x00\x01N") == 1
        # The file now claims 2^31 - 1 numbers instead of 256.
        content = content.replace(b"cpuq\x06M\x00\x01N", b"cpuq\x06J\xff\xff\xff\x7fN")
        path.write_bytes(content)

    def legacy_memo():
        torch.save({"a": torch.ones(256).half()}, path, _use_new_zipfile_serialization=False)
        content = path.read_bytes()
        path.write_bytes(content.replace(b"M\x00\x01N", b"M\x00\x01K\x07"))

    def reserving():
        path.write_bytes(b"\x80\x02cbuiltins\nbytearray\n" + b"J\xff\xff\xff\x7f\x85R.")

    def reserving_in_capitals():
        torch.save({"a": torch.ones(1)}, path)
        with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as old, zipfile.ZipFile(path, "w") as new:
            for record in old.infolist():
                content = old.read(record)
                if record.filename.endswith("data.pkl"):
                    content = b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R."
                new.writestr(record.filename.replace("data.pkl", "DATA.PKL"), content)

    for change in (
        deflated,
        long_table,
        repeated,
        repeated_in_shape,
        shared,
        legacy,
        legacy_memo,
        reserving,
        reserving_in_capitals,
    ):
        change()
        assert path.stat().st_size < 20 << 20

        def load(change=change):
            with pytest.raises(OSError, match="truncated or corrupt") as caught:
                ChatGLMForConditionalGeneration.from_pretrained(checkpoint, **settings)
            assert "allocate" not in str(caught.value), change
            print(change.__name__, caught.value)

        memory_limit(load)


@BOTH_PATHS
def test_tensors_that_are_none(checkpoint, settings):
    """Sparse tensors, tensors quantised by torch and tensors without content are refused."""
    path = checkpoint / "model.safetensors"
    stored = load_file(path)
    sparse = stored[DENSE].to_sparse()
    quantised = torch.quantize_per_tensor(stored[DENSE].float(), 0.1, 0, torch.qint8)
    for number, tensor in enumerate((sparse, quantised, stored[DENSE].to("meta"))):
        folder = shutil.copytree(checkpoint, checkpoint.parent / str(number))
        as_bin(folder, **{DENSE: tensor})
        refused(folder, "truncated or corrupt", error=OSError, **settings)


@BOTH_PATHS
def test_pipes_and_headers_that_lie(checkpoint, settings):
    path = checkpoint / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(struct.pack("<Q", 1 << 60) + content[8:])
    refused(checkpoint, "truncated or corrupt", error=OSError, **settings)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        ChatGLMForConditionalGeneration.from_pretrained(checkpoint, **settings)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_whole_files_are_read_once(tiny_dir, tmp_path, form, monkeypatch):
    """Checking reads no weights: only scales are taken out of a file."""
    from faster_chatglm_6b.checkpoint import files as checkpoint_files
    from faster_chatglm_6b.checkpoint import source

    checkpoint = shutil.copytree(tiny_dir, tmp_path / "checkpoint")
    if form == "bin":
        as_bin(checkpoint)
    files = source.weight_files(str(checkpoint), {})
    taken, mapped = [], []
    load = torch.load
    monkeypatch.setattr(torch, "isfinite", lambda tensor: taken.append(tensor))
    monkeypatch.setattr(torch, "load", lambda *args, mmap, **kw: mapped.append(mmap) or load(*args, mmap=mmap, **kw))
    held = checkpoint_files.contents(files, "x")
    assert not taken and mapped == [True] * (form == "bin")
    assert {key: one.shape for key, one in held.items()} == {
        key: tuple(value.shape) for key, value in load_file(tiny_dir / "model.safetensors").items()
    }
