"""Outputs of ``generate`` other than tokens, and the searches and settings that it follows or refuses."""

import copy
import inspect
import json
import shutil

import pytest
import torch
import transformers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation import logits_process

import faster_chatglm_6b
from faster_chatglm_6b.generation.guidance import PrefixGuidanceLogitsProcessor
from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration

PROMPT = [20, 30, 40, 50, 60, 321, 324]
IDS = torch.tensor([PROMPT])
PADDED = torch.tensor([PROMPT, [3, 3, 3, 70, 80, 321, 324]])
NEW = 5
GREEDY = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 3}
STATES = {"output_hidden_states": True, "output_attentions": True, "return_dict_in_generate": True}
# Assisted decoding of transformers 4 needs an end token; the random checkpoint never draws this one.
ASSISTED = {**GREEDY, "eos_token_id": 0}


def by_hand(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, output_hidden_states=True, output_attentions=True, **kwargs)


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def check_states(output, whole, prompt, rows=slice(None), heads=None):
    """Check that each step's states are rows of one forward over the finished sequences."""
    heads = slice(None) if heads is None else heads
    prefix = whole.attentions[0].shape[2] - whole.attentions[0].shape[1]
    assert len(output.hidden_states) == len(output.attentions) == NEW
    for step in range(NEW):
        start, end = (0, prompt) if step == 0 else (prompt + step - 1, prompt + step)
        for got, expected in zip(output.hidden_states[step], whole.hidden_states, strict=True):
            close(got[:, rows], expected[start:end, rows])
        for got, expected in zip(output.attentions[step], whole.attentions, strict=True):
            close(got[heads], expected[heads, start:end, : end + prefix])


@pytest.mark.parametrize("search", ["greedy", "sampling", "prompt lookup", "assistant", "no cache"])
def test_states_of_each_step_equal_one_forward(tiny_model, search):
    settings = {
        "greedy": GREEDY,
        "sampling": {**GREEDY, "do_sample": True},
        "prompt lookup": {**ASSISTED, "prompt_lookup_num_tokens": 3},
        "assistant": {**ASSISTED, "assistant_model": copy.deepcopy(tiny_model)},
        "no cache": {**GREEDY, "use_cache": False},
    }[search]
    output = tiny_model.generate(IDS, **settings, **STATES)
    whole = by_hand(tiny_model, output.sequences[:, :-1])
    if search == "no cache":
        lengths = [one[0].shape[0] for one in output.hidden_states]
        assert lengths == [len(PROMPT) + step for step in range(NEW)]
        close(output.hidden_states[-1][-1], whole.hidden_states[-1])
        close(output.attentions[-1][0], whole.attentions[0])
    else:
        check_states(output, whole, len(PROMPT))
    assert output.sequences.shape == (1, len(PROMPT) + NEW)


def test_states_in_a_generation_config_and_beside_a_prefix(load_tuned):
    model = load_tuned(0)
    config = GenerationConfig(**GREEDY, **STATES)
    output = model.generate(IDS, generation_config=config)
    check_states(output, by_hand(model, output.sequences[:, :-1]), len(PROMPT))
    assert output.attentions[0][0].shape == (4, len(PROMPT), len(PROMPT) + model.config.pre_seq_len)


def test_states_of_a_padded_batch(tiny_model):
    mask = (PADDED != 3).long()
    output = tiny_model.generate(PADDED, attention_mask=mask, **GREEDY, **STATES)
    whole = by_hand(tiny_model, output.sequences[:, :-1])
    check_states(output, whole, len(PROMPT), rows=slice(0, 1), heads=slice(0, 4))
    # Only real rows are compared: what pads attend to does not count.
    for step in range(1, NEW):
        close(output.hidden_states[step][-1], whole.hidden_states[-1][len(PROMPT) + step - 1 : len(PROMPT) + step])


def test_states_of_beams(tiny_model):
    """``beam_indices`` name the rows of earlier steps that the best sequence went through."""
    output = tiny_model.generate(IDS, **GREEDY, **STATES, num_beams=3, output_scores=True)
    path = output.beam_indices[0].tolist()
    assert len(path) == NEW and [one[-1].shape[:2] for one in output.hidden_states] == [(7, 3), *[(1, 3)] * (NEW - 1)]
    whole = by_hand(tiny_model, output.sequences[:, :-1])
    for step in range(1, NEW):
        row = path[step]
        at = len(PROMPT) + step - 1
        close(output.hidden_states[step][-1][0, row], whole.hidden_states[-1][at, 0])
        close(output.attentions[step][0][4 * row : 4 * row + 4], whole.attentions[0][:, at : at + 1, : at + 1])


def test_states_equal_stocks(tiny_model, golden_tensors):
    golden = golden_tensors("hidden_attn")
    output = tiny_model.generate(golden["single.input_ids"], **{**GREEDY, "max_new_tokens": 1}, **STATES)
    for layer in range(4):
        torch.testing.assert_close(
            output.hidden_states[0][layer], golden[f"single.hidden_states.{layer}"], rtol=0, atol=1e-3
        )
    for layer in range(3):
        torch.testing.assert_close(output.attentions[0][layer], golden[f"single.attentions.{layer}"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("search", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}])
@pytest.mark.parametrize("in_config", [False, True])
def test_scores_and_logits(tiny_model, search, in_config):
    asked = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    settings = {**ASSISTED, **asked, **search, "repetition_penalty": 1.3}
    given = {"generation_config": GenerationConfig(**settings)} if in_config else settings
    output = tiny_model.generate(IDS, **given)
    assert len(output.scores) == len(output.logits) == NEW
    with torch.no_grad():
        logits = tiny_model(output.sequences[:, :-1]).logits[0, len(PROMPT) - 1 :]
    close(output.logits[0][0], logits[0])
    if not search.get("num_beams"):
        close(torch.cat(output.logits), logits)
        penalty = logits_process.RepetitionPenaltyLogitsProcessor(1.3)
        for step in range(NEW):
            close(output.scores[step], penalty(output.sequences[:, : len(PROMPT) + step], logits[step : step + 1]))
        assert [int(one.argmax()) for one in output.scores] == output.sequences[0, len(PROMPT) :].tolist()


def test_states_without_a_dict_change_nothing(tiny_model):
    expected = tiny_model.generate(IDS, **GREEDY).tolist()
    asked = {"output_hidden_states": True, "output_attentions": True}
    assert tiny_model.generate(IDS, **GREEDY, **asked).tolist() == expected
    reasons = faster_chatglm_6b.status().plain_generations
    assert not [reason for reason in reasons if "output_hidden_states" in reason]
    assert [int(token) for token in tiny_model.stream_tokens(IDS, **GREEDY, **asked)] == expected[0][len(PROMPT) :]


def test_states_with_embeddings_are_those_of_the_embeddings(tiny_model):
    """States follow the caller's embeddings; assisted decoding is refused, because drafts have none."""
    embeds = torch.zeros(1, len(PROMPT), 128)
    output = tiny_model.generate(input_ids=IDS, inputs_embeds=embeds, **GREEDY, **STATES)
    close(output.hidden_states[0][0], embeds.transpose(0, 1))
    with pytest.raises(ValueError, match="for which inputs_embeds hold no draft"):
        tiny_model.generate(input_ids=IDS, inputs_embeds=embeds, **ASSISTED, prompt_lookup_num_tokens=3)


def guided_by_hand(model, ids, negative, scale, tokens):
    """Compute greedy tokens from the definition, without any cache; one row, negative [1, N]."""
    answer, found = ids[:, :0], []
    for _ in range(tokens):
        with torch.no_grad():
            mine, other = (
                torch.log_softmax(model(torch.cat((begin, answer), dim=1)).logits[:, -1], dim=-1)
                for begin in (ids, negative)
            )
        found.append(scale * mine + (1 - scale) * other)
        answer = torch.cat((answer, found[-1].argmax(dim=-1, keepdim=True)), dim=1)
    return answer, torch.cat(found)


NEGATIVE = torch.tensor([[90, 100, 110, 321, 324]])


@pytest.mark.parametrize("negative", [None, NEGATIVE])
@pytest.mark.parametrize("use_cache", [True, False])
def test_guidance_equals_its_definition(tiny_model, negative, use_cache):
    other = torch.tensor([[321, 324]]) if negative is None else negative
    expected, scores = guided_by_hand(tiny_model, IDS, other, 1.7, NEW)
    plain = tiny_model.generate(IDS, **GREEDY)
    settings = {**GREEDY, "guidance_scale": 1.7, "negative_prompt_ids": negative, "use_cache": use_cache}
    output = tiny_model.generate(IDS, **settings, output_scores=True, return_dict_in_generate=True)
    close(torch.cat(output.scores), scores)
    assert output.sequences[:, len(PROMPT) :].tolist() == expected.tolist() != plain[:, len(PROMPT) :].tolist()


def test_guidance_of_batches_beams_drafts_and_streams(tiny_model):
    settings = {**GREEDY, "guidance_scale": 1.7}
    for ids, negative in (
        (PADDED, None),
        (PADDED, NEGATIVE),
        (PADDED, torch.tensor([[90, 91, 321, 324], [3, 7, 321, 324]])),
    ):
        rows = tiny_model.generate(ids, **settings, negative_prompt_ids=negative)
        for index, row in enumerate(rows):
            alone = ids[index][ids[index] != 3][None]
            other = torch.tensor([[321, 324]]) if negative is None else negative[index % len(negative)]
            other = other[other != 3].view(1, -1)
            expected, _ = guided_by_hand(tiny_model, alone, other, 1.7, NEW)
            assert row[len(PROMPT) :].tolist() == expected[0].tolist()
    alone = tiny_model.generate(IDS, **settings).tolist()
    assert [int(token) for token in tiny_model.stream_tokens(IDS, **settings)] == alone[0][len(PROMPT) :]
    drafted = tiny_model.generate(IDS, **{**settings, "eos_token_id": 0}, prompt_lookup_num_tokens=3)
    assert drafted.tolist() == alone
    beams = {**settings, "num_beams": 3, "num_return_sequences": 2}
    assert tiny_model.generate(IDS, **beams).tolist() == tiny_model.generate(IDS, **beams, use_cache=False).tolist()


def test_guidance_of_an_answer_that_has_begun(tiny_model):
    """Without a negative prompt, guidance leaves out the context and keeps the whole answer."""
    begun = torch.tensor([[*PROMPT, 36, 158], [3, 70, 80, 320, 90, 324, 40, 41, 42]])
    rows = tiny_model.generate(begun, **GREEDY, guidance_scale=1.7)
    for row, other in zip(rows, ([321, 324, 36, 158], [320, 324, 40, 41, 42]), strict=True):
        alone = row[: begun.shape[1]]
        alone = alone[int(alone[0] == 3) :][None]
        expected, _ = guided_by_hand(tiny_model, alone, torch.tensor([other]), 1.7, NEW)
        assert row[begun.shape[1] :].tolist() == expected[0].tolist()


def test_guidance_of_the_callers_own_processor_and_in_chat(tiny_model, tiny_tokenizer):
    theirs = logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor(1.7, tiny_model, NEGATIVE)
    expected = tiny_model.generate(IDS, **GREEDY, guidance_scale=1.7, negative_prompt_ids=NEGATIVE).tolist()
    assert tiny_model.generate(IDS, **GREEDY, logits_processor=[theirs]).tolist() == expected
    settings = {"do_sample": False, "max_new_tokens": 8, "guidance_scale": 3.0}
    response, _ = tiny_model.chat(tiny_tokenizer, "你好", **settings)
    *_, (streamed, _) = tiny_model.stream_chat(tiny_tokenizer, "你好", **settings)
    assert response == streamed != tiny_model.chat(tiny_tokenizer, "你好", do_sample=False, max_new_tokens=8)[0]


@pytest.mark.parametrize(
    ("negative", "message"),
    [
        (torch.tensor([[7, 8]]), "neither"),
        (torch.tensor([[7, 321]]), "no <sop>"),
        (NEGATIVE.repeat(3, 1), "3 negative prompts, but 1 prompts; pass one, or one for each"),
        (NEGATIVE.float(), "input_ids are torch.float32"),
    ],
)
def test_negative_prompts_that_are_none(tiny_model, negative, message):
    with pytest.raises(ValueError, match=message):
        tiny_model.generate(IDS, **GREEDY, guidance_scale=1.7, negative_prompt_ids=negative)


def test_guidance_of_another_model_is_left_alone(tiny_model):
    other = copy.deepcopy(tiny_model)
    theirs = logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor(1.0, other)
    found = tiny_model._get_logits_processor(GenerationConfig(), 7, IDS, None, [theirs], device="cpu", model_kwargs={})
    assert theirs in found and not [one for one in found if isinstance(one, PrefixGuidanceLogitsProcessor)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search compares hidden states"),
        ({"dola_layers": "low"}, "DoLa reads hidden states"),
        ({"token_healing": True}, "nothing to heal"),
        ({"use_mtp": True}, "no heads that predict several tokens"),
        # transformers 4 itself refuses this cache as unknown.
        ({"cache_implementation": "paged"}, "Continuous batching|Invalid `cache_implementation` .paged."),
    ],
)
@pytest.mark.parametrize("place", ["argument", "config", "checkpoint"])
def test_searches_that_cannot_follow_are_refused(tiny_model, settings, message, place):
    missing = [name for name in settings if not hasattr(GenerationConfig(), name)]
    if missing:
        pytest.skip(f"transformers {transformers.__version__} has no {missing[0]}")
    config = GenerationConfig(**GREEDY)
    vars(config).update(settings)
    if place == "checkpoint":
        tiny_model = copy.deepcopy(tiny_model)
        vars(tiny_model.generation_config).update(settings)
    given = {"argument": {**GREEDY, **settings}, "config": {"generation_config": config}, "checkpoint": GREEDY}[place]
    with pytest.raises(ValueError, match=message):
        tiny_model.generate(IDS, **given)


def test_continuous_batching_is_refused_by_each_of_its_names(tiny_model):
    calls = [name for name in ("generate_batch", "init_continuous_batching") if hasattr(tiny_model, name)]
    for name in calls:
        with pytest.raises(ValueError, match=r"call generate\(\) with a padded batch, or chat_batch\(\)"):
            getattr(tiny_model, name)([PROMPT], generation_config=GenerationConfig(max_new_tokens=2))
    assert calls


@pytest.mark.parametrize(
    "settings",
    [
        {"prefill_chunk_size": 2},
        {"cache_implementation": "static"},
        {"cache_implementation": "offloaded_static"},
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "offloaded"},
    ],
)
@pytest.mark.parametrize("place", ["argument", "config", "checkpoint"])
def test_settings_for_speed_or_memory_change_no_token(tiny_model, settings, place):
    expected = tiny_model.generate(IDS, **GREEDY).tolist()
    config = GenerationConfig(**GREEDY)
    vars(config).update(settings)
    if place == "checkpoint":
        tiny_model = copy.deepcopy(tiny_model)
        vars(tiny_model.generation_config).update(settings)
    before = copy.deepcopy(tiny_model.generation_config).to_dict()
    given = {"argument": {**GREEDY, **settings}, "config": {"generation_config": config}, "checkpoint": GREEDY}[place]
    assert tiny_model.generate(IDS, **given).tolist() == expected
    assert tiny_model.generation_config.to_dict() == before


CHECKPOINT_SETTINGS = [
    {"cache_implementation": "static"},
    {"prefill_chunk_size": 2},
    {"guidance_scale": 1.7},
    {"return_dict_in_generate": True},
    {"num_beams": 3},
    {"return_dict_in_generate": True, "output_hidden_states": True, "output_scores": True},
]


@pytest.mark.parametrize("settings", CHECKPOINT_SETTINGS, ids=str)
def test_a_checkpoints_settings_act_as_arguments(tiny_model, tiny_dir, tmp_path, settings):
    folder = shutil.copytree(tiny_dir, tmp_path / "checkpoint")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 325, "pad_token_id": 3, **settings}))
    model = ChatGLMForConditionalGeneration.from_pretrained(folder).float().eval()
    by_argument = tiny_model.generate(IDS, do_sample=False, max_new_tokens=NEW, **settings)
    by_file = model.generate(IDS, do_sample=False, max_new_tokens=NEW)
    assert type(by_file) is type(by_argument)
    if isinstance(by_file, torch.Tensor):
        assert by_file.tolist() == by_argument.tolist()
    else:
        assert by_file.sequences.tolist() == by_argument.sequences.tolist() and list(by_file) == list(by_argument)


def test_a_decoding_function_of_the_callers_own(tiny_model):
    if "custom_generate" not in inspect.signature(transformers.GenerationMixin.generate).parameters:
        pytest.skip(f"transformers {transformers.__version__} takes no decoding loop of the caller's own")

    def twice(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        return torch.cat((input_ids, input_ids), dim=1)

    assert tiny_model.generate(IDS, custom_generate=twice, **GREEDY).tolist() == [PROMPT * 2]
    own = tiny_model.generate(IDS, custom_generate=transformers.GenerationMixin._sample, **GREEDY)
    assert own.tolist() == tiny_model.generate(IDS, **GREEDY).tolist()


def test_models_of_two_classes_draft_for_each_other(tiny_model):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    other = LlamaForCausalLM(LlamaConfig(vocab_size=704, **sizes, bos_token_id=None, eos_token_id=None)).eval()
    for main, assistant in ((other, copy.deepcopy(tiny_model)), (tiny_model, other)):
        expected = main.generate(IDS, **ASSISTED).tolist()
        assert main.generate(IDS, **ASSISTED, assistant_model=assistant).tolist() == expected
