"""One turn and a follow-up with ChatGLM-6B: plain Hugging Face code below one import.

python examples/demo.py            # THUDM/chatglm-6b, about 12 GB to download once
python examples/demo.py --tiny     # the toy checkpoint of this repository: no download, no GPU
"""

import argparse
import sys
import time
from pathlib import Path

import faster_chatglm_6b  # first: where OneFlow runs the model, it lets torch mean OneFlow

# isort: split
import torch
from huggingface_hub.utils import logging as hub_logging
from transformers import AutoModel, AutoTokenizer

HUB_ID = "THUDM/chatglm-6b"
TINY = Path(__file__).parent / "tiny_chatglm"
FOLLOW_UP = "用英文再说一遍"  # "Say that again in English": it can only be answered with the history


def parse_arguments() -> argparse.Namespace:
    """What to load, where, and what to ask."""
    parser = argparse.ArgumentParser(description="Chat with ChatGLM-6B for one turn and a follow-up.")
    parser.add_argument("--model", default=HUB_ID, help="hub id or directory of a ChatGLM-6B checkpoint (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="use the toy checkpoint that comes with this repository")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one, else cpu)")
    parser.add_argument("--query", default="你好", help="the first question (%(default)s)")
    parser.add_argument("--follow-up", default=FOLLOW_UP, help="the second question (%(default)s)")
    return parser.parse_args()


def load(name: str, device: torch.device):
    """Tokenizer and model: half precision on a GPU, float32 elsewhere."""
    hub_logging.set_verbosity_error()  # not a warning per attempt where there is no network: main() says it once
    source = {"revision": faster_chatglm_6b.revision} if name == HUB_ID else {}
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True, **source)
    model = AutoModel.from_pretrained(name, trust_remote_code=True, **source)
    return tokenizer, (model.half() if device.type == "cuda" else model.float()).to(device)


def stream_answer(model, tokenizer, query: str, history: list) -> tuple[int, float]:
    """Print an answer as it comes; returns its tokens and the seconds that they took."""
    begun, tokens, shown, response = time.perf_counter(), 0, 0, ""
    for response, _ in model.stream_chat(tokenizer, query, history=history, do_sample=False):
        tokens += 1
        # The last character may still change: a comma gets its Chinese form when a Chinese character follows.
        print(response[shown:-1], end="", flush=True)
        shown = max(shown, len(response) - 1)
    print(response[shown:])
    return tokens, time.perf_counter() - begun


def main() -> int:
    """Run the conversation; 1 where the weights cannot be had."""
    arguments = parse_arguments()
    name = str(TINY) if arguments.tiny else arguments.model
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        tokenizer, model = load(name, device)
    except OSError as error:
        advice = (
            f"{name} is neither on this machine nor to be had from the hub: connect to the network, pass a local "
            "directory with --model, or try the toy checkpoint with --tiny."
        )
        print(error if Path(name).is_dir() else advice, file=sys.stderr)
        return 1

    print(f"Question: {arguments.query}")
    response, history = model.chat(tokenizer, arguments.query, history=[], do_sample=False)
    print(f"Answer:   {response}\n")

    print(f"Question: {arguments.follow_up}")
    print("Answer:   ", end="", flush=True)
    tokens, seconds = stream_answer(model, tokenizer, arguments.follow_up, history)
    print(f"\n{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s on {device}\n")
    print(faster_chatglm_6b.status())
    return 0


if __name__ == "__main__":
    sys.exit(main())
