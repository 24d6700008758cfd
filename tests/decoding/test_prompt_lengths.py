"""Only the lengths of a short list have graphs, whatever the batch. No kernel runs here."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels")

from faster_chatglm_6b.decoding.steps.prompt import (  # noqa: E402
    LENGTHS,
    MOST_CAPTURED_ROWS,
    MOST_INTEGER_ROWS,
    captured_length,
)
from faster_chatglm_6b.ops.triton.quantized.configs import MOST_TILE_ROWS  # noqa: E402


@pytest.mark.parametrize("most", [MOST_CAPTURED_ROWS, MOST_INTEGER_ROWS])
@pytest.mark.parametrize("batch", [1, 2, 3, 5, 17, 33, 128])
def test_few_lengths_have_graphs(batch, most):
    """A graph for each length in between would be captured at nearly every request and push out the others."""
    for length in range(2, 1025):
        rows = captured_length(batch, length, most)
        fitting = [one for one in LENGTHS if one >= length and batch * one <= most]
        assert rows == (min(fitting) if fitting else None)


def test_no_graph_dequantises():
    """The memory for a weight in floats would stay with the graph."""
    assert MOST_INTEGER_ROWS <= MOST_TILE_ROWS
