"""The captured loop over quantised models against transformers' own loop: in Triton's interpreter, and on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels")

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).parent)]
import loop_checks  # noqa: E402

CHECKPOINTS = Path(__file__).resolve().parents[1] / "golden" / "ckpt"
MODELS = ("int8", "int4", "int8 groups head", "int4 groups head")
EXACT = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}


def load(name: str, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """Load a stored quantised checkpoint, or quantise one here in groups with its head."""
    from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration

    bits, grouped = name.split()[0], "groups" in name
    path = CHECKPOINTS / ("tiny" if grouped else f"tiny-{bits}")
    model = ChatGLMForConditionalGeneration.from_pretrained(path, torch_dtype=dtype)
    if grouped:
        model.quantize(int(bits[3:]), group_size=16, head_bits=8)
    return model.to(dtype).to(device).eval()


def check_tokens(model: torch.nn.Module, tokens: int) -> None:
    """Check one sequence and a padded batch."""
    ids = loop_checks.prompt(model, 6)
    loop_checks.check_equal(model, input_ids=ids, max_new_tokens=tokens, eos_token_id=None)
    loop_checks.check_equal(model, **loop_checks.padded(model, [6, 3]), max_new_tokens=tokens, eos_token_id=None)


# Only two of the models, because the interpreter takes seconds for a token.
@pytest.mark.parametrize("name", ["int8", "int4 groups head"])
def test_interpreted(name):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__, name], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("name", MODELS)
def test_on_a_gpu(name):
    check_tokens(load(name, torch.float32, "cuda"), 8)
    model = load(name, torch.float16, "cuda")
    for seed in range(20):
        ids = loop_checks.prompt(model, 3 + seed, seed)
        ours, theirs = loop_checks.both(model, input_ids=ids, **EXACT)
        step = next((i for i in range(len(ours[0])) if ours[0][i] != theirs[0][i]), None)
        if step is not None:
            with torch.no_grad():
                best = model(torch.tensor([ours[0][:step]], device="cuda")).logits[0, -1].float().topk(2).values
            assert best[0] - best[1] < 0.05, (ours, theirs)


if __name__ == "__main__":
    torch.set_num_threads(1)
    from interpreter_blocks import use_large_blocks

    use_large_blocks()
    check_tokens(load(sys.argv[1], torch.float32, "cpu"), 3)
