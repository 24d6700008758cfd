"""Only the lengths of a short list have graphs, whatever the batch. No kernel runs here."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels")

from faster_chatglm_6b.decoding.steps.prompt import LENGTHS, MOST_CAPTURED_ROWS, has_graph, rows_for  # noqa: E402


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 17, 33, 128])
def test_few_lengths_have_graphs(batch):
    """A graph for each length in between would be captured at nearly every request and push out the others."""
    for length in range(2, 1025):
        rows = rows_for(batch, length)
        assert rows >= length
        if has_graph(batch, rows):
            assert rows in LENGTHS and batch * rows <= MOST_CAPTURED_ROWS
        else:
            assert rows == length
