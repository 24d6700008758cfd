"""Checks of the sampling kernels against transformers' processors, shared by the interpreter's and the GPU's tests."""

import torch
from transformers.generation.logits_process import (
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from faster_chatglm_6b.ops import triton as kernels
from faster_chatglm_6b.ops.cpu import steps as cpu_kernels
from faster_chatglm_6b.ops.triton.sampling import threshold

PAD = 3
EOS = 7


def make_state(device: str, batch: int, length: int = 4, capacity: int = 12, seed: int = 1) -> kernels.DecodeState:
    def counter(value: int) -> torch.Tensor:
        return torch.full((batch,), value, dtype=torch.int32, device=device)

    return kernels.DecodeState(
        tokens=torch.full((batch,), -5, device=device),
        finished=torch.zeros(batch, dtype=torch.int32, device=device),
        ids=torch.full((batch, capacity), -7, device=device),
        ids_length=counter(length),
        cache_length=counter(length - 1),
        step=counter(0),
        limit=counter(2**31 - 1),
        eos_ids=torch.tensor([EOS, -1, EOS + 1], device=device).repeat(batch, 1),
        seed=torch.full((batch,), seed, device=device),
        lane=torch.arange(batch, dtype=torch.int32, device=device),
        ring=torch.full((3, batch), -1, device=device),
        turn=counter(0)[:1].clone(),
        pad_id=torch.tensor([PAD], device=device),
    )


def make_workspace(device: str, batch: int, vocab: int) -> kernels.Workspace:
    workspace = kernels.Workspace(device, batch, 2, 32, vocab)
    workspace.candidates.fill_(2**62)
    workspace.maxima.fill_(2**31 - 1)
    workspace.chunk_sums.fill_(float("nan"))
    workspace.histogram.fill_(2**62)
    workspace.thresholds.fill_(2**62)
    return workspace


def values(batch: int, number: float, dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.full((batch,), number, dtype=dtype, device=device)


def check_greedy(device: str, dtype: torch.dtype, batch: int, vocab: int) -> None:
    """Check tokens and all the bookkeeping over five steps, beyond the ring's size and the history's end."""
    state = make_state(device, batch, length=4, capacity=7)
    workspace = make_workspace(device, batch, vocab)
    finished = torch.zeros(batch, dtype=torch.bool, device=device)
    for step in range(5):
        scores = torch.randn(batch, vocab, device=device).to(dtype)
        best = torch.randint(10, vocab, (batch,), device=device)
        scores.scatter_(1, best[:, None], 30.0)
        # A tie with a later index must not win.
        scores[:, -1] = 30.0
        if step == 1:
            best[0] = EOS
            scores[0, EOS] = 31.0
        if step == 2 and batch > 1:
            best[1] = EOS + 1
            scores[1, EOS + 1] = float("inf")
        expected = torch.where(finished, PAD, best)
        kernels.greedy_sample(scores, state, workspace=workspace)
        finished |= (expected == EOS) | (expected == EOS + 1)
        assert torch.equal(state.tokens, expected)
        assert torch.equal(state.finished.bool(), finished)
        assert torch.equal(state.ring[step % 3], expected)
        counters = [set(c.tolist()) for c in (state.ids_length, state.cache_length, state.step, state.turn)]
        assert counters == [{5 + step}, {4 + step}, {1 + step}, {1 + step}]
        if 4 + step < 7:
            assert torch.equal(state.ids[:, 4 + step], expected)
    assert (state.ids[:, :4] == -7).all()
    assert not workspace.counters.any()


def check_invalid_rule(device: str, dtype: torch.dtype, vocab: int) -> None:
    """Check that rows with NaN or +inf give token 5 or the one asked for, and that all other rows do not."""
    batch = 4
    scores = torch.randn(batch, vocab, device=device).to(dtype)
    scores[0, vocab // 2] = float("nan")
    scores[1, vocab - 1] = float("inf")
    scores[2, : vocab // 2] = float("-inf")
    scores[2, vocab - 2] = scores[3, vocab - 3] = 60.0
    one = values(batch, 1.0, torch.float32, device)
    k = values(batch, 2, torch.int32, device)
    workspace = make_workspace(device, batch, vocab)

    def run(sampler, *arguments) -> None:
        for options, token in (({}, 5), ({"invalid_token": vocab // 3}, vocab // 3)):
            state = make_state(device, batch)
            sampler(scores, state, *arguments, invalid_rule=True, workspace=workspace, **options)
            assert state.tokens.tolist() == [token, token, vocab - 2, vocab - 3]

    run(kernels.greedy_sample)
    run(kernels.top_k_sample, one, k, one * 0.9)
    run(kernels.full_sample, one, None, one * 0.9)
    run(kernels.full_sample, one, k, None)


def reference_probabilities(scores: torch.Tensor, temperature: float, top_k: int | None, top_p: float) -> torch.Tensor:
    """Return the softmax of scores [1, V] after transformers' warpers, in float32 as they compute."""
    scores = TemperatureLogitsWarper(temperature)(None, scores.float().cpu())
    if top_k is not None:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1.0:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return scores.softmax(-1)[0].double()


def assert_distribution(counts: torch.Tensor, probabilities: torch.Tensor) -> None:
    """Run a chi-square test at about five standard deviations; outcomes expected less than eight times are merged."""
    draws = int(counts.sum())
    assert not counts[probabilities == 0].any(), "a token outside the kept set was drawn"
    expected = probabilities * draws
    common = expected >= 8
    observed = torch.cat((counts[common].double(), counts[~common].sum().double()[None]))
    expected = torch.cat((expected[common], expected[~common].sum()[None]))
    statistic = ((observed - expected).square() / expected.clamp_min(1e-9))[expected > 0].sum()
    freedom = max(int((expected > 0).sum()) - 1, 1)
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5 + 10, (float(statistic), freedom)


def check_distribution(
    device: str,
    sampler: str,
    dtype: torch.dtype,
    vocab: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    batch: int,
    steps: int,
    spread: float = 2.0,
) -> None:
    """Draw ``batch * steps`` tokens of one distribution and compare them with the warpers' probabilities."""
    generator = torch.Generator().manual_seed(vocab)
    row = (torch.randn(1, vocab, generator=generator) * spread).to(dtype)
    scores = row.to(device).expand(batch, -1).contiguous()
    state = make_state(device, batch, seed=1234567890123)
    state.eos_ids.fill_(-1)
    workspace = make_workspace(device, batch, vocab)
    heat, p = values(batch, temperature, torch.float32, device), values(batch, top_p, torch.float32, device)
    k = None if top_k is None else values(batch, top_k, torch.int32, device)
    counts = torch.zeros(vocab, dtype=torch.long)
    for _ in range(steps):
        if sampler == "top_k":
            kernels.top_k_sample(scores, state, heat, k, p, workspace=workspace)
        else:
            kernels.full_sample(scores, state, heat, k, p if top_p < 1.0 else None, workspace=workspace)
        counts += torch.bincount(state.tokens.cpu(), minlength=vocab)
    assert not workspace.counters.any()
    # transformers' top-p keeps an arbitrary choice of equal scores, so tokens are told apart only by their score.
    probabilities = reference_probabilities(row, temperature, top_k, top_p)
    _, group = row[0].unique(return_inverse=True)
    empty = torch.zeros(int(group.max()) + 1, dtype=torch.double)
    assert_distribution(empty.long().index_add_(0, group, counts), empty.index_add(0, group, probabilities))


def check_ties(device: str, sampler: str, batch: int) -> None:
    """Check that all ties at the k-th value stay, and only as many at the edge of top-p as are needed.

    A small batch shows only that nothing else is drawn; a batch of 32 or more also shows that all of them are.
    """
    vocab = 300
    scores = torch.full((batch, vocab), -20.0, device=device)
    scores[:, 10:20] = 1.0
    state, workspace = make_state(device, batch), make_workspace(device, batch, vocab)
    state.eos_ids.fill_(-1)
    heat = values(batch, 1.0, torch.float32, device)
    seen = set()
    for _ in range(3 if batch < 32 else 6):
        if sampler == "top_k":
            kernels.top_k_sample(scores, state, heat, values(batch, 3, torch.int32, device), heat, workspace=workspace)
        else:
            kernels.full_sample(scores, state, heat, values(batch, 3, torch.int32, device), None, workspace=workspace)
        seen |= set(state.tokens.tolist())
    assert seen <= set(range(10, 20)) and (len(seen) == 10 or batch < 32)
    seen = set()
    p = values(batch, 0.45, torch.float32, device)
    for _ in range(3 if batch < 32 else 6):
        if sampler == "top_k":
            kernels.top_k_sample(scores, state, heat, values(batch, 50, torch.int32, device), p, workspace=workspace)
        else:
            kernels.full_sample(scores, state, heat, None, p, workspace=workspace)
        seen |= set(state.tokens.tolist())
    assert seen <= set(range(10, 15)) and (len(seen) == 5 or batch < 32)


def scores_of(kind: str, batch: int, vocab: int, dtype: torch.dtype) -> torch.Tensor:
    """Return scores [B, V] on a CPU that are easy or hard to tell apart."""
    scores = torch.randn(batch, vocab, generator=torch.Generator().manual_seed(vocab)) * 2
    if kind == "equal":
        scores.fill_(0.5)
    elif kind == "few values":
        scores = scores.round()
    elif kind == "far":
        # All but one are within a ten-thousandth of what separates them from the largest.
        scores /= 1000
        scores[:, vocab // 3] = 40.0
    elif kind == "banned":
        scores[:, ::2] = float("-inf")
    return scores.to(dtype)


def check_thresholds(
    device: str,
    dtype: torch.dtype,
    vocab: int,
    kind: str,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    gathered: int | None = None,
) -> None:
    """Check which scores may be drawn, one by one, against sorting them in float64.

    ``gathered`` limits the scores that share a distance, as if there were many more.
    """
    batch = 3
    scores = scores_of(kind, batch, vocab, dtype)
    state, workspace = make_state(device, batch), make_workspace(device, batch, vocab)
    heat = values(batch, temperature, torch.float32, device)
    k = None if top_k is None else values(batch, top_k, torch.int32, device)
    p = None if top_p is None else values(batch, top_p, torch.float32, device)
    most = threshold.MOST_GATHERED
    threshold.MOST_GATHERED = most if gathered is None else gathered
    try:
        kernels.full_sample(scores.to(device), state, heat, k, p, workspace=workspace)
    finally:
        threshold.MOST_GATHERED = most
    floors, cuts = workspace.thresholds.view(batch, -1)[:, :2].cpu().unbind(1)
    for row in range(batch):
        # The order of ties in a stable sort is that of their indices.
        ordered, index = scores[row].double().sort(descending=True, stable=True)
        bits = (ordered.float() + 0.0).view(torch.int32).long()
        packed = (torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) << 32) | (0xFFFFFFFF - index)
        last_of_k = vocab
        if top_k is not None and top_k < vocab:
            # Whether -inf stays does not matter, as it is never drawn.
            last_of_k = min(int((ordered >= ordered[top_k - 1]).sum()), int(ordered.isfinite().sum()))
            assert int((packed >= floors[row]).sum()) == last_of_k
        mass = (ordered[:last_of_k] / temperature).softmax(0).cumsum(0)
        kept = int((packed >= torch.maximum(floors[row], cuts[row])).sum())
        least, most_kept = 1, last_of_k
        if top_p is not None and top_p < 1.0:
            # Rounding decides where a sum is as large as top_p.
            least = int((mass < top_p - 2e-6).sum()) + 1
            most_kept = min(int((mass < top_p + 2e-6).sum()) + 1, last_of_k)
        else:
            least = last_of_k
        assert least <= kept <= most_kept, (row, least, kept, most_kept)
        place = (index == int(state.tokens[row])).nonzero()
        assert int(place) < kept
    assert not workspace.counters.any()


def check_repeatable(device: str, sampler: str, vocab: int) -> None:
    """Check that the same seed and step give the same tokens, and another seed, step or row gives others."""
    batch = 32
    scores = torch.zeros(batch, vocab, device=device)
    heat, p = values(batch, 1.0, torch.float32, device), values(batch, 1.0, torch.float32, device)
    k = values(batch, 64, torch.int32, device)

    def draw(seed: int) -> list[list[int]]:
        state, workspace = make_state(device, batch, seed=seed), make_workspace(device, batch, vocab)
        state.eos_ids.fill_(-1)
        rows = []
        for _ in range(2):
            if sampler == "top_k":
                kernels.top_k_sample(scores, state, heat, k, p, workspace=workspace)
            else:
                kernels.full_sample(scores, state, heat, None, None, workspace=workspace)
            rows.append(state.tokens.tolist())
        return rows

    first, again, other = draw(11), draw(11), draw(2**40 + 11)
    assert first == again
    assert first[0] != first[1] and first[0] != other[0]
    assert len(set(first[0])) > 5


def check_same_draws(device: str, sampler: str, batch: int, vocab: int) -> None:
    """Check that the kernels of a CPU draw the same tokens from the same scores and states over three steps."""
    draw = torch.Generator().manual_seed(batch)
    scores = torch.randn(3, batch, vocab, generator=draw) * 3
    heat = torch.rand(batch, generator=draw) + 0.4
    k, p = torch.randint(2, 50, (batch,), dtype=torch.int32, generator=draw), torch.rand(batch, generator=draw) * 0.5
    found = []
    for where, table in ((device, kernels), ("cpu", cpu_kernels)):
        state = make_state(where, batch, seed=-(2**62) + 3)
        state.eos_ids.fill_(-1)
        state.lane.add_(7)
        tokens = []
        for step in range(3):
            sample = table.top_k_sample if sampler == "top_k" else table.full_sample
            given = (one.to(where) for one in (heat, k, p + 0.45))
            sample(scores[step].to(where), state, *given, workspace=table.Workspace(where, batch, 2, 32, vocab))
            tokens.append(state.tokens.tolist())
        found.append(tokens)
    assert found[0] == found[1]
    assert len({token for row in found[0] for token in row}) > batch


def check_processors(device: str, dtype: torch.dtype, batch: int, vocab: int) -> None:
    """Check each processor and the copy against transformers'; nothing after the valid ids is read."""
    length, capacity = 40, 1100
    ids = torch.full((batch, capacity), vocab - 1, device=device)
    ids[:, :length] = torch.randint(0, 12, (batch, length), device=device)
    logits = torch.randn(batch, vocab, device=device).to(dtype)
    scores = torch.full((batch, vocab), float("nan"), device=device)
    count = values(batch, length, torch.int32, device)
    seen, original = ids[:, :length].cpu(), logits.float().cpu()

    kernels.copy_scores(logits, scores)
    assert torch.equal(scores.cpu(), original)
    kernels.repetition_penalty(logits, scores, ids, count, values(batch, 1.7, torch.float32, device))
    expected = RepetitionPenaltyLogitsProcessor(1.7)(seen, original.clone())
    assert torch.allclose(scores.cpu(), expected, rtol=1e-6, atol=0)
    for size in (1, 2, 3, 5, 41, 42):
        kernels.copy_scores(logits, scores)
        kernels.no_repeat_ngram(scores, ids, count, values(batch, size, torch.int32, device))
        expected = NoRepeatNGramLogitsProcessor(size)(seen, original.clone())
        assert torch.equal(scores.cpu(), expected), size
    eos = torch.tensor([EOS, -1, vocab - 1], device=device).repeat(batch, 1)
    for minimum, banned in ((length + 1, True), (length, False)):
        kernels.copy_scores(logits, scores)
        kernels.min_length(scores, count, values(batch, minimum, torch.int32, device), eos)
        expected = original.clone()
        if banned:
            expected[:, [EOS, vocab - 1]] = float("-inf")
        assert torch.equal(scores.cpu(), expected)


def check_rows_of_their_own(device: str, sampler: str, batch: int, vocab: int) -> None:
    """Check that rows which differ in everything get what each of them gets alone, over three steps."""
    draw = torch.Generator().manual_seed(batch)

    def integers(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, (batch,), dtype=torch.int32, generator=draw).to(device)

    state = make_state(device, batch, capacity=20)
    state.ids.copy_(torch.randint(0, vocab, state.ids.shape, generator=draw))
    state.ids_length, state.cache_length, state.step = integers(6, 15), integers(0, 9), integers(0, 50)
    state.seed, state.lane, state.limit = integers(0, 1000).long(), integers(0, 3), integers(8, 18)
    state.eos_ids, state.finished = integers(0, vocab).long()[:, None], integers(0, 4) // 3
    heat = torch.rand(batch, generator=draw).to(device) + 0.3
    # The first row gets its largest scores and does not end; the second one is at its end.
    heat[0], state.finished[0], state.limit[0], state.eos_ids[0], state.limit[1] = 0.0, 0, 100, -1, 8
    k, p = integers(1, 60), torch.rand(batch, generator=draw).to(device)
    penalty, size, minimum = heat + 0.8, integers(0, 4), integers(5, 20)
    logits = (2 * torch.randn(3, batch, vocab, generator=draw)).to(device)

    def run(rows: slice) -> list[list[torch.Tensor]]:
        """Return what the state of ``rows`` is after each step."""
        names = ("tokens", "finished", "ids", "ids_length", "cache_length", "step", "limit", "eos_ids", "seed", "lane")
        own = {name: getattr(state, name)[rows].clone() for name in names}
        count = len(own["tokens"])
        ring, turn = torch.full((3, count), -1, device=device), torch.zeros(1, dtype=torch.int32, device=device)
        mine = kernels.DecodeState(**own, ring=ring, turn=turn, pad_id=state.pad_id)
        workspace, after = make_workspace(device, count, vocab), []
        for step in range(3):
            given = logits[step, rows].contiguous()
            scores = torch.empty_like(given)
            kernels.copy_scores(given, scores)
            kernels.repetition_penalty(given, scores, mine.ids, mine.ids_length, penalty[rows])
            kernels.no_repeat_ngram(scores, mine.ids, mine.ids_length, size[rows])
            kernels.min_length(scores, mine.ids_length, minimum[rows], mine.eos_ids)
            if sampler == "greedy":
                kernels.greedy_sample(scores, mine, workspace=workspace)
            else:
                sample = kernels.top_k_sample if sampler == "top_k" else kernels.full_sample
                sample(scores, mine, heat[rows], k[rows], p[rows], workspace=workspace)
            if rows.start == 0:
                assert mine.tokens[0] == scores[0].argmax()
            after.append([getattr(mine, name).clone() for name in names] + [mine.ring.T.clone()])
        return after

    together = run(slice(0, batch))
    for row in range(batch):
        for whole, alone in zip(together, run(slice(row, row + 1)), strict=True):
            assert all(torch.equal(one[row : row + 1], other) for one, other in zip(whole, alone, strict=True)), row
    assert together[-1][1][:2].tolist() == [0, 1]
