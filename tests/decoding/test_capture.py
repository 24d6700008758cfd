"""A capture is left cleanly, with a stand-in for CUDA's graph; test_faults_gpu.py tests real ones."""

import gc
from collections import defaultdict

import pytest
import torch

from faster_chatglm_6b.decoding import graphs as capture

POOL = (0, 7)


class Tensor:
    """Stand in for a tensor on a GPU."""

    device = torch.device("cuda", 0)

    def zero_(self):
        return self


@pytest.fixture
def calls(monkeypatch):
    """Return a list of the calls in order; the first graph cannot be ended if ``spoilt`` is in it."""
    made = []

    class Graph:
        def __init__(self):
            self.number = sum(call == "graph" for call in made)
            made.append("graph")

        def capture_begin(self, pool=None, capture_error_mode="global"):
            assert capture_error_mode == "thread_local" and pool == (None if self.number else POOL)
            made.append(f"begin {self.number}")

        def capture_end(self):
            made.append(f"end {self.number}")
            if self.number == 0 and "spoilt" in made:
                raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):

        def note(*arguments, name=name):
            assert arguments == (0, POOL)
            made.append(name)
            if f"{name} fails" in made:
                raise RuntimeError("not recording")

        monkeypatch.setattr(torch._C, name, note, raising=False)
    return made


def test_streams_are_taken_up_again(monkeypatch):
    """Each living owner has one stream, and the stream of a dead owner is taken up again."""
    monkeypatch.setattr(capture, "_idle_streams", defaultdict(list))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: [device])
    owners = [Tensor() for _ in range(3)]
    streams = [capture.capture_stream(owner, Tensor.device) for owner in owners]
    assert len({id(stream) for stream in streams}) == 3
    for _ in range(40):
        owners[1] = None
        owners[1] = Tensor()
        assert capture.capture_stream(owners[1], Tensor.device) is streams[1]
    owners.clear()
    other = torch.device("cuda", 1)
    assert capture.capture_stream(Tensor(), other) == [other]


def test_a_good_capture(calls):
    assert capture.capture(POOL, lambda: calls.append("run"), Tensor()).number == 0
    assert calls == ["graph", "begin 0", "run", "end 0"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.cuda.OutOfMemoryError("out of memory")], ids=repr)
@pytest.mark.parametrize("spoilt", [False, True])
def test_the_first_error_comes_out(calls, error, spoilt):
    def run():
        calls.extend(["spoilt"] * spoilt)
        raise error

    with pytest.raises(type(error)) as caught:
        capture.capture(POOL, run, Tensor())
    assert caught.value is error
    left = ["_cuda_endAllocateToPool", "_cuda_releasePool", "graph", "begin 1", "end 1"] if spoilt else []
    assert [call for call in calls if call != "spoilt"] == ["graph", "begin 0", "end 0", *left]


def test_a_capture_that_cannot_be_ended(calls):
    """The error of the end comes out if it is the first, and an unused pool is not released once too often."""
    calls.append("_cuda_endAllocateToPool fails")
    with pytest.raises(RuntimeError, match="previous error during capture"):
        capture.capture(POOL, lambda: calls.append("spoilt"), Tensor())
    assert "_cuda_releasePool" not in calls and calls[-1] == "end 1"


@pytest.mark.parametrize("enabled", [True, False])
def test_no_collection(enabled):
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(KeyboardInterrupt), capture.no_collection():
            assert not gc.isenabled()
            raise KeyboardInterrupt
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
