"""Answer the prompts of a JSONL file; an interrupted run goes on where it stopped.

python examples/batch_inference.py prompts.jsonl answers.jsonl --tiny
python examples/batch_inference.py prompts.jsonl answers.jsonl --model THUDM/chatglm-6b --bits 4 --max-tokens 256

A line of the input is {"prompt": "..."} or {"messages": [...]}, with more fields if you like. Each answer is a line of
the output, in the order in which they are finished: the input's line number as "line" (from 0 on), "response",
"finish_reason" and "tokens"; or "line" and "error" for a prompt that cannot be answered. Lines that the output has
already are not asked again; a prompt at which the model failed has no line, so the next run asks it again. An answer
depends on its line and the seed, so the output is the same without interruption.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from faster_chatglm_6b.cli import run_command
from faster_chatglm_6b.cli.errors import CommandError
from faster_chatglm_6b.cli.options import CommandParser, add_model_options


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = CommandParser(prog="batch_inference.py", description=__doc__.splitlines()[0])
    parser.add_argument("input", type=Path, help="JSONL file of prompts")
    parser.add_argument("output", type=Path, help="JSONL file of answers, which may hold some already")
    add_model_options(parser)
    parser.add_argument("--max-tokens", type=int, help="most new tokens of an answer (default: the model's room)")
    parser.add_argument("--max-rows", type=int, default=64, help="answers at once (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.95, help="0: no chance (%(default)s)")
    parser.add_argument("--top-p", type=float, default=0.7, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    return parser


def read_prompts(path: Path) -> list[Any]:
    """Return the prompts of a file: texts, or lists of messages.

    Raises:
        CommandError: the file cannot be read, or a line is no prompt.
    """
    try:
        # Only at line feeds: a text may hold other characters that end lines.
        lines = path.read_text("utf-8").rstrip().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"{path} cannot be read: {error}.") from error
    prompts = []
    for number, line in enumerate(lines if lines != [""] else []):
        try:
            fields = json.loads(line)
            prompts.append(fields["messages"] if "messages" in fields else fields["prompt"])
        except (ValueError, TypeError, KeyError) as error:
            raise CommandError(
                f'Line {number} of {path} is no prompt: each line is {{"prompt": "..."}} or {{"messages": [...]}}.'
            ) from error
    return prompts


def finished_lines(path: Path) -> set[int]:
    """Return which lines have an answer already, and cut off a line that an interruption left half written.

    Raises:
        CommandError: the file holds something else.
    """
    if not path.exists():
        return set()
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    try:
        done = {int(json.loads(line)["line"]) for line in whole.splitlines()}
    except (ValueError, TypeError, KeyError) as error:
        raise CommandError(f"{path} holds something else than answers: name another file for the output.") from error
    if whole != content:
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return done


def run(arguments: argparse.Namespace) -> None:
    """Read, answer, write.

    Raises:
        CommandError: files that cannot be read, or no checkpoint.
    """
    prompts, done = read_prompts(arguments.input), finished_lines(arguments.output)
    missing = [number for number in range(len(prompts)) if number not in done]
    if not missing:
        print(f"All {len(prompts)} lines have an answer in {arguments.output}.")
        return
    from faster_chatglm_6b.cli.checkpoint import load_asked
    from faster_chatglm_6b.serving.engine import EngineFailed

    tokenizer, model = load_asked(arguments, default="THUDM/chatglm-6b")
    failures: list[Exception] = []
    try:
        found = answers(model, tokenizer, prompts, missing, arguments, failures)
        with arguments.output.open("a", encoding="utf-8") as file:
            for line in tqdm(found, total=len(missing), unit="answer"):
                write(file, line)
    except EngineFailed as error:
        failures.append(error)
    except ValueError as error:  # too little memory, or no row
        raise CommandError(str(error)) from error
    if failures:
        left = len(missing) - len(finished_lines(arguments.output).intersection(missing))
        raise CommandError(
            f"The model failed, and {left} lines have no answer yet: {failures[0]}. Run the command again for them."
        )


def answers(
    model: Any,
    tokenizer: Any,
    prompts: list[Any],
    missing: list[int],
    arguments: argparse.Namespace,
    failures: list[Exception],
) -> Iterator[dict[str, Any]]:
    """Yield the lines of the output; an error that is the model's, not the prompt's, is appended to ``failures``."""
    from faster_chatglm_6b.serving.offline import answer_many

    found = answer_many(
        model,
        tokenizer,
        (prompts[number] for number in missing),
        places=missing,
        max_tokens=arguments.max_tokens,
        max_rows=arguments.max_rows,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    for one in found:
        if one.error is not None and not isinstance(one.error, (TypeError, ValueError)):
            failures.append(one.error)
        elif one.error is not None:
            yield {"line": one.index, "error": str(one.error)}
        else:
            yield {"line": one.index, "response": one.text, "finish_reason": one.end, "tokens": one.tokens}


def write(file: TextIO, line: dict[str, Any]) -> None:
    """Write one line for good, so that an interruption loses no more than the answers under way."""
    file.write(json.dumps(line, ensure_ascii=False) + "\n")
    file.flush()


if __name__ == "__main__":
    sys.exit(run_command(run, parser().parse_args()))
