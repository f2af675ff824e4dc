"""What a step costs beside its arithmetic: 24 layers so narrow that nothing but overhead is left.

    python bench/kernels/step_overhead.py [--rounds N] [--threads N] [--json FILE]

`step` lays out a batch and runs it through a whole fused decoder, head included: all of a pass but
sampling. `layers` is the one call of the layers alone, `ops` the same layers op by op, as they ran
before there was one call; `numbers` does nothing but lay the batch out. A ratio above 1 is slower
than the step.
"""

from functools import partial

import torch
from timing import interleaved, parse_arguments, print_row
from torch import Tensor, nn

from results import add_json_option, save, summary_of
from specinfer_engine.attention import PagedPass
from specinfer_engine.batch import SequenceRows, build_batch
from specinfer_engine.fused import FusedDecoder
from specinfer_engine.rowwise import RotaryTable
from specinfer_kernels import (
    DecoderLayer,
    DecoderStack,
    LayerCaches,
    RotaryPlaces,
    RowNorm,
    decoder_layers,
    pack_linear,
)

NUM_LAYERS, WIDTH, INNER, HEADS, KV_HEADS, HEAD_DIM = 24, 64, 128, 2, 1, 64
VOCAB_SIZE, MAX_LENGTH, CONTEXT, BLOCK_SIZE = 256, 512, 64, 16
# Sequences and rows of each: a root, a tree, eight roots, eight small trees.
PASSES = ((1, 1), (1, 8), (8, 1), (8, 4))
DTYPES = (torch.bfloat16, torch.float32)


class Angles(nn.Module):
    """Rotary positions as the stock modules give them."""

    def forward(self, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[..., None] * 0.5 ** torch.arange(HEAD_DIM // 2)
        both = torch.cat((angles, angles), -1)
        return both.cos().to(values.dtype), both.sin().to(values.dtype)


def make_stack(dtype: torch.dtype) -> DecoderStack:
    mixed, query = (HEADS + 2 * KV_HEADS) * HEAD_DIM, HEADS * HEAD_DIM
    shapes = ((mixed, WIDTH), (WIDTH, query), (2 * INNER, WIDTH), (WIDTH, INNER))
    layers = []
    for _ in range(NUM_LAYERS):
        linears = [pack_linear(torch.randn(shape).to(dtype) * 0.05) for shape in shapes]
        norm = RowNorm(torch.ones(WIDTH, dtype=dtype), 1e-5)
        layers.append(
            DecoderLayer(
                attention_norm=norm,
                head_norms=None,
                query_key_value=linears[0],
                output=linears[1],
                mlp_norm=norm,
                gate_up=linears[2],
                down=linears[3],
                scale=HEAD_DIM**-0.5,
            )
        )
    return DecoderStack(tuple(layers), HEADS, KV_HEADS, HEAD_DIM)


def make_rows(num_sequences: int, num_rows: int) -> list[SequenceRows]:
    """Chains of rows after a context, each sequence on blocks of its own."""
    blocks = -(-(CONTEXT + num_rows) // BLOCK_SIZE)
    return [
        SequenceRows.chain(
            range(num_rows), CONTEXT, range(index * blocks, (index + 1) * blocks), range(num_rows)
        )
        for index in range(num_sequences)
    ]


def run_pass(
    dtype: torch.dtype, num_sequences: int, num_rows: int, rounds: int
) -> dict[str, object]:
    stack, rotary = make_stack(dtype), RotaryTable(Angles(), MAX_LENGTH)
    embedding = torch.randn(VOCAB_SIZE, WIDTH).to(dtype)
    head, norm = pack_linear(embedding), RowNorm(torch.ones(WIDTH, dtype=dtype), 1e-5)
    decoder = FusedDecoder(embedding, stack, norm, head, rotary)
    pool = torch.zeros(NUM_LAYERS, 2, num_sequences * 8, BLOCK_SIZE, KV_HEADS, HEAD_DIM).to(dtype)
    caches = LayerCaches(tuple((layer[0], layer[1]) for layer in pool))
    rows = make_rows(num_sequences, num_rows)
    batch = build_batch(rows, BLOCK_SIZE)
    places = RotaryPlaces(batch.position_ids[0], batch.slot_mapping, *rotary.tables(embedding))
    hidden = torch.randn(batch.num_rows, WIDTH).to(dtype)

    def step() -> Tensor:
        laid_out = build_batch(rows, BLOCK_SIZE)
        return decoder(laid_out, PagedPass(laid_out.layout, laid_out.slot_mapping, caches))

    layers = partial(decoder_layers, hidden, stack, places, batch.layout, caches)
    seconds = interleaved(
        {
            "step": step,
            "layers": layers,
            "ops": partial(layers, backend="reference"),
            "numbers": partial(build_batch, rows, BLOCK_SIZE),
        },
        rounds,
    )
    name = str(dtype).removeprefix("torch.")
    print_row(f"{name} {num_sequences} sequences of {num_rows} rows", seconds, "step")
    facts = {"dtype": name, "sequences": num_sequences, "rows": num_sequences * num_rows}
    return facts | summary_of(seconds, "step")


def main() -> None:
    arguments = parse_arguments("step overhead", add_json_option)
    with torch.inference_mode():
        lines = [run_pass(dtype, *shape, arguments.rounds) for dtype in DTYPES for shape in PASSES]
    save(arguments, lines)


if __name__ == "__main__":
    main()
