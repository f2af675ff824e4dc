"""Norms, gates and rotary positions on a GPU: what to launch. `decoder_rows_device` computes."""

from typing import Any

from torch import Tensor

from specinfer_kernels.reference import FLOAT8
from specinfer_kernels.triton import decoder_rows_device as device
from specinfer_kernels.triton.runtime import device_of

GATE_BLOCK = 1024


def rms_norm(values: Tensor, update: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
    """As the ops rms_norm and, with an update, add_rms_norm."""
    num_rows, width = values.shape
    result = values.new_empty(num_rows, width)
    if num_rows:
        with device_of(values):
            device.norm_kernel[(num_rows,)](
                values,
                values if update is None else update,
                weight,
                result,
                values.stride(0),
                0 if update is None else update.stride(0),
                width,
                epsilon,
                HAS_UPDATE=update is not None,
                BLOCK=_power_of_two(width),
                **_options(_power_of_two(width)),
            )
    return result


def silu_multiply(gate_up: Tensor) -> Tensor:
    """As the op."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    result = gate_up.new_empty(num_rows, width)
    if result.numel():
        grid = (num_rows, -(-width // GATE_BLOCK))
        with device_of(gate_up):
            device.gate_kernel[grid](
                gate_up, result, gate_up.stride(0), width, BLOCK=GATE_BLOCK, **_options(GATE_BLOCK)
            )
    return result


def rotate_and_write_kv(
    mixed: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    cosines: Tensor,
    sines: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    epsilon: float,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> Tensor:
    """As the op; one program for each head of each row, values included."""
    num_kv_heads, head_dim = key_cache.shape[2:]
    num_rows, num_all = mixed.shape[0], mixed.shape[1] // head_dim
    num_heads = num_all - 2 * num_kv_heads
    query = mixed.new_empty(num_rows, num_heads, head_dim)
    if num_rows:
        pointers = device.Rotation(
            mixed, positions, slot_mapping, cosines, sines, key_cache, value_cache, query
        )
        has_norms = query_weight is not None and key_weight is not None
        with device_of(mixed):
            device.rotate_kernel[(num_rows, num_all)](
                pointers,
                query_weight if has_norms else mixed,
                key_weight if has_norms else mixed,
                mixed.stride(0),
                epsilon,
                1.0 / key_scale,
                1.0 / value_scale,
                NUM_HEADS=num_heads,
                NUM_KV_HEADS=num_kv_heads,
                HEAD_DIM=head_dim,
                HAS_NORMS=has_norms,
                FLOAT8=key_cache.dtype == FLOAT8,
                HALF=_power_of_two(head_dim // 2),
                **_options(head_dim),
            )
    return query


def _power_of_two(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _options(block: int) -> dict[str, Any]:
    """Fixed by the width, so that a row's sums have one order; no fused multiply-adds."""
    return {"num_warps": min(8, max(1, block // 512)), "enable_fp_fusion": False}


def move_slots(pool: Tensor, sources: Tensor, targets: Tensor) -> None:
    """As the op compact_kv, in place: a program owns some columns of all slots of one layer."""
    num_moves = sources.numel()
    if num_moves == 0:
        return
    num_slots, width = pool.shape[2] * pool.shape[3], pool.shape[4] * pool.shape[5]
    block_moves = _power_of_two(num_moves)
    block_columns = max(8, min(_power_of_two(width), device.MOVE_ELEMENTS // block_moves))
    grid = (pool.shape[0] * 2, -(-width // block_columns))
    with device_of(pool):
        device.move_kernel[grid](
            pool,
            sources,
            targets,
            num_moves,
            num_slots,
            width,
            MOVES=block_moves,
            COLUMNS=block_columns,
            num_warps=4,
            enable_fp_fusion=False,
        )


def can_move(num_moves: int) -> bool:
    """Whether so many moves fit one program, which has to read all before it writes any."""
    return num_moves * 8 <= device.MOVE_ELEMENTS
