"""One turn and a follow-up, the speed, and the status report."""

import argparse
import time

from .. import status
from .checkpoint import load_asked, out_of_memory, too_long
from .errors import CommandError
from .printing import harmless, print_growing


def run(arguments: argparse.Namespace) -> None:
    """Hold the conversation.

    Raises:
        CommandError: no checkpoint, or a question that it cannot be asked.
    """
    tokenizer, model = load_asked(arguments, default=None)
    for query in (arguments.query, arguments.follow_up):
        if refusal := too_long(query, model):
            raise CommandError(refusal, code=2)
    try:
        _converse(tokenizer, model, arguments)
    except (ValueError, *out_of_memory()) as error:  # such as questions that leave no room for an answer
        raise CommandError(str(error)) from error
    print(status())


def _converse(tokenizer, model, arguments: argparse.Namespace) -> None:
    print(f"Question: {harmless(arguments.query)}")
    response, history = model.chat(tokenizer, arguments.query, history=[], do_sample=False)
    print(f"Answer:   {harmless(response)}\n")

    print(f"Question: {harmless(arguments.follow_up)}")
    print("Answer:   ", end="", flush=True)
    begun = time.perf_counter()
    tokens, _ = print_growing(model.stream_chat(tokenizer, arguments.follow_up, history=history, do_sample=False))
    seconds = time.perf_counter() - begun
    print(f"\n{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s on {model.device}\n")
