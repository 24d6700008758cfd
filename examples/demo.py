"""One turn and a follow-up with ChatGLM-6B; _loading.py is plain Hugging Face code below one import.

python examples/demo.py            # THUDM/chatglm-6b, about 12 GB to download once
python examples/demo.py --tiny     # the toy checkpoint of this repository: no download, no GPU
"""

import argparse
import time

from _loading import add_model_options, device_of, load_or_exit
from _printing import print_growing

import faster_chatglm_6b

FOLLOW_UP = "用英文再说一遍"  # "Say that again in English": it can only be answered with the history


def parse_arguments() -> argparse.Namespace:
    """What to load, where, and what to ask."""
    parser = argparse.ArgumentParser(description="Chat with ChatGLM-6B for one turn and a follow-up.")
    add_model_options(parser)
    parser.add_argument("--query", default="你好", help="the first question (%(default)s)")
    parser.add_argument("--follow-up", default=FOLLOW_UP, help="the second question (%(default)s)")
    return parser.parse_args()


def main() -> None:
    """Run the conversation."""
    arguments = parse_arguments()
    tokenizer, model = load_or_exit(arguments)

    print(f"Question: {arguments.query}")
    response, history = model.chat(tokenizer, arguments.query, history=[], do_sample=False)
    print(f"Answer:   {response}\n")

    print(f"Question: {arguments.follow_up}")
    print("Answer:   ", end="", flush=True)
    begun = time.perf_counter()
    tokens, _ = print_growing(model.stream_chat(tokenizer, arguments.follow_up, history=history, do_sample=False))
    seconds = time.perf_counter() - begun
    print(f"\n{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s on {device_of(arguments)}\n")
    print(faster_chatglm_6b.status())


if __name__ == "__main__":
    main()
