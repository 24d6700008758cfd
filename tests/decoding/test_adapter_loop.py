"""LoRA adapters take the plain path until they are merged, then the captured loop: interpreted, and on a GPU."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels")
peft = pytest.importorskip("peft", reason="adapters need peft: pip install peft")

# PEFT 0.21 asks for it by name, and transformers 4.45 does not import it.
import torch.distributed.tensor  # noqa: E402, F401

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).parent)]
from loop_checks import check_equal, expect, prompt  # noqa: E402

import faster_chatglm_6b  # noqa: E402

CHECKPOINTS = Path(__file__).resolve().parents[1] / "golden" / "ckpt"
NAMES = ("tiny", "tiny-int8", "tiny-int4")


def check(name: str, device: str, dtype: torch.dtype, tokens: int) -> None:
    """Check that the loop serves the base and the merged model with the right weights, and not the adapted one."""
    from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration

    model = ChatGLMForConditionalGeneration.from_pretrained(CHECKPOINTS / name).to(dtype).to(device).eval()
    settings = {"input_ids": prompt(model, 6), "max_new_tokens": tokens, "eos_token_id": None}
    before = check_equal(model, **settings)
    torch.manual_seed(0)
    options = {"target_modules": ["query_key_value", "dense", "dense_4h_to_h"], "init_lora_weights": False}
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=32, **options))
    seen = faster_chatglm_6b.status().plain_generations
    with expect(plain=1):
        unmerged = adapted.generate(**settings, do_sample=False).tolist()
    assert unmerged != before
    reasons = [why for why, count in faster_chatglm_6b.status().plain_generations.items() if count != seen.get(why, 0)]
    assert len(reasons) == 1 and reasons[0].startswith("transformer.layers.0.attention.query_key_value is a "), reasons
    with warnings.catch_warnings():
        # Merging into integer weights warns of rounding.
        warnings.simplefilter("ignore", UserWarning)
        merged = adapted.merge_and_unload()
    after = check_equal(merged, **settings)
    assert after != before
    if name == "tiny" and dtype == torch.float32:
        assert after == unmerged


@pytest.mark.parametrize("name", ["tiny", "tiny-int8"])
def test_interpreted(name):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, __file__, name], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu(name):
    check(name, "cuda", torch.float32, 10)


if __name__ == "__main__":
    torch.set_num_threads(1)
    from interpreter_blocks import use_large_blocks

    use_large_blocks()
    check(sys.argv[1], "cpu", torch.float32, 3)
