"""The captured loop after a P-Tuning prefix against stock and transformers' loop: interpreted, and on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels")

sys.path[:0] = [str(folder) for folder in (*Path(__file__).resolve().parents[2:0:-1], Path(__file__).parent)]
from loop_checks import both, check_equal, expect, padded, prompt  # noqa: E402
from near_ties import assert_equal_up_to_near_ties, measured_near_tie  # noqa: E402

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
KINDS = ("embedding", "projection")
EXACT = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}


def load(kind: str, device: str) -> torch.nn.Module:
    """Load the tiny model in float32 with a golden prefix of 8 keys."""
    from safetensors.torch import load_file

    from faster_chatglm_6b.configuration_chatglm import ChatGLMConfig
    from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration

    folder = GOLDEN / "ckpt" / f"tiny-ptuning-proj{KINDS.index(kind)}"
    config = ChatGLMConfig.from_pretrained(folder)
    model = ChatGLMForConditionalGeneration.from_pretrained(GOLDEN / "ckpt" / "tiny", config=config).float().eval()
    missing, unexpected = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert not unexpected and not any("prefix_encoder" in name for name in missing)
    return model.to(device)


def stock_tokens(model: torch.nn.Module, kind: str, tokens: int = 8) -> None:
    """Check that both kinds of prompt and a padded batch give stock's tokens."""
    from safetensors.torch import load_file

    tensors = load_file(GOLDEN / "golden" / "tiny" / f"ptuning_proj{KINDS.index(kind)}.safetensors")
    for name in ("gmask", "mask_mid", "batch"):
        ids = tensors[f"{name}.input_ids"].view(-1, tensors[f"{name}.input_ids"].shape[-1]).to(model.device)
        with expect(captured=1):
            output = model.generate(ids, **EXACT | {"max_new_tokens": tokens})
        expected = tensors[f"{name}.generated"].view(len(ids), -1)[:, :tokens]
        assert output[:, ids.shape[1] :].tolist() == expected.tolist(), name


def padding_shorter_and_longer_than_the_prefix(model: torch.nn.Module) -> None:
    lengths = (4, 16, 13, 7)
    batch = check_equal(model, **padded(model, lengths), max_new_tokens=3, eos_token_id=None)
    for row in (0, 2):
        single = check_equal(model, input_ids=prompt(model, lengths[row], row), max_new_tokens=3, eos_token_id=None)
        assert batch[row][16:] == single[0][lengths[row] :]


def cache_that_must_hold_the_prefix_too(model: torch.nn.Module) -> None:
    from faster_chatglm_6b.decoding import loop, session

    kept, session._SMALLEST_CAPACITY = session._SMALLEST_CAPACITY, 16
    try:
        model.release_cache()
        # One key more than 16 with the prefix, fewer than 16 without it.
        check_equal(model, input_ids=prompt(model, 5), max_new_tokens=4, eos_token_id=None)
        assert loop.engine_of(model)._sessions[1].capacity == 32
    finally:
        session._SMALLEST_CAPACITY = kept
        model.release_cache()


def trained_prefix(model: torch.nn.Module) -> None:
    """Check that new prefix values serve from the next call on and that a hook on the prefix runs."""
    ids, encoder = prompt(model, 6), model.transformer.prefix_encoder
    before = check_equal(model, input_ids=ids, max_new_tokens=3, eos_token_id=None)
    weight = encoder.embedding.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(-3)
    after = check_equal(model, input_ids=ids, max_new_tokens=3, eos_token_id=None)
    with torch.no_grad():
        weight.copy_(kept)
    assert before != after
    calls = []
    hook = encoder.register_forward_hook(lambda *arguments: calls.append(1))
    assert check_equal(model, input_ids=ids, max_new_tokens=3, eos_token_id=None) == before
    hook.remove()
    assert len(calls) == 2


def prefix_switched_off(model: torch.nn.Module) -> None:
    """Check that a session made with a prefix does not serve without it; the cache's unused keys would."""
    from prompt_checks import check_logits, poison, session_for

    ids, length = prompt(model, 6), model.config.pre_seq_len
    check_logits(model, input_ids=ids)
    poison(session_for(model, 1))
    try:
        model.config.pre_seq_len = None
        check_logits(model, input_ids=ids)
    finally:
        model.config.pre_seq_len = length
    check_logits(model, input_ids=ids)


def stream_with_processors(model: torch.nn.Module) -> None:
    ids, settings = prompt(model, 6), {"max_new_tokens": 4, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
    whole = check_equal(model, input_ids=ids, **settings)
    with expect(captured=1):
        streamed = [int(token[0]) for token in model.stream_tokens(ids, do_sample=False, **settings)]
    assert whole[0][6:] == streamed


CHECKS = (
    padding_shorter_and_longer_than_the_prefix,
    cache_that_must_hold_the_prefix_too,
    trained_prefix,
    prefix_switched_off,
    stream_with_processors,
)


@pytest.mark.parametrize("kind", KINDS)
def test_interpreted(kind):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__, kind], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]


class TestOnAGPU:
    pytestmark = gpu

    @pytest.fixture(scope="class", params=KINDS)
    def kind(self, request):
        return request.param

    @pytest.fixture(scope="class")
    def model(self, kind):
        return load(kind, "cuda")

    def test_stock_tokens(self, model, kind):
        stock_tokens(model, kind)

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_as_in_the_interpreter(self, model, check):
        check(model)

    def test_100_prompts_in_float32(self, model):
        for seed in range(100):
            check_equal(model, input_ids=prompt(model, 3 + seed % 40, seed), max_new_tokens=6)

    @pytest.mark.parametrize("batch", [2, 5, 33])
    def test_batches_in_float32(self, model, batch):
        check_equal(model, **padded(model, [3 + (7 * row) % 30 for row in range(batch)]), max_new_tokens=8)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("prefix_dtype", [torch.float32, None], ids=["float32 prefix", "same prefix"])
    def test_half(self, kind, dtype, prefix_dtype):
        """A half model serves with a prefix of its own dtype, or of float32 as the trainer keeps it."""
        model = load(kind, "cuda").to(dtype)
        model.transformer.prefix_encoder.to(prefix_dtype or dtype)
        prompts = [prompt(model, 3 + seed, seed) for seed in range(40)]
        near_tie = measured_near_tie(model, [{"input_ids": ids} for ids in prompts])
        different = 0
        for ids in prompts:
            ours, theirs = both(model, input_ids=ids, **EXACT)
            different += assert_equal_up_to_near_ties(model, ours, theirs, ids.shape[1], near_tie)
        print(f"{different} of 40 runs differ at a near-tie of less than {near_tie:.4f}")
        assert different < 20


if __name__ == "__main__":
    torch.set_num_threads(1)
    from interpreter_blocks import use_large_blocks

    use_large_blocks()
    tuned = load(sys.argv[1], "cpu")
    stock_tokens(tuned, sys.argv[1], tokens=4)
    for check in CHECKS if sys.argv[1] == "embedding" else ():
        check(tuned)
