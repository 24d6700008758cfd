"""Random left-padded batches, and what each of their rows gives when it runs alone."""

import random
from dataclasses import dataclass

import torch

MOST_TOKENS = 10
WAYS = ("stock's 4-D mask and positions", "2-D mask", "pad ids alone")


@dataclass(frozen=True)
class Row:
    """A prompt and its greedy answer, of up to ``MOST_TOKENS`` tokens, when it runs alone."""

    ids: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Rows:
    """Prompts of many lengths and kinds, with the end tokens that their answers stop at."""

    rows: list[Row]
    end_ids: list[int]


def random_prompt(config, rng, longest=40):
    """Return random text with ``[gMASK]`` or ``[MASK]`` at its end or inside; some prompts go on after ``<sop>``."""
    text = [rng.randrange(5, 300) for _ in range(rng.randint(0, longest))]
    mask = config.gmask_token_id if rng.random() < 0.75 else config.mask_token_id
    place = len(text) if rng.random() < 0.75 else rng.randint(0, len(text))
    begun = [rng.randrange(5, 300) for _ in range(rng.choice((0, 0, 0, 1, 4)))]
    return [*text[:place], mask, *text[place:], config.bos_token_id, *begun]


def greedy(model, rows, end_ids, **kwargs):
    """Return the new tokens of each row of ids, as ``generate`` gives them."""
    ids = torch.tensor(rows, device=model.device)
    settings = {"do_sample": False, "max_new_tokens": MOST_TOKENS, **kwargs}
    return model.generate(ids, eos_token_id=end_ids, **settings)[:, ids.shape[1] :].tolist()


def single_runs(model, count=64, seed=0):
    """Run ``count`` random prompts one by one, with end tokens that stop answers at many lengths."""
    rng = random.Random(seed)
    prompts = [random_prompt(model.config, rng) for _ in range(count)]
    free = [greedy(model, [ids], None)[0] for ids in prompts]
    end_ids = sorted({free[row][row % MOST_TOKENS] for row in range(0, count, 8)} | {model.config.eos_token_id})
    return Rows([Row(ids, greedy(model, [ids], end_ids)[0]) for ids in prompts], end_ids)


def random_batches(rows, count, seed=1, largest=8):
    """Draw ``count`` times (rows, ``max_new_tokens``, one of ``WAYS``); small batches come first."""
    rng = random.Random(seed)
    batches = [
        (rng.sample(rows, rng.randint(1, largest)), rng.randint(1, MOST_TOKENS), rng.choice(WAYS)) for _ in range(count)
    ]
    return sorted(batches, key=lambda batch: len(batch[0]))


def inputs_of(batch, way, tokenizer, device):
    """Return the arguments of ``generate`` for rows of different lengths, padded on the left."""
    inputs = dict(tokenizer.pad({"input_ids": [row.ids for row in batch]}, padding=True, return_tensors="pt"))
    assert inputs["attention_mask"].dim() == 4
    if way == "2-D mask":
        inputs = {"input_ids": inputs["input_ids"], "attention_mask": (inputs["input_ids"] != 3).long()}
    elif way == "pad ids alone":
        inputs = {"input_ids": inputs["input_ids"]}
    return {name: value.to(device) for name, value in inputs.items()}


def expected_rows(batch, tokens, pad):
    """Cut the single runs' answers at ``tokens`` and fill them up to the longest of them."""
    answers = [row.answer[:tokens] for row in batch]
    longest = max(len(answer) for answer in answers)
    return [answer + [pad] * (longest - len(answer)) for answer in answers]


def check_beams(model, tokenizer, runs, way, count):
    """Check that beams give each row of a batch the sequences that it gets alone, best first."""
    rng, pad = random.Random(2), model.config.pad_token_id
    for _ in range(count):
        batch, beams = rng.sample(runs.rows, rng.randint(2, 4)), rng.randint(2, 4)
        settings = {
            "do_sample": False,
            "num_beams": beams,
            "num_return_sequences": rng.randint(1, beams),
            "max_new_tokens": rng.randint(1, MOST_TOKENS),
            "early_stopping": rng.random() < 0.5,
        }
        inputs = inputs_of(batch, way, tokenizer, model.device)
        output = model.generate(**inputs, eos_token_id=runs.end_ids, **settings)[:, inputs["input_ids"].shape[1] :]
        alone = [answer for row in batch for answer in greedy(model, [row.ids], runs.end_ids, **settings)]
        mine = [[token for token in row if token != pad] for row in output.tolist()]
        assert mine == [[token for token in row if token != pad] for row in alone], settings
