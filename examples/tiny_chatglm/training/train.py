"""Train the tiny checkpoint and measure it on wordings that it has never seen.

    python examples/tiny_chatglm/training/train.py --output examples/tiny_chatglm

needs faster_chatglm_6b installed (or PYTHONPATH=.) and build_tokenizer.py to have been run. It takes about four minutes
on a data-centre GPU; ``--samples 400 --steps 3 --batch 16`` tries the script on a CPU. Writes model.safetensors
(float16) and training/metrics.json to ``--output``.
"""

import argparse
import json
import math
import multiprocessing
import os
import random
import time
from array import array
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from corpus import Corpus
from dialogue import Dialogue
from safetensors.torch import save_file

from faster_chatglm_6b.configuration_chatglm import ChatGLMConfig
from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration
from faster_chatglm_6b.templates.prompts import build_prompt, process_response
from faster_chatglm_6b.tokenization_chatglm import ChatGLMTokenizer

HERE = Path(__file__).resolve().parent
MAX_TOKENS = 480
Sample = tuple[array, int]  # ids of prompt, [gMASK], <sop>, answer, <eop>; and how many come before <sop>


def encode(dialogue: Dialogue, tokenizer: ChatGLMTokenizer) -> Sample:
    """Encode a dialogue in ChatGLM's order, its history as ``chat`` returns it."""
    history = [(query, process_response(answer)) for query, answer in dialogue.history]
    context = [*tokenizer.encode_text(build_prompt(dialogue.query, history)), tokenizer.gmask_token_id]
    answer = [tokenizer.bos_token_id, *tokenizer.encode_text(dialogue.answer), tokenizer.eos_token_id]
    return array("H", context + answer), len(context)


def draw_samples(arguments: tuple[str, int, int]) -> list[Sample]:
    """Draw and encode ``count`` training dialogues; one call per worker process."""
    checkpoint, seed, count = arguments
    tokenizer = ChatGLMTokenizer.from_pretrained(checkpoint)
    return encoded_draws(Corpus().draw, tokenizer, seed, count)


def encoded_draws(
    draw: Callable[[random.Random], Dialogue], tokenizer: ChatGLMTokenizer, seed: int, count: int
) -> list[Sample]:
    """Draw and encode ``count`` dialogues that are not too long."""
    rng, samples = random.Random(seed), []
    while len(samples) < count:
        sample = encode(draw(rng), tokenizer)
        if len(sample[0]) <= MAX_TOKENS:
            samples.append(sample)
    return samples


def drawn_by_all_cores(draw: Callable[[tuple[str, int, int]], list[Sample]], settings: argparse.Namespace) -> list:
    """Let one process per core draw its part of the samples with ``draw``."""
    begun, workers = time.time(), os.cpu_count() or 1
    jobs = [(str(settings.checkpoint), 1000 * settings.seed + i, settings.samples // workers) for i in range(workers)]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        samples = [sample for part in pool.map(draw, jobs) for sample in part]
    tokens = sum(len(ids) for ids, _ in samples)
    print(f"{len(samples)} dialogues, {tokens} tokens in {time.time() - begun:.1f} s", flush=True)
    return samples


def _ids(samples: list[Sample], pad_id: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return right-padded ids [B, L], and the lengths of context and whole [B, 1]."""
    length = max(len(ids) for ids, _ in samples)
    return (
        torch.tensor([list(ids) + [pad_id] * (length - len(ids)) for ids, _ in samples]),
        torch.tensor([[count] for _, count in samples]),
        torch.tensor([[len(ids)] for ids, _ in samples]),
    )


def prepare(samples: list[Sample], pad_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Make the model's arguments for a batch: right-padded ids, 2-D positions, the prefix mask and labels."""
    return with_masks(*(tensor.to(device) for tensor in _ids(samples, pad_id)))


def with_masks(input_ids: torch.Tensor, context: torch.Tensor, end: torch.Tensor) -> dict[str, torch.Tensor]:
    """Make masks (True = hidden), positions and labels of ids [B, L]; ``context`` and ``end`` [B, 1] are lengths."""
    column = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    in_context = column < context
    # Positions stay at [gMASK] while the block position counts 1, 2, 3 ... from <sop> on.
    positions = torch.stack(
        [torch.where(in_context, column, context - 1), torch.where(in_context, 0, column - context + 1)], dim=1
    )
    hidden = (column[:, None, :] > column[:, :, None]) & ~in_context[:, None, :]
    answered = (column > context) & (column < end)
    return {
        "input_ids": input_ids,
        "position_ids": positions,
        "attention_mask": hidden[:, None],
        "labels": torch.where(answered, input_ids, -100),
    }


def batches(samples: list[Sample], size: int, pad_id: int, device: torch.device, rng: random.Random) -> list[tuple]:
    """Make (ids, context, end) of each batch on the device, samples of similar length together."""
    order = sorted(samples, key=lambda sample: len(sample[0]) * rng.uniform(0.75, 1.25))
    prepared = []
    for start in range(0, len(order) - size + 1, size):
        prepared.append(tuple(tensor.to(device) for tensor in _ids(order[start : start + size], pad_id)))
    return prepared


def initialise(model: ChatGLMForConditionalGeneration, deviation: float) -> None:
    """Set normal weights, zero biases, unit norms."""
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            torch.nn.init.constant_(parameter, 1.0 if name.endswith("weight") else 0.0)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=deviation)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Follow a short linear warm-up, then a cosine down to 1 % of the peak."""
    warm = max(1, min(300, steps // 10))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


@torch.no_grad()
def accuracy(
    model: ChatGLMForConditionalGeneration, dialogues: list[Dialogue], tokenizer: ChatGLMTokenizer, device: torch.device
) -> tuple[dict[str, dict[str, float]], list[dict[str, str]]]:
    """Return the share of exact answers of greedy decoding per kind and language, and the dialogues that it misses.

    Greedy decoding gives the wanted answer exactly when each of its tokens, <eop> included, is the most probable one
    after those before it; one forward of the whole text tells.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    missed = []
    encoded = sorted(
        ((encode(dialogue, tokenizer), dialogue) for dialogue in dialogues), key=lambda pair: len(pair[0][0])
    )
    for start in range(0, len(encoded), 64):
        part = encoded[start : start + 64]
        batch = prepare([sample for sample, _ in part], tokenizer.pad_token_id, device)
        labels = batch.pop("labels")[:, 1:]
        best = model(**batch, use_cache=False).logits[:, :-1].argmax(-1)
        exact = ((best == labels) | (labels == -100)).all(dim=1).tolist()
        for is_right, (_, dialogue) in zip(exact, part, strict=True):
            right[f"{dialogue.kind}.{dialogue.language}"].append(is_right)
            if not is_right:
                missed.append({"kind": dialogue.kind, "query": dialogue.query, "wanted": dialogue.answer})
    table = {
        kind: {"dialogues": len(marks), "exact": round(sum(marks) / len(marks), 4)}
        for kind, marks in sorted(right.items())
    }
    every = [mark for marks in right.values() for mark in marks]
    table["all"] = {"dialogues": len(every), "exact": round(sum(every) / len(every), 4)}
    return table, missed


def save(model: ChatGLMForConditionalGeneration, output: Path) -> int:
    """Write the weights in float16 without the head, which is the embedding; return the file's bytes."""
    tensors = {
        name: tensor.half().contiguous().cpu()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight" and "rotary" not in name
    }
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    return (output / "model.safetensors").stat().st_size


def new_model(settings: argparse.Namespace, device: torch.device) -> ChatGLMForConditionalGeneration:
    """Make a model with random weights, ready for training."""
    torch.manual_seed(settings.seed)
    model = ChatGLMForConditionalGeneration(ChatGLMConfig.from_pretrained(str(settings.checkpoint)))
    initialise(model, settings.deviation)
    return model.to(device).train()


def fit(
    model: ChatGLMForConditionalGeneration, prepared: list[tuple], settings: argparse.Namespace, rng: random.Random
) -> tuple[int, list[list[float]], float]:
    """Train for ``settings.steps``, or fewer if they would take longer than ``settings.seconds``.

    Returns:
        The steps, [step, loss] of some of them, and the seconds that they took.
    """
    # TF32 is plenty for a toy; it is measured in float32 afterwards.
    torch.backends.cuda.matmul.allow_tf32 = True
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.05)
    steps, queue, curve, begun, per_step = settings.steps, [], [], time.time(), None
    for step in range(settings.steps):
        if step in (1, 50):
            warm, warmed = step, time.time()
        # A slow machine cannot wait for so many steps.
        if per_step is None and step > 4 and (step == 150 or time.time() - begun > settings.seconds / 8):
            per_step = (time.time() - warmed) / max(1, step - warm)
            steps = min(settings.steps, step + int((settings.seconds - (time.time() - begun)) / per_step))
            print(f"{per_step * 1e3:.1f} ms a step: {steps} steps", flush=True)
        if step >= steps:
            break
        if not queue:
            queue = rng.sample(prepared, len(prepared))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, settings.learning_rate)
        loss = model(**with_masks(*queue.pop()), use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % min(250, max(1, steps // 20)) == 0 or step == steps - 1:
            curve.append([step, round(loss.item(), 4)])
            print(f"step {step}: loss {loss.item():.4f}, {time.time() - begun:.0f} s", flush=True)
    torch.backends.cuda.matmul.allow_tf32 = False
    return steps, curve, time.time() - begun


def training_options(description: str, samples: int, steps: int, seconds: float) -> argparse.ArgumentParser:
    """Make a parser of what every training can be told, with these defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=HERE.parent, help="where config.json and the tokenizer are")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=samples, help="training dialogues to draw")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=192)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--deviation", type=float, default=0.08, help="standard deviation of the initial weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=seconds, help="shorten the schedule to end in about this time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def run_of(settings: argparse.Namespace) -> dict[str, object]:
    """Return what a file of metrics says about the settings and the machine."""
    unnamed = ("checkpoint", "output", "device")
    return {
        "settings": {key: value for key, value in vars(settings).items() if key not in unnamed},
        "device": torch.cuda.get_device_name() if torch.device(settings.device).type == "cuda" else "cpu",
        "torch": torch.__version__,
    }


def main() -> None:
    """Draw, train, measure, save."""
    arguments = training_options(__doc__, samples=700_000, steps=7_000, seconds=600.0).parse_args()
    device, begun = torch.device(arguments.device), time.time()
    samples = drawn_by_all_cores(draw_samples, arguments)

    corpus, rng = Corpus(), random.Random(arguments.seed)
    tokenizer = ChatGLMTokenizer.from_pretrained(str(arguments.checkpoint))
    model = new_model(arguments, device)
    prepared = batches(samples, arguments.batch, tokenizer.pad_token_id, device, rng)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters} parameters, {len(prepared)} batches, ready after {time.time() - begun:.1f} s", flush=True)
    steps, curve, seconds = fit(model, prepared, arguments, rng)

    (arguments.output / "training").mkdir(parents=True, exist_ok=True)
    size = save(model, arguments.output)
    model.half().float().eval()
    table, missed = accuracy(model, corpus.held_out(), tokenizer, device)
    seen = random.Random(10_000 + arguments.seed)
    drawn, _ = accuracy(model, [corpus.draw(seen) for _ in range(2000)], tokenizer, device)
    metrics = run_of(arguments) | {
        "corpus": corpus.sizes(),
        "training": {
            "parameters": parameters,
            "dialogues": len(samples),
            "steps": steps,
            "batch": arguments.batch,
            "seconds": round(seconds, 1),
            "seconds_in_all": round(time.time() - begun, 1),
            "loss_at_step": curve,
        },
        "model_bytes": size,
        "exact_answers_on_held_out_wordings": table,
        "exact_answers_on_fresh_draws_of_trained_wordings": drawn,
        "missed": missed,
    }
    (arguments.output / "training" / "metrics.json").write_text(
        json.dumps(metrics, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    print(json.dumps({"held out": table, "trained wordings": drawn["all"], "seconds": seconds}, indent=1))


if __name__ == "__main__":
    main()
