"""Measure what speculation costs and brings: a step of 1 + k positions, drafts that come true, and those that do not.

    python -m examples.measuring.speculation --json speculation.json

"cost" and "forced" records come from random weights of the ChatGLM-6B shape, in the product's own loop. There a hook
of this file makes exactly ``accepted`` ids of every draft come true, as random weights never repeat a text: tokens/s at
so many accepted ids per step, not an answer that a model gave. The hook's few small kernels count as the step's.
"unforced" records have no hook: ids are drawn with nearly equal chances, from all, which never repeat, so that "auto"
can only lose, or from three, which repeat by chance and mislead the drafts. "acceptance" records are answers of the
tiny trained checkpoint to prompts that ask for something said before: tokens per step at its own size, no speed.
"copies" records are the same of a checkpoint trained to repeat passages, which ``--copies FOLDER`` names and
examples/tiny_chatglm/training/train_copies.py makes. Its questions were not trained on.
"""

import argparse
import contextlib
import datetime
import functools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from faster_chatglm_6b.decoding.loop import engine_of
from faster_chatglm_6b.ops import triton as kernels

from .machine import synchronize
from .models import make_prompt, random_model, weights_of

ROOT = Path(__file__).resolve().parents[2]
PROMPT, NEW = 128, 96
# (k, accepted ids of each draft)
FORCED = ((3, 0), (3, 1), (3, 3), (7, 0), (7, 1), (7, 3), (7, 7))
# What a step of 1 + k positions may take at most, in steps of one, by weights, on an H100; and what copying must bring.
MOST_COST = {"fp16": {3: 1.10, 7: 1.18}, "int8": {3: 1.15, 7: 1.25}, "int4": {3: 1.25, 7: 1.40}}
MOST_LOSS, LEAST_GAIN = 1.02, 1.8
# Random weights whose head is the embedding say the same id again and again unless they are made to draw: from all ids,
# so that nothing repeats, and from three, so that what repeats goes on otherwise.
UNFORCED = {"any id": {"top_k": 0}, "one of 3 ids": {"top_k": 3}}
# Rounds of a conversation with the tiny checkpoint; the answer to the last repeats one before.
CONVERSATIONS = (
    ("What is faster_chatglm_6b?", "Please say that again."),
    ("What is faster_chatglm_6b?", "What is faster_chatglm_6b?"),
    ("Tell me a story.", "Tell me a story."),
    ("Tell me a poem.", "Please repeat that."),
    ("How do I install it?", "How do I install it?"),
    ("你好", "你好"),
    ("讲个故事", "讲个故事"),
    ("什么是 int8？", "请再说一遍。"),
)


def turns_of(model: torch.nn.Module) -> int | None:
    """Return the turns that the last answer took; None if nothing was drafted for it."""
    session = [*engine_of(model)._sessions.values()][-1]
    return None if session._speculation is None else session._speculation.turns_read


def ms_per_token(model: torch.nn.Module, ids: torch.Tensor, speculate: int | str, iters: int, **settings: Any) -> float:
    """Return the milliseconds that each token after the first takes a caller; the median of ``iters`` calls."""

    def seconds(new_tokens: int) -> float:
        torch.manual_seed(0)
        synchronize()
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=new_tokens, eos_token_id=None, speculate=speculate, **settings)
        synchronize()
        return time.perf_counter() - start

    # Compiles and captures.
    seconds(NEW)
    seconds(1)
    # The long answer last, whose turns the caller may count.
    first, whole = zip(*((seconds(1), seconds(NEW)) for _ in range(iters)), strict=True)
    return (statistics.median(whole) - statistics.median(first)) / (NEW - 1) * 1e3


@contextlib.contextmanager
def forced(accepted: int) -> Iterator[None]:
    """Make the first ``accepted`` ids of every draft come true, and not the next one."""
    normal = kernels.accept

    def accept(sampled: torch.Tensor, state: Any, drafts: Any) -> None:
        rows = drafts.tokens.shape[1]
        chosen = sampled.view(-1, rows)
        chosen[:, :accepted].copy_(drafts.tokens[:, 1 : 1 + accepted])
        if accepted < rows - 1:
            torch.add(drafts.tokens[:, 1 + accepted] % 20000, 20, out=chosen[:, accepted])
        drafts.count.fill_(rows - 1)
        normal(sampled, state, drafts)

    with mock.patch.object(kernels, "accept", accept):
        yield


def cost_records(model: torch.nn.Module, batch: int, iters: int) -> Iterator[dict[str, Any]]:
    """Yield the time of a step of one token, and of 1 + k positions with so many accepted ids."""
    ids, weights = make_prompt(model, batch, PROMPT), weights_of(model)
    greedy = {"do_sample": False}
    one = ms_per_token(model, ids, 0, iters, **greedy)
    yield {"kind": "cost", "weights": weights, "batch": batch, "k": 0, "ms_per_step": round(one, 4)}
    for k, accepted in FORCED:
        # A graph keeps the hook that it was captured with.
        model.release_cache()
        with forced(accepted):
            ms = ms_per_token(model, ids, k, iters, **greedy)
            turns = turns_of(model)
        step = ms * (NEW - 1) / (turns - 1) if turns else None
        yield {
            "kind": "forced",
            "weights": weights,
            "batch": batch,
            "k": k,
            "accepted": accepted,
            "ms_per_step": step and round(step, 4),
            "cost": step and round(step / one, 4),
            "tokens_per_s": round(batch * 1e3 / ms, 1),
            "gain": round(one / ms, 4),
        }
    model.release_cache()


def unforced_records(model: torch.nn.Module, batch: int, iters: int) -> Iterator[dict[str, Any]]:
    """Yield how many times as long a token takes with drafts where the text does as it likes."""
    ids = make_prompt(model, batch, PROMPT)
    for text, settings in UNFORCED.items():
        settings = settings | {"do_sample": True, "top_p": 1.0, "temperature": 1e4}
        one = ms_per_token(model, ids, 0, iters, **settings)
        auto = ms_per_token(model, ids, "auto", iters, **settings)
        yield {
            "kind": "unforced",
            "weights": weights_of(model),
            "batch": batch,
            "text": text,
            "ms_per_token": round(one, 4),
            "ms_per_token_auto": round(auto, 4),
            "times_as_long": round(auto / one, 4),
            "turns": turns_of(model),
            "tokens": NEW,
        }


def answered_with_drafts(
    model: torch.nn.Module, tokenizer: Any, query: str, history: list[tuple[str, str]]
) -> Iterator[dict[str, Any]]:
    """Yield a greedy answer for each kind of drafts, with the turns that it took."""
    chat = functools.partial(model.chat, tokenizer, query, history=history, do_sample=False)
    plain = chat(speculate=0)
    # The end is a token, too.
    tokens = 1 + len(tokenizer.encode_text(plain[0]))
    for k in (3, 7, "auto"):
        answer = chat(speculate=k)
        turns = turns_of(model)
        yield {
            "answer": answer[0],
            "same": answer == plain,
            "k": k,
            "tokens": tokens,
            # One or two of the turns that were read may lie behind the end.
            "turns": turns,
            "tokens_per_turn": round(tokens / turns, 3),
        }


def loaded(folder: Path, device: str) -> tuple[torch.nn.Module, Any]:
    """Return the model and the tokenizer of a small checkpoint, in float32."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    return AutoModel.from_pretrained(folder, trust_remote_code=True).float().to(device).eval(), tokenizer


def acceptance_records(folder: Path, device: str) -> Iterator[dict[str, Any]]:
    """Yield how many tokens a step brings where the tiny checkpoint says something again."""
    model, tokenizer = loaded(folder, device)
    for *before, query in CONVERSATIONS:
        history: list = []
        for text in before:
            _, history = model.chat(tokenizer, text, history=history, do_sample=False)
        for record in answered_with_drafts(model, tokenizer, query, history):
            yield {"kind": "acceptance", "query": query, "after": before, **record}


def copies_records(folder: Path, device: str) -> Iterator[dict[str, Any]]:
    """Yield the same of the checkpoint that was trained on copies, for its questions that were not trained on."""
    model, tokenizer = loaded(folder, device)
    questions = json.loads((folder / "copies.json").read_text(encoding="utf-8"))["questions"]
    for question in questions:
        for record in answered_with_drafts(model, tokenizer, question["query"], []):
            exact = record["answer"] == question["answer"]
            yield {"kind": "copies", "task": question["task"], "query": question["query"], "exact": exact, **record}


def copies_summary(records: list[dict[str, Any]]) -> str:
    """Return a line of the mean tokens per step by task; the first token of an answer is a turn as well."""
    copies = [record for record in records if record["kind"] == "copies"]
    means = []
    for task in dict.fromkeys(record["task"] for record in copies):
        for k in dict.fromkeys(record["k"] for record in copies):
            some = [record for record in copies if (record["task"], record["k"]) == (task, k)]
            mean = sum(record["tokens"] for record in some) / sum(record["turns"] for record in some)
            means.append(f"{task} k = {k}: {mean:.2f}")
    exact, same = (sum(record[name] for record in copies) for name in ("exact", "same"))
    answers = f"{exact} of {len(copies)} answers are exact copies, {same} the same as without drafts"
    return f"tokens per step: {', '.join(means)}; {answers}"


def verdicts(records: list[dict[str, Any]]) -> Iterator[str]:
    """Yield each measured number beside what was asked of it."""
    for record in records:
        if record["kind"] == "forced" and record["batch"] == 1 and record["accepted"] == 0:
            most = MOST_COST[record["weights"]][record["k"]]
            word = "ok" if record["cost"] <= most else "MISSED"
            yield f"{word} {record['weights']} k = {record['k']}: a step takes {record['cost']} (at most {most})"
        if record["kind"] == "unforced":
            word = "ok" if record["times_as_long"] <= MOST_LOSS else "MISSED"
            yield (
                f"{word} {record['weights']}, {record['text']}: auto takes {record['times_as_long']} times as long "
                f"(at most {MOST_LOSS})"
            )
    gains = [r["gain"] for r in records if r["kind"] == "forced" and (r["weights"], r["batch"]) == ("fp16", 1)]
    if gains:
        word = "ok" if max(gains) >= LEAST_GAIN else "MISSED"
        yield f"{word} fp16, every id accepted: {max(gains)} times as fast (at least {LEAST_GAIN})"


def main() -> None:
    """Measure what the arguments name, print each record as it comes, and write them to a file if one is given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    weights = ("fp16", "int8", "int4")
    parser.add_argument("--weights", nargs="*", choices=weights, default=weights, help="none: only what models answer")
    parser.add_argument("--batch", nargs="+", type=int, default=[1], help="sequences of the forced steps")
    parser.add_argument("--iters", type=int, default=5)
    parser.add_argument("--copies", type=Path, metavar="FOLDER", help="a checkpoint that train_copies.py made")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records as a JSON list")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs an NVIDIA GPU")
    records: list[dict[str, Any]] = []
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "date": str(datetime.date.today())}

    def keep(found: Iterator[dict[str, Any]]) -> None:
        for record in found:
            records.append(record | machine)
            print(json.dumps(record, ensure_ascii=False), flush=True)

    keep(acceptance_records(ROOT / "examples" / "tiny_chatglm", "cuda"))
    if arguments.copies:
        keep(copies_records(arguments.copies, "cuda"))
    for weights in arguments.weights:
        model = random_model()
        if weights != "fp16":
            model.quantize(int(weights[3:]))
        for batch in arguments.batch:
            keep(cost_records(model, batch, arguments.iters))
        keep(unforced_records(model, 1, arguments.iters))
        model.release_cache()
        del model
        torch.cuda.empty_cache()
    print("\n".join(verdicts(records)))
    if arguments.copies:
        print(copies_summary(records))
    if arguments.json:
        lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
        arguments.json.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
