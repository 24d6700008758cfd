"""Launches of every kernel, on tensors without memory, for ahead-of-time compilation."""

from collections.abc import Callable

import torch

from faster_chatglm_6b.ops import triton as kernels
from faster_chatglm_6b.ops.triton import configs
from faster_chatglm_6b.ops.triton.linear.gemv import launch_gemv, launch_persistent_gemv
from faster_chatglm_6b.ops.triton.linear.small_batch_matmul import launch_small_batch_matmul

HEADS, SIZE, HIDDEN, INNER, VOCAB, CAPACITY, POSITIONS = 32, 128, 4096, 16384, 130528, 2048, 2048
WEIGHTS = [(3 * HIDDEN, HIDDEN), (HIDDEN, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER), (VOCAB, HIDDEN)]


def meta(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def int32(*shape: int) -> torch.Tensor:
    return meta(torch.int32, *shape)


# Sequences, splits, keys, and whether the step is captured, for every configuration of attention.
MANY_KEYS = (
    (2, 1, 2048, False),
    (2, 64, 2048, False),
    (2, 8, 256, True),
    (1, 2, 256, True),
    (8, 2, 512, True),
    (8, 2, 512, False),
    (64, 1, 512, True),
)


def decode_attention_launch(
    dtype: torch.dtype, batch: int, splits: int, keys: int, captured: bool, two: bool = True, page: int = 0
) -> Callable[[], object]:
    """Return decode attention of ``batch`` sequences, with positions of two parts or of one, and with pages or none."""
    packed, counts = meta(dtype, batch, 3 * HIDDEN), 5 * [int32(batch)]
    cache, table = meta(dtype, batch, HEADS, CAPACITY, SIZE), meta(dtype, POSITIONS, SIZE // (4 if two else 2))
    options = {"splits": splits, "max_length": keys, "stable_state": captured}
    if page:
        options["padded"] = batch == 8
        cache, options["block_table"] = meta(dtype, 999, HEADS, page, SIZE), int32(batch, CAPACITY // page)
    options["workspace"] = kernels.Workspace("meta", batch)
    return lambda: kernels.decode_attention(packed, cache, cache, *counts, table, table, **options)


def prompt_launches(dtype: torch.dtype, batch: int, rows: int) -> None:
    """Launch what rotates and attends in a prompt of ``rows`` rows, with positions of two parts."""
    packed, places = meta(dtype, batch, rows, 3 * HIDDEN), [int32(batch), int32(batch)]
    cache, table = meta(dtype, batch, HEADS, CAPACITY, SIZE), meta(dtype, POSITIONS, SIZE // 4)
    query = kernels.rotary_concat_past_key_value(
        packed, cache, cache, *places, int32(batch), int32(1), table, table, prefix=128
    )
    kernels.prompt_attention(query, cache, cache, *places, int32(1), prefix=128)


def speculation_launches(dtype: torch.dtype) -> list[Callable[[], object]]:
    """Return what a step of 1 + k positions has of its own; most of it knows no dtype, and float16 stands for that."""
    calls = []
    for batch, rows, splits in ((1, 8, 8), (16, 4, 1), (2, 8, 2))[: 3 if dtype == torch.float16 else 1]:
        state = decode_state(batch)
        drafts = kernels.DraftState(
            tokens=meta(torch.int64, batch, rows),
            **{name: int32(batch) for name in ("count", "seen", "first", "streak", "need", "balance", "price")},
            steps=int32(batch * rows),
            reports=meta(torch.int64, 16, batch, 2 + rows),
            turn=int32(1),
        )
        packed, counts = meta(dtype, batch, rows, 3 * HIDDEN), 5 * [int32(batch)]
        cache, table = meta(dtype, batch, HEADS, CAPACITY, SIZE), meta(dtype, POSITIONS, SIZE // 4)
        workspace = kernels.Workspace("meta", batch * rows)
        arguments = (packed, cache, cache, *counts, table, table)
        calls.append(lambda a=arguments, w=workspace, s=splits: kernels.draft_attention(*a, splits=s, workspace=w))
        if dtype == torch.float16 and rows == 8:
            pages = meta(dtype, 999, HEADS, 64, SIZE)
            arguments = (packed, pages, pages, *counts, table, table)
            options = {"block_table": int32(batch, CAPACITY // 64), "limit": int32(batch), "padded": batch == 2}
            options |= {"splits": splits, "workspace": workspace}
            calls.append(lambda a=arguments, o=options: kernels.draft_attention(*a, **o))
        if dtype != torch.float16 or batch == 2:
            continue
        sampled = meta(torch.int64, batch * rows)
        calls.append(lambda s=sampled, state=state, drafts=drafts: kernels.accept(s, state, drafts))
        calls += [
            lambda state=state, drafts=drafts, w=workspace, spent=spent: kernels.propose(
                state, drafts, spent=spent, workspace=w
            )
            for spent in (False, True)
        ]
    return calls


def decode_state(batch: int) -> kernels.DecodeState:
    return kernels.DecodeState(
        tokens=meta(torch.int64, batch),
        finished=int32(batch),
        ids=meta(torch.int64, batch, CAPACITY),
        **{name: int32(batch) for name in ("ids_length", "cache_length", "step", "limit", "lane")},
        eos_ids=meta(torch.int64, batch, 16),
        seed=meta(torch.int64, batch),
        ring=meta(torch.int64, 256, batch),
        turn=int32(1),
        pad_id=meta(torch.int64, 1),
    )


def packed_launches(dtype: torch.dtype, rows: int, page: int) -> None:
    """Launch what rotates and attends in packed prompts of up to ``rows`` tokens."""
    pages, table = meta(dtype, 999, HEADS, page, SIZE), meta(dtype, POSITIONS, SIZE // 4)
    block_table, places = int32(64, CAPACITY // page), [int32(64), int32(64)]
    packed = meta(dtype, rows, 3 * HIDDEN)
    query = kernels.packed_rotary_concat(
        packed, pages, pages, block_table, int32(rows), int32(rows), *places, table, table, prefix=128
    )
    for padded in (False, True):
        kernels.packed_prompt_attention(
            query, pages, pages, block_table, int32(32, 4), *places, longest=rows, prefix=128, padded=padded
        )


def operator_launches(dtype: torch.dtype) -> list[Callable[[], object]]:
    """Return the operators other than matrix products, in the shapes of a decode step."""
    batch = 2
    hidden = meta(dtype, batch, HIDDEN)
    vector = meta(dtype, HIDDEN)
    table = meta(dtype, POSITIONS, SIZE // 4)
    packed = meta(dtype, batch, 3 * HIDDEN)

    def rotary() -> None:
        kernels.fused_apply_rotary_emb(
            packed[:, None],
            position_ids=meta(torch.int64, batch, 2, 1),
            cos=table,
            sin=table,
            tensor_index=1,
            k_size=SIZE,
        )

    return [
        lambda: kernels.fast_gelu(hidden),
        lambda: kernels.fused_fast_gelu_mul(hidden, hidden),
        lambda: kernels.skip_layer_norm(hidden, vector, vector),
        lambda: kernels.skip_layer_norm(hidden, vector, vector, skip=hidden, alpha=7.5),
        rotary,
        *(lambda rows=rows: prompt_launches(dtype, batch, rows) for rows in (64, 512)),
        *(decode_attention_launch(dtype, *sizes) for sizes in MANY_KEYS),
        decode_attention_launch(dtype, 2, 8, 2048, False, two=False),
        *(decode_attention_launch(dtype, *sizes, page=64) for sizes in MANY_KEYS),
        *(lambda rows=rows: packed_launches(dtype, rows, 64) for rows in (64, 512)),
        lambda: kernels.embedding(meta(torch.int64, batch), meta(dtype, VOCAB, HIDDEN)),
    ]


def gemv_launches(family: configs.Family, dtype: torch.dtype) -> list[Callable[[], object]]:
    """Return the GEMV of each weight of the model with each number of rows that it serves."""
    calls = []
    rows = range(1, family.gemv_rows + 1) if dtype.itemsize == 2 else range(1, 5)
    for n, k in WEIGHTS:
        weight, bias = meta(dtype, n, k), meta(dtype, n)
        for m in rows:
            x, out = meta(dtype, m, k), meta(dtype, m, n)
            config = configs.gemv_config(family, n, k, dtype.itemsize)
            gelu, residual = n == INNER, out if n == HIDDEN else None
            calls.append(
                lambda x=x, w=weight, b=bias, r=residual, g=gelu, o=out, c=config: launch_gemv(x, w, b, r, 7.5, g, o, c)
            )
        fused = configs.layer_norm_gemv_config(family, n, k, dtype.itemsize)
        if fused is not None:
            vector = meta(dtype, k)
            calls.append(
                lambda v=vector, w=weight, b=bias, n=n, c=fused: launch_persistent_gemv(
                    v[None], v, v, 1e-5, w, b, None, 1.0, n == INNER, v, b, c
                )
            )
    return calls


def dot_launches(family: configs.Family, dtype: torch.dtype) -> list[Callable[[], object]]:
    """Return the tensor-core product of each weight of the model with each padded number of rows."""
    calls = []
    workspace = kernels.Workspace("meta", 64)
    for rows in (16, 32):
        for n, k in WEIGHTS:
            x, weight, bias, out = meta(dtype, rows, k), meta(dtype, n, k), meta(dtype, n), meta(dtype, rows, n)
            config = configs.dot_config(family, rows, n, k)
            gelu, residual = n == INNER, out if n == HIDDEN else None
            calls.append(
                lambda x=x, w=weight, b=bias, r=residual, g=gelu, o=out, c=config: launch_small_batch_matmul(
                    x, w, b, r, 7.5, g, o, c, workspace.partial, workspace.counters
                )
            )
    return calls


def sampling_launches(dtype: torch.dtype, capacity: int) -> list[Callable[[], object]]:
    """Return the samplers over scores of ``dtype``, and the processors before them."""
    batch = 2
    state = decode_state(batch)
    logits, scores = meta(dtype, batch, VOCAB), meta(torch.float32, batch, VOCAB)
    number, count = meta(torch.float32, batch), int32(batch)
    workspace = kernels.Workspace("meta", batch)
    return [
        lambda: kernels.greedy_sample(logits, state, workspace=workspace),
        lambda: kernels.greedy_sample(logits, state, invalid_rule=True, workspace=workspace),
        lambda: kernels.top_k_sample(
            logits, state, number, count, number, capacity=capacity, invalid_rule=True, workspace=workspace
        ),
        lambda: kernels.full_sample(logits, state, number, count, number, invalid_rule=True, workspace=workspace),
        lambda: kernels.full_sample(logits, state, number, None, None, workspace=workspace),
        lambda: kernels.copy_scores(logits, scores),
        lambda: kernels.repetition_penalty(logits, scores, state.ids, count, number),
        lambda: kernels.no_repeat_ngram(scores, state.ids, count, count),
        lambda: kernels.min_length(scores, count, count, state.eos_ids),
    ]
