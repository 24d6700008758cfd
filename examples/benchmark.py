"""How fast ChatGLM-6B decodes on this GPU, next to what reading its weights costs on it.

    python examples/benchmark.py --sample --batch 8          # random weights of the real shape, nothing to download
    python examples/benchmark.py --model_name THUDM/chatglm-6b
    python examples/benchmark.py --bits 4 --head-bits 8      # quantised after loading
    python examples/benchmark.py --suite --json images/data/benchmark_h200.json

Times are wall-clock times of the public calls, the device drained before and after. ms_per_step is the median time of
``model.generate`` for all new tokens minus the median for one (the prompt and its first token), divided by the other
tokens: what one more token costs a caller. With ``--new-tokens 1`` it is the time of the whole call, which is how long
the prompt takes. bytes_per_step are the weights and the keys and values that a step must read; their share of the read
ceiling, a read-only stream of 8 GiB timed in the same process, tells how much is left to gain.
"""

import argparse
import contextlib
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

KEYS = (
    "backend weights group_size head batch prompt_tokens new_tokens mode ms_per_step tokens_per_s bytes_per_step "
    "gb_per_s read_ceiling_gb_per_s share peak_memory_gb gpu clocks torch triton date command"
).split()
SAMPLING = {"do_sample": True, "top_p": 0.7, "temperature": 0.95}


def build_model(name: str | None) -> torch.nn.Module:
    """The checkpoint ``name`` in float16 on the GPU, or random weights of the 6B shape, made there in seconds."""
    from faster_chatglm_6b.configuration_chatglm import ChatGLMConfig
    from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration

    if name is not None:
        return ChatGLMForConditionalGeneration.from_pretrained(name, torch_dtype=torch.float16).cuda().eval()
    config = ChatGLMConfig(**CONFIG_6B)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("cuda"):
            model = ChatGLMForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator("cuda").manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0, 0.02, generator=generator)
    model.lm_head.weight = model.transformer.word_embeddings.weight
    return model.eval()


# THUDM/chatglm-6b's config.json.
CONFIG_6B = {
    "vocab_size": 130528,
    "hidden_size": 4096,
    "num_layers": 28,
    "num_attention_heads": 32,
    "inner_hidden_size": 16384,
    "max_sequence_length": 2048,
    "bos_token_id": 130004,
    "eos_token_id": 130005,
    "mask_token_id": 130000,
    "gmask_token_id": 130001,
    "pad_token_id": 3,
    "position_encoding_2d": True,
}


def make_prompt(model: torch.nn.Module, batch: int, tokens: int) -> torch.Tensor:
    """Random ids [batch, tokens] that end in [gMASK] <sop>; no tokenizer is needed."""
    config = model.config
    text = torch.randint(20, 20000, (batch, tokens - 2), generator=torch.Generator().manual_seed(tokens))
    end = torch.tensor([[config.gmask_token_id, config.bos_token_id]]).expand(batch, 2)
    return torch.cat((text, end), dim=1).cuda()


def read_ceiling() -> float:
    """GB/s of a read-only stream of 8 GiB, the best of 20."""
    import triton
    import triton.language as tl

    @triton.jit
    def read(source, sink, BLOCK: tl.constexpr, ROUNDS: tl.constexpr):
        start = tl.program_id(0).to(tl.int64) * BLOCK * ROUNDS
        total = tl.zeros([BLOCK], tl.int32)
        for i in range(ROUNDS):
            total += tl.load(source + start + i * BLOCK + tl.arange(0, BLOCK), eviction_policy="evict_first")
        # Never true, but the compiler cannot know.
        if tl.sum(total) == 123456789:
            tl.store(sink, 1)

    data = torch.zeros(2 << 30, dtype=torch.int32, device="cuda")
    sink = torch.zeros(1, dtype=torch.int32, device="cuda")
    grid = (data.numel() // (4096 * 8),)
    times = []
    for _ in range(22):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        read[grid](data, sink, BLOCK=4096, ROUNDS=8, num_warps=8)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return data.numel() * 4 / min(times[2:]) / 1e6


def clocks() -> str:
    """SM and memory clock right after work was queued, as nvidia-smi reads them."""
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    for _ in range(300):
        x @ x
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        out = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip().splitlines()
        if out:
            return out[0]
    return "unknown"


def bytes_per_step(model: torch.nn.Module, batch: int, prompt_tokens: int, new_tokens: int) -> int:
    """What a step must read on average: every layer, the head, and the keys and values so far."""
    layers = sum(p.numel() * p.element_size() for p in model.transformer.layers.parameters())
    head = model.lm_head.weight.numel() * model.lm_head.weight.element_size()
    config = model.config
    context = prompt_tokens + new_tokens / 2
    return int(layers + head + 2 * config.num_layers * config.hidden_size * 2 * batch * context)


def timed(call) -> float:
    """Seconds of one call, the device drained before and after."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def run_once(model: torch.nn.Module, ids: torch.Tensor, mode: str, new_tokens: int) -> None:
    """Generate ``new_tokens``; random weights must not end the answer early, so there is no end token."""
    from transformers import LogitsProcessorList

    from faster_chatglm_6b.chat import InvalidScoreLogitsProcessor

    settings = {"max_new_tokens": new_tokens, "eos_token_id": None, "pad_token_id": 3}
    if mode == "greedy":
        model.generate(ids, do_sample=False, **settings)
        return
    # What chat and stream_chat ask for.
    settings |= SAMPLING | {"logits_processor": LogitsProcessorList([InvalidScoreLogitsProcessor()])}
    if mode == "sample":
        model.generate(ids, **settings)
        return
    for token in model.stream_tokens(ids, **settings):
        token.tolist()


def measure(model: torch.nn.Module, args: argparse.Namespace, ceiling: float, clock: str) -> dict:
    """One record, with the keys KEYS."""
    import triton

    ids = make_prompt(model, args.batch, args.prompt_tokens)
    for _ in range(args.warmup_iters):
        run_once(model, ids, args.mode, args.new_tokens)
    torch.cuda.reset_peak_memory_stats()
    whole = [timed(lambda: run_once(model, ids, args.mode, args.new_tokens)) for _ in range(args.iters)]
    seconds, steps = statistics.median(whole), 1
    if args.new_tokens > 1:
        first = [timed(lambda: run_once(model, ids, args.mode, 1)) for _ in range(args.iters + 2)]
        seconds, steps = seconds - statistics.median(first[1:]), args.new_tokens - 1
    step = seconds / steps
    moved = bytes_per_step(model, args.batch, args.prompt_tokens, args.new_tokens)
    rate = moved / step / 1e9
    config = model.config
    values = (
        args.backend,
        f"int{config.quantization_bit}" if config.quantization_bit else "fp16",
        config.quantization_group_size,
        f"int{config.quantization_head_bits}" if config.quantization_head_bits else "fp16",
        args.batch,
        args.prompt_tokens,
        args.new_tokens,
        args.mode,
        round(step * 1e3, 4),
        round(args.batch / step, 1),
        moved,
        round(rate, 1),
        round(ceiling, 1),
        round(rate / ceiling, 4),
        round(torch.cuda.max_memory_reserved() / 1e9, 2),
        torch.cuda.get_device_name(),
        clock,
        torch.__version__,
        triton.__version__,
        datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        " ".join(["python", *sys.argv]),
    )
    record = dict(zip(KEYS, values, strict=True))
    print(
        f"{args.backend:5} {args.mode:6} batch {args.batch:<3} prompt {args.prompt_tokens:<5} new {args.new_tokens:<4} "
        f"{step * 1e3:8.3f} ms/token {args.batch / step:9.1f} tokens/s {rate:7.0f} GB/s of {ceiling:.0f}: "
        f"{rate / ceiling:.3f}  peak {record['peak_memory_gb']} GB",
        flush=True,
    )
    return record


def append(path: str | None, records: list[dict]) -> None:
    """Add records to a JSON list in a file, one line each."""
    if path is None:
        return
    file = Path(path)
    known = json.loads(file.read_text()) if file.exists() else []
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in known + records)
    file.write_text(f"[\n{lines}\n]\n")


def profile(model: torch.nn.Module, args: argparse.Namespace) -> None:
    """Print which kernels the steps' time goes to."""
    from torch.profiler import ProfilerActivity

    ids = make_prompt(model, args.batch, args.prompt_tokens)
    run_once(model, ids, args.mode, args.new_tokens)
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run_once(model, ids, args.mode, args.new_tokens)
        torch.cuda.synchronize()
    print(profiler.key_averages().table(sort_by="cuda_time_total", row_limit=20, max_name_column_width=48))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model_name", help="a checkpoint; without one the weights are random")
    parser.add_argument("--random-weights", action="store_true", help="random weights of the real shape (the default)")
    parser.add_argument("--backend", choices=("ours", "torch"), default="ours", help="torch: no kernels, plain loop")
    parser.add_argument("--bits", type=int, choices=(16, 8, 4), default=16, help="quantise the layers first")
    parser.add_argument("--group-size", type=int, help="columns per scale, for example 128; default: whole rows")
    parser.add_argument("--head-bits", type=int, choices=(8,), help="quantise the output head too")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--iters", type=int, default=5)
    parser.add_argument("--warmup-iters", type=int, default=2)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--sample", dest="mode", action="store_const", const="sample", help="as chat samples")
    mode.add_argument("--stream", dest="mode", action="store_const", const="stream", help="as stream_chat samples")
    parser.add_argument("--json", metavar="FILE", help="append the records to this file")
    parser.add_argument("--profile", action="store_true", help="print the kernels that the time goes to")
    parser.add_argument("--suite", action="store_true", help="every row of the README's table")
    parser.set_defaults(mode="greedy")
    args = parser.parse_args(argv)
    if args.prompt_tokens < 3 or args.new_tokens < 1 or args.iters < 1:
        parser.error("a prompt has at least 3 tokens, and there is at least one new token and one iteration")
    if args.bits == 16 and (args.group_size or args.head_bits):
        parser.error("--group-size and --head-bits need --bits 8 or --bits 4")
    return args


def main(args: argparse.Namespace) -> None:
    """Run what the arguments ask for."""
    if not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device, and this benchmark measures GPUs; run it on a machine with one.")
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    if args.backend == "torch":
        # Read when the first model runs: the definitions in plain PyTorch, and transformers' own loop.
        os.environ["FASTER_CHATGLM_6B_KERNELS"] = "off"
    if args.suite:
        import benchmark_suite

        benchmark_suite.run(args)
        return
    ceiling, clock = read_ceiling(), clocks()
    torch.cuda.empty_cache()
    model = build_model(args.model_name)
    if args.bits != 16:
        model.quantize(args.bits, args.group_size, args.head_bits)
        torch.cuda.empty_cache()
    append(args.json, [measure(model, args, ceiling, clock)])
    if args.profile:
        profile(model, args)


if __name__ == "__main__":
    main(parse())
