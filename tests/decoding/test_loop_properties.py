"""Any request gets the same tokens from the captured loop as from transformers' own, in Triton's interpreter.

The kernels run in a process of their own, which this file starts as a program.
"""

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels to interpret")

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).parent)]
from hypothesis import given  # noqa: E402
from property_profiles import examples  # noqa: E402
from request_checks import GREEDY, SAMPLED, check, requests  # noqa: E402
from worker import Worker, serve  # noqa: E402

CHECKPOINT = Path(__file__).resolve().parents[1] / "golden" / "ckpt" / "tiny"
# Both loops compute in float32 and differ only in the order of their sums.
NEAR_TIE = 1e-4


@pytest.fixture(scope="module")
def interpreter():
    worker = Worker(Path(__file__), {"TRITON_INTERPRET": "1"}, timeout=300)
    yield worker
    worker.close()


@examples(short=40, long=1000, shrink=False)
@given(request=requests(4, 14, 5, GREEDY))
def test_greedy_search_in_the_interpreter(interpreter, request):
    error = interpreter.ask(request)
    assert error is None, error


# The interpreter takes five seconds to draw one token.
@examples(short=6, long=60, shrink=False)
@given(request=requests(2, 14, 2, SAMPLED))
def test_sampling_in_the_interpreter(interpreter, request):
    error = interpreter.ask(request)
    assert error is None, error


def small_model():
    """Return a model of one narrow layer, because the interpreter is slow for every program of a kernel."""
    import torch

    from faster_chatglm_6b.configuration_chatglm import ChatGLMConfig
    from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration

    config = ChatGLMConfig.from_pretrained(CHECKPOINT)
    config.hidden_size, config.inner_hidden_size, config.num_layers, config.num_attention_heads = 32, 64, 1, 2
    torch.manual_seed(0)
    model = ChatGLMForConditionalGeneration(config).float().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def main() -> None:
    """Answer each request with None or with what went wrong."""
    import traceback

    import torch
    from interpreter_blocks import use_large_blocks

    from faster_chatglm_6b.tokenization_chatglm import ChatGLMTokenizer

    torch.set_num_threads(1)
    use_large_blocks(gemv=(1024, 64, 4))
    model, tokenizer = small_model(), ChatGLMTokenizer.from_pretrained(CHECKPOINT)

    def answer(request):
        try:
            check(model, tokenizer, request, NEAR_TIE)
        except Exception:
            return traceback.format_exc()

    serve(answer)


if __name__ == "__main__":
    main()
