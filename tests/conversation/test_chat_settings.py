"""A chat turn heeds the settings of ``generate``: stop strings, stopping criteria and ``generation_config.json``."""

import copy

import pytest
from transformers import GenerationConfig, StoppingCriteria

from faster_chatglm_6b import report
from faster_chatglm_6b.templates.prompts import process_response

GREEDY = {"do_sample": False}


@pytest.fixture
def with_file(tiny_model, monkeypatch):
    """Return the tiny model as if its ``generation_config.json`` held some settings."""

    def change(**settings):
        config = copy.deepcopy(tiny_model.generation_config)
        vars(config).update(settings)
        monkeypatch.setattr(tiny_model, "generation_config", config)
        return tiny_model

    return change


@pytest.fixture
def all_ways(tiny_tokenizer):
    """Return the answer that ``chat``, ``stream_chat`` and ``chat_batch`` must share."""

    def ask(model, query="你好", **settings):
        response, _ = model.chat(tiny_tokenizer, query, **settings)
        assert list(model.stream_chat(tiny_tokenizer, query, **settings))[-1][0] == response
        assert model.chat_batch(tiny_tokenizer, [query, "hi there"], **settings)[0][0] == response
        return response

    return ask


@pytest.fixture
def long_answer(all_ways, tiny_model):
    return all_ways(tiny_model, **GREEDY, max_new_tokens=30)


@pytest.mark.parametrize("as_list", [False, True])
def test_a_stop_string_ends_the_answer_and_stays(all_ways, tiny_model, long_answer, as_list):
    """The stop string ends the text, as in ``generate``."""
    middle = len(long_answer) // 2
    stop = long_answer[middle]
    response = all_ways(tiny_model, **GREEDY, max_new_tokens=30, stop_strings=[stop] if as_list else stop)
    # A token may also hold characters after the stop string.
    assert stop in response and response != long_answer and long_answer.startswith(response.rstrip())
    # transformers hands the tokenizer on to its loop; no user should hear of that.
    assert not [notice for notice in report._notices if "tokenizer" in notice]
    nowhere = "faster than light"
    assert all_ways(tiny_model, **GREEDY, max_new_tokens=30, stop_strings=[nowhere]) == long_answer


def test_stop_strings_of_the_file_and_of_a_config(all_ways, tiny_model, with_file, long_answer):
    stop = long_answer[len(long_answer) // 2]
    wanted = all_ways(tiny_model, **GREEDY, max_new_tokens=30, stop_strings=stop)
    config = GenerationConfig(stop_strings=stop, max_new_tokens=30)
    assert all_ways(tiny_model, **GREEDY, generation_config=config) == wanted
    assert config.stop_strings == stop
    assert all_ways(with_file(stop_strings=stop), **GREEDY, max_new_tokens=30) == wanted


def test_full_width_stop_strings(tiny_model, tiny_tokenizer, monkeypatch):
    """The model writes half-width marks, and the response shows them full-width after Chinese characters."""
    asked = {}
    monkeypatch.setattr(tiny_model, "generate", lambda ids, **settings: asked.update(settings) or ids)
    tiny_model.chat(tiny_tokenizer, "你好", stop_strings=["你好！", "\n问："])
    assert asked["stop_strings"] == ["你好!", "\n问:"] and asked["tokenizer"] is tiny_tokenizer
    assert process_response("你好!") == "你好！"


@pytest.mark.parametrize("nothing", [None, [], ()])
def test_no_stop_strings_and_no_max_length(all_ways, tiny_model, with_file, long_answer, nothing):
    """Servers hand on what a request leaves out as None or as an empty list."""
    settings = {**GREEDY, "max_new_tokens": 30}
    assert all_ways(tiny_model, **settings, stop_strings=nothing, max_length=None) == long_answer
    assert all_ways(tiny_model, **GREEDY, generation_config=GenerationConfig(max_new_tokens=30, stop_strings=nothing))
    assert all_ways(with_file(stop_strings=nothing), **settings) == long_answer
    assert all_ways(with_file(max_new_tokens=30), **GREEDY, max_length=None) == long_answer
    assert all_ways(tiny_model, **GREEDY, max_length=None) == all_ways(tiny_model, **GREEDY)


@pytest.mark.parametrize("stop_strings", [3, "", [""], [None], ["a", 1], {"a"}])
def test_stop_strings_that_are_none(tiny_model, tiny_tokenizer, stop_strings):
    for call in (tiny_model.chat, tiny_model.stream_chat):
        with pytest.raises(ValueError, match="stop_strings is .*, but it must be a text or a list of texts"):
            call(tiny_tokenizer, "你好", stop_strings=stop_strings)


def test_stopping_criteria(all_ways, tiny_model, tiny_tokenizer, long_answer):
    class AfterThree(StoppingCriteria):
        """A criterion that ends each row three tokens after the prompt."""

        def __call__(self, input_ids, scores, **kwargs):
            starts = (input_ids == tiny_tokenizer.bos_token_id).int().argmax(dim=-1)
            return input_ids.shape[1] - 1 - starts >= 3

    response = all_ways(tiny_model, **GREEDY, max_new_tokens=30, stopping_criteria=[AfterThree()])
    assert response == all_ways(tiny_model, **GREEDY, max_new_tokens=3) != long_answer


@pytest.mark.parametrize(
    "settings",
    [
        {"return_dict_in_generate": True},
        {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
        {"output_scores": True},
        {"num_beams": 4},
        {"num_beams": 4, "num_return_sequences": 3},
        {"num_return_sequences": 2, "do_sample": True},
        {"num_beams": 4, "num_return_sequences": 2, "return_dict_in_generate": True, "do_sample": True},
        {"max_length": 5},
        {"min_new_tokens": None, "top_p": 0.1, "temperature": 3.0},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_a_chat_turn_is_not_disturbed_by_the_file(all_ways, with_file, long_answer, settings):
    """Arguments of ``chat`` win, and one text comes back, whatever the file asks of ``generate``."""
    assert all_ways(with_file(**settings), **GREEDY, max_new_tokens=30) == long_answer


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 25},
        {"max_new_tokens": 4},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_settings_of_the_file_act_as_arguments_do(all_ways, tiny_model, with_file, settings):
    limit = {} if "max_new_tokens" in settings else {"max_new_tokens": 30}
    wanted = all_ways(tiny_model, **GREEDY, **limit, **settings)
    assert all_ways(with_file(**settings), **GREEDY, **limit) == wanted


@pytest.mark.parametrize(
    "settings",
    [{"cache_implementation": "static"}, {"prefill_chunk_size": 4}, {"guidance_scale": 1.5}],
    ids=lambda settings: " ".join(settings),
)
def test_what_generate_follows_or_refuses_it_does_wherever_it_stands(tiny_model, tiny_tokenizer, with_file, settings):
    """A setting gives the same answer or the same sentence in the file and as an argument."""

    def outcome(model, **arguments):
        try:
            return model.chat(tiny_tokenizer, "你好", **GREEDY, max_new_tokens=8, **arguments)
        except ValueError as error:
            return str(error)

    assert outcome(with_file(**settings)) == outcome(tiny_model, **settings)


def test_limits(tiny_model, tiny_tokenizer, all_ways, with_file):
    """The call's own limit comes before the file's, and the file's before the default of 2048."""
    prompt = len(tiny_model._chat_ids(tiny_tokenizer, "你好", None))
    ten = all_ways(tiny_model, **GREEDY, max_new_tokens=10)
    assert len(tiny_tokenizer.encode_text(ten)) > 5
    model = with_file(max_new_tokens=3)
    assert all_ways(model, **GREEDY) == all_ways(model, **GREEDY, max_new_tokens=3)
    assert all_ways(model, **GREEDY, max_new_tokens=10) == ten
    assert model.chat(tiny_tokenizer, "你好", **GREEDY, max_length=prompt + 10)[0] == ten
    assert model.chat_batch(tiny_tokenizer, ["你好"], **GREEDY, max_length=prompt + 10)[0] == [ten]
    for call in (model.chat, model.stream_chat):
        with pytest.raises(ValueError, match="leaves no room for an answer"):
            call(tiny_tokenizer, "你好", **GREEDY, max_length=prompt)


def test_min_length_of_the_file_is_refused_in_a_batch(tiny_tokenizer, with_file):
    """In a batch ``min_length`` would count the padding, in the file as in the call."""
    model = with_file(min_length=30)
    with pytest.raises(ValueError, match="min_length is 30, but in a batch it would count the padding too"):
        model.chat_batch(tiny_tokenizer, ["你好"], **GREEDY)
    given = {**GREEDY, "max_new_tokens": 3, "min_length": 0}
    assert model.chat_batch(tiny_tokenizer, ["你好"], **given)[0][0] == model.chat(tiny_tokenizer, "你好", **given)[0]


def test_beams_of_the_caller_cannot_be_streamed(tiny_model, tiny_tokenizer):
    with pytest.raises(ValueError, match="Streaming yields one token at a time"):
        tiny_model.stream_chat(tiny_tokenizer, "你好", **GREEDY, num_beams=3)


def test_more_than_ids_may_be_asked_for(tiny_model, tiny_tokenizer):
    """The response is the same text, and ``chat`` drops the rest."""
    plain = tiny_model.chat(tiny_tokenizer, "你好", **GREEDY, max_new_tokens=8)
    asked = {"return_dict_in_generate": True, "output_scores": True}
    assert tiny_model.chat(tiny_tokenizer, "你好", **GREEDY, max_new_tokens=8, **asked) == plain
    config = GenerationConfig(max_new_tokens=8, **asked)
    assert tiny_model.chat(tiny_tokenizer, "你好", **GREEDY, generation_config=config) == plain
