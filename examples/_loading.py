"""What the demos share: their options, a checkpoint's tokenizer and model, and how an answer is drawn."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import faster_chatglm_6b  # first: where OneFlow runs the model, it lets torch mean OneFlow

# isort: split
import torch
from huggingface_hub.utils import logging as hub_logging
from transformers import AutoModel, AutoTokenizer

HUB_ID = "THUDM/chatglm-6b"
TINY = Path(__file__).parent / "tiny_chatglm"


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which checkpoint, in how many bits, on which device."""
    parser.add_argument("--model", default=HUB_ID, help="hub id or directory of a ChatGLM-6B checkpoint (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="use the toy checkpoint that comes with this repository")
    parser.add_argument("--bits", type=int, choices=(4, 8), help="quantise the weights while loading")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one, else cpu)")


def device_of(arguments: argparse.Namespace) -> torch.device:
    """The device that was asked for, or the best one."""
    return torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def load_or_exit(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Tokenizer and model: half precision on a GPU, float32 elsewhere.

    Raises:
        SystemExit: 1, after a sentence on what to do, where the weights cannot be had or do not fit the options.
    """
    name = os.path.relpath(TINY) if arguments.tiny else arguments.model
    hub_logging.set_verbosity_error()  # not a warning per attempt where there is no network: it is said once, below
    try:
        return _load(name, arguments.bits, device_of(arguments))
    except OSError as error:
        advice = (
            f"{name} is neither on this machine nor to be had from the hub: connect to the network, pass a local "
            "directory with --model, or try the toy checkpoint with --tiny."
        )
        print(error if Path(name).is_dir() else advice, file=sys.stderr)
    except ValueError as error:
        print(error, file=sys.stderr)
    sys.exit(1)


def _load(name: str, bits: int | None, device: torch.device) -> tuple[Any, Any]:
    source = {"revision": faster_chatglm_6b.revision} if name == HUB_ID else {}
    quantization = {"quantization_bit": bits} if bits else {}
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True, **source)
    model = AutoModel.from_pretrained(name, trust_remote_code=True, **source, **quantization)
    return tokenizer, (model.half() if device.type == "cuda" else model.float()).to(device)


def generation_settings(max_length: int, top_p: float, temperature: float) -> dict[str, Any]:
    """Arguments of ``stream_chat``. A temperature of 0 takes the most likely token every time."""
    if temperature == 0:
        return {"max_length": max_length, "do_sample": False}
    return {"max_length": max_length, "do_sample": True, "top_p": top_p, "temperature": temperature}
