"""bitsandbytes, torchao, optimum-quanto and torch itself quantise the network's layers; what cannot is refused."""

import copy
import json
import shutil

import pytest
import torch
from torch import nn
from transformers import AutoModel, BitsAndBytesConfig, GPTQConfig

import faster_chatglm_6b
from faster_chatglm_6b.checkpoint import foreign_quantization
from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration

IDS = torch.tensor([[20, 30, 40, 321, 324]])
GREEDY = {"do_sample": False, "max_new_tokens": 5}
LINEARS = 12


def kinds(model):
    """Return the types of the blocks' linear layers, as text."""
    names = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
    found = [m for name, m in model.transformer.layers.named_modules() if name.rsplit(".", 1)[-1] in names]
    assert len(found) == LINEARS
    return {f"{type(module).__module__.split('.')[0]}.{type(module).__name__}" for module in found}


def check_answers(model, tokenizer, original, rounded=True):
    """Check that generation and chat run on the plain path with a reason, and that logits differ by rounding alone."""
    before = faster_chatglm_6b.status().plain_generations
    ids = model.generate(IDS, **GREEDY)
    with torch.no_grad():
        steps = IDS
        while steps.shape[1] < ids.shape[1]:
            steps = torch.cat((steps, model(steps).logits[:, -1].argmax(-1, keepdim=True)), dim=1)
        logits = model(IDS).logits.float()
    assert ids.tolist() == steps.tolist()
    response, history = model.chat(tokenizer, "你好", **GREEDY)
    assert history == [("你好", response)]
    after = faster_chatglm_6b.status().plain_generations
    reasons = {why: count - before.get(why, 0) for why, count in after.items() if count != before.get(why, 0)}
    assert sum(reasons.values()) == 2 and all(reasons)
    with torch.no_grad():
        expected = original(IDS).logits.float()
    if not rounded:
        torch.testing.assert_close(logits, expected, rtol=0, atol=2e-2)
    else:
        assert not torch.equal(logits, expected)
        assert torch.cosine_similarity(logits.flatten(), expected.flatten(), dim=0) > 0.98
    return reasons


class TestBitsAndBytes:
    SETTINGS = {
        "8bit": {"load_in_8bit": True},
        "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
        "double": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32},
    }
    KINDS = {"8bit": "Linear8bitLt", "nf4": "Linear4bit", "double": "Linear4bit"}

    @pytest.fixture(autouse=True)
    def needed(self):
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install bitsandbytes")
        pytest.importorskip("accelerate", reason="bitsandbytes in transformers needs accelerate")

    @pytest.fixture(params=SETTINGS)
    def case(self, request):
        return request.param

    def load(self, folder, case, **more):
        settings = BitsAndBytesConfig(**self.SETTINGS[case])
        return AutoModel.from_pretrained(folder, trust_remote_code=True, quantization_config=settings, **more)

    @staticmethod
    def dequantized(model, original):
        """Return the original with the weights that 4 bits stand for."""
        from bitsandbytes.functional import dequantize_4bit

        expected = copy.deepcopy(original)
        for name, module in model.named_modules():
            if type(module).__name__ == "Linear4bit":
                weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
                expected.get_submodule(name).weight.data = weight.float()
        return expected

    def test_layers_are_its_own(self, case, tiny_dir, tiny_model, tiny_tokenizer):
        model = self.load(tiny_dir, case, torch_dtype=torch.float32)
        assert kinds(model) == {f"bitsandbytes.{self.KINDS[case]}"}
        assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.transformer.word_embeddings.weight
        if case == "8bit":
            check_answers(model, tiny_tokenizer, tiny_model)
        else:
            from bitsandbytes.functional import has_avx512bf16

            # On a CPU with such instructions bitsandbytes computes in bfloat16, whatever it is asked for.
            check_answers(model, tiny_tokenizer, self.dequantized(model, tiny_model), rounded=has_avx512bf16())

    def test_saved_and_loaded(self, case, tiny_dir, tmp_path):
        model = self.load(tiny_dir, case)
        model.save_pretrained(tmp_path)
        again = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
        assert kinds(again) == kinds(model)
        with torch.no_grad():
            torch.testing.assert_close(again(IDS).logits, model(IDS).logits)

    @pytest.mark.parametrize("argument", ["load_in_8bit", "load_in_4bit"])
    def test_arguments_of_old_scripts(self, argument, tiny_dir):
        """ChatGLM-Tuning calls ``from_pretrained(load_in_8bit=True)``, which transformers 5 no longer knows."""
        model = AutoModel.from_pretrained(tiny_dir, trust_remote_code=True, **{argument: True})
        kind = "Linear8bitLt" if argument == "load_in_8bit" else "Linear4bit"
        assert kinds(model) == {f"bitsandbytes.{kind}"} and getattr(model, f"is_{argument}".replace("load", "loaded"))

    def test_a_prefix_and_the_head_stay_floats(self, case, tiny_dir):
        settings = BitsAndBytesConfig(**self.SETTINGS[case], llm_int8_skip_modules=["dense_h_to_4h"])
        options = {"quantization_config": settings, "pre_seq_len": 4, "prefix_projection": True}
        model = AutoModel.from_pretrained(tiny_dir, trust_remote_code=True, **options)
        assert kinds(model) == {f"bitsandbytes.{self.KINDS[case]}", "torch.Linear"}
        assert {type(module) for module in model.transformer.prefix_encoder.trans} == {nn.Linear, nn.Tanh}
        assert type(model.lm_head) is nn.Linear and settings.llm_int8_skip_modules == ["dense_h_to_4h"]

    @pytest.mark.filterwarnings("ignore")
    def test_qlora(self, case, tiny_dir):
        """PEFT's guide is followed: the adapter alone changes, and the loss falls."""
        peft = pytest.importorskip("peft", reason="QLoRA needs peft: pip install peft")
        import torch.distributed.tensor  # noqa: F401 PEFT asks for it by name

        torch.manual_seed(0)
        model = peft.prepare_model_for_kbit_training(self.load(tiny_dir, case))
        assert model.transformer.gradient_checkpointing
        settings = {"r": 4, "target_modules": ["query_key_value", "dense_h_to_4h"], "lora_alpha": 8}
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).train()
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer, losses = torch.optim.SGD(trained, lr=0.05), []
        ids = torch.tensor([[20, 30, 40, 321, 324, 50, 60, 70]])
        for _ in range(4):
            loss = model(input_ids=ids, labels=ids).loss
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert losses[-1] < losses[0]
        changed = {name for name, one in model.named_parameters() if not torch.equal(before[name], one)}
        assert changed and all("lora_" in name for name in changed)
        assert model.eval().generate(input_ids=IDS, **GREEDY).shape[1] > IDS.shape[1]

    @pytest.mark.parametrize("bits", [8, 4])
    def test_not_over_our_own(self, case, golden_dir, tiny_dir, bits):
        for folder, more in ((golden_dir / "ckpt" / f"tiny-int{bits}", {}), (tiny_dir, {"quantization_bit": bits})):
            with pytest.raises(ValueError, match=f"quantization_bit={bits} and with a quantization_config of bitsand"):
                self.load(folder, case, **more)

    def test_ours_not_over_it(self, case, tiny_dir):
        model = self.load(tiny_dir, case)
        with pytest.raises(ValueError, match="is a bitsandbytes.*load the float checkpoint with quantization_bit=8"):
            model.quantize(8)
        assert kinds(model) == {f"bitsandbytes.{self.KINDS[case]}"}

    def test_nothing_converted_is_an_error(self, case, tiny_dir):
        settings = BitsAndBytesConfig(**self.SETTINGS[case], llm_int8_skip_modules=["transformer"])
        with pytest.raises(ValueError, match="no linear layer of its blocks was quantised; pass quantization_bit"):
            AutoModel.from_pretrained(tiny_dir, trust_remote_code=True, quantization_config=settings)


@pytest.mark.parametrize("place", ["argument", "config.json"])
@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors", "none of them"])
def test_what_cannot_be_served(tiny_dir, tmp_path, method, place):
    settings = {"quant_method": method, "bits": 4}
    message = f"quantization_config of {method}, but only bitsandbytes.* pass quantization_bit=8 or 4 instead"
    if place == "argument":
        with pytest.raises(ValueError, match=message):
            ChatGLMForConditionalGeneration.from_pretrained(tiny_dir, quantization_config=settings)
        return
    shutil.copy(tiny_dir / "model.safetensors", tmp_path)
    config = json.loads((tiny_dir / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    with pytest.raises(ValueError, match=f"quant_method='{method}'.*quantization_bit=8 or 4"):
        ChatGLMForConditionalGeneration.from_pretrained(tmp_path)


def test_a_class_of_settings_that_cannot_be_served(tiny_dir):
    with pytest.raises(ValueError, match="quantization_config of gptq, .* pass quantization_bit=8 or 4"):
        ChatGLMForConditionalGeneration.from_pretrained(tiny_dir, quantization_config=GPTQConfig(bits=4))


def test_two_ways_to_ask(tiny_dir):
    with pytest.raises(ValueError, match="load_in_8bit or load_in_4bit is given beside a quantization_config"):
        ChatGLMForConditionalGeneration.from_pretrained(
            tiny_dir, load_in_8bit=True, quantization_config={"load_in_4bit": True}
        )


def test_a_float_model_is_not_converted(tiny_model):
    with pytest.raises(ValueError, match="no linear layer of its blocks was quantised"):
        foreign_quantization.check_converted(tiny_model, "tiny")


@pytest.mark.filterwarnings("ignore")
def test_torchs_dynamic_quantisation(tiny_model, tiny_tokenizer):
    from torch.ao.quantization import quantize_dynamic

    if torch.backends.quantized.engine == "none":
        pytest.skip("this build of torch has no engine for quantised layers")
    model = quantize_dynamic(copy.deepcopy(tiny_model), {nn.Linear}, dtype=torch.qint8)
    assert kinds(model) == {"torch.Linear"}
    assert all(
        "quantized" in type(module).__module__
        for module in (model.lm_head, model.transformer.layers[0].mlp.dense_h_to_4h)
    )
    reasons = check_answers(model, tiny_tokenizer, tiny_model)
    assert all("lm_head is a torch.ao.nn.quantized" in why for why in reasons)


@pytest.mark.filterwarnings("ignore")
def test_torchao(tiny_model, tiny_tokenizer):
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao: pip install torchao")
    model = copy.deepcopy(tiny_model)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    linears = [layer.attention.dense for layer in model.transformer.layers] + [model.lm_head]
    assert all(type(linear) is nn.Linear and type(linear.weight) is not nn.Parameter for linear in linears)
    check_answers(model, tiny_tokenizer, tiny_model)
    with pytest.raises(ValueError, match="linear layer with a weight of .*torchao"):
        model.quantize(8)


@pytest.mark.filterwarnings("ignore")
def test_optimum_quanto(tiny_model, tiny_tokenizer):
    quanto = pytest.importorskip("optimum.quanto", reason="needs optimum-quanto: pip install optimum-quanto")
    model = copy.deepcopy(tiny_model)
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    assert kinds(model) == {"optimum.QLinear"}
    check_answers(model, tiny_tokenizer, tiny_model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("library", ["torchao", "quanto"])
def test_others_through_from_pretrained(tiny_dir, tiny_model, tiny_tokenizer, library):
    if library == "torchao":
        torchao = pytest.importorskip("torchao.quantization", reason="needs torchao: pip install torchao")
        from transformers import TorchAoConfig

        settings = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    else:
        pytest.importorskip("optimum.quanto", reason="needs optimum-quanto: pip install optimum-quanto")
        from transformers import QuantoConfig

        settings = QuantoConfig(weights="int8")
    options = {"quantization_config": settings, "torch_dtype": torch.float32}
    model = ChatGLMForConditionalGeneration.from_pretrained(tiny_dir, **options)
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    check_answers(model, tiny_tokenizer, tiny_model)
