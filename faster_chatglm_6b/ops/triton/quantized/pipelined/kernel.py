"""The kernel, in Gluon, which says what Triton leaves to its compiler: who copies, who multiplies, and when each waits.

One warp copies blocks of x and of the stored weight into a ring of stages (TMA). Each warpgroup takes 64 rows of a
weight block, unpacks them in registers and multiplies them with the block of x from shared memory (wgmma). Nothing else
joins the warpgroups, so that one unpacks while another one multiplies. Barriers in shared memory say that a stage is
full, or empty again.

``turns`` warpgroups may share 64 rows: they take the blocks of columns in turn, and the first one adds up their sums.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ...common import gelu as triton_gelu
from ...common import start_successor as triton_start_successor
from ...common import wait_for_predecessor as triton_wait_for_predecessor
from .. import tiles

# The same functions in Gluon, whose blocks have layouts.
columns_of = gluon.jit(tiles.columns_of.fn)
gelu = gluon.jit(triton_gelu.fn)
start_successor = gluon.jit(triton_start_successor.fn)
wait_for_predecessor = gluon.jit(triton_wait_for_predecessor.fn)

# Later releases have the first names, Triton 3.6 has the second ones.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
copy_block = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared

# Weight rows of a warpgroup, as the matrix instruction takes them.
ROWS = gl.constexpr(64)
# Pieces in which sums change their layout: each takes shared memory of its size.
PIECES = gl.constexpr(4)


@gluon.constexpr_function
def pair_layout(columns):
    """Return where a warpgroup holds pairs of columns, so that they unpack to what the matrix instruction reads."""
    register = [[8, 0]] + [[0, 4 << i] for i in range((columns // 8).bit_length() - 1)]
    lane = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(register, lane, [[16, 0], [32, 0]], [], [64, columns // 2])


@gluon.constexpr_function
def sums_layout(block_m):
    """Return where a warpgroup holds its sums [64, block_m]."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, block_m, 16])


@gluon.constexpr_function
def out_layout():
    """Return a layout in which each thread has eight results that lie side by side in the output."""
    return gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])


@gluon.jit
def copy_ahead(
    rings, x, weight, first_x_row, first_row, first,
    BLOCKS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Copy all blocks of columns from column ``first`` on, as far ahead as there are stages."""
    full, empty, x_ring, weight_ring = rings
    STAGES: gl.constexpr = x_ring.shape[0]
    BLOCK_K: gl.constexpr = x_ring.shape[2]
    BYTES: gl.constexpr = x.block_type.nbytes + weight.block_type.nbytes
    AHEAD: gl.constexpr = STAGES if STAGES < BLOCKS else BLOCKS
    # The weight does not depend on the predecessor.
    for s in gl.static_range(AHEAD):
        mbarrier.expect(full.index(s), BYTES)
        column = first + s * BLOCK_K
        copy_block(weight, [first_row, column // 2], full.index(s), weight_ring.index(s))
    wait_for_predecessor(PDL)
    for s in gl.static_range(AHEAD):
        copy_block(x, [first_x_row, first + s * BLOCK_K], full.index(s), x_ring.index(s))
    stage, phase = 0, 0
    for block in range(AHEAD, BLOCKS):
        column = first + block * BLOCK_K
        mbarrier.wait(empty.index(stage), phase)
        mbarrier.expect(full.index(stage), BYTES)
        copy_block(weight, [first_row, column // 2], full.index(stage), weight_ring.index(stage))
        copy_block(x, [first_x_row, column], full.index(stage), x_ring.index(stage))
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1


@gluon.jit
def multiply(
    rings, done, others, ends,
    INDEX: gl.constexpr, WARPGROUPS: gl.constexpr, SPLITS: gl.constexpr, BLOCKS: gl.constexpr,
    BIAS: gl.constexpr, RESIDUAL: gl.constexpr, GELU: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Do the part of warpgroup ``INDEX``; the first one of each set of rows stores the results."""
    full, empty, x_ring, weight_ring = rings
    STAGES: gl.constexpr = x_ring.shape[0]
    BLOCK_M: gl.constexpr = x_ring.shape[1]
    BLOCK_K: gl.constexpr = x_ring.shape[2]
    BITS: gl.constexpr = 8 if weight_ring.dtype == gl.int16 else 4
    BFLOAT: gl.constexpr = x_ring.dtype == gl.bfloat16
    PARTS: gl.constexpr = weight_ring.shape[1] // ROWS
    TURNS: gl.constexpr = WARPGROUPS // PARTS
    PART: gl.constexpr = INDEX // TURNS
    TURN: gl.constexpr = INDEX % TURNS
    layout: gl.constexpr = sums_layout(BLOCK_M)
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    wait_for_predecessor(PDL)
    sums = gl.zeros([ROWS, BLOCK_M], gl.float32, layout)
    stage, phase = TURN, 0
    for _ in range(TURN, BLOCKS, TURNS):
        mbarrier.wait(full.index(stage), phase)
        pairs = weight_ring.index(stage).slice(PART * ROWS, ROWS).load(pair_layout(BLOCK_K))
        columns = gl.convert_layout(columns_of(pairs, BITS, BFLOAT, False), operand, assert_trivial=True)
        running = warpgroup_mma(columns, x_ring.index(stage).permute((1, 0)), sums, is_async=True)
        # The instruction reads the registers of ``columns`` until then.
        sums, columns = warpgroup_mma_wait(0, deps=[running, columns])
        mbarrier.arrive(empty.index(stage), count=1)
        stage += TURNS
        if stage >= STAGES:
            stage -= STAGES
            phase ^= 1
    if TURN > 0:
        others.index(PART * (TURNS - 1) + TURN - 1).store(sums)
        barrier()
        mbarrier.arrive(done.index(PART), count=1)
    else:
        if TURNS > 1:
            mbarrier.wait(done.index(PART), 0)
            for other in gl.static_range(TURNS - 1):
                sums += others.index(PART * (TURNS - 1) + other).load(layout)
        store_results(sums, ends, PART, PARTS, SPLITS, BIAS, RESIDUAL, GELU)


@gluon.jit
def halves(block):
    WIDTH: gl.constexpr = block.shape[1] // 2
    return gl.split(gl.permute(gl.reshape(block, [ROWS, 2, WIDTH]), (0, 2, 1)))


@gluon.jit
def store_results(
    sums, ends,
    PART: gl.constexpr, PARTS: gl.constexpr, SPLITS: gl.constexpr,
    BIAS: gl.constexpr, RESIDUAL: gl.constexpr, GELU: gl.constexpr,
):  # fmt: skip
    """Store what becomes of the sums [64, BLOCK_M]; with splits, the program that comes last does for all."""
    scale, bias, residual, out, partial, counters, M, N, beta, first_x_row, first_row = ends
    layout: gl.constexpr = out_layout()
    WIDTH: gl.constexpr = sums.shape[1] // PIECES
    row = first_row + PART * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    place = first_x_row + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    left, right = halves(sums)
    pieces = halves(left) + halves(right)
    if SPLITS == 1:
        for piece in gl.static_range(PIECES):
            total = gl.convert_layout(pieces[piece], layout)
            m = place + piece * WIDTH
            finish(total, scale, bias, residual, out, row, m, M, N, beta, BIAS, RESIDUAL, GELU)
    else:
        size = M.to(gl.int64) * N
        mine = partial + gl.program_id(1) * size
        for piece in gl.static_range(PIECES):
            m = place + piece * WIDTH
            valid = (row < N)[:, None] & (m < M)[None, :]
            gl.store(mine + (m[None, :] * N + row[:, None]), gl.convert_layout(pieces[piece], layout), mask=valid)
        # It puts the stores of all threads before the release of one.
        barrier()
        counter = counters + gl.program_id(0) * PARTS + PART
        if gl.atomic_add(counter, 1, sem="acq_rel") == SPLITS - 1:
            gl.store(counter, 0)
            for piece in gl.static_range(PIECES):
                m = place + piece * WIDTH
                valid = (row < N)[:, None] & (m < M)[None, :]
                total = gl.zeros([ROWS, WIDTH], gl.float32, layout)
                # In the order of the splits, whichever came last, so that the result does not vary.
                for split in gl.static_range(SPLITS):
                    theirs = partial + split * size + (m[None, :] * N + row[:, None])
                    total += gl.load(theirs, mask=valid, other=0.0, cache_modifier=".cg")
                finish(total, scale, bias, residual, out, row, m, M, N, beta, BIAS, RESIDUAL, GELU)


@gluon.jit
def finish(
    total, scale, bias, residual, out, row, m, M, N, beta,
    BIAS: gl.constexpr, RESIDUAL: gl.constexpr, GELU: gl.constexpr,
):  # fmt: skip
    """Scale sums [weight rows, rows of x], add bias, GELU or beta * residual, and store them."""
    valid = (row < N)[:, None] & (m < M)[None, :]
    target = m[None, :] * N + row[:, None]
    total *= gl.load(scale + row, mask=row < N, other=0.0).to(gl.float32)[:, None]
    if BIAS:
        total += gl.load(bias + row, mask=row < N, other=0.0).to(gl.float32)[:, None]
    if GELU:
        total = gelu(total)
    if RESIDUAL:
        total += beta * gl.load(residual + target, mask=valid, other=0.0).to(gl.float32)
    gl.store(out + target, total.to(out.dtype.element_ty), mask=valid)


@gluon.jit
def quantized_pipelined_kernel(
    x,  # descriptor of [M, K], blocks [BLOCK_M, BLOCK_K]
    weight,  # descriptor of [N, K / 2], pairs of columns: int16 of int8, int8 of int4
    scale,  # [N]
    bias,  # [N]
    residual,  # [M, N]
    out,  # [M, N]
    partial,  # float32 [SPLITS, M, N]
    counters,  # int32 [cdiv(N, 64) * cdiv(M, BLOCK_M)], zero
    M,
    N,
    beta,
    K: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_K: gl.constexpr,
    WARPGROUPS: gl.constexpr,  # 2 or 4
    TURNS: gl.constexpr,  # divides WARPGROUPS
    STAGES: gl.constexpr,  # a multiple of TURNS
    SPLITS: gl.constexpr,
    REGISTERS: gl.constexpr,  # of a thread that multiplies
    BIAS: gl.constexpr,
    RESIDUAL: gl.constexpr,
    GELU: gl.constexpr,
    PDL: gl.constexpr,
):
    start_successor(PDL)
    PARTS: gl.constexpr = WARPGROUPS // TURNS
    # Columns past the end of a row are copied as zeros.
    BLOCKS: gl.constexpr = (K + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K)
    # The blocks of x rows that share a weight block follow one another.
    row_blocks = gl.cdiv(M, BLOCK_M)
    first_row = gl.program_id(0) // row_blocks * (PARTS * ROWS)
    first_x_row = gl.program_id(0) % row_blocks * BLOCK_M
    first = gl.program_id(1) * (BLOCKS * BLOCK_K)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [PARTS, 1], mbarrier.MBarrierLayout())
    x_ring = gl.allocate_shared_memory(x.dtype, [STAGES, BLOCK_M, BLOCK_K], x.layout)
    weight_ring = gl.allocate_shared_memory(weight.dtype, [STAGES, PARTS * ROWS, BLOCK_K // 2], weight.layout)
    OTHERS: gl.constexpr = PARTS * (TURNS - 1)
    # One small block stands for none.
    others = gl.allocate_shared_memory(
        gl.float32,
        [OTHERS, ROWS, BLOCK_M] if TURNS > 1 else [1, ROWS, 4],
        gl.SwizzledSharedLayout(2, 1, 8 if TURNS > 1 else 1, [1, 0]),
    )
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=PARTS)
    for part in gl.static_range(PARTS):
        mbarrier.init(done.index(part), count=TURNS - 1 if TURNS > 1 else 1)
    fence_async_shared()
    rings = (full, empty, x_ring, weight_ring)
    ends = (scale, bias, residual, out, partial, counters, M, N, beta, first_x_row, first_row)
    if WARPGROUPS == 4:
        gl.warp_specialize(
            [
                (multiply, (rings, done, others, ends, 0, WARPGROUPS, SPLITS, BLOCKS, BIAS, RESIDUAL, GELU, PDL)),
                (multiply, (rings, done, others, ends, 1, WARPGROUPS, SPLITS, BLOCKS, BIAS, RESIDUAL, GELU, PDL)),
                (multiply, (rings, done, others, ends, 2, WARPGROUPS, SPLITS, BLOCKS, BIAS, RESIDUAL, GELU, PDL)),
                (multiply, (rings, done, others, ends, 3, WARPGROUPS, SPLITS, BLOCKS, BIAS, RESIDUAL, GELU, PDL)),
                (copy_ahead, (rings, x, weight, first_x_row, first_row, first, BLOCKS, PDL)),
            ],
            [4, 4, 4, 1],
            [REGISTERS, REGISTERS, REGISTERS, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (multiply, (rings, done, others, ends, 0, WARPGROUPS, SPLITS, BLOCKS, BIAS, RESIDUAL, GELU, PDL)),
                (multiply, (rings, done, others, ends, 1, WARPGROUPS, SPLITS, BLOCKS, BIAS, RESIDUAL, GELU, PDL)),
                (copy_ahead, (rings, x, weight, first_x_row, first_row, first, BLOCKS, PDL)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )  # fmt: skip
