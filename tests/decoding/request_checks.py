"""Requests of every kind for the captured loop, drawn by hypothesis, and their check against transformers' loop.

A request is a dict of plain values, so that it can be sent to a process that runs Triton's interpreter.
"""

import contextlib
from typing import Any

import torch
from hypothesis import strategies as st
from loop_checks import plain_path
from transformers import LogitsProcessorList

import faster_chatglm_6b
from faster_chatglm_6b.generation.processors import InvalidScoreLogitsProcessor

# Reasons with which the loop may leave a drawn request to transformers.
KNOWN_REFUSALS = ("the repetition penalty leaves the padding out and the n-gram rule does not",)


GREEDY = st.none()
SAMPLED = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.2, 1.0, 1.7]), "top_k": st.sampled_from([0, 1, 3, 50, 80, 400])},
    optional={"top_p": st.sampled_from([0.05, 0.7, 0.95, 1.0]), "num_return_sequences": st.integers(1, 2)},
)


def requests(
    most_rows: int, longest: int, most_tokens: int, sampling: st.SearchStrategy
) -> st.SearchStrategy[dict[str, Any]]:
    """Draw requests of up to ``most_rows`` prompts of up to ``longest`` tokens, for up to ``most_tokens`` new ones.

    Args:
        sampling: ``GREEDY``, ``SAMPLED`` or either.
    """
    row = st.fixed_dictionaries(
        {
            "length": st.integers(2, longest),
            "answer": st.sampled_from([0, 0, 0, 1, 3]),
            "form": st.sampled_from(["gmask", "gmask", "gmask", "mask inside", "two masks"]),
        }
    )
    return st.fixed_dictionaries(
        {
            "rows": st.lists(row, min_size=1, max_size=most_rows),
            "seed": st.integers(0, 2**16),
            # Few different tokens make repetitions, on which the penalty and the n-gram rule act.
            "tokens": st.sampled_from([1, 3, 300]),
            "mask": st.sampled_from(["none", "2-D", "4-D"]),
            "limit": st.sampled_from(["max_new_tokens", "max_length"]),
            "new_tokens": st.integers(1, most_tokens),
            "ends": st.lists(st.tuples(st.integers(0, most_rows - 1), st.integers(0, most_tokens - 1)), max_size=3),
            "pad": st.sampled_from([None, 7]),
            "invalid_rule": st.booleans(),
            "stream": st.booleans(),
            "settings": st.fixed_dictionaries(
                {
                    "repetition_penalty": st.sampled_from([None, None, 0.5, 1.0, 1.2, 2.0]),
                    "no_repeat_ngram_size": st.sampled_from([None, None, None, 1, 2, 4]),
                    "min_length": st.one_of(st.none(), st.integers(0, longest + 3 + most_tokens)),
                    "min_new_tokens": st.one_of(st.none(), st.integers(0, most_tokens)),
                }
            ),
            "sampling": sampling,
        }
    )


def arguments(model: Any, tokenizer: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``generate`` except for end tokens and sampling."""
    draw = torch.Generator().manual_seed(request["seed"])
    rows = [_row(model.config, draw, request["tokens"], **row) for row in request["rows"]]
    padded = tokenizer.pad({"input_ids": rows}, padding=True, return_tensors="pt")
    ids = padded["input_ids"]
    result = {"input_ids": ids.to(model.device)}
    result |= {name: value for name, value in request["settings"].items() if value is not None}
    if request["mask"] == "2-D":
        lengths = torch.tensor([len(row) for row in rows])
        result["attention_mask"] = (torch.arange(ids.shape[1]) >= ids.shape[1] - lengths[:, None]).long().to(ids.device)
    elif request["mask"] == "4-D":
        result["attention_mask"] = padded["attention_mask"]
    if "attention_mask" in result:
        result["attention_mask"] = result["attention_mask"].to(model.device)
    new = request["new_tokens"]
    result[request["limit"]] = new if request["limit"] == "max_new_tokens" else ids.shape[1] + new
    for name, most in (("min_length", ids.shape[1] + new), ("min_new_tokens", new)):
        if name in result:
            result[name] = min(result[name], most)
    if request["pad"] is not None:
        result["pad_token_id"] = request["pad"]
    if request["invalid_rule"]:
        result["logits_processor"] = LogitsProcessorList([InvalidScoreLogitsProcessor()])
    return result


def _row(config: Any, draw: torch.Generator, tokens: int, length: int, answer: int, form: str) -> list[int]:
    text = torch.randint(5, 5 + tokens, (length - 2 + answer,), generator=draw).tolist()
    text, behind = text[: length - 2], text[length - 2 :]
    mask = config.gmask_token_id
    if form != "gmask":
        mask = config.mask_token_id
        text.insert(len(text) // 2, mask)
        if form == "two masks":
            text.append(config.gmask_token_id)
        return [*text, config.bos_token_id, *behind]
    return [*text, mask, config.bos_token_id, *behind]


def check(model: Any, tokenizer: Any, request: dict[str, Any], near_tie: float) -> dict[str, Any]:
    """Check that both loops serve the request alike.

    Greedy search must give the same tokens. In sampling, every token that the captured loop drew must have a
    probability above zero under transformers' processors and warpers, and rows must end and be padded alike.

    Args:
        near_tie: a token may differ if transformers' scores of the two are no further apart; tokens after it are not
            compared.

    Returns:
        {"captured": whether the loop served it, "ties": rows that differ at a near-tie}
    """
    kwargs = arguments(model, tokenizer, request)
    kwargs["eos_token_id"] = _end_tokens(model, kwargs, request)
    sampling = request["sampling"]
    kwargs |= {"do_sample": False} if sampling is None else {"do_sample": True, **sampling}
    ours, reason = _ours(model, kwargs, request)
    start = kwargs["input_ids"].shape[1]
    with plain_path(), _forced(ours[:, start:]) if sampling else contextlib.nullcontext():
        output = model.generate(**kwargs, return_dict_in_generate=True, output_scores=True)
    theirs, scores = output.sequences.cpu(), [step.float().cpu() for step in output.scores]
    assert ours.shape[0] == theirs.shape[0]
    assert torch.equal(ours[:, :start], theirs[:, :start])
    rows = enumerate(zip(ours, theirs, strict=True))
    ties = sum(_row_differs(*pair, start, row, scores, near_tie) for row, pair in rows)
    assert ties or ours.shape == theirs.shape, (ours.tolist(), theirs.tolist())
    if sampling:
        assert not ties
        ends = {*(kwargs["eos_token_id"] or ())}
        for row, sequence in enumerate(ours[:, start:].tolist()):
            for step, token in enumerate(sequence):
                assert scores[step][row, token] > -torch.inf, f"row {row}, step {step}: {token} has no probability"
                if token in ends:
                    break
    return {"captured": reason is None, "ties": int(ties)}


def _end_tokens(model: Any, kwargs: dict[str, Any], request: dict[str, Any]) -> list[int] | None:
    """Return the tokens at chosen steps of a free greedy search, or None for no end token."""
    if not request["ends"]:
        return None
    free = {name: kwargs[name] for name in ("input_ids", "attention_mask") if name in kwargs}
    steps = 1 + max(step for _, step in request["ends"])
    with plain_path():
        output = model.generate(**free, do_sample=False, max_new_tokens=steps, eos_token_id=None)
    start = kwargs["input_ids"].shape[1]
    tokens = {int(output[row % output.shape[0], start + step]) for row, step in request["ends"]}
    return sorted({*tokens, model.config.eos_token_id})


def _ours(model: Any, kwargs: dict[str, Any], request: dict[str, Any]) -> tuple[torch.Tensor, str | None]:
    """Return our sequences on the CPU, and the reason if the captured loop did not serve."""
    before = faster_chatglm_6b.status()
    torch.manual_seed(request["seed"])
    if request["stream"] and "num_return_sequences" not in (request["sampling"] or {}):
        tokens = torch.stack(list(model.stream_tokens(**kwargs)), dim=1)
        ours = torch.cat((kwargs["input_ids"].cpu(), tokens), dim=1)
    else:
        ours = model.generate(**kwargs).cpu()
    after = faster_chatglm_6b.status()
    if sum(after.captured_generations.values()) == sum(before.captured_generations.values()) + 1:
        return ours, None
    old = before.plain_generations
    (reason,) = (why for why, count in after.plain_generations.items() if count != old.get(why, 0))
    assert reason.startswith(KNOWN_REFUSALS), reason
    return ours, reason


@contextlib.contextmanager
def _forced(tokens: torch.Tensor):
    """Let transformers' loop draw these tokens [B, N], one column after the other."""
    columns, multinomial = iter(tokens.T), torch.multinomial

    def chosen(probabilities: torch.Tensor, num_samples: int, **kwargs: Any) -> torch.Tensor:
        return next(columns)[:, None].to(probabilities.device)

    torch.multinomial = chosen
    try:
        yield
        assert next(columns, None) is None, "transformers' loop ends earlier"
    finally:
        torch.multinomial = multinomial


def _row_differs(
    ours: torch.Tensor, theirs: torch.Tensor, start: int, row: int, scores: list[torch.Tensor], near_tie: float
) -> bool:
    length = min(len(ours), len(theirs))
    different = (ours[start:length] != theirs[start:length]).nonzero()
    if not len(different):
        return False
    step = int(different[0])
    mine, other = int(ours[start + step]), int(theirs[start + step])
    gap = float(scores[step][row, other] - scores[step][row, mine])
    assert gap <= near_tie, f"row {row}, step {step}: {mine} instead of {other}, whose score is {gap:.4g} higher"
    return True
