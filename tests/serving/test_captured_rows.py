"""Rows in the captured loop: on a CPU and in Triton's interpreter, where steps run eagerly, and captured on a GPU."""

import functools
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
sys.path[:0] = [str(ROOT), str(Path(__file__).parent), str(ROOT / "tests" / "decoding"), str(ROOT / "tests" / "ops")]
import captured_checks  # noqa: E402

NAMES = ("greedy", "seeds", "logprobs", "places", "broken_scores", "prefix")
DRAFTED = ("drafts", "ends_inside_drafts", "without_drafts", "seeds_with_drafts", "pages_with_drafts")


def load(prefix: int = 0, layers: int = 3, heads: int = 4) -> torch.nn.Module:
    """Make a small model with random weights in float32, with a P-Tuning prefix of so many tokens."""
    from faster_chatglm_6b.configuration_chatglm import ChatGLMConfig
    from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration

    sizes = {"num_layers": layers, "num_attention_heads": heads, "hidden_size": 32 * heads, "inner_hidden_size": 64}
    special = {"bos_token_id": 324, "eos_token_id": 325, "mask_token_id": 320, "gmask_token_id": 321}
    # Fewer blocks of ids for the interpreter to look at.
    lengths = {"vocab_size": 352, "max_sequence_length": captured_checks.LONGEST}
    torch.manual_seed(1)
    config = ChatGLMConfig(**sizes, **special, **lengths, pad_token_id=3, pre_seq_len=prefix or None)
    model = ChatGLMForConditionalGeneration(config).float().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0, 0.3)
    return model.requires_grad_(False)


def run_check(name: str, model: torch.nn.Module, most: int) -> None:
    import drafted_checks

    getattr(drafted_checks if name in DRAFTED else captured_checks, f"check_{name}")(model, most)


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
    for name in (*NAMES, *DRAFTED):
        start = time.perf_counter()
        try:
            model = load(100 if name == "prefix" else 0, layers=1 if name in DRAFTED else 2, heads=1)
            run_check(name, model, 2)
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


@pytest.mark.parametrize("name", (*NAMES, *DRAFTED))
def test_interpreted(name: str, results: dict[str, str | None]) -> None:
    assert results[name] is None, results[name]


@pytest.mark.parametrize("name", (*NAMES, *DRAFTED))
def test_on_a_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from faster_chatglm_6b.ops.cpu import steps

    # Otherwise nobody drafts who does not insist on it.
    monkeypatch.setattr(steps, "DRAFTS_PAY", True)
    run_check(name, load(100 if name == "prefix" else 0), 12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", (*NAMES, *DRAFTED))
def test_captured(name: str) -> None:
    run_check(name, load(100 if name == "prefix" else 0).cuda(), 12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("speculate", [3, 7, "auto"])
@pytest.mark.parametrize("name", NAMES)
def test_captured_with_drafts(name: str, speculate: int | str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured_checks, "make", functools.partial(captured_checks.make, speculate=speculate))
    run_check(name, load(100 if name == "prefix" else 0).cuda(), 12)


if __name__ == "__main__":
    print(json.dumps(run_all()))
