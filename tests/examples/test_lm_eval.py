"""``examples/lm_eval_chatglm.py`` lets lm-evaluation-harness score and generate as a prefix LM should."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval", reason="the adapter needs lm-evaluation-harness: pip install lm_eval")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TINY = EXAMPLES / "tiny_chatglm"
sys.path.append(str(EXAMPLES))

import lm_eval_chatglm  # noqa: E402
from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration  # noqa: E402
from faster_chatglm_6b.tokenization_chatglm import ChatGLMTokenizer  # noqa: E402

PAIRS = [
    ("问：你好 答：", "天气很好"),
    ("hello", " world"),
    ("", "你好，世界"),
    ("a <eop> typed [gMASK] control <sop> token", "two lines\nof text"),
    ("hello", " a"),
    ("question ", "b"),
]
TASKS = {
    "choice": """
task: choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "answer": """
task: answer
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 24}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "perplexity": """
task: perplexity
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
""",
}


@pytest.fixture(scope="module")
def tokenizer():
    return ChatGLMTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def model():
    return ChatGLMForConditionalGeneration.from_pretrained(TINY).float().eval()


def adapter(model, tokenizer, **options):
    return lm_eval_chatglm.ChatGLMLM(pretrained=model, tokenizer=tokenizer, **options)


def requests(kind, arguments):
    return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]


def by_hand(model, tokenizer, context_ids, ids):
    """Score one row without padding: return the log-probability of the tokens, and True if each is the likeliest."""
    row = [*context_ids, tokenizer.gmask_token_id, tokenizer.bos_token_id, *ids]
    with torch.no_grad():
        scores = model(torch.tensor([row])).logits[0].log_softmax(-1)
    rows = scores[len(row) - len(ids) - 1 : -1]
    score = rows.gather(1, torch.tensor(ids)[:, None]).sum().item()
    return score, rows.argmax(-1).tolist() == list(ids)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_log_likelihoods_equal_a_hand_computation(model, tokenizer, batch_size):
    scored = adapter(model, tokenizer, batch_size=batch_size).loglikelihood(requests("loglikelihood", PAIRS))
    for (context, continuation), (score, is_greedy) in zip(PAIRS, scored, strict=True):
        expected, expected_greedy = by_hand(
            model, tokenizer, tokenizer.encode_text(context), tokenizer.encode_text(continuation)
        )
        assert score == pytest.approx(expected, abs=1e-3), context
        assert is_greedy == expected_greedy


def test_the_greedy_answer_is_greedy(model, tokenizer):
    """The model's own likeliest continuation counts as greedy, in a batch and alone."""
    context = "你好"
    prompt = torch.tensor([tokenizer(context)["input_ids"]])
    said = model.generate(prompt, do_sample=False, max_new_tokens=4, eos_token_id=None)[0, prompt.shape[1] :].tolist()
    text = tokenizer.decode(said)
    assert tokenizer.encode_text(text) == said, "the example's text must be its tokens' own"
    scored = adapter(model, tokenizer, batch_size=2).loglikelihood(requests("x", [(context, text), (context, "坏")]))
    assert [is_greedy for _, is_greedy in scored] == [True, False]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_generate_until_gives_what_chat_would(model, tokenizer, batch_size):
    contexts = ["你好", "hello there, this one is longer", "问：天气 答："]
    settings = {"until": ["\n\n"], "max_gen_toks": 24, "do_sample": False}
    texts = adapter(model, tokenizer, batch_size=batch_size).generate_until(
        requests("generate_until", [(context, dict(settings)) for context in contexts])
    )
    for context, text in zip(contexts, texts, strict=True):
        prompt = torch.tensor([tokenizer(context)["input_ids"]])
        said = model.generate(prompt, do_sample=False, max_new_tokens=24)[0, prompt.shape[1] :]
        expected = tokenizer.decode(said.tolist()).split("\n\n")[0]
        assert text == expected and len(text) > 1


def test_a_stop_string_cuts_the_answer(model, tokenizer):
    whole, cut = (
        adapter(model, tokenizer).generate_until(requests("x", [("你好", {"until": until, "max_gen_toks": 24})]))[0]
        for until in ([], ["stop"])
    )
    assert whole == cut and len(whole) > 3
    stop = whole[2]
    (cut,) = adapter(model, tokenizer).generate_until(requests("x", [("你好", {"until": [stop], "max_gen_toks": 24})]))
    assert cut == whole.split(stop)[0]


def test_a_long_text_is_scored_in_windows(model, tokenizer):
    """Each token is scored once; the first window has an empty prompt, the others the token before."""
    text = "今天天气很好，world hello。" * 3
    ids = tokenizer.encode_text(text)
    whole, windows = (
        adapter(model, tokenizer, max_length=length).loglikelihood_rolling(requests("x", [(text,), ("a",)]))
        for length in (None, 16)
    )
    assert whole[0] == pytest.approx(by_hand(model, tokenizer, [], ids)[0], abs=1e-3)
    room = 16 - 3
    parts = [(ids[max(begin - 1, 0) : begin], ids[begin : begin + room]) for begin in range(0, len(ids), room)]
    assert len(parts) > 2 and [one for _, part in parts for one in part] == ids
    assert windows[0] == pytest.approx(sum(by_hand(model, tokenizer, *part)[0] for part in parts), abs=1e-3)
    assert (
        whole[1] == windows[1] == pytest.approx(by_hand(model, tokenizer, [], tokenizer.encode_text("a"))[0], abs=1e-3)
    )


def test_a_context_that_is_too_long_keeps_its_end(model, tokenizer):
    short = adapter(model, tokenizer, max_length=12)
    context, continuation = "今天天气很好" * 5, "你好"
    ((score, _),) = short.loglikelihood(requests("x", [(context, continuation)]))
    ids = tokenizer.encode_text(continuation)
    # lm_eval keeps one token more than the window, since the last one is not read.
    kept = tokenizer.encode_text(context)[-(12 + 1 - 2 - len(ids)) :]
    assert score == pytest.approx(by_hand(model, tokenizer, kept, ids)[0], abs=1e-3)
    with pytest.raises(ValueError, match="but 1 to 10 can be scored in a window of 12 tokens"):
        short.loglikelihood(requests("x", [("a", context)]))
    with pytest.raises(ValueError, match="A continuation has 0 tokens"):
        short.loglikelihood(requests("x", [("a", "")]))


@pytest.fixture
def tasks(tmp_path):
    """Write tasks of two questions, which need no network."""
    rows = [
        {"question": "你好", "choices": ["天气很好", "x y z"], "label": 0, "answer": "?"},
        {"question": "hello", "choices": ["a b c", "world"], "label": 1, "answer": "?"},
    ]
    data = tmp_path / "data.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, text in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(text.replace("DATA", str(data)), encoding="utf-8")
    return tmp_path, rows


def test_simple_evaluate(model, tokenizer, tasks, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tasks[0] / "cache"))
    results = simple_evaluate(
        adapter(model, tokenizer, batch_size=2),
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tasks[0]), include_defaults=False),
        bootstrap_iters=0,
    )
    samples = {name: sorted(results["samples"][name], key=lambda sample: sample["doc_id"]) for name in TASKS}
    for row, sample in zip(tasks[1], samples["choice"], strict=True):
        question = tokenizer.encode_text(row["question"])
        expected = [by_hand(model, tokenizer, question, tokenizer.encode_text(one))[0] for one in row["choices"]]
        assert [score for score, _ in sample["filtered_resps"]] == pytest.approx(expected, abs=1e-3)
        best = max(range(2), key=expected.__getitem__)
        assert sample["acc"] == float(best == row["label"])
    for row, sample in zip(tasks[1], samples["answer"], strict=True):
        prompt = torch.tensor([tokenizer(row["question"])["input_ids"]])
        said = model.generate(prompt, do_sample=False, max_new_tokens=24)[0, prompt.shape[1] :]
        assert sample["filtered_resps"] == [tokenizer.decode(said.tolist()).split("\n\n")[0]]
    assert results["results"]["perplexity"]["word_perplexity,none"] > 1


@pytest.mark.parametrize("turns", [1, 3])
def test_a_chat_template_gives_the_prompt_that_chat_gives(model, tokenizer, turns):
    """``--apply_chat_template`` gives one [gMASK] <sop>, for scores and answers; what a question types stays text."""
    lm = adapter(model, tokenizer, batch_size=2)
    messages = [
        {"role": "user", "content": "a \x10<sop> typed <eop> token"},
        {"role": "assistant", "content": "你好"},
        {"role": "user", "content": "天气"},
    ][:turns]
    context = lm.apply_chat_template(messages)
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert prompt.count(tokenizer.gmask_token_id) == prompt.count(tokenizer.bos_token_id) == 1
    rows, mask = lm.tok_batch_encode([context, "a"])
    assert rows[0].tolist() == prompt and mask[0].all()
    ids = tokenizer.encode_text("你好")
    ((score, _),) = lm.loglikelihood(requests("x", [(context, "你好")]))
    assert score == pytest.approx(by_hand(model, tokenizer, prompt[:-2], ids)[0], abs=1e-3)
    (text,) = lm.generate_until(requests("x", [(context, {"until": ["\n\n"], "max_gen_toks": 8})]))
    said = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=8)[0, len(prompt) :]
    assert text == tokenizer.decode(said.tolist()).split("\n\n")[0]


def test_a_chat_template_with_the_beginning_of_an_answer(model, tokenizer):
    """The scored text follows lm_eval's ``gen_prefix``, which follows [gMASK] <sop>."""
    lm = adapter(model, tokenizer)
    messages = [{"role": "user", "content": "天气"}, {"role": "assistant", "content": "今天"}]
    context = lm.apply_chat_template(messages, add_generation_prompt=False)
    prefix, ids = tokenizer.encode_text("今天"), tokenizer.encode_text("你好")
    question = tokenizer.encode_text("天气")
    expected = by_hand(model, tokenizer, question, [*prefix, *ids])[0] - by_hand(model, tokenizer, question, prefix)[0]
    ((score, _),) = lm.loglikelihood(requests("x", [(context, "你好")]))
    assert score == pytest.approx(expected, abs=1e-3)


def test_the_command(tasks):
    """The command of the example's docstring runs in another process."""
    folder, _ = tasks
    command = [sys.executable, str(EXAMPLES / "lm_eval_chatglm.py"), "run", "--model", "chatglm", "--device", "cpu"]
    command += ["--model_args", f"pretrained={TINY},trust_remote_code=True", "--tasks", "choice"]
    command += ["--include_path", str(folder), "--output_path", str(folder / "results")]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "HF_HUB_OFFLINE": "1"}
    environment["HF_DATASETS_CACHE"] = str(folder / "cache")
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|choice|" in done.stdout.replace(" ", "")
    (written,) = (folder / "results").rglob("results_*.json")
    assert json.loads(written.read_text("utf-8"))["results"]["choice"]["acc,none"] in (0, 0.5, 1)
