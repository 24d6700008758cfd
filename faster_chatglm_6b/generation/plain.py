"""Generate token by token with the model's own forward, for what the captured loop does not serve."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..ops.caches import CACHE_NAME, take_cache
from .reading import pad_token


def plain_tokens(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any,
    model_kwargs: dict[str, Any],
) -> Iterator[torch.Tensor]:
    """Yield the next tokens, int64 [B] on the CPU, until every row has ended.

    Arguments are those of transformers' ``_sample``. Rows that ended yield the pad id. transformers' own loop gives the
    same tokens with the same seed.
    """
    generator = _on_device(model_kwargs.get("generator"), input_ids.device)
    pad = pad_token(generation_config)
    finished = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    cache = take_cache(model_kwargs)
    while not bool(finished.all()):
        # Entered for each token: held over a yield, it would switch the caller's autograd off.
        with torch.no_grad():
            inputs = model.prepare_inputs_for_generation(input_ids, past_key_values=cache, **model_kwargs)
            outputs = model(**inputs, return_dict=True)
            if getattr(outputs, CACHE_NAME) is not None:
                cache = getattr(outputs, CACHE_NAME)
            mask = model_kwargs.get("attention_mask")
            if mask is not None:
                model_kwargs["attention_mask"] = torch.cat((mask, mask.new_ones(mask.shape[0], 1)), dim=1)
            scores = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=input_ids.device)
            scores = logits_processor(input_ids, scores)
            if generation_config.do_sample:
                tokens = torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1, generator=generator).squeeze(1)
            else:
                tokens = scores.argmax(dim=-1)
            if pad is not None:
                tokens = torch.where(finished, pad.to(tokens.device), tokens)
            input_ids = torch.cat((input_ids, tokens[:, None]), dim=1)
            finished = finished | stopping_criteria(input_ids, None)
        if streamer is not None:
            streamer.put(tokens.cpu())
        yield tokens.cpu()
    if streamer is not None:
        streamer.end()


def _on_device(generator: torch.Generator | None, device: torch.device) -> torch.Generator | None:
    """Return the generator, or one seeded from it if it lives on another device than the scores."""
    if generator is None or generator.device.type == device.type:
        return generator
    seed = torch.randint(2**62, (1,), generator=generator, device=generator.device)
    return torch.Generator(device).manual_seed(int(seed))
