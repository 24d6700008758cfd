"""Measure one model on each GPU of a process, with a thread each, against one of them alone.

    python -m examples.measuring.cards --json FILE      # random weights of the 6B shape; two GPUs or more
    python -m examples.measuring.cards --bits 4 --batch 8

All models have the same weights and get the same prompt, so all must give the same tokens, alone and side by side. The
rounds alone and together alternate, and the medians of their tokens per second are compared.
"""

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from .models import make_prompt, random_model, weights_of
from .timing import append, known_records


def model_on(index: int, bits: int) -> torch.nn.Module:
    """Return the model of random weights on one GPU; they are the same on every GPU of one kind."""
    with torch.cuda.device(index):
        model = random_model()
        if bits != 16:
            model.quantize(bits)
    return model


def answer(model: torch.nn.Module, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Return the ids after ``new_tokens`` greedy ones, on the CPU."""
    settings = {"do_sample": False, "max_new_tokens": new_tokens, "eos_token_id": None, "pad_token_id": 3}
    # Random weights repeat themselves: drafts would come true.
    settings["speculate"] = 0
    return model.generate(ids.to(model.device), **settings).cpu()


def round_of(models: Sequence[torch.nn.Module], ids: torch.Tensor, new_tokens: int) -> tuple[float, list[torch.Tensor]]:
    """Return the tokens per second that all models together give, and the ids of each.

    Every model answers in a thread of its own, three times.
    """

    def work(model: torch.nn.Module) -> list[torch.Tensor]:
        return [answer(model, ids, new_tokens) for _ in range(3)]

    with ThreadPoolExecutor(len(models)) as pool:
        start = time.perf_counter()
        answers = [one for many in pool.map(work, models) for one in many]
        seconds = time.perf_counter() - start
    return len(answers) * len(ids) * new_tokens / seconds, answers


def main(argv: list[str] | None = None) -> None:
    """Measure, print and append a record; raise SystemExit if an answer differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, choices=(16, 8, 4), default=16, help="quantise the layers first")
    parser.add_argument("--batch", type=int, default=1, help="prompts at once for each GPU (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens of an answer (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds alone and together (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="append the record to FILE")
    args = parser.parse_args(argv)
    count = torch.cuda.device_count()
    if count < 2:
        raise SystemExit(f"This process sees {count} CUDA devices, but this measurement needs two or more.")
    if args.json:
        known_records(Path(args.json))
    models = [model_on(index, args.bits) for index in range(count)]
    ids = make_prompt(models[0], args.batch, 20)
    expected = [answer(model, ids, args.new_tokens) for model in models]
    alone, together, answers = [], [], expected
    for _ in range(args.rounds):
        for group, rates in ((models[:1], alone), (models, together)):
            rate, given = round_of(group, ids, args.new_tokens)
            rates.append(rate)
            answers = [*answers, *given]
    if not all(torch.equal(one, expected[0]) for one in answers):
        raise SystemExit("The GPUs gave different tokens, alone or side by side.")
    one, all_of_them = statistics.median(alone), statistics.median(together)
    record = {
        "gpus": count,
        "gpu": torch.cuda.get_device_name(0),
        "weights": weights_of(models[0]),
        "batch": args.batch,
        "new_tokens": args.new_tokens,
        "answers_compared": len(answers),
        "tokens_per_s_alone": round(one, 1),
        "tokens_per_s_together": round(all_of_them, 1),
        "times": round(all_of_them / one, 3),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    print(json.dumps(record))
    append(args.json, [record])


if __name__ == "__main__":
    main()
