"""``generate`` against the ids of the stock code."""

import pytest
import torch

from faster_chatglm_6b.network.prompt_layout import PromptLayout


@pytest.fixture(scope="module")
def cases(golden_json):
    return {case["name"]: case for case in golden_json("generate")["cases"]}


def arguments(case, config):
    """Return stock's arguments: ids, and for padded calls the tokenizer's 4-D mask and positions."""
    input_ids = torch.tensor(case["prompt_ids"])
    if "attention_mask" not in case["inputs"]:
        return {"input_ids": input_ids}
    layout, length = PromptLayout.of(input_ids, config), input_ids.shape[1]
    hidden, position_ids = layout.hidden(0, length), layout.position_ids(0, length)
    assert (
        list(hidden.shape) == case["inputs"]["attention_mask"]
        and list(position_ids.shape) == case["inputs"]["position_ids"]
    )
    return {"input_ids": input_ids, "attention_mask": hidden, "position_ids": position_ids}


def names(cases, *prefixes):
    found = [name for name in cases if name.startswith(prefixes)]
    assert found
    return found


def test_greedy_and_processors(tiny_model, cases):
    for name in names(
        cases, "greedy|", "reppen", "ngram", "max_new_tokens", "nocache", "batch_greedy", "batch_reppen", "single"
    ):
        case = cases[name]
        output = tiny_model.generate(**arguments(case, tiny_model.config), **case["kwargs"])
        assert output.tolist() == case["output_ids"], name


def test_min_length_goes_on_with_the_best_allowed_token(tiny_model, cases):
    """``min_length`` gives stock's ids; only stock's chat takes its -inf for an overflow."""
    for name in names(cases, "min_length"):
        case = cases[name]
        assert (
            tiny_model.generate(**arguments(case, tiny_model.config), **case["kwargs"]).tolist() == case["output_ids"]
        ), name


def reference_beams(model, input_ids, num_beams, max_length, layout_mask=None):
    """Search beams over whole sequences, with transformers' scores since 4.36.

    Finished beams are scored by their generated tokens alone, ``<eop>`` among them. One row, without processors;
    ``early_stopping`` is False, ``length_penalty`` 1.

    Returns:
        The sequences from best to worst.
    """
    eos, prompt = model.config.eos_token_id, input_ids.shape[1]
    beams, finished = [(0.0, input_ids[0].tolist())], []
    for length in range(prompt + 1, max_length + 1):
        with torch.no_grad():
            logits = model(torch.tensor([ids for _, ids in beams])).logits[:, -1]
        scores = torch.log_softmax(logits, dim=-1) + torch.tensor([score for score, _ in beams])[:, None]
        best = scores.flatten().topk(2 * num_beams)
        candidates = [
            (float(score), [*beams[int(i) // logits.shape[1]][1], int(i) % logits.shape[1]])
            for score, i in zip(best.values, best.indices, strict=True)
        ]
        # Only candidates among the first num_beams may finish.
        finished += [
            (score / (length - prompt), ids)
            for score, ids in candidates[:num_beams]
            if ids[-1] == eos or length == max_length
        ]
        finished = sorted(finished, reverse=True, key=lambda item: item[0])[:num_beams]
        beams = [(score, ids) for score, ids in candidates if ids[-1] != eos][:num_beams]
        if len(finished) == num_beams and beams[0][0] / (length - prompt) <= finished[-1][0]:
            break
    return [ids for _, ids in finished]


def test_beams(tiny_model, cases):
    """Beams equal our own uncached loop, and stock's ids if no beam ended early.

    transformers scores ended beams without the prompt since 4.36, so stock's ids differ there.
    """
    equal_to_stock = 0
    for name in names(cases, "beam3|"):
        case = cases[name]
        input_ids = arguments(case, tiny_model.config)["input_ids"]
        output = tiny_model.generate(input_ids, **case["kwargs"]).tolist()
        reference = reference_beams(tiny_model, input_ids, 3, case["kwargs"]["max_length"])
        assert [token for token in output[0] if token != 3] == [token for token in reference[0] if token != 3], name
        equal_to_stock += output == case["output_ids"]
    assert equal_to_stock >= 3


def test_beams_with_several_results(tiny_model, cases):
    for name in names(cases, "beam3_ret3"):
        case = cases[name]
        input_ids = arguments(case, tiny_model.config)["input_ids"]
        output = tiny_model.generate(input_ids, **case["kwargs"]).tolist()
        reference = reference_beams(tiny_model, input_ids, 3, case["kwargs"]["max_length"])
        assert [[t for t in row if t != 3] for row in output] == reference, name


def test_beams_over_a_padded_batch_equal_the_single_rows(tiny_model, cases):
    case = cases["batch_beam3"]
    inputs = arguments(case, tiny_model.config)
    output = tiny_model.generate(**inputs, **case["kwargs"])
    layout = PromptLayout.of(inputs["input_ids"], tiny_model.config)
    for row, (ids, first) in enumerate(zip(inputs["input_ids"], layout.first_slot.tolist(), strict=True)):
        kwargs = {**case["kwargs"], "max_length": case["kwargs"]["max_length"] - first}
        single = tiny_model.generate(ids[None, first:], **kwargs)[0].tolist()
        mine = output[row, first:].tolist()
        assert [t for t in mine if t != 3] == [t for t in single if t != 3], row


def test_masks_and_positions(tiny_model, golden_json):
    """Masks and positions equal stock's, but a run of pad ids at the start is padding even without a mask."""
    for case in golden_json("masks_positions")["cases"]:
        input_ids = torch.tensor(case["input_ids"])
        if "error" in case:
            with pytest.raises(ValueError, match="<sop>|MASK"):
                PromptLayout.of(input_ids, tiny_model.config)
            continue
        mask = torch.ones_like(input_ids) if case["name"] == "left_padded_batch" else None
        layout = PromptLayout.of(input_ids, tiny_model.config, mask)
        length = input_ids.shape[1]
        assert layout.hidden(0, length)[:, 0].int().tolist() == case["attention_mask"], case["name"]
        assert layout.mask_position.tolist() == case["mask_positions"], case["name"]
        assert layout.has_gmask.tolist() == case["use_gmasks"], case["name"]
        assert layout.position_ids(0, length).tolist() == case["position_ids_2d"], case["name"]
        assert layout.position_ids(0, length, two_dimensional=False).tolist() == case["position_ids_1d"], case["name"]
    unmasked = PromptLayout.of(torch.tensor([[3, 3, 10, 321, 324]]), tiny_model.config)
    assert unmasked.position_ids(0, 5).tolist() == [[[0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]]
    assert unmasked.hidden(0, 5)[0, 0, -1].tolist() == [True, True, False, False, False]


@pytest.mark.parametrize("form", ["stock", "2-D", "ids alone"])
def test_a_padded_row_equals_its_single_run(tiny_model, golden_tensors, form):
    """A 2-D mask and pads without a mask are honoured, both of which stock ignores."""
    batch = golden_tensors("batch")
    input_ids = batch["input_ids"]
    inputs = {"input_ids": input_ids}
    if form == "stock":
        inputs |= {"attention_mask": batch["attention_mask"], "position_ids": batch["position_ids"]}
    elif form == "2-D":
        inputs["attention_mask"] = (input_ids != 3).long()
    output = tiny_model.generate(**inputs, do_sample=False, max_new_tokens=8)
    assert output.tolist() == batch["generate_ids"].tolist()
    for row, ids in enumerate(input_ids):
        real = ids[ids != 3][None]
        single = tiny_model.generate(real, do_sample=False, max_new_tokens=8)[0, real.shape[1] :].tolist()
        mine = output[row, input_ids.shape[1] :].tolist()
        assert mine[: len(single)] == single and set(mine[len(single) :]) <= {3}


def test_padded_and_unpadded_calls_agree_about_the_mask_token(tiny_model, tiny_tokenizer, cases):
    """Both calls agree; in stock they differ, for its tokenizer prefers ``[MASK]`` and its model ``[gMASK]``."""
    stock = [
        cases[f"text_with_special_{form}|北京是[MASK]的首都"]["output_ids"] for form in ("unpadded", "padded_call")
    ]
    assert stock[0] != stock[1]
    for name in names(cases, "text_with_special_"):
        case, text = cases[name], name.split("|")[1]
        inputs = tiny_tokenizer([text], return_tensors="pt", padding="padded_call" in name)
        assert inputs["input_ids"].tolist() == case["prompt_ids"], name
        expected = cases[f"text_with_special_unpadded|{text}"]["output_ids"]
        assert tiny_model.generate(**inputs, **case["kwargs"]).tolist() == expected, name


def test_other_modes(tiny_model, cases):
    """Lookup, static cache, dicts, several sequences, streamers, criteria and processors keep stock's ids."""
    from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
    from transformers.generation.streamers import BaseStreamer

    case = cases["greedy|你好"]
    input_ids, expected = arguments(case, tiny_model.config)["input_ids"], case["output_ids"]
    greedy = {"do_sample": False, "max_length": case["kwargs"]["max_length"]}
    assert tiny_model.generate(input_ids, **greedy, prompt_lookup_num_tokens=3).tolist() == expected
    assert tiny_model.generate(input_ids, **greedy, cache_implementation="static").tolist() == expected
    output = tiny_model.generate(
        input_ids,
        **greedy,
        return_dict_in_generate=True,
        output_scores=True,
        output_attentions=True,
        output_hidden_states=True,
    )
    assert output.sequences.tolist() == expected
    new = len(expected[0]) - input_ids.shape[1]
    assert len(output.scores) == len(output.hidden_states) == len(output.attentions) == new
    torch.manual_seed(0)
    several = tiny_model.generate(input_ids, do_sample=True, num_return_sequences=3, max_length=10)
    assert several.shape[0] == 3 and several[:, : input_ids.shape[1]].tolist() == input_ids.tolist() * 3

    class Streamer(BaseStreamer):
        def __init__(self):
            self.ids, self.ended = [], False

        def put(self, value):
            self.ids += value.flatten().tolist()

        def end(self):
            self.ended = True

    streamer = Streamer()
    tiny_model.generate(input_ids, **greedy, streamer=streamer)
    assert streamer.ids == expected[0] and streamer.ended

    class AfterFive(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= case_length + 5)

    case_length = input_ids.shape[1]
    stopped = tiny_model.generate(input_ids, **greedy, stopping_criteria=StoppingCriteriaList([AfterFive()]))
    assert stopped.tolist() == [expected[0][: case_length + 5]]

    class Forbid(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[:, expected[0][case_length]] = -torch.inf
            return scores

    other = tiny_model.generate(input_ids, **greedy, logits_processor=LogitsProcessorList([Forbid()]))
    assert expected[0][case_length] not in other[0, case_length:].tolist()


def test_given_position_ids_are_followed(tiny_model, golden_tensors):
    """Positions that differ from the derived ones shift the answer's positions too, as in stock."""
    input_ids = golden_tensors("decode")["gmask_n07.prompt_ids"][None]
    layout = PromptLayout.of(input_ids, tiny_model.config)
    shifted = layout.position_ids(0, 9) + torch.tensor([[5], [0]])
    output = tiny_model.generate(input_ids, position_ids=shifted, do_sample=False, max_new_tokens=6, eos_token_id=None)
    ids = input_ids
    for step in range(6):
        position_ids = layout.position_ids(0, 9 + step) + torch.tensor([[5], [0]])
        with torch.no_grad():
            logits = tiny_model(ids, position_ids=position_ids).logits[:, -1]
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), dim=1)
    assert output.tolist() == ids.tolist()


def test_inputs_embeds(tiny_model, cases):
    case = cases["greedy|你好"]
    input_ids = arguments(case, tiny_model.config)["input_ids"]
    embeds = tiny_model.get_input_embeddings()(input_ids).detach()
    output = tiny_model.generate(
        input_ids, inputs_embeds=embeds, do_sample=False, max_length=case["kwargs"]["max_length"]
    )
    assert output.tolist() == case["output_ids"]
    with torch.no_grad():
        with_both = tiny_model(input_ids, inputs_embeds=embeds).logits
        torch.testing.assert_close(with_both, tiny_model(input_ids).logits)
    with pytest.raises(ValueError, match="inputs_embeds alone"):
        tiny_model(inputs_embeds=embeds)
