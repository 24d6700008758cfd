"""The tripwire for new releases of transformers: each step of a generation reads only what is new."""

import contextlib
import copy
import dataclasses
import logging
import warnings
from inspect import signature
from pathlib import Path
from unittest import mock

import pytest
import release_checks
import torch
import transformers
from release_checks import PROMPT, notices, rows_read
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

import faster_chatglm_6b
from faster_chatglm_6b import backend, versions
from faster_chatglm_6b.generation import generate as generation
from faster_chatglm_6b.generation import reading
from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration
from faster_chatglm_6b.ops import caches
from faster_chatglm_6b.ops.caches import CACHE_NAME, CACHE_NAMES, cache_in

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "tiny_chatglm"
IDS = torch.tensor(PROMPT)
NEW = 6
STEPS = [IDS.shape[1]] + [1] * (NEW - 1)
SETTINGS = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None}


@contextlib.contextmanager
def quietly(but=()):
    """Check that transformers warns of no deprecation inside, except for texts that begin with ``but``."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    log = logging.getLogger("transformers")
    transformers.utils.logging.warning_once.cache_clear()
    log.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught, notices() as found:
            warnings.simplefilter("always")
            yield
    finally:
        log.removeHandler(handler)
    said = [record.getMessage() for record in records] + [str(one.message) for one in caught]
    assert not [one for one in said if "deprecat" in one.lower() and not one.startswith(but)]
    assert not found


@pytest.fixture
def quiet():
    """Run the whole test inside ``quietly``."""
    with quietly():
        yield


@pytest.fixture(params=["float", "int8", "prefix", "projected prefix", "LoRA", "merged LoRA"])
def model(request, golden_dir, load_tuned):
    """Load the tiny checkpoint in each form in which people use it."""
    if "prefix" in request.param:
        return load_tuned(int("projected" in request.param))
    folder = golden_dir / "ckpt" / ("tiny-int8" if request.param == "int8" else "tiny")
    model = ChatGLMForConditionalGeneration.from_pretrained(folder).float().eval()
    if "LoRA" not in request.param:
        return model
    peft = pytest.importorskip("peft", reason="adapters need peft: pip install peft")
    import torch.distributed.tensor  # noqa: F401 PEFT asks for it by name, and transformers 4.45 does not import it

    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False)).eval()
    return adapted.merge_and_unload() if "merged" in request.param else adapted


class Ignored(BaseStreamer):
    def put(self, value):
        pass

    def end(self):
        pass


def network_of(model):
    """Return our model from inside the wrapper that PEFT puts around it."""
    return model if isinstance(model, ChatGLMForConditionalGeneration) else model.get_base_model()


CALLS = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "streamer": {"streamer": Ignored()},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "several answers": {"num_return_sequences": 2, "do_sample": True},
    "scores": {"return_dict_in_generate": True, "output_scores": True},
    "processors": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2},
    "cache given": {"past_key_values": DynamicCache},
    "cache given under its newer name": {"cache": DynamicCache},
    "generator": {"do_sample": True, "generator": lambda: torch.Generator().manual_seed(0)},
}


@pytest.mark.parametrize("call", CALLS)
def test_each_step_reads_one_token(model, call, quiet):
    given = {name: value() if callable(value) else value for name, value in CALLS[call].items()}
    inner = network_of(model)
    with rows_read(inner) as rows:
        model.generate(input_ids=IDS, **{**SETTINGS, **given})
    assert rows == STEPS


def test_a_padded_batch_and_embeddings(model, quiet):
    inner = network_of(model)
    ids = torch.cat((torch.tensor([[3, 3, *PROMPT[0][2:]]]), IDS))
    embeds = inner.get_input_embeddings()(IDS).detach()
    for inputs in ({"input_ids": ids}, {"input_ids": IDS, "inputs_embeds": embeds}):
        with rows_read(inner) as rows:
            model.generate(**inputs, **SETTINGS)
        assert rows == STEPS


def test_streams_read_one_token_per_step(model, tiny_tokenizer, quiet):
    inner = network_of(model)
    with rows_read(inner) as rows:
        list(model.stream_tokens(IDS, **SETTINGS))
    assert rows == STEPS
    with rows_read(inner) as rows:
        list(model.stream_chat(tiny_tokenizer, "你好", **SETTINGS))
    assert 1 < len(rows) <= NEW and set(rows[1:]) == {1}


def test_a_filled_cache_is_gone_on_with(tiny_model, quiet):
    """Turns that hand their cache on, under either name, read only what is new."""
    whole = tiny_model.generate(IDS, **{**SETTINGS, "max_new_tokens": 2 * NEW}).tolist()
    for name in ("past_key_values", "cache"):
        cache = DynamicCache()
        first = tiny_model.generate(IDS, **SETTINGS, **{name: cache})
        assert cache.get_seq_length() == first.shape[1] - 1
        with rows_read(tiny_model) as rows:
            second = tiny_model.generate(first, **SETTINGS, **{name: cache})
        assert second.tolist() == whole and rows == [1] * NEW


def test_a_returned_cache_is_gone_on_with(tiny_model):
    """A returned cache serves the next turn, also as the tuple that transformers 4.45 and 4.46 make of it."""
    whole = tiny_model.generate(IDS, **{**SETTINGS, "max_new_tokens": 2 * NEW}).tolist()
    first = tiny_model.generate(IDS, **SETTINGS, return_dict_in_generate=True)
    with rows_read(tiny_model) as rows:
        second = tiny_model.generate(first.sequences, **SETTINGS, past_key_values=first[CACHE_NAME])
    assert second.tolist() == whole and rows == [1] * NEW


def test_two_caches_are_refused(tiny_model):
    two = {"past_key_values": DynamicCache(), "cache": DynamicCache()}
    for call in (lambda: tiny_model.generate(IDS, **SETTINGS, **two), lambda: tiny_model(IDS, **two)):
        with pytest.raises(ValueError, match="past_key_values and cache are both given, but are two names"):
            call()
    one = DynamicCache()
    assert cache_in({"past_key_values": one, "cache": one}) is one and cache_in({"cache": None}) is None


def test_assisted_decoding(tiny_model):
    """Each step reads a draft of at most three tokens and the token before it; the tokens stay the same."""
    # transformers 4 and 5.0 fail here without an end token, so the test gives one that is never drawn.
    settings = {**SETTINGS, "eos_token_id": 0}
    expected = tiny_model.generate(IDS, **settings).tolist()
    assert len(expected[0]) == len(PROMPT[0]) + NEW
    assistant = copy.deepcopy(tiny_model)
    assistant.generation_config.num_assistant_tokens = 3
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    # transformers calls the assistant in a way that transformers itself deprecates.
    its_own = ("Passing `generation_config` together with generation-related arguments",)
    with quietly(but=its_own), rows_read(tiny_model) as rows, rows_read(assistant) as drafts:
        output = tiny_model.generate(IDS, **settings, assistant_model=assistant)
    assert output.tolist() == expected
    assert len(rows) < NEW and len(PROMPT[0]) < rows[0] <= len(PROMPT[0]) + 3 and max(rows[1:]) <= 4
    assert drafts[0] == len(PROMPT[0]) and max(drafts[1:]) <= 2
    for given in ({}, {"past_key_values": DynamicCache()}):
        with quietly(), rows_read(tiny_model) as rows:
            output = tiny_model.generate(IDS, **settings, prompt_lookup_num_tokens=3, **given)
        assert output.tolist() == expected and max(rows[1:]) <= 4


def test_outputs_hold_the_cache_under_the_releases_name(tiny_model, quiet):
    field = {one.name for one in dataclasses.fields(CausalLMOutputWithPast)} & set(CACHE_NAMES)
    assert field == {CACHE_NAME}
    for network in (tiny_model, tiny_model.transformer):
        with torch.no_grad():
            output = network(IDS, use_cache=True)
            position_ids = torch.tensor([[[5], [2]]])
            again = {"input_ids": torch.tensor([[7]]), "position_ids": position_ids}
            followed = [
                network(**again, **{name: copy.deepcopy(output[CACHE_NAME])})[0].tolist()
                for name in ("past_key_values", "cache")
            ]
        assert CACHE_NAME in output and followed[0] == followed[1]


@pytest.mark.parametrize("check", release_checks.EVERYWHERE, ids=lambda check: check.__name__)
def test_a_newer_release_on_the_plain_path(tiny_model, check, monkeypatch):
    monkeypatch.setenv("FASTER_CHATGLM_6B_KERNELS", "off")
    check(tiny_model, captured=False)


def test_a_renamed_cache_reaches_every_step(tiny_model, quiet):
    with release_checks.arguments_changed(release_checks.rename_cache):
        with rows_read(tiny_model) as rows:
            tiny_model.generate(IDS, **SETTINGS)
    assert rows == STEPS


def test_a_cache_of_the_callers_under_a_third_name(tiny_model, quiet):
    """``generate`` takes today's names and hands on the release's own name without a complaint about it."""
    prepare = GenerationMixin._prepare_cache_for_generation

    def nothing_more_to_prepare(self, generation_config, model_kwargs, *args, **kwargs):
        if "memory" not in model_kwargs:
            prepare(self, generation_config, model_kwargs, *args, **kwargs)

    whole = tiny_model.generate(IDS, **{**SETTINGS, "max_new_tokens": 2 * NEW}).tolist()
    for name in ("past_key_values", "cache"):
        cache = DynamicCache()
        with (
            mock.patch.object(generation, "CACHE_NAME", "memory"),
            mock.patch.object(GenerationMixin, "_prepare_cache_for_generation", nothing_more_to_prepare),
        ):
            first = tiny_model.generate(IDS, **SETTINGS, **{name: cache})
            with rows_read(tiny_model) as rows:
                assert tiny_model.generate(first, **SETTINGS, **{name: cache}).tolist() == whole
        assert rows[-1] == 1 and len(rows) == NEW


def test_the_name_of_the_cache_is_read_off_the_outputs():
    def outputs(*names):
        return dataclasses.make_dataclass("Outputs", [("loss", "Tensor"), *names])

    assert caches._name_in(outputs(("past_key_values", "tuple"), ("memory", "Cache | None"))) == "past_key_values"
    assert caches._name_in(outputs(("cache", "Cache | None"), ("past_key_values", "tuple"))) == "cache"
    assert caches._name_in(outputs(("memory", "Cache | None"))) == "memory"
    assert caches._name_in(outputs()) == "past_key_values"


def test_a_search_that_is_gone_is_said():
    class Owner:
        _sample = None

    with notices() as found:
        reading.check_searches(Owner)
    gone = ("_beam_search", "_assisted_decoding", "_prepare_generation_config", "_get_logits_processor")
    assert [name in sentence for name, sentence in zip(gone, found, strict=True)] == [True] * 4


def test_a_network_with_the_former_arguments(tiny_model, quiet):
    """A replaced inner forward need not know the cache's newer name."""
    model = copy.deepcopy(tiny_model)
    forward = model.transformer.forward
    names = [name for name in signature(forward).parameters if name != "cache"]
    assert len(names) == 9

    def former(**kwargs):
        assert set(kwargs) <= set(names)
        return forward(**kwargs)

    model.transformer.forward = former
    expected = tiny_model.generate(IDS, **SETTINGS).tolist()
    for given in ({}, {"cache": DynamicCache()}):
        assert model.generate(IDS, **SETTINGS, **given).tolist() == expected


def test_early_exits_are_refused_before_anything_changes(tiny_model):
    expected = tiny_model.generate(IDS, **SETTINGS).tolist()
    if not hasattr(tiny_model.generation_config, "assistant_early_exit"):
        pytest.skip(f"transformers {transformers.__version__} knows no early exits")
    with pytest.raises(ValueError, match="assistant_early_exit is 1, but this model has no early exits; leave it out"):
        tiny_model.generate(IDS, **SETTINGS, assistant_early_exit=1)
    assert tiny_model.generate(IDS, **SETTINGS).tolist() == expected


def test_settings_in_a_generation_config(tiny_model, tiny_tokenizer, quiet):
    """A generation config serves alone, and in chat beside chat's own arguments, without a warning."""
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=[0])
    config.cache_implementation = "static"
    before = config.to_dict()
    expected = tiny_model.generate(IDS, **SETTINGS).tolist()
    assert tiny_model.generate(IDS, generation_config=config).tolist() == expected
    config.cache_implementation = before["cache_implementation"] = None
    for call in (tiny_model.chat, lambda *args, **kwargs: list(tiny_model.stream_chat(*args, **kwargs))[-1]):
        answer = call(tiny_tokenizer, "你好", do_sample=False, generation_config=config)
        assert answer[0] == tiny_model.chat(tiny_tokenizer, "你好", do_sample=False, max_new_tokens=NEW)[0]
    batch = tiny_model.chat_batch(tiny_tokenizer, ["你好", "hi"], do_sample=False, generation_config=config)
    assert batch[0][0] == answer[0] and config.to_dict() == before


def test_a_cache_that_transformers_does_not_hand_on(tiny_model, quiet):
    """The next step gets the cache even if transformers does not find it in the outputs."""
    original = GenerationMixin._update_model_kwargs_for_generation

    def without_cache(self, outputs, model_kwargs, **kwargs):
        kept = original(self, outputs, model_kwargs, **kwargs)
        return {name: value for name, value in kept.items() if name not in CACHE_NAMES}

    patched = mock.patch.object(GenerationMixin, "_update_model_kwargs_for_generation", without_cache)
    with patched, rows_read(tiny_model) as rows:
        tiny_model.generate(IDS, **SETTINGS)
    assert rows == STEPS


def test_a_lost_cache_is_said_once(tiny_model):
    original = ChatGLMForConditionalGeneration.prepare_inputs_for_generation

    def without_cache(self, *args, **kwargs):
        return original(self, *args, **{name: value for name, value in kwargs.items() if name not in CACHE_NAMES})

    expected = tiny_model.generate(IDS, **SETTINGS).tolist()
    owner = ChatGLMForConditionalGeneration
    with notices() as found, mock.patch.object(owner, "prepare_inputs_for_generation", without_cache):
        for _ in range(2):
            assert tiny_model.generate(IDS, **SETTINGS).tolist() == expected
    assert len(found) == 1 and found[0].startswith("No cache comes back to the model from step to step")
    with notices() as found, mock.patch.object(owner, "prepare_inputs_for_generation", without_cache):
        tiny_model.generate(IDS, **SETTINGS, use_cache=False)
        tiny_model.generate(IDS, **{**SETTINGS, "max_new_tokens": 2})
    assert not found


def test_only_steps_of_one_generation_are_compared():
    """A single step, another call and a cut step are no later steps of one generation, so no cache counts as lost."""

    def lost(*steps):
        with notices() as found:
            for length, past_length in steps:
                reading.watch_step(length, past_length, True)
        return len(found)

    assert lost((5, 0), (6, 0), (7, 0)) == 0
    with reading.steps_watched():
        assert lost((5, 0), (6, 0), (7, 6), (8, 7)) == 0
        with reading.steps_watched():
            assert lost((4, 0), (5, 4), (6, 0)) == 0
        assert lost((9, 0)) == 1
    assert lost((5, 0), (6, 0), (7, 0)) == 0


def test_a_decoding_loop_of_the_callers_own_may_begin_anew(tiny_model, quiet):
    def rerank(model, input_ids, logits_processor=None, stopping_criteria=None, generation_config=None, **kwargs):
        for length in range(len(PROMPT[0]), len(PROMPT[0]) + 4):
            ids = torch.cat((input_ids, input_ids[:, : length - len(PROMPT[0])]), dim=1)
            model(**model.prepare_inputs_for_generation(ids, use_cache=True))
        return input_ids

    if "custom_generate" not in signature(GenerationMixin.generate).parameters:
        pytest.skip(f"transformers {transformers.__version__} takes no decoding loop of the caller's own")
    assert tiny_model.generate(IDS, custom_generate=rerank).tolist() == PROMPT


def test_no_cache_is_what_the_caller_asked_for(tiny_model, quiet):
    with rows_read(tiny_model) as rows:
        tiny_model.generate(IDS, **SETTINGS, use_cache=False)
    assert rows == [len(PROMPT[0]) + step for step in range(NEW)]


@pytest.mark.parametrize("options", [{}, {"dtype": torch.float32}, {"quantization_bit": 8}])
def test_loading_and_saving(options, tmp_path, quiet):
    """Loading and saving warn of nothing, although the dtype's argument changed its name in 4.56."""
    settings = {"trust_remote_code": True}
    tokenizer = AutoTokenizer.from_pretrained(TINY, **settings)
    model = AutoModel.from_pretrained(TINY, **settings, **options)
    assert model.dtype == options.get("dtype", torch.float16)
    for one in (tokenizer, model):
        one.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, **settings)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, **settings, config=config)
    assert all(torch.equal(one, again.state_dict()[name]) for name, one in model.state_dict().items())


@pytest.mark.parametrize(
    ("version", "note"),
    [
        ("99.1.0", "99.1.0 (newer than {newest}, the newest that was tested)"),
        (backend.NEWEST_TESTED_TRANSFORMERS, "{newest}"),
        ("4.57.6", "4.57.6"),
    ],
)
def test_a_release_newer_than_the_newest_tested_is_named(version, note, monkeypatch):
    monkeypatch.setattr(versions, "installed_version", {"transformers": version}.get)
    line = f"  transformers   {note.format(newest=backend.NEWEST_TESTED_TRANSFORMERS)}"
    assert line in str(faster_chatglm_6b.status()).splitlines()


def test_the_newest_tested_release_is_the_one_that_the_pages_name():
    for name in ("docs/verified.md", "docs/zh/verified.md"):
        assert f"| {backend.NEWEST_TESTED_TRANSFORMERS} |" in (ROOT / name).read_text("utf-8")
