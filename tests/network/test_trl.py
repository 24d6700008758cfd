"""trl's trainers on ChatGLM-6B: the loss on messages, on ids and labels, and the data that a prefix LM cannot learn."""

import copy

import pytest
import torch

trl = pytest.importorskip("trl", reason="these tests need trl: pip install trl")
datasets = pytest.importorskip("datasets", reason="trl needs datasets")
peft = pytest.importorskip("peft", reason="these tests need peft: pip install peft")

from test_trainer import example, summed_by_hand  # noqa: E402

from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration  # noqa: E402

TURNS = [("你好", "天气"), ("hello there", "b"), ("a", "今天天气很好，世界"), ("一二三", "x")]
PACKED = [
    {"packing": True, "max_length": 32},
    {"packing": True, "max_length": 32, "packing_strategy": "wrapped"},
    {"padding_free": True, "max_length": None},
]


def messages(prompt, answer):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def trainer(model, tokenizer, rows, folder, kind="SFT", **options):
    peft_config = options.pop("peft_config", None)
    settings = {"report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no", "logging_steps": 1}
    settings |= {"max_steps": 1, "per_device_train_batch_size": 4, "shuffle_dataset": False, "max_grad_norm": 0.0}
    if kind == "DPO":
        settings.pop("shuffle_dataset")
    return getattr(trl, f"{kind}Trainer")(
        model=model,
        args=getattr(trl, f"{kind}Config")(output_dir=str(folder), **(settings | options)),
        train_dataset=datasets.Dataset.from_list(rows),
        eval_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def first_loss(one):
    one.train()
    return next(entry["loss"] for entry in one.state.log_history if "loss" in entry)


@pytest.fixture
def model(tiny_model):
    return copy.deepcopy(tiny_model)


@pytest.fixture
def examples(tiny_tokenizer):
    return [example(tiny_tokenizer, *turn) for turn in TURNS]


@pytest.fixture
def expected(tiny_model, examples):
    """Return the loss by hand over every answer's tokens and its ``<eop>``, all weighted alike."""
    total, count = (sum(part) for part in zip(*(summed_by_hand(tiny_model, row) for row in examples), strict=True))
    return total / count


FORMS = {
    "ids and labels": (lambda row, prompt, answer: row, {}),
    "messages": (lambda row, *turn: {"messages": messages(*turn)}, {"assistant_only_loss": True}),
    "prompt and completion": (
        lambda row, *turn: dict(zip(("prompt", "completion"), ([one] for one in messages(*turn)), strict=True)),
        {},
    ),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_the_loss_equals_a_hand_computation(
    model, tiny_tokenizer, examples, expected, tmp_path, form, lora, checkpointing
):
    make, options = FORMS[form]
    rows = [make(row, *turn) for row, turn in zip(examples, TURNS, strict=True)]
    if lora:
        options = options | {"peft_config": peft.LoraConfig(task_type="CAUSAL_LM", r=4)}
    one = trainer(model, tiny_tokenizer, rows, tmp_path, gradient_checkpointing=checkpointing, **options)
    for row, wanted in zip(one.train_dataset, examples, strict=True):
        assert {key: row[key] for key in wanted} == wanted
    before = {name: value.detach().clone() for name, value in one.model.named_parameters()}
    assert first_loss(one) == pytest.approx(expected, rel=1e-3)
    changed = {name for name, value in one.model.named_parameters() if not torch.equal(before[name], value)}
    assert changed and all("lora_" in name for name in changed) == lora


def test_accumulated_batches_are_one_large_batch(tiny_model, tiny_tokenizer, examples, expected, tmp_path):
    trained = []
    for size, steps in ((4, 1), (1, 4)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "optim": "sgd"}
        model = copy.deepcopy(tiny_model)
        one = trainer(model, tiny_tokenizer, examples, tmp_path, learning_rate=0.1, **options)
        assert first_loss(one) == pytest.approx(expected, rel=1e-3)
        trained.append(model.transformer.word_embeddings.weight.detach())
    assert not torch.equal(trained[0], tiny_model.transformer.word_embeddings.weight)
    torch.testing.assert_close(trained[1], trained[0], rtol=1e-3, atol=1e-5)


def test_evaluation(model, tiny_tokenizer, examples, expected, tmp_path):
    one = trainer(model, tiny_tokenizer, examples, tmp_path)
    assert one.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-3)
    logits = one.predict(one.eval_dataset).predictions
    longest = max(len(row["labels"]) for row in examples)
    assert logits.shape == (len(TURNS), longest, model.config.vocab_size)


def test_the_body_keeps_stocks_layout_outside_of_trl(model, tiny_tokenizer, examples, tmp_path):
    ids = torch.tensor([examples[0]["input_ids"]] * 2)
    one = trainer(model, tiny_tokenizer, examples, tmp_path)
    with torch.no_grad():
        before = model(ids).logits
        fused = model(ids, labels=ids, fused_lm_head=True).log_probs
    assert model.transformer(ids).last_hidden_state.shape == (ids.shape[1], 2, model.config.hidden_size)
    expected = before.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(fused, expected, rtol=1e-3, atol=1e-3)
    assert one.model is model


@pytest.mark.parametrize(
    "row",
    [{"text": "今天天气很好"}, {"prompt": "你好", "completion": "天气"}],
    ids=["text", "prompt and completion"],
)
def test_texts_are_refused(model, tiny_tokenizer, tmp_path, row):
    """Texts are refused, because trl joins them to one text that does not show where the answer begins."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    one = trainer(model, tiny_tokenizer, [row] * 4, tmp_path)
    with pytest.raises(ValueError, match="trl joins a prompt and its completion to one text: give it messages"):
        one.train()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("options", PACKED, ids=str)
def test_packing_is_refused(model, tiny_tokenizer, examples, tmp_path, options):
    one = trainer(model, tiny_tokenizer, examples, tmp_path, **options)
    with pytest.raises(ValueError, match="every row of a prefix LM has one context; train with packing=False"):
        one.train()


def test_a_quantised_head_is_refused(tiny_dir, tiny_tokenizer, examples, tmp_path):
    """A quantised head is refused, because trl reads its weight, which holds integers."""
    model = ChatGLMForConditionalGeneration.from_pretrained(tiny_dir).float().quantize(8, head_bits=8)
    options = {"peft_config": peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["query_key_value"])}
    one = trainer(model, tiny_tokenizer, examples, tmp_path, **options)
    with pytest.raises(ValueError, match="quantise without head_bits to train"):
        one.train()


def test_preferences(model, tiny_tokenizer, tmp_path):
    """DPO begins at ln 2 whatever the answers, because the policy is still the reference."""
    rows = [
        {"prompt": [turn[0]], "chosen": [turn[1]], "rejected": [{"role": "assistant", "content": "坏"}]}
        for turn in (messages(*turn) for turn in TURNS)
    ]
    options = {"peft_config": peft.LoraConfig(task_type="CAUSAL_LM", r=4)}
    assert first_loss(trainer(model, tiny_tokenizer, rows, tmp_path, "DPO", **options)) == pytest.approx(
        0.6931, abs=1e-3
    )
