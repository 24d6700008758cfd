"""Rows in the captured loop: in Triton's interpreter, where steps run eagerly, and captured on a GPU."""

import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels to run")

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
sys.path[:0] = [str(ROOT), str(Path(__file__).parent), str(ROOT / "tests" / "decoding")]
import captured_checks  # noqa: E402

NAMES = ("greedy", "seeds", "logprobs", "places", "broken_scores", "prefix")


def load(with_prefix: bool) -> torch.nn.Module:
    """Load the tiny golden model in float32, with or without a P-Tuning prefix."""
    from safetensors.torch import load_file

    from faster_chatglm_6b.configuration_chatglm import ChatGLMConfig
    from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration

    folder = GOLDEN / "ckpt" / ("tiny-ptuning-proj0" if with_prefix else "tiny")
    config = ChatGLMConfig.from_pretrained(folder)
    model = ChatGLMForConditionalGeneration.from_pretrained(GOLDEN / "ckpt" / "tiny", config=config).float().eval()
    if with_prefix:
        begin = "transformer.prefix_encoder."
        state = {name.removeprefix(begin): value for name, value in load_file(folder / "model.safetensors").items()}
        model.transformer.prefix_encoder.load_state_dict(state)
    # Fewer blocks of ids for the interpreter to look at.
    model.config.max_sequence_length = captured_checks.LONGEST
    return model


def run_all() -> dict[str, str | None]:
    """Map the name of each check to what went wrong, or to None."""
    from interpreter_blocks import use_large_blocks

    from faster_chatglm_6b.ops.triton.configs import PromptAttention
    from faster_chatglm_6b.ops.triton.packed import prompt_attention, rotary_concat
    from faster_chatglm_6b.serving.rows import captured

    torch.set_num_threads(1)
    use_large_blocks(keys=256)
    captured.PAGE_TOKENS = 128
    rotary_concat.BLOCK_M = 128
    prompt_attention.prompt_attention_config = lambda *_: PromptAttention(128, 128, 4, 1)
    results = {}
    for name in NAMES:
        start = time.perf_counter()
        try:
            getattr(captured_checks, f"check_{name}")(load(name == "prefix"), 2)
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
            print(results[name], file=sys.stderr)
        print(f"{time.perf_counter() - start:6.2f} s  {name}", file=sys.stderr, flush=True)
    return results


@pytest.fixture(scope="module")
def results() -> dict[str, str | None]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", NAMES)
def test_interpreted(name: str, results: dict[str, str | None]) -> None:
    assert results[name] is None, results[name]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", NAMES)
def test_captured(name: str) -> None:
    getattr(captured_checks, f"check_{name}")(load(name == "prefix").cuda(), 12)


if __name__ == "__main__":
    print(json.dumps(run_all()))
