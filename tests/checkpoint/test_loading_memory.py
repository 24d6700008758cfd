"""A quantised checkpoint of the real shape loads and answers in little more memory than its weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAKE = """
import sys
from pathlib import Path

import torch
from measuring.cpu import random_model

folder, kind = sys.argv[1:]
model = random_model(2, torch.float16, 4, None, None)
model.save_pretrained(folder)
if kind != "safetensors":
    Path(folder, "model.safetensors").unlink()
    state = model.state_dict()
    if kind == "bin with a head":
        state["lm_head.weight"] = state["lm_head.weight"].clone()
    torch.save(state, Path(folder, "pytorch_model.bin"))
"""
LOAD = """
import json, resource, sys

import torch
from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration

model = ChatGLMForConditionalGeneration.from_pretrained(sys.argv[1]).eval()
model.generate(torch.tensor([[5, 130001, 130004]]), do_sample=False, max_new_tokens=2, eos_token_id=None)
weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
print(json.dumps([weights, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells the peak in KiB")
@pytest.mark.parametrize("kind", ["safetensors", "bin", "bin with a head"])
def test_the_peak_is_the_weights_and_a_gigabyte(tmp_path, kind):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "examples")))}
    for code, arguments in ((MAKE, [str(tmp_path), kind]), (LOAD, [str(tmp_path)])):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=1000
        )
        assert done.returncode == 0, done.stderr[-2000:]
    weights, peak = json.loads(done.stdout.splitlines()[-1])
    assert weights > 1.2e9 and peak <= weights + 1e9
