"""What a stream on the plain path keeps alive when it has ended: nothing that only the garbage collector frees."""

import gc

import torch
from release_checks import PROMPT

import faster_chatglm_6b
from faster_chatglm_6b.decoding.refusal import CannotServe


def test_a_refused_request_leaves_no_cycle(tiny_model):
    """A reason that is both raised and kept would hold its frames, and they the model and the cache."""

    def refusals():
        return sum(isinstance(one, CannotServe) for one in gc.get_objects())

    gc.collect()
    before = refusals()
    gc.disable()
    try:
        # The captured loop knows no min_p: the request is refused where its arguments are read.
        settings = {"do_sample": True, "min_p": 0.1, "max_new_tokens": 3, "eos_token_id": None}
        assert len(list(tiny_model.stream_tokens(torch.tensor(PROMPT), **settings))) == 3
        assert any(reason.startswith("MinP") for reason in faster_chatglm_6b.status().plain_generations)
        assert refusals() == before
    finally:
        gc.enable()
