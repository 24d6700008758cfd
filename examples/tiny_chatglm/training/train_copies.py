"""Train a checkpoint like the tiny one whose answers repeat passages of the question, and measure how exactly.

    python examples/tiny_chatglm/training/train_copies.py --output FOLDER

takes about four minutes on a data-centre GPU; ``--seconds 60 --samples 4000 --batch 16`` tries it on a CPU. FOLDER gets
a whole checkpoint of its own, and copies.json with the share of exact copies and with the held-out questions that
``python -m examples.measuring.speculation --copies FOLDER`` asks.
"""

import json
import random
import shutil
import time

import torch
from copies import TASKS, Copies
from safetensors.torch import load_file
from train import (
    Sample,
    accuracy,
    batches,
    drawn_by_all_cores,
    encoded_draws,
    fit,
    new_model,
    run_of,
    save,
    training_options,
)

from faster_chatglm_6b.tokenization_chatglm import ChatGLMTokenizer

FILES = ("config.json", "ice_text.model", "tokenizer_config.json")
# Questions for the measurement, per task, and for the share of exact copies.
ASKED, MEASURED = 8, 200


def draw_samples(arguments: tuple[str, int, int]) -> list[Sample]:
    """Draw and encode ``count`` training dialogues; one call per worker process."""
    checkpoint, seed, count = arguments
    tokenizer = ChatGLMTokenizer.from_pretrained(checkpoint)
    return encoded_draws(Copies(tokenizer).draw, tokenizer, seed, count)


def main() -> None:
    """Draw, train, measure, save."""
    parser = training_options(__doc__, samples=500_000, steps=9_000, seconds=150.0)
    parser.add_argument("--from-scratch", action="store_true", help="begin with random weights, not the checkpoint's")
    arguments = parser.parse_args()
    device, begun = torch.device(arguments.device), time.time()
    samples = drawn_by_all_cores(draw_samples, arguments)

    rng = random.Random(arguments.seed)
    tokenizer = ChatGLMTokenizer.from_pretrained(str(arguments.checkpoint))
    model = new_model(arguments, device)
    if not arguments.from_scratch:
        # It repeats a few words already, so that it need not find out again how to.
        weights = load_file(arguments.checkpoint / "model.safetensors")
        model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, strict=False)
    prepared = batches(samples, arguments.batch, tokenizer.pad_token_id, device, rng)
    print(f"{len(prepared)} batches, ready after {time.time() - begun:.1f} s", flush=True)
    steps, curve, seconds = fit(model, prepared, arguments, rng)

    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copyfile(arguments.checkpoint / name, arguments.output / name)
    size = save(model, arguments.output)
    model.half().float().eval()
    # No passage of random words comes twice, so another seed is enough to hold these out.
    copies, unseen = Copies(tokenizer), random.Random(-1 - arguments.seed)
    asked = [copies.draw(unseen, held_out=True, task=task) for task in TASKS for _ in range(ASKED)]
    measured = [copies.draw(unseen, held_out=True, task=task) for task in TASKS for _ in range(MEASURED)]
    table, missed = accuracy(model, measured, tokenizer, device)
    metrics = run_of(arguments) | {
        "training": {
            "dialogues": len(samples),
            "steps": steps,
            "seconds": round(seconds, 1),
            "seconds_in_all": round(time.time() - begun, 1),
            "loss_at_step": curve,
        },
        "model_bytes": size,
        "exact_copies_of_held_out_passages": table,
        "missed": missed[:20],
        "questions": [
            {"task": one.kind, "language": one.language, "query": one.query, "answer": one.answer} for one in asked
        ],
    }
    (arguments.output / "copies.json").write_text(
        json.dumps(metrics, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    print(json.dumps({"exact copies": table, "seconds": seconds}, indent=1))


if __name__ == "__main__":
    main()
