"""Make a folder of data in which first tokens were measured, for the tests of pictures and pages."""

import json
import shutil
from pathlib import Path

DATA = Path(__file__).resolve().parents[2] / "images" / "data"
SUITE = "benchmark_h200.json"
PROMPTS = ((1, 20), (1, 128), (1, 512), (1, 1024), (1, 2000), (8, 512))
OF_A_FIRST_TOKEN = {"new_tokens": 1, "mode": "greedy", "matrix_rate_tflops": 700.0, "operations_per_step": 10**13}


def with_first_tokens(folder: Path) -> Path:
    """Copy images/data to ``folder`` and replace its first tokens: b prompts of n tokens take n * b + 6 ms."""
    shutil.copytree(DATA, folder, dirs_exist_ok=True)
    records = [record for record in json.loads((folder / SUITE).read_text("utf-8")) if record["new_tokens"] > 1]
    for index, weights in enumerate(("fp16", "int8", "int4")):
        for batch, tokens in PROMPTS:
            ms = tokens * batch + 6.0
            one = {"weights": weights, "batch": batch, "prompt_tokens": tokens, "ms_per_step": ms}
            floor = ms / 2 - index
            records.append(records[0] | OF_A_FIRST_TOKEN | one | {"floor_ms": floor, "share": floor / ms})
    (folder / SUITE).write_text(json.dumps(records), "utf-8")
    return folder
