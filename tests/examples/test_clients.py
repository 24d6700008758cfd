"""Clients that nobody here wrote say what ``chat`` says on the toy checkpoint. docs/clients.md lists them."""

import re
from pathlib import Path
from typing import Literal

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, pipeline

TINY = str(Path(__file__).resolve().parents[2] / "examples" / "tiny_chatglm")
QUERY = "What is int8?"
SETTINGS = {"max_new_tokens": 40, "do_sample": False}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY, trust_remote_code=True)


def load(**options):
    return AutoModel.from_pretrained(TINY, trust_remote_code=True, **options).float().eval()


@pytest.fixture(scope="module")
def expected(tokenizer):
    """Return the answer's first tokens, as every client is asked for them."""
    answer = load().chat(tokenizer, QUERY, history=[], **SETTINGS)[0]
    assert len(answer) > 40
    return answer


def empty_model():
    from accelerate import init_empty_weights

    with init_empty_weights():
        model = AutoModel.from_config(AutoConfig.from_pretrained(TINY, trust_remote_code=True), trust_remote_code=True)
    model.tie_weights()
    return model


def prepared(folder):
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare(load())


def dispatched(folder):
    from accelerate import load_checkpoint_and_dispatch

    model = load_checkpoint_and_dispatch(empty_model(), TINY, device_map={"": "cpu"}, dtype=torch.float32)
    return model.eval()


def offloaded_to_cpu(folder):
    from accelerate import cpu_offload

    return cpu_offload(load(), execution_device=torch.device("cpu"))


def offloaded_to_disk(folder):
    from accelerate import disk_offload

    return disk_offload(load(), str(folder), execution_device=torch.device("cpu"))


def mapped(folder):
    return load(device_map="auto")


@pytest.mark.parametrize("place", [prepared, dispatched, offloaded_to_cpu, offloaded_to_disk, mapped])
def test_accelerate(tokenizer, expected, tmp_path, place):
    pytest.importorskip("accelerate", reason="this client is not installed: pip install accelerate")
    model = place(tmp_path)
    assert model.chat(tokenizer, QUERY, history=[], **SETTINGS)[0] == expected
    batch = tokenizer([QUERY, "Hello"], padding=True, return_tensors="pt")
    said = model.generate(batch["input_ids"], **SETTINGS)[0, batch["input_ids"].shape[1] :]
    assert tokenizer.decode(said.tolist()) == expected


def test_langchain(tokenizer, expected):
    client = pytest.importorskip("langchain_huggingface", reason="not installed: pip install langchain-huggingface")
    pipe = pipeline("text-generation", model=load(), tokenizer=tokenizer, return_full_text=False, **SETTINGS)
    chain = client.HuggingFacePipeline(pipeline=pipe)
    assert chain.invoke(QUERY) == expected
    assert chain.batch([QUERY, QUERY]) == [expected] * 2
    assert "".join(chain.stream(QUERY)).strip() == expected


def test_llama_index(tokenizer, expected):
    client = pytest.importorskip(
        "llama_index.llms.huggingface", reason="not installed: pip install llama-index-llms-huggingface"
    )
    from llama_index.core.llms import ChatMessage

    settings = {"max_new_tokens": 40, "generate_kwargs": {"do_sample": False}}
    llm = client.HuggingFaceLLM(model=load(), tokenizer=tokenizer, **settings)
    assert str(llm.complete(QUERY)) == expected
    assert "".join(part.delta for part in llm.stream_complete(QUERY)).strip() == expected
    assert llm.chat([ChatMessage(role="user", content=QUERY)]).message.content == expected


def test_outlines(tokenizer, expected):
    outlines = pytest.importorskip("outlines", reason="not installed: pip install outlines")
    model = outlines.from_transformers(load(), tokenizer)
    assert model(QUERY, **SETTINGS) == expected
    assert model(QUERY, Literal["yes", "no"], max_new_tokens=8) in ("yes", "no")
    assert re.fullmatch(r"[0-9]{3}", model(QUERY, outlines.types.Regex(r"[0-9]{3}"), max_new_tokens=8))


def test_xgrammar(tokenizer):
    xgrammar = pytest.importorskip("xgrammar", reason="not installed: pip install xgrammar")
    from xgrammar.contrib.hf import LogitsProcessor

    model = load()
    vocabulary = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=model.config.vocab_size)
    grammar = xgrammar.GrammarCompiler(vocabulary).compile_regex("[0-9]{3}")
    ids = torch.tensor([tokenizer(QUERY)["input_ids"]])
    said = model.generate(ids, max_new_tokens=8, do_sample=False, logits_processor=[LogitsProcessor(grammar)])
    assert re.fullmatch("[0-9]{3}", tokenizer.decode(said[0, ids.shape[1] :].tolist()))


def torchao_config():
    pytest.importorskip("torchao", reason="not installed: pip install torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def quanto_config():
    pytest.importorskip("optimum.quanto", reason="not installed: pip install optimum-quanto")
    from transformers import QuantoConfig

    return QuantoConfig(weights="int8")


@pytest.mark.parametrize("config", [torchao_config, quanto_config])
def test_weights_in_integers(tokenizer, expected, config):
    """transformers' ``quantization_config`` replaces the layers, and the answer is the same."""
    model = AutoModel.from_pretrained(
        TINY, trust_remote_code=True, torch_dtype=torch.float32, quantization_config=config()
    ).eval()
    layer = model.transformer.layers[0].mlp.dense_h_to_4h
    assert (type(layer), type(layer.weight)) != (torch.nn.Linear, torch.nn.Parameter)
    assert model.chat(tokenizer, QUERY, history=[], **SETTINGS)[0] == expected
