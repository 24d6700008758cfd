"""Measure how fast ChatGLM-6B answers here, next to plain PyTorch and to what reading its weights costs.

    python examples/benchmark.py                             # random weights of the real shape, nothing to download
    python examples/benchmark.py --no-fast                   # the same in plain PyTorch
    python examples/benchmark.py --model_name THUDM/chatglm-6b --quant
    python examples/benchmark.py --bits 4 --group-size 128 --head-bits 8 --batch 8 --sample
    python examples/benchmark.py --table --json FILE         # both backends, quantised or not; --quick for a short one
    python examples/benchmark.py --suite --json FILE         # contexts, batches, first tokens, memory and promises
    python examples/benchmark.py --serve --json FILE         # the server under load; --tiny --quick without a GPU
    python examples/benchmark.py --model_name examples/tiny_chatglm --new_tokens 32     # without a GPU
    python examples/benchmark.py --random-weights --device cpu --bits 4 --layers 4      # a CPU, extrapolated to 28

One run prints how long its iterations took in all and on average, and one row of the table: tok/s, GB/s and the share
of the read ceiling are those of one more token, without the prompt (see measuring/timing.py). With ``--new_tokens 1``
they are those of the first token, and the share is that of its floor. ``--json FILE`` appends the record.

"Torch" is the stock model's way of computing: every operator by its definition in PyTorch calls, a cache that is
concatenated at every step, transformers' own loop, and quantised weights turned back into floats at every product. It
runs our definitions of the operators and not the checkpoint's own code, whose ``generate`` fails on transformers 4.42
and later. Where the two differ, the baseline is mostly the lighter one: PyTorch's own GELU, no mask in a step without
padding, tables of sines that are kept, scores that are not scaled twice. It is the heavier one where int8 and int4
weights become floats, in two and in seven PyTorch calls: the stock code has a CUDA kernel for that, though none for
GPUs beyond compute capability 8.6.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
# The package comes from the clone, installed or not.
sys.path.insert(0, str(ROOT))

PROMPT = "请写一段关于人工智能的文字，不少于800字。"
BACKENDS = ("ours", "torch")


class Parser(argparse.ArgumentParser):
    """Take ``--new_tokens`` for ``--new-tokens``, and say what is wrong in one sentence."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> argparse.Namespace:
        given = sys.argv[1:] if args is None else args
        spelled = [re.sub(r"^--[^=]+", lambda name: name[0].replace("_", "-"), word) for word in given]
        return super().parse_args(spelled, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def count(text: str) -> int:
    """Read a number of at least 1, for an option."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} was given, but it must be 1 or more")
    return value


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add every option; those that depend on others have no default here."""
    choice = argparse.BooleanOptionalAction
    model = parser.add_argument_group("what is measured")
    model.add_argument("--model-name", "--model", metavar="NAME", help="hub id or directory of a checkpoint")
    tiny = os.path.relpath(ROOT / "examples" / "tiny_chatglm")
    model.add_argument("--tiny", dest="model_name", action="store_const", const=tiny, help="the toy checkpoint")
    model.add_argument("--random-weights", action="store_true", help="random weights of the 6B shape (the default)")
    model.add_argument("--backend", choices=BACKENDS, help="torch: plain PyTorch, see above (default: ours)")
    model.add_argument("--fast", action=choice, help="the same choice: --no-fast is --backend torch")
    model.add_argument("--bits", type=int, choices=(16, 8, 4), help="quantise the layers first")
    model.add_argument("--quant", action=choice, help="quantise to 8 bits, or to --bits")
    model.add_argument("--group-size", type=count, help="columns per scale, for example 128 (default: whole rows)")
    model.add_argument("--head-bits", type=int, choices=(8,), help="quantise the output head too")
    model.add_argument(
        "--device", choices=("cuda", "cpu"), help="cpu: random weights on the CPU, with its read ceiling"
    )
    model.add_argument("--layers", type=count, help="with --device cpu: fewer than 28, and 28 are extrapolated")
    dtypes = ("float32", "float16", "bfloat16")
    model.add_argument("--dtype", choices=dtypes, help="with --device cpu: of the floats (default: float16)")
    work = parser.add_argument_group("the work")
    work.add_argument("--prompt", metavar="TEXT", help=f"needs a checkpoint (its default: {PROMPT})")
    work.add_argument("--prompt-tokens", type=count, help="random tokens instead (default without a checkpoint: 20)")
    work.add_argument("--new-tokens", type=count, default=128, help="new tokens per iteration (%(default)s)")
    work.add_argument("--batch", type=count, default=1, help="prompts at once (%(default)s)")
    mode = work.add_mutually_exclusive_group()
    mode.add_argument("--sample", dest="mode", action="store_const", const="sample", help="as chat samples")
    mode.add_argument("--stream", dest="mode", action="store_const", const="stream", help="as stream_chat samples")
    work.add_argument("--iters", type=count, help="measured iterations (20; 15 with --suite, 5 with --serve)")
    work.add_argument("--warmup-iters", type=count, help="iterations before them (1; 2 with --suite)")
    whole = parser.add_argument_group("whole experiments")
    whole.add_argument("--table", action="store_true", help="both backends, quantisation off, 8 and 4, in 5 runs each")
    whole.add_argument("--runs", type=count, help="runs of each row of the table, each in a process of its own")
    whole.add_argument(
        "--suite",
        nargs="?",
        const="all",
        choices=("all", "floats", "integers"),
        help="contexts, batches, first tokens, memory, first calls; a word: only those of such weights",
    )
    whole.add_argument("--serve", action="store_true", help="the server: throughput, latencies, memory (servebench)")
    whole.add_argument("--requests", type=count, help="with --serve: until memory is compared (2000; 100 with --quick)")
    whole.add_argument("--quick", action="store_true", help="--table, --suite or --serve with few iterations")
    output = parser.add_argument_group("output")
    output.add_argument("--json", metavar="FILE", help="append the records to FILE; with --table: write FILE anew")
    output.add_argument("--profile", action="store_true", help="print the kernels that the time goes to")
    output.add_argument("--run-to", metavar="FILE", help=argparse.SUPPRESS)  # how --table hears from its processes
    parser.set_defaults(mode="greedy")


def contradiction(args: argparse.Namespace) -> str | None:
    """Return one sentence on options that cannot go together, or None if all can."""
    if args.fast is not None and args.backend not in (None, BACKENDS[not args.fast]):
        given = "--fast" if args.fast else "--no-fast"
        return f"{given} means --backend {BACKENDS[not args.fast]}, but --backend {args.backend} was given; keep one."
    if args.quant is False and args.bits not in (None, 16):
        return f"--no-quant was given with --bits {args.bits}; keep one of the two."
    if args.quant and args.bits == 16:
        return "--quant was given with --bits 16, which is no quantisation; keep one of the two."
    if args.random_weights and args.model_name:
        return f"--random-weights was given with --model_name {args.model_name}; keep one of the two."
    if args.prompt is not None and args.prompt_tokens is not None:
        return "--prompt was given with --prompt-tokens, which stands for random tokens; keep one of the two."
    if args.prompt is not None and (not args.model_name or args.suite):
        return "--prompt needs a tokenizer, and random weights have none; name a checkpoint with --model_name."
    if args.prompt_tokens is not None and args.prompt_tokens < 3:
        return f"--prompt-tokens {args.prompt_tokens} was given, but a prompt has at least 3 tokens."
    on_cpu = args.device == "cpu"
    if args.serve and (wrong := contradiction_of_serve(args)):
        return wrong
    if args.requests and not args.serve:
        return "--requests belongs to --serve; give it too."
    if not on_cpu and (args.layers or args.dtype):
        return f"{'--layers' if args.layers else '--dtype'} belongs to --device cpu; give it too."
    if on_cpu and (args.model_name or args.table or args.suite or args.profile):
        return "--device cpu measures random weights; leave --model_name, --table, --suite and --profile out."
    if on_cpu and args.layers and not 2 <= args.layers <= 28:
        return f"--layers {args.layers} was given, but the time of a layer needs 2 to 28 of them."
    if args.table and args.suite:
        return "--table was given with --suite; run one after the other."
    if args.quick and not (args.table or args.suite or args.serve):
        return "--quick shortens --table, --suite and --serve; give one of them, or fewer --iters."
    if args.runs is not None and not args.table:
        return "--runs belongs to --table; give it too, or more --iters."
    decided = {"--backend": args.backend, "--fast": args.fast, "--bits": args.bits, "--quant": args.quant}
    given = [name for name, value in {**decided, "--head-bits": args.head_bits}.items() if value is not None]
    if args.table and given:
        return f"--table measures both backends, quantised and not; leave {given[0]} out."
    if args.table and args.profile:
        return "--profile looks at one run; leave --table out."
    if args.suite and any(value is not None for value in (args.bits, args.quant, args.group_size, args.head_bits)):
        return "--suite measures float16, int8 and int4 weights; leave the options of quantisation out."
    if (args.group_size or args.head_bits) and not (args.table or args.quant or args.bits in (8, 4)):
        return "--group-size and --head-bits need --bits 8 or --bits 4."
    return None


def contradiction_of_serve(args: argparse.Namespace) -> str | None:
    """Return one sentence on options that do not go with --serve, or None."""
    no_use = {
        "--table": args.table, "--suite": args.suite, "--profile": args.profile, "--prompt": args.prompt,
        "--backend torch": args.backend == "torch" or args.fast is False,
        "--sample and --stream": args.mode != "greedy",
        "--batch": args.batch != 1, "--layers": args.layers, "--dtype": args.dtype, "--device": args.device,
    }  # fmt: skip
    given = [name for name, value in no_use.items() if value]
    if given:
        return f"--serve measures the server as it is started, on the GPU if there is one; leave {given[0]} out."
    return None


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the options and fill in those that depend on others; exit with one sentence if they contradict."""
    description, details = __doc__.split("\n\n", 1)
    parser = Parser(description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    args = parser.parse_args(argv)
    wrong = contradiction(args)
    if wrong:
        parser.error(wrong)
    args.backend = args.backend or BACKENDS[args.fast is False]
    args.bits = args.bits or (8 if args.quant else 16)
    args.runs = args.runs or (1 if args.quick else 5)
    args.dtype = args.dtype or "float16"
    args.iters = args.iters or (
        5 if args.device == "cpu" or args.serve else 3 if args.quick else 15 if args.suite else 20
    )
    args.warmup_iters = args.warmup_iters or (2 if args.suite and not args.quick else 1)
    if args.prompt_tokens is None and (args.serve or args.suite or not args.model_name):
        args.prompt_tokens = 128 if args.serve else 20
    return args


def check_machine(args: argparse.Namespace) -> None:
    """Raise SystemExit, with one sentence, if there is no GPU for what was asked."""
    import torch

    if args.device == "cpu" or torch.cuda.is_available() or (args.model_name and not args.suite):
        return
    needy = "--suite needs" if args.suite else "the 6B shape with random weights needs"
    raise SystemExit(
        f"There is no CUDA device, which {needy}; on a CPU, give --device cpu, or measure a checkpoint, "
        "for example --model_name examples/tiny_chatglm."
    )


def check_path(args: argparse.Namespace) -> None:
    """Make sure that the plain baseline was plain, and say so if ours was not fast."""
    import faster_chatglm_6b

    status = faster_chatglm_6b.status()
    if args.backend == "torch":
        operators = {name for choices in status.operators.values() for name, _ in choices.values()}
        if status.captured_generations or operators != {"reference"}:
            raise SystemExit(f"The plain baseline was not plain, which is a fault of this benchmark: {status}")
    elif status.plain_generations:
        print(f"Ours ran without its captured loop: {'; '.join(status.plain_generations)}.", file=sys.stderr)


def single(args: argparse.Namespace) -> None:
    """Measure one model and one kind of work: print the closing line and the row, write the record."""
    from measuring import table
    from measuring.machine import look
    from measuring.models import encode_prompt, load, make_prompt
    from measuring.timing import append, known_records, measure, profile, token_times

    if args.json:
        known_records(Path(args.json))
    machine = look()
    model, tokenizer = load(args.model_name)
    if args.bits != 16:
        try:
            model.quantize(args.bits, args.group_size, args.head_bits)
        except ValueError as error:
            raise SystemExit(str(error)) from None
    if args.prompt_tokens is None:
        ids = encode_prompt(model, tokenizer, args.prompt or PROMPT, args.batch)
    else:
        ids = make_prompt(model, args.batch, args.prompt_tokens)
    run = measure(model, ids, args, machine)
    check_path(args)
    total = sum(run.seconds)
    print(f"Finish {args.iters} iters in {total:.3f} seconds, average {total / args.iters:.3f} s/it\n")
    print(table.HEADER)
    print(table.markdown_row(table.row_of([total], [run.record], args.iters)))
    append(args.json, [run.record])
    if args.run_to:
        times = token_times(model, ids, args.new_tokens) if args.bits == 16 else None
        result = {"duration_s": total, "record": run.record, "token_times": times}
        Path(args.run_to).write_text(json.dumps(result), encoding="utf-8")
    if args.profile:
        profile(model, ids, args.mode, args.new_tokens)


def main(args: argparse.Namespace) -> None:
    """Run what the arguments ask for."""
    check_machine(args)
    if args.backend == "torch":
        # Read when the first model runs.
        os.environ["FASTER_CHATGLM_6B_KERNELS"] = "off"
    if args.serve:
        from measuring import serving

        serving.run(args)
    elif args.device == "cpu":
        from measuring import cpu

        cpu.run(args)
    elif args.suite:
        from measuring import suite

        suite.run(args)
    elif args.table:
        from measuring import table

        table.run(args)
    else:
        single(args)


if __name__ == "__main__":
    main(parse())
