"""Compute hidden states and attentions of assisted decoding.

transformers cuts them out of forwards of several tokens: along the wrong axis for stock's layouts, and at the first
step from the wrong rows. One forward over the finished sequence gives the same values, because no row of a prefix LM
sees a later answer.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

_FLAGS = ("output_hidden_states", "output_attentions")


def take_states(arguments: dict[str, Any]) -> tuple[str, ...]:
    """Remove the flags that ask for states from the arguments of a search, and return their names."""
    for name in _FLAGS:
        arguments.pop(name, None)
    config = arguments["generation_config"]
    asked = tuple(name for name in _FLAGS if getattr(config, name))
    if asked:
        arguments["generation_config"] = config = copy.copy(config)
        for name in asked:
            setattr(config, name, False)
    return asked if config.return_dict_in_generate else ()


def with_states(model: Any, output: Any, prompt: int, asked: tuple[str, ...], arguments: dict[str, Any]) -> Any:
    """Add states to the output of a search for one sequence, as the other searches give them.

    The first are those of the prompt, of ``prompt`` tokens, and the others those of each token that was read.
    """
    ids = output.sequences[:, :-1]
    mask = arguments.get("attention_mask")
    if mask is not None:
        mask = torch.cat((mask, mask.new_ones(mask.shape[0], ids.shape[1] - mask.shape[1])), dim=1)
    inputs = model.prepare_inputs_for_generation(
        ids,
        attention_mask=mask,
        prompt_position_ids=arguments.get("prompt_position_ids"),
        use_cache=False,
        logits_to_keep=1,
        **dict.fromkeys(asked, True),
    )
    with torch.no_grad():
        outputs = model(**inputs, return_dict=True)
    ends = [(0, prompt), *((end - 1, end) for end in range(prompt + 1, ids.shape[1] + 1))]
    if "output_hidden_states" in asked:
        output.hidden_states = tuple(tuple(one[a:b] for one in outputs.hidden_states) for a, b in ends)
    if "output_attentions" in asked:
        output.attentions = tuple(tuple(one[:, a:b, :b] for one in outputs.attentions) for a, b in ends)
    return output
