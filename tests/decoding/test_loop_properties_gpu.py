"""Any request gets the same tokens from the captured loop as from transformers' own, on a GPU."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from hypothesis import given  # noqa: E402
from property_profiles import examples  # noqa: E402
from request_checks import GREEDY, SAMPLED, check, requests  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

# Two paths that round differently may choose different tokens only if transformers' scores are nearer than this: the
# golden data's tolerance, and a few units in the last place of float16 logits below 16, which a penalty may double.
NEAR_TIE = {torch.float32: 1e-3, torch.float16: 0.1}


@pytest.fixture(scope="module")
def counted():
    """Count what happened, and print it for ``pytest -s``."""
    results = Counter()
    yield results
    print(dict(results))


def run(model, tokenizer, request, counted, kind):
    result = check(model, tokenizer, request, NEAR_TIE[model.dtype])
    counted[f"{kind}, captured" if result["captured"] else f"{kind}, plain"] += 1
    counted[f"{kind}, rows that differ at a near-tie"] += result["ties"]


@examples(short=150, long=5000)
@given(request=requests(6, 40, 12, GREEDY))
def test_greedy_search_in_float32(single, tiny_tokenizer, counted, request):
    run(single, tiny_tokenizer, request, counted, "float32")


@examples(short=100, long=5000)
@given(request=requests(6, 40, 12, GREEDY))
def test_greedy_search_in_float16(half, tiny_tokenizer, counted, request):
    run(half, tiny_tokenizer, request, counted, "float16")


@examples(short=100, long=5000)
@given(request=requests(6, 40, 12, SAMPLED))
def test_sampling(single, tiny_tokenizer, counted, request):
    """Sampling is compared in float32 only, because half precision moves tokens over the edge of ``top_p``."""
    run(single, tiny_tokenizer, request, counted, "sampling")
