"""The logits processor that chat adds to transformers' own."""

import torch
from transformers.generation.logits_process import LogitsProcessor


class InvalidScoreLogitsProcessor(LogitsProcessor):
    """Makes a row whose logits overflowed (NaN or +inf) say a blank instead of failing.

    Unlike stock's, it looks at each row alone and takes -inf for what it is: a token that another processor forbade.
    """

    score = 5e4

    def __init__(self, token_id: int = 5):
        """Take the id of the blank: 5, and 20005 where image tokens come first (150528 ids)."""
        self.token_id = token_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores [B, vocab_size] with invalid rows replaced."""
        invalid = (scores.isnan() | (scores == torch.inf)).any(dim=-1, keepdim=True)
        certain = torch.zeros_like(scores)
        certain[:, self.token_id] = self.score
        return torch.where(invalid, certain, scores)
