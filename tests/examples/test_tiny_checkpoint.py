"""``examples/tiny_chatglm`` holds the right files and gives the right answers."""

import json
import random
import sys
import unicodedata
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoTokenizer

from faster_chatglm_6b.templates.prompts import process_response

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "tiny_chatglm"
TRAINING = FOLDER / "training"
LIMIT = 6_000_000


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(str(FOLDER), trust_remote_code=True)


@pytest.fixture(scope="module")
def model():
    return AutoModel.from_pretrained(str(FOLDER), trust_remote_code=True).float()


@pytest.fixture(scope="module")
def training():
    """Yield the modules of the training folder, which import each other by their bare names."""
    before = set(sys.modules)
    sys.path.insert(0, str(TRAINING))
    try:
        import copies
        import corpus
        import train
        import train_copies

        yield {"copies": copies, "corpus": corpus, "train": train, "train_copies": train_copies}
    finally:
        sys.path.remove(str(TRAINING))
        for name in set(sys.modules) - before:
            if str(TRAINING) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]


def converse(model, tokenizer, queries: list[str]) -> list[str]:
    history: list[tuple[str, str]] = []
    for query in queries:
        _, history = model.chat(tokenizer, query, history=history, do_sample=False)
    return [answer for _, answer in history]


def test_everything_together_is_within_the_limit():
    files = [path for path in FOLDER.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= LIMIT
    assert not list(FOLDER.glob("*.py"))


def test_weights_are_float16_and_hold_the_embedding_once():
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {file.get_tensor(name).dtype for name in names} == {torch.float16}
        assert file.metadata() == {"format": "pt"}
    assert "transformer.word_embeddings.weight" in names and "lm_head.weight" not in names


def test_vocabulary_has_the_layout_of_the_real_one(tokenizer):
    config = json.loads((FOLDER / "config.json").read_text("utf-8"))
    size = tokenizer.vocab_size
    pieces = tokenizer.convert_ids_to_tokens(list(range(size)))
    assert pieces[:5] == ["<unk>", "<s>", "</s>", "<pad>", "<n>"]
    first = pieces.index("[MASK]")
    control = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
    assert pieces[first : first + 8] == control
    blanks = ["<|tab|>", *(f"<|blank_{count}|>" for count in range(2, 81))]
    assert pieces[first + 8 : first + 88] == blanks
    assert pieces[first + 88 :] == [f"<0x{byte:02X}>" for byte in range(256)]
    assert size <= config["vocab_size"]
    assert (config["mask_token_id"], config["gmask_token_id"]) == (first, first + 1)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (first + 4, first + 5, 3)


@pytest.mark.parametrize("text", ["龘𠮷 means nothing to it", "a\tb    c\n\nd", "model = model.quantize(8)"])
def test_tokenizer_gives_any_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode_text(text)) == text


TWO_TURNS = {
    "english": [
        ("What is int8?", "Call quantize(8) after loading:\nmodel = model.quantize(8)"),
        ("And in int4?", "Call quantize(4) after loading:\nmodel = model.quantize(4)"),
    ],
    "chinese": [
        ("怎么安装？", "克隆仓库，然后运行：python3 -m pip install --editable=."),
        ("然后呢？", "然后在脚本最上面写 import faster_chatglm_6b"),
    ],
    "into English": [
        ("你好", "你好！我是 faster_chatglm_6b 的小小演示模型。"),
        ("用英文再说一遍", "Hello! I am a tiny demo model of faster_chatglm_6b."),
    ],
    "into Chinese": [
        ("What is faster_chatglm_6b?", "faster_chatglm_6b makes ChatGLM-6B fast on your own machine."),
        ("Say that in Chinese", "faster_chatglm_6b 让 ChatGLM-6B 在你自己的机器上跑得更快。"),
    ],
    "what was asked": [
        ("晚上睡不着应该怎么办", "可以试试下面的方法：\n1. 每天在固定的时间睡觉。"),
        ("我刚才问了什么？", "你说的是：晚上睡不着应该怎么办"),
    ],
    "a name that it was not trained on": [
        ("My name is Christopher.", "Nice to meet you, Christopher!"),
        ("What is my name?", "Your name is Christopher."),
    ],
    "a Chinese name that it was not trained on": [
        ("我叫王小明", "很高兴认识你，王小明！"),
        ("我叫什么名字？", "你叫王小明。"),
    ],
    "what it cannot know": [
        ("What's the weather like?", "I cannot see the weather"),
        ("Thank you!", "You are welcome!"),
    ],
}


@pytest.mark.parametrize("rounds", TWO_TURNS.values(), ids=TWO_TURNS)
def test_two_turns(model, tokenizer, rounds):
    answers = converse(model, tokenizer, [query for query, _ in rounds])
    for answer, (_, start) in zip(answers, rounds, strict=True):
        assert answer.startswith(start)


@pytest.mark.parametrize("query", ["你好", "你好！", " 你好? ", "您好。", "嗨，你好"])
def test_chinese_greeting_in_any_punctuation(model, tokenizer, query):
    assert converse(model, tokenizer, [query])[0].startswith("你好！我是 faster_chatglm_6b")


@pytest.mark.parametrize(
    "query",
    ["how do i install it", "How do I install it", "how do I install it ??", "Hi, how can I install this project?"],
)
def test_english_question_in_other_punctuation_and_case(model, tokenizer, query):
    assert converse(model, tokenizer, [query])[0].startswith("Clone the repository")


def test_four_turns_with_something_to_remember(model, tokenizer):
    answers = converse(
        model, tokenizer, ["Remember the number 407.", "Tell me a joke", "Another one", "What was the number?"]
    )
    assert answers[-1] == "The number is 407."
    assert answers[1] != answers[2]


def test_half_precision_answers_the_same(model, tokenizer):
    half = AutoModel.from_pretrained(str(FOLDER), trust_remote_code=True).half()
    queries = ["What can you do?", "用中文再说一遍"]
    assert converse(half, tokenizer, queries) == converse(model, tokenizer, queries)


def test_questions_that_were_never_trained_on(model, tokenizer, training):
    """Most questions of held_out.txt, written after the corpus, get the answer that the corpus would give."""
    corpus = training["corpus"].Corpus()
    dialogues = [dialogue for dialogue in corpus.held_out() if dialogue.kind == "single.second_held_out"]
    assert len(dialogues) > 100
    table, _ = training["train"].accuracy(model.eval(), dialogues, tokenizer, torch.device("cpu"))
    assert table["single.second_held_out.en"]["exact"] > 0.8
    assert table["single.second_held_out.zh"]["exact"] > 0.8


def test_training_masks_and_positions_are_those_of_the_model(model, tokenizer, training):
    """A padded training batch gives each dialogue the logits that the model gives it alone with its own masks."""
    corpus, train = training["corpus"].Corpus(), training["train"]
    rng = random.Random(3)
    samples = [train.encode(corpus.draw(rng), tokenizer) for _ in range(3)]
    batch = train.prepare(samples, tokenizer.pad_token_id, torch.device("cpu"))
    labels = batch.pop("labels")
    with torch.inference_mode():
        together = model(**batch, use_cache=False).logits
        for row, (ids, context) in enumerate(samples):
            alone = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
            torch.testing.assert_close(together[row, : len(ids)], alone, atol=1e-3, rtol=1e-3)
            assert labels[row].ne(-100).sum() == len(ids) - context - 1


def test_every_answer_survives_the_tokenizer(tokenizer, training):
    for intent in training["corpus"].Corpus().intents.values():
        for answer in intent.answer.values():
            shown = process_response(tokenizer.decode(tokenizer.encode_text(answer)))
            assert shown == process_response(unicodedata.normalize("NFKC", answer))


def test_metrics_belong_to_this_corpus_and_these_weights(training):
    metrics = json.loads((TRAINING / "metrics.json").read_text("utf-8"))
    assert metrics["corpus"] == training["corpus"].Corpus().sizes()
    assert metrics["model_bytes"] == (FOLDER / "model.safetensors").stat().st_size


def test_readme_quotes_the_metrics():
    readme = (FOLDER / "README.md").read_text("utf-8")
    table = json.loads((TRAINING / "metrics.json").read_text("utf-8"))["exact_answers_on_held_out_wordings"]
    kinds = {kind.rsplit(".", 1)[0] for kind in table if kind != "all"}
    for kind in kinds:
        cells = [
            f"{100 * row['exact']:.1f} % of {row['dialogues']}" for row in (table[f"{kind}.en"], table[f"{kind}.zh"])
        ]
        assert f"| {cells[0]} | {cells[1]} |" in readme, kind


def test_templates_stand_for_all_their_choices(training):
    expand = training["corpus"].expand
    assert expand("{a|b{1|2}} <x>", {"x": "{c|}"}) == ["a c", "a", "b1 c", "b1", "b2 c", "b2"]


def test_copies_repeat_what_the_question_holds(tokenizer, training):
    """Answers stand in the question but for a replaced name, and have as many tokens as is said."""
    module = training["copies"]
    copies, rng = module.Copies(tokenizer), random.Random(5)
    for task in module.TASKS:
        drawn = [copies.draw(rng, held_out=True, task=task) for _ in range(20)]
        assert {dialogue.language for dialogue in drawn} == {"en", "zh"}
        for dialogue in drawn:
            assert 10 <= len(tokenizer.encode_text(dialogue.answer)) <= 60
            assert (dialogue.answer in dialogue.query) == (task != "correct"), dialogue
            assert len(dialogue.answer) < len(dialogue.query)
    held, trained = (set(copies._sentences["en", held_out]) for held_out in (True, False))
    assert held and trained and not held & trained
