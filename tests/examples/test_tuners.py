"""The tuners of ``examples/measuring`` time the right step and search well, with a tiny model in the interpreter.

An environment variable chooses Triton's interpreter when the kernels are imported. So the checks run in a process of
their own: this file starts itself as a program. Nothing is timed: a step runs once, and its time is made up.
"""

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels to interpret")

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = 5


def load(*quantization):
    from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration

    model = ChatGLMForConditionalGeneration.from_pretrained(ROOT / "tests" / "golden" / "ckpt" / "tiny").float()
    return model.quantize(*quantization).eval() if quantization else model.eval()


def made_up_time(monkeypatch, measure=lambda step, repeats=1: 2.0):
    """Let every measurement return what ``measure(step)`` says."""
    from measuring.decode_step import TimedStep

    monkeypatch.setattr(TimedStep, "measure", measure)


def run_eagerly(monkeypatch):
    """Let a measurement run its step once and take 2 ms."""
    from measuring import decode_step

    monkeypatch.setattr(decode_step, "median_ms", lambda run, repeats, reset: 2.0)


def the_step_is_the_products(monkeypatch):
    """Check that the timed step chooses the token that ``generate`` chooses after the same prompt."""
    import torch
    from measuring.decode_step import TimedStep

    from faster_chatglm_6b.network.prompt_layout import PromptLayout

    run_eagerly(monkeypatch)
    model = load()
    ids = torch.tensor([[10, 11, 12, model.config.gmask_token_id, model.config.bos_token_id]])
    first, second = model.generate(ids, do_sample=False, max_new_tokens=2, eos_token_id=None)[0, CONTEXT:].tolist()
    step = TimedStep(model, 1, CONTEXT)
    session = step._session
    session.numbers.set(cache_length=CONTEXT - 1)
    with torch.inference_mode():
        placed, _ = session.prompt.place(model, ids, PromptLayout.of(ids, model.config))
        session.numbers.send()
        session.prompt.run(model, placed, session.state.cache_length, CONTEXT)
    session.state.tokens.fill_(first)
    assert step.measure() == 2.0
    assert session.state.tokens.tolist() == [second] and session.state.cache_length.tolist() == [CONTEXT + 1]


def every_sampler_advances(monkeypatch):
    from measuring.decode_step import PLANS, TimedStep

    run_eagerly(monkeypatch)
    model = load()
    for sampler in PLANS:
        step = TimedStep(model, 2, CONTEXT, sampler)
        step.measure()
        assert set(step._session.state.ids_length.tolist()) == {CONTEXT + 2}, sampler
        assert all(0 <= token < model.config.vocab_size for token in step._session.state.tokens.tolist()), sampler


def a_part_that_is_left_out_is_not_launched(monkeypatch):
    from measuring.decode_step import PARTS, TimedStep

    from faster_chatglm_6b.ops import triton as kernels

    run_eagerly(monkeypatch)
    model, launchers = load(), (kernels.decode_attention, kernels.layer_norm_matmul_bias)
    for without in (frozenset(), *({part} for part in PARTS), PARTS):
        step = TimedStep(model, 1, CONTEXT, without=without)
        session = step._session
        session.step.normed.fill_(7)
        session.step.cache.storage[..., CONTEXT, :] = 7
        step.measure()
        done = {
            "norm": (session.step.normed != 7).any(),
            "attention": (session.step.cache.storage[..., CONTEXT, :] != 7).any(),
            "sampling": session.state.cache_length[0] != CONTEXT,
        }
        assert {part for part in PARTS if not done[part]} == set(without)
        assert launchers == (kernels.decode_attention, kernels.layer_norm_matmul_bias)
        cache = 2 * model.config.num_layers * model.config.hidden_size * 4 * (CONTEXT + 1)
        assert TimedStep(model, 1, CONTEXT).bytes - step.bytes == (cache if "attention" in without else 0)


def a_part_that_the_step_does_not_have_is_told_of(monkeypatch):
    from measuring.decode_step import TimedStep

    run_eagerly(monkeypatch)
    model = load(8, None, 8)
    TimedStep(model, 1, CONTEXT).measure()
    with pytest.raises(RuntimeError, match="does not launch kernels.layer_norm_matmul_bias"):
        TimedStep(model, 1, CONTEXT, without={"norm"}).measure()


def the_chain_of_float_weights(monkeypatch):
    import torch
    from measuring import tune_kernels

    made_up_time(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "no GPU")
    records = list(tune_kernels.chain_records(load(), 2.0))
    modes = [(1, 32, "greedy"), (1, 32, "top_k"), (1, 32, "full"), (1, 1024, "greedy")]
    assert [(one["batch"], one["context"], one["sampler"]) for one in records[:4]] == modes
    assert [one["batch"] for one in records] == [1] * 4 + [8] * 4 + [32] * 4 + [1] * 4
    missing = [one["without"] for one in records[12:]]
    assert missing == [["sampling"], ["attention"], ["norm"], ["attention", "norm", "sampling"]]
    for one in records:
        assert one["share"] == pytest.approx(one["bytes_per_step"] / 2 / 1e6 / 2, abs=1e-4)


def the_chain_of_integer_weights(monkeypatch):
    import torch
    from measuring import tune_quantized_kernels

    made_up_time(monkeypatch)
    monkeypatch.setattr(tune_quantized_kernels, "random_model", load)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    records = list(tune_quantized_kernels.chain_records(1.0))
    names = ["16 bits, head 16", "8 bits, head 16", "8 bits, head 8", "4 bits, head 16", "4 bits, head 8"]
    assert list(dict.fromkeys(one["weights"] for one in records)) == [*names, "4 bits, groups of 128, head 16"]
    assert [one["batch"] for one in records] == [1, 8, 1, 8, 1, 1, 8, 1, 1, 8]


def the_search_keeps_the_fastest_block_shapes(monkeypatch):
    from measuring import tune_kernels
    from measuring.decode_step import DENSE

    from faster_chatglm_6b.ops.triton import configs

    wanted = configs.Gemv(1, 4096, 8), configs.Attention(64, 4, 4)

    def measure(step, repeats=1):
        family = configs.family(step.model.device)
        return 3.0 - (family.gemv.get(DENSE) == wanted[0]) - (family.attention == wanted[1])

    monkeypatch.setattr(configs, "FAMILIES", dict(configs.FAMILIES))
    made_up_time(monkeypatch, measure)
    lines: list[str] = []
    family = tune_kernels.tune(load(), 1, lines.append)
    assert family.gemv == {DENSE: wanted[0]} and family.attention == wanted[1]
    assert lines[0] == "batch 1, context 32: 3.0000 ms with the tables as they are"
    assert lines[-1] == "batch 1, context 1024: 1.0000 ms"
    assert f"  gemv {DENSE}: 2.0000 {{{DENSE}: {wanted[0]}}}" in lines


def the_search_keeps_the_fastest_row(monkeypatch):
    import torch
    from measuring import tune_quantized_kernels
    from measuring.decode_step import HEAD, QKV

    from faster_chatglm_6b.ops.triton.quantized.configs import Row, row_config, rows_for

    wanted, rows = {QKV: Row(8, 2, 2, 3), HEAD: Row(4, 2, 4, 3)}, rows_for(torch.device("cpu"))

    def measure(step, repeats=1):
        bits = {QKV: 4, HEAD: 8}
        return 3.0 - sum(row_config(rows, bits[shape], *shape) == row for shape, row in wanted.items())

    made_up_time(monkeypatch, measure)
    best = tune_quantized_kernels.tune(load(4, None, 8), 4)
    assert {shape: best[shape] for shape in wanted} == wanted
    assert (rows[4][QKV], rows[8][HEAD]) == (wanted[QKV], wanted[HEAD])


CHECKS = {
    check.__name__: check
    for check in (
        the_step_is_the_products,
        every_sampler_advances,
        a_part_that_is_left_out_is_not_launched,
        a_part_that_the_step_does_not_have_is_told_of,
        the_chain_of_float_weights,
        the_chain_of_integer_weights,
        the_search_keeps_the_fastest_block_shapes,
        the_search_keeps_the_fastest_row,
    )
}


def run_all() -> dict[str, str | None]:
    """Run the checks; return what went wrong by name, None if nothing did."""
    import torch
    from interpreter_blocks import use_large_blocks

    torch.set_num_threads(1)
    use_large_blocks(keys=512)
    results = {}
    for name, check in CHECKS.items():
        try:
            with pytest.MonkeyPatch.context() as monkeypatch:
                check(monkeypatch)
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    output = tmp_path_factory.mktemp("tuners") / "results.json"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    paths = [ROOT, ROOT / "examples", ROOT / "tests" / "decoding"]
    environment["PYTHONPATH"] = os.pathsep.join([*map(str, paths), *sys.path[1:]])
    done = subprocess.run([sys.executable, __file__, str(output)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text())


@pytest.mark.parametrize("name", CHECKS)
def test_in_the_interpreter(results, name):
    assert results[name] is None, results[name]


@pytest.mark.parametrize("name", ["tune_kernels --chain", "tune_quantized_kernels --chain", "tune_many_rows"])
def test_without_a_gpu_the_command_says_so(name):
    command = [sys.executable, "-m", *f"examples.measuring.{name}".split()]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.endswith("error: this needs an NVIDIA GPU\n"), done.stderr


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(run_all()))
