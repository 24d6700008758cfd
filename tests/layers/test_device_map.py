"""A model that accelerate's ``device_map`` spreads gives the same answers, on the plain path and with the reason."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

import faster_chatglm_6b
from faster_chatglm_6b.configuration_chatglm import ChatGLMConfig
from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration

accelerate = pytest.importorskip("accelerate", reason="device_map needs accelerate: pip install accelerate")

PROMPT = torch.tensor([[20, 30, 40, 321, 324]])
BATCH = torch.tensor([[3, 3, 20, 30, 40, 321, 324], [50, 60, 70, 80, 90, 321, 324]])
GREEDY = {"do_sample": False, "max_new_tokens": 6}
TOLERANCE = {"rtol": 0, "atol": 1e-3}
# Of logits up to 20, of which halves keep three digits.
HALF_TOLERANCE = {"rtol": 0, "atol": 0.1}
NAMES = ("tiny", "tiny-int8", "tiny-int4", "tiny-ptuning-proj1")


@pytest.fixture(scope="module", params=NAMES)
def folder(request, golden_dir, tmp_path_factory):
    """Return the folder of a golden checkpoint; a P-Tuning prefix is put together with its base weights."""
    source = golden_dir / "ckpt" / request.param
    if "ptuning" not in request.param:
        return source
    whole, base = tmp_path_factory.mktemp("ptuning"), golden_dir / "ckpt" / "tiny"
    ChatGLMConfig.from_pretrained(source).save_pretrained(whole)
    # lm_head.weight stays, as in THUDM's: transformers 4 does not find an offloaded tied weight by its other name.
    tensors = load_file(base / "model.safetensors") | load_file(source / "model.safetensors")
    save_file(tensors, whole / "model.safetensors", metadata={"format": "pt"})
    return whole


def place(embedding, *layers):
    """Return a ``device_map``: head and prefix lie with the embedding, the last norm lies with the last layer."""
    map_ = {f"transformer.layers.{i}": layer for i, layer in enumerate(layers)}
    together = ("transformer.word_embeddings", "lm_head", "transformer.prefix_encoder")
    return map_ | dict.fromkeys(together, embedding) | {"transformer.final_layernorm": layers[-1]}


def load(folder, device_map, tmp_path):
    known = {**device_map}
    if ChatGLMConfig.from_pretrained(folder).pre_seq_len is None:
        known.pop("transformer.prefix_encoder", None)
    options = {"device_map": known, "offload_folder": str(tmp_path), "torch_dtype": torch.float32}
    return ChatGLMForConditionalGeneration.from_pretrained(folder, **options).eval()


def check(model, alone, tokenizer):
    """Check that logits, answers, chats and streams equal those of ``alone``, on the plain path due to the places."""
    before = faster_chatglm_6b.status().plain_generations
    device = alone.device
    with torch.no_grad():
        expected = alone(PROMPT.to(device)).logits
        tolerance = TOLERANCE if expected.dtype == torch.float32 else HALF_TOLERANCE
        torch.testing.assert_close(model(PROMPT.to(device)).logits.to(device), expected, **tolerance)
    for ids in (PROMPT, BATCH):
        assert model.generate(ids.to(device), **GREEDY).tolist() == alone.generate(ids.to(device), **GREEDY).tolist()
    beams = [one.generate(BATCH.to(device), **GREEDY, num_beams=2).tolist() for one in (model, alone)]
    assert beams[0] == beams[1]
    assert model.chat(tokenizer, "你好", **GREEDY) == alone.chat(tokenizer, "你好", **GREEDY)
    streams = [list(one.stream_chat(tokenizer, "你好", **GREEDY)) for one in (model, alone)]
    assert streams[0] == streams[1]
    batches = [one.chat_batch(tokenizer, ["你好", "hi there"], **GREEDY) for one in (model, alone)]
    assert batches[0] == batches[1]
    new = {
        why: count - before.get(why, 0)
        for why, count in faster_chatglm_6b.status().plain_generations.items()
        if "device_map spreads the model over" in why
    }
    places = ", ".join(sorted({f"cuda:{one}" if isinstance(one, int) else one for one in model.hf_device_map.values()}))
    assert new[f"device_map spreads the model over {places}; the captured loop needs it on one device"] == 5


@pytest.mark.parametrize(
    "device_map",
    [place("cpu", "cpu", "disk", "disk"), place("disk", "disk", "cpu", "disk")],
    ids=["layers on disk", "embedding on disk"],
)
def test_offloaded_to_disk(folder, device_map, tiny_tokenizer, tmp_path):
    alone = ChatGLMForConditionalGeneration.from_pretrained(folder, torch_dtype=torch.float32).eval()
    check(load(folder, device_map, tmp_path), alone, tiny_tokenizer)


def test_all_in_one_place_is_not_spread(golden_dir, tmp_path):
    before = faster_chatglm_6b.status()
    model = load(golden_dir / "ckpt" / "tiny", {"": "cpu"}, tmp_path)
    model.generate(PROMPT, **GREEDY)
    after = faster_chatglm_6b.status()
    assert sum(after.captured_generations.values()) == sum(before.captured_generations.values()) + 1
    assert after.plain_generations == before.plain_generations


class TestOnGPUs:
    pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]

    @pytest.fixture
    def alone(self, folder):
        return ChatGLMForConditionalGeneration.from_pretrained(folder, torch_dtype=torch.float32).cuda().eval()

    @pytest.mark.parametrize(
        "device_map",
        [place(0, 0, "cpu", "cpu"), place("cpu", "cpu", 0, 0), place(0, "disk", "cpu", 0)],
        ids=["layers on the CPU", "embedding on the CPU", "CPU and disk"],
    )
    def test_offloaded(self, folder, alone, device_map, tiny_tokenizer, tmp_path):
        check(load(folder, device_map, tmp_path), alone, tiny_tokenizer)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two CUDA devices")
    @pytest.mark.parametrize(
        "device_map",
        [place(0, 0, 0, 1), place(1, 1, 0, 0), place(1, 0, 1, 0), place(0, 1, "cpu", 0)],
        ids=["first to second", "second to first", "back and forth", "and the CPU"],
    )
    def test_two_gpus(self, folder, alone, device_map, tiny_tokenizer, tmp_path):
        check(load(folder, device_map, tmp_path), alone, tiny_tokenizer)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two CUDA devices")
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
    def test_auto_over_two_gpus(self, folder, dtype, tiny_tokenizer):
        whole = ChatGLMForConditionalGeneration.from_pretrained(folder, torch_dtype=dtype)
        # Room for all but a layer; the head shares the embedding's memory.
        sizes = {tensor.data_ptr(): tensor.nbytes for tensor in whole.state_dict().values()}
        room = sum(sizes.values()) - sum(t.nbytes for t in whole.transformer.layers[0].state_dict().values())
        options = {"device_map": "auto", "max_memory": {0: room, 1: "1GiB"}, "torch_dtype": dtype}
        model = ChatGLMForConditionalGeneration.from_pretrained(folder, **options).eval()
        assert set(model.hf_device_map.values()) == {0, 1}
        check(model, whole.cuda().eval(), tiny_tokenizer)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two CUDA devices")
    def test_on_the_second_gpu_it_is_captured(self, folder, alone, tmp_path):
        model = load(folder, {"": 1}, tmp_path)
        before = sum(faster_chatglm_6b.status().captured_generations.values())
        output = model.generate(BATCH.to(model.device), **GREEDY)
        assert output.tolist() == alone.generate(BATCH.cuda(), **GREEDY).tolist()
        assert sum(faster_chatglm_6b.status().captured_generations.values()) == before + 2

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two CUDA devices")
    def test_training_over_two_gpus(self, golden_dir, tiny_model, tmp_path):
        model = load(golden_dir / "ckpt" / "tiny", place(0, 0, 1, 0), tmp_path)
        ids = torch.tensor([[20, 30, 40, 321, 324, 50, 60]])
        one, other = (m(ids.to(m.device), labels=ids.to(m.device)).loss for m in (model, tiny_model))
        torch.testing.assert_close(one.detach().cpu(), other.detach(), **TOLERANCE)
        parameters = [dict(m.named_parameters()) for m in (model, tiny_model)]
        for name in (f"transformer.layers.{i}.attention.dense.weight" for i in range(3)):
            gradients = [
                torch.autograd.grad(loss, named[name], retain_graph=True)[0].cpu()
                for loss, named in zip((one, other), parameters, strict=True)
            ]
            torch.testing.assert_close(*gradients, **TOLERANCE)

    @pytest.mark.parametrize("device_map", ["cuda:0", {"": 0}], ids=str)
    def test_on_one_gpu_it_is_captured(self, golden_dir, device_map):
        model = ChatGLMForConditionalGeneration.from_pretrained(
            golden_dir / "ckpt" / "tiny", device_map=device_map, torch_dtype=torch.float32
        )
        before = sum(faster_chatglm_6b.status().captured_generations.values())
        model.generate(PROMPT.cuda(), **GREEDY)
        assert sum(faster_chatglm_6b.status().captured_generations.values()) == before + 1


@pytest.mark.parametrize("offload", ["cpu_offload", "disk_offload"])
def test_offloaded_by_accelerate(tiny_model, tiny_tokenizer, offload, tmp_path):
    """A model whose weights lie on no device between two steps gives the same answers."""
    model = copy.deepcopy(tiny_model)
    options = {"offload_dir": str(tmp_path)} if offload == "disk_offload" else {}
    getattr(accelerate, offload)(model, execution_device="cpu", **options)
    assert model.device.type == "meta"
    assert model.generate(PROMPT, **GREEDY).tolist() == tiny_model.generate(PROMPT, **GREEDY).tolist()
    for call in ("chat", "stream_chat"):
        answers = [getattr(one, call)(tiny_tokenizer, "你好", **GREEDY) for one in (model, tiny_model)]
        assert list(answers[0]) == list(answers[1])
