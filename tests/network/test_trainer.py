"""The Trainer on ChatGLM-6B: the loss, accumulated batches, collators, and labels that teach a prefix LM nothing."""

import copy
import logging

import pytest
import torch

pytest.importorskip("accelerate", reason="the Trainer needs accelerate: pip install accelerate")

from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments  # noqa: E402

from faster_chatglm_6b.network import training  # noqa: E402

PAIRS = [("你好", "天气"), ("hello there", "b"), ("a", "今天天气很好，世界"), ("问：一二三 答：", "x")]


def example(tokenizer, prompt, answer):
    ids = tokenizer.build_inputs_with_special_tokens(tokenizer.encode_text(prompt), tokenizer.encode_text(answer))
    begin = ids.index(tokenizer.bos_token_id) + 1
    return {"input_ids": ids, "labels": [-100] * begin + ids[begin:]}


@pytest.fixture
def examples(tiny_tokenizer):
    return [example(tiny_tokenizer, *pair) for pair in PAIRS]


def summed_by_hand(model, row):
    """Return the sum of the negative log-probabilities of one unpadded row's labels, and their count."""
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
    with torch.no_grad():
        scores = model(ids).logits[0].log_softmax(-1)
    places = [place for place in range(1, len(labels)) if labels[place] != -100]
    return -sum(scores[place - 1, labels[place]].item() for place in places), len(places)


def arguments(tmp_path, **options):
    settings = {"report_to": [], "use_cpu": True, "save_strategy": "no", "logging_steps": 1, "max_steps": 1}
    return TrainingArguments(output_dir=str(tmp_path), **(settings | options))


def right_padded(rows, pad_id):
    length = max(len(row["input_ids"]) for row in rows)
    fills = {"input_ids": pad_id, "labels": -100}
    batch = {
        key: torch.tensor([row[key] + [fill] * (length - len(row[key])) for row in rows]) for key, fill in fills.items()
    }
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    return batch | {"attention_mask": (torch.arange(length) < lengths[:, None]).long()}


def collate(side, tokenizer):
    if side == "left":
        return DataCollatorForSeq2Seq(tokenizer)
    return lambda rows: right_padded(rows, tokenizer.pad_token_id)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_of_several_lengths(tiny_model, tiny_tokenizer, examples, side):
    """The loss equals the sum by hand for left padding by ``DataCollatorForSeq2Seq`` and for right padding."""
    batch = collate(side, tiny_tokenizer)([dict(row) for row in examples])
    assert batch["labels"].shape == batch["input_ids"].shape
    parts = [summed_by_hand(tiny_model, row) for row in examples]
    assert len({len(row["input_ids"]) for row in examples}) > 2
    with torch.no_grad():
        loss = tiny_model(**batch).loss
        scaled = tiny_model(**batch, num_items_in_batch=torch.tensor(50)).loss
    total, count = (sum(part) for part in zip(*parts, strict=True))
    assert loss.item() == pytest.approx(total / count, rel=1e-4)
    assert scaled.item() == pytest.approx(total / 50, rel=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_accumulated_batches_are_one_large_batch(tiny_model, tiny_tokenizer, examples, tmp_path, side):
    """The loss and the weights after a step do not depend on how rows are split into batches."""
    trained, losses = [], []
    for size, steps in ((4, 1), (2, 2), (1, 4)):
        model = copy.deepcopy(tiny_model)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "learning_rate": 0.1}
        # Plain SGD, because Adam's steps would hide a wrong scale.
        options |= {"optim": "sgd", "max_grad_norm": 0.0, "remove_unused_columns": False}
        trainer = Trainer(
            model=model,
            args=arguments(tmp_path, **options),
            train_dataset=[dict(row) for row in examples],
            data_collator=collate(side, tiny_tokenizer),
        )
        assert trainer.model_accepts_loss_kwargs
        trainer.train()
        losses.append(next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry))
        trained.append({name: value.detach().clone() for name, value in model.named_parameters()})
    total, count = (sum(part) for part in zip(*(summed_by_hand(tiny_model, row) for row in examples), strict=True))
    assert losses == pytest.approx([total / count] * 3, rel=1e-3)
    moved = (trained[0]["lm_head.weight"] if "lm_head.weight" in trained[0] else None, tiny_model.lm_head.weight)
    assert moved[0] is None or not torch.equal(*moved)
    for name, value in trained[0].items():
        for other in trained[1:]:
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5)
    before = dict(tiny_model.named_parameters())
    assert any(not torch.equal(value, before[name]) for name, value in trained[0].items())


def test_the_format_of_the_official_script(tiny_model, tiny_tokenizer, examples):
    """Right padding without a mask works as in ptuning/main.py, which also counts the prediction of ``<sop>``."""
    rows = []
    for row in examples:
        ids = row["input_ids"]
        context = ids.index(tiny_tokenizer.bos_token_id)
        pads = 24 - len(ids)
        labels = [-100] * context + ids[context:] + [tiny_tokenizer.pad_token_id] * pads
        labels = [label if label != tiny_tokenizer.pad_token_id else -100 for label in labels]
        rows.append({"input_ids": ids + [tiny_tokenizer.pad_token_id] * pads, "labels": labels})
    batch = {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}
    trimmed = [{key: row[key][: len(one["input_ids"])] for key in row} for row, one in zip(rows, examples, strict=True)]
    total, count = (sum(part) for part in zip(*(summed_by_hand(tiny_model, row) for row in trimmed), strict=True))
    assert count == sum(len(row["labels"]) - row["labels"].count(-100) for row in examples) + len(examples)
    with torch.no_grad():
        assert tiny_model(**batch).loss.item() == pytest.approx(total / count, rel=1e-4)


def refusals(tokenizer):
    good = example(tokenizer, "你好", "天气")
    ids, labels = good["input_ids"], good["labels"]
    prompt = tokenizer("你好")["input_ids"]
    return {
        "None of the labels can be learned": (prompt, prompt, "labels before <sop> and none after it"),
        "Text that trl tokenizes": (
            tokenizer("你好天气<eop>")["input_ids"],
            tokenizer("你好天气<eop>")["input_ids"],
            "docs/finetuning.md shows how",
        ),
        "packed": (ids * 2, labels * 2, "holds several examples"),
        "another length": (ids, labels[1:], r"labels are torch.int64 of shape \[1, \d+\]; pass int64"),
        "no id": (ids, [*labels[:-1], 10**6], "labels hold 1000000, but this model's vocabulary goes from 0 to"),
        "another ignored value": (ids, [-1, *labels[1:]], "labels hold -1, but"),
    }


@pytest.mark.parametrize("kind", range(6))
def test_labels_that_teach_nothing_are_refused(tiny_model, tiny_tokenizer, kind):
    ids, labels, sentence = list(refusals(tiny_tokenizer).values())[kind]
    with pytest.raises(ValueError, match=sentence):
        tiny_model(torch.tensor([ids]), labels=torch.tensor([labels]))


def test_labels_on_the_context_are_told_of_once(tiny_model, tiny_tokenizer, caplog):
    ids = torch.tensor([example(tiny_tokenizer, "你好", "天气")["input_ids"]])
    training._warn_of_context.cache_clear()
    with caplog.at_level(logging.WARNING, "faster_chatglm_6b"), torch.no_grad():
        losses = [tiny_model(ids, labels=ids).loss.item() for _ in range(2)]
    assert [record.getMessage()[:32] for record in caplog.records] == ["labels count tokens before <sop>"]
    total, count = summed_by_hand(tiny_model, {"input_ids": ids[0].tolist(), "labels": ids[0].tolist()})
    assert losses == pytest.approx([total / count] * 2, rel=1e-4)


def test_a_row_without_labels_counts_nothing(tiny_model, tiny_tokenizer, examples):
    empty = {"input_ids": examples[0]["input_ids"], "labels": [-100] * len(examples[0]["labels"])}
    batch = DataCollatorForSeq2Seq(tiny_tokenizer)([dict(examples[1]), empty])
    total, count = summed_by_hand(tiny_model, examples[1])
    with torch.no_grad():
        assert tiny_model(**batch).loss.item() == pytest.approx(total / count, rel=1e-4)


def test_label_smoothing_is_told_of(tiny_model, tiny_tokenizer, examples, tmp_path, caplog):
    """Label smoothing gives a warning: the Trainer takes the labels away and shifts them only for known classes."""
    training._warn_of_missing_labels.cache_clear()
    trainer = Trainer(
        model=copy.deepcopy(tiny_model),
        args=arguments(tmp_path, label_smoothing_factor=0.1),
        train_dataset=[dict(row) for row in examples],
        data_collator=DataCollatorForSeq2Seq(tiny_tokenizer),
    )
    with caplog.at_level(logging.WARNING, "faster_chatglm_6b"):
        trainer.train()
    assert [record.getMessage() for record in caplog.records if "label_smoothing_factor" in record.getMessage()]
