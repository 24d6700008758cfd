"""Measure the server: ``python examples/benchmark.py --serve --json FILE``.

The engine is measured first, without HTTP: throughput of full rows, and one answer alone. Then the server listens in
this process, over the same rows, and servebench (``pip install servebench``, which is not ours) loads it from a process
of its own: a number of clients at once, each of which sends its next request when it has its answer. Prompts have
exactly ``--prompt-tokens`` tokens, answers exactly ``--new-tokens``. At last many short requests tell whether memory
grows.

Records have a "kind": "offline", "one answer", "http", "mixed" (every eighth prompt has 1024 tokens) or "memory".
Latencies are in milliseconds as clients see them. Goodput counts the requests per second whose first token came within
500 ms and whose further tokens took 50 ms at most.
"""

import argparse
import contextlib
import datetime
import importlib.util
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import timing
from .machine import Machine, look
from .models import load, weights_of
from .serving_prompts import prompts_of, tokenizer_for

NAME = "chatglm-6b"
LONG_PROMPT = 1024
# Prompt and new tokens of the requests that tell whether memory grows.
SHORT = (32, 16)


class Plan(NamedTuple):
    """How much is measured.

    Attributes:
        clients: at once, each number in turn.
        rounds: requests of each client.
        rows: of the engine without HTTP.
        lengths: prompt and new tokens without HTTP.
        requests: to see whether memory grows.
    """

    clients: Sequence[int]
    rounds: int
    rows: Sequence[int]
    lengths: Sequence[tuple[int, int]]
    requests: int


def plan_of(args: argparse.Namespace) -> Plan:
    """Return the plan that the options ask for."""
    here = (args.prompt_tokens, args.new_tokens)
    if args.quick:
        return Plan((1, 8), 2, (8,), (here,), args.requests or 100)
    lengths = tuple(dict.fromkeys(((20, args.new_tokens), here)))
    return Plan((1, 8, 32, 128, 256), 4, (64, 128, 256), lengths, args.requests or 2000)


def run(args: argparse.Namespace) -> None:
    """Measure what the arguments ask for, print it, and append the records to ``args.json``."""
    if importlib.util.find_spec("servebench") is None:
        raise SystemExit("--serve needs servebench, which sends the requests: pip install servebench (Python 3.11).")
    if args.json:
        timing.known_records(Path(args.json))
    plan, machine = plan_of(args), look()
    model, tokenizer = load(args.model_name)
    if args.bits != 16:
        model.quantize(args.bits, args.group_size, args.head_bits)
    tokenizer = tokenizer or tokenizer_for(model)
    bench = Bench(model, tokenizer, args, machine)
    for rows in plan.rows:
        bench.offline(rows, plan.lengths)
    rows = bench.rows(max(plan.clients))
    bench.one_answer(rows)
    with bench.listening(rows) as url:
        for clients in plan.clients:
            bench.http(url, clients, plan.rounds)
        bench.mixed(url, plan.clients[-2], plan.rounds)
        bench.memory(url, max(plan.clients), plan.requests)
    bench.compare()


class Bench:
    """One model on one machine, and the records so far; each is printed and written as soon as it is made."""

    def __init__(self, model: Any, tokenizer: Any, args: argparse.Namespace, machine: Machine):
        self.model, self.tokenizer, self.args = model, tokenizer, args
        self.records: list[dict[str, Any]] = []
        self._of_all = {
            "weights": weights_of(model),
            "gpu": machine.name,
            "clocks": machine.clocks,
            "torch": torch.__version__,
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
            "command": " ".join(["python", *sys.argv]),
        }

    def note(self, kind: str, **values: Any) -> dict[str, Any]:
        """Print and write a record, with its numbers rounded, and return it."""
        record = {"kind": kind} | {
            name: round(value, 4) if isinstance(value, float) else value for name, value in values.items()
        }
        print(", ".join(f"{name} {value}" for name, value in record.items()), flush=True)
        self.records.append(record)
        timing.append(self.args.json, [record | self._of_all])
        return record

    def rows(self, count: int) -> Any:
        """Return the rows that a server would have."""
        from faster_chatglm_6b.serving.rows.making import make_rows

        return make_rows(self.model, count, 0.9)

    def answers(self, rows: Any, prompts: Sequence[str], new_tokens: int) -> float:
        """Answer all prompts without HTTP, greedily, and return the seconds."""
        from faster_chatglm_6b.serving.offline import answer_many

        settings = {"max_tokens": new_tokens, "ignore_eos": True, "temperature": 0, "rows": rows}
        found = []

        def work() -> None:
            found.extend(answer_many(self.model, self.tokenizer, prompts, **settings))

        seconds = timing.timed(work)
        wrong = [one for one in found if one.error or one.tokens != new_tokens]
        if wrong or len(found) != len(prompts):
            raise SystemExit(f"Not all of {len(prompts)} answers have {new_tokens} tokens: {wrong[:1]}")
        return seconds

    def offline(self, count: int, lengths: Sequence[tuple[int, int]]) -> None:
        """Measure full rows: two answers for each of ``count`` rows, prompts included."""
        rows = self.rows(count)
        for prompt_tokens, new_tokens in lengths:
            prompts = prompts_of(self.tokenizer, 2 * count, prompt_tokens)
            self.answers(rows, prompts[:count], min(new_tokens, 4))
            seconds = self.answers(rows, prompts, new_tokens)
            self.note(
                "offline",
                rows=count,
                prompt_tokens=prompt_tokens,
                new_tokens=new_tokens,
                requests=len(prompts),
                tokens_per_s=len(prompts) * new_tokens / seconds,
            )
        del rows
        self.model.release_cache()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def one_answer(self, rows: Any) -> None:
        """Measure one answer alone: its first token, one more token, and the first token of a long prompt."""
        tokens, new_tokens = self.args.prompt_tokens, self.args.new_tokens
        one, long = (prompts_of(self.tokenizer, 1, count) for count in (tokens, LONG_PROMPT))

        def median(prompts: Sequence[str], count: int) -> float:
            times = sorted(self.answers(rows, prompts, count) for _ in range(self.args.iters + 1))
            return times[len(times) // 2]

        whole, first, first_of_long = median(one, new_tokens), median(one, 1), median(long, 1)
        self.note(
            "one answer",
            prompt_tokens=tokens,
            new_tokens=new_tokens,
            ms_first_token=first * 1e3,
            ms_per_token=timing.step_of([whole], [first], new_tokens) * 1e3 if new_tokens > 1 else None,
            ms_first_token_of_1024=first_of_long * 1e3,
        )

    @contextlib.contextmanager
    def listening(self, rows: Any) -> Iterator[str]:
        """Serve on a free port in a thread; give the address."""
        import uvicorn

        from faster_chatglm_6b.serving.api.server import Settings, application

        app = application(self.model, self.tokenizer, Settings(names=(NAME,), rows=rows.rows), rows)
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", access_log=False))
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            while not server.started:
                if not thread.is_alive():
                    raise SystemExit("The server did not start.")
                time.sleep(0.01)
            yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()

    def load(
        self, url: str, prompts: Sequence[str], clients: int, requests: int, new_tokens: int, warmup: int = 2
    ) -> dict[str, Any]:
        """Let servebench send the requests from a process of its own; return its summary, with ``lag_ms`` of itself."""
        with tempfile.TemporaryDirectory() as folder:
            file, out = Path(folder) / "prompts.jsonl", Path(folder) / "run.json"
            file.write_text("\n".join(json.dumps({"prompt": text}) for text in prompts), encoding="utf-8")
            options = {
                "url": f"{url}/v1", "model": NAME, "concurrency": clients, "num-requests": requests, "prompts": file,
                "output-len": new_tokens, "warmup": warmup, "seed": 1, "out": out,
            }  # fmt: skip
            words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
            command = [sys.executable, "-m", "servebench.cli", "run", *words]
            done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
            if done.returncode or not out.is_file():
                raise SystemExit(f"servebench has failed: {(done.stderr or done.stdout)[-2000:]}")
            (level,) = json.loads(out.read_text(encoding="utf-8"))["levels"]
        summary = level["summary"]
        if summary["failed"]:
            raise SystemExit(f"{summary['failed']} of {requests} requests have failed: {summary['errors']}")
        return summary | {"lag_ms": level["client_lag_p99_ms"]}

    def note_http(self, kind: str, summary: dict[str, Any], **values: Any) -> None:
        """Note what servebench measured."""

        def ms(name: str, share: str) -> float | None:
            value = summary[name][share]
            return None if value is None else value * 1e3

        self.note(
            kind,
            **values,
            requests=summary["completed"],
            ms_first_token_p50=ms("ttft", "p50"),
            ms_first_token_p99=ms("ttft", "p99"),
            ms_between_tokens_p50=ms("itl", "p50"),
            ms_between_tokens_p99=ms("itl", "p99"),
            ms_per_token_p50=ms("tpot", "p50"),
            tokens_per_s=summary["output_throughput"],
            requests_per_s=summary["request_throughput"],
            good_requests_per_s=summary["goodput"],
            tokens_per_chunk=summary["tokens_per_chunk"],
            ms_tester_lag_p99=summary["lag_ms"],
        )

    def http(self, url: str, clients: int, rounds: int) -> None:
        """Measure a number of clients at once."""
        tokens, new_tokens = self.args.prompt_tokens, self.args.new_tokens
        requests = max(clients * rounds, 8)
        prompts = prompts_of(self.tokenizer, requests, tokens, seed=clients)
        summary = self.load(url, prompts, clients, requests, new_tokens, warmup=min(clients, 8))
        self.note_http("http", summary, clients=clients, prompt_tokens=tokens, new_tokens=new_tokens)

    def mixed(self, url: str, clients: int, rounds: int) -> None:
        """Measure what long prompts of others cost the running answers: every eighth has 1024 tokens."""
        tokens, new_tokens = self.args.prompt_tokens, self.args.new_tokens
        requests = max(clients * rounds, 8)
        prompts = prompts_of(self.tokenizer, requests, tokens, seed=-1)
        prompts[::8] = prompts_of(self.tokenizer, len(prompts[::8]), LONG_PROMPT, seed=-1)
        summary = self.load(url, prompts, clients, requests, new_tokens)
        self.note_http("mixed", summary, clients=clients, prompt_tokens=tokens, new_tokens=new_tokens)

    def memory(self, url: str, clients: int, requests: int) -> None:
        """Measure how much memory this process has grown by after many short requests, a tenth of them as a warm-up."""
        tokens, new_tokens = SHORT
        prompts = prompts_of(self.tokenizer, min(requests, 512), tokens, seed=-2)
        self.load(url, prompts, clients, max(requests // 10, 1), new_tokens)
        before = memory_now()
        self.load(url, prompts, clients, requests, new_tokens)
        after = memory_now()
        grown = {f"mb_{name}_grown": (after[name] - before[name]) / 1e6 for name in after}
        self.note("memory", clients=clients, prompt_tokens=tokens, new_tokens=new_tokens, requests=requests, **grown)

    def compare(self) -> None:
        """Print what HTTP costs: throughput over that without it, and one answer over that without it."""
        offline = {
            record["rows"]: record["tokens_per_s"]
            for record in self.records
            if record["kind"] == "offline" and record["prompt_tokens"] == self.args.prompt_tokens
        }
        http = {record["clients"]: record for record in self.records if record["kind"] == "http"}
        for clients in sorted(offline.keys() & http.keys()):
            share = http[clients]["tokens_per_s"] / offline[clients]
            print(f"{clients} clients over HTTP: {share:.3f} of the throughput without it")
        (alone,) = (record for record in self.records if record["kind"] == "one answer")
        if alone["ms_per_token"] and 1 in http:
            share = http[1]["ms_per_token_p50"] / alone["ms_per_token"]
            print(f"one client over HTTP: {share:.3f} times the time per token without it")


def memory_now() -> dict[str, int]:
    """Return the bytes that this process holds: "host" resident, and on a GPU "gpu" allocated and "reserved"."""
    import gc

    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    held = {"host": pages * 4096}
    if torch.cuda.is_available():
        held |= {"gpu": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved()}
    return held
