"""The captured loop's prompt step on a GPU: lengths up to the longest prompt, padded batches, prefixes, integers."""

import random
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels")

sys.path.insert(0, str(Path(__file__).parent))
import prompt_checks  # noqa: E402
import row_checks  # noqa: E402
from loop_checks import padded, prompt  # noqa: E402
from prompt_checks import check_logits  # noqa: E402
from test_prefix_loop import load  # noqa: E402

from faster_chatglm_6b.decoding.loop import engine_of  # noqa: E402
from faster_chatglm_6b.decoding.steps.prompt import LENGTHS, MOST_CAPTURED_ROWS  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def model(request, load_on_gpu):
    return load_on_gpu(request.param)


@pytest.mark.parametrize("check", prompt_checks.EVERYWHERE + row_checks.EVERYWHERE, ids=lambda check: check.__name__)
def test_as_in_the_interpreter(model, check):
    check(model)


def test_random_lengths(model):
    rng = random.Random(0)
    edges = [length + offset for length in LENGTHS for offset in (0, 1)]
    for length in [3, *edges, *(rng.randint(3, 2047) for _ in range(20)), 2047]:
        check_logits(model, input_ids=prompt(model, length, length))


@pytest.mark.parametrize("batch", [2, 5, 8, 33])
def test_padded_batches(model, batch):
    rng = random.Random(batch)
    for longest in (6, 40, 300):
        check_logits(model, **padded(model, [rng.randint(3, longest) for _ in range(batch)]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_after_a_prefix(dtype):
    model = load("embedding", "cuda").to(dtype)
    for length in (3, 16, 17, 60, 700):
        check_logits(model, input_ids=prompt(model, length, length))
    check_logits(model, **padded(model, (4, 30, 13, 7)))


@pytest.mark.parametrize("bits", [8, 4])
def test_integer_weights(load_on_gpu, bits):
    model = load_on_gpu(torch.float16).quantize(bits)
    for length in (3, 17, 65, 130, 300, 700):
        check_logits(model, input_ids=prompt(model, length, length))


def test_a_graph_serves_every_length_up_to_its_own(model):
    model.release_cache()
    for length in (9, 12, 16):
        model.generate(prompt(model, length), do_sample=False, max_new_tokens=1, eos_token_id=None)
    graphs = engine_of(model)._sessions[1].graphs
    assert len(graphs) == 1
    model.generate(prompt(model, MOST_CAPTURED_ROWS + 1), do_sample=False, max_new_tokens=1, eos_token_id=None)
    assert len(engine_of(model)._sessions[1].graphs) <= 1
