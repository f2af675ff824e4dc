"""What a step costs beside its arithmetic, and a whole step against its floor.

    python bench/kernels/step_overhead.py [--rounds N] [--threads N] [--model narrow] [--json FILE]

`step` lays out a batch and runs it through a whole fused decoder, head included: all of a pass but
sampling. `decoder` is the one call of the decoder alone, `ops` the same op by op, as everything ran
before there was one call; `numbers` does nothing but lay the batch out. The `narrow` model has 24
layers that compute next to nothing, so all of its step is overhead. The floor is the larger of
reading every weight once, measured on those very weights, and of their products at the rate of a
large matrix product, both in the same rounds. Before each the caches are swept, as the pass of a
large model sweeps them: cold code is slower than warm. A ratio above 1 is slower than the step.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from timing import (
    PEAK_SIZE,
    interleaved,
    parse_arguments,
    peak_candidates,
    pop_peaks,
    print_row,
)
from torch import Tensor, nn

from results import add_json_option, save, summary_of
from specinfer_engine.attention import PagedPass
from specinfer_engine.batch import SequenceRows, build_batch
from specinfer_engine.fused import FusedDecoder
from specinfer_engine.rowwise import RotaryTable
from specinfer_kernels import (
    DecoderLayer,
    DecoderRows,
    DecoderStack,
    LayerCaches,
    PackedLinear,
    RowNorm,
    decoder_logits,
    pack_linear,
)

HEAD_DIM, MAX_LENGTH, CONTEXT, BLOCK_SIZE = 64, 512, 64, 16
SWEPT_BYTES = 64 << 20
# Sequences and rows of each: a root, small and large trees, many roots, many small trees.
PASSES = ((1, 1), (1, 8), (1, 16), (1, 32), (8, 1), (8, 4))
DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Shape:
    num_layers: int
    width: int
    inner: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int


SHAPES = {
    "narrow": Shape(24, 64, 128, 2, 1, 256),
    "200m": Shape(16, 1024, 2816, 16, 4, 3072),
    "1b": Shape(22, 2048, 5632, 32, 4, 3072),
}


class Angles(nn.Module):
    """Rotary positions as the stock modules give them."""

    def forward(self, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[..., None] * 0.5 ** torch.arange(HEAD_DIM // 2)
        both = torch.cat((angles, angles), -1)
        return both.cos().to(values.dtype), both.sin().to(values.dtype)


@dataclass(frozen=True)
class Model:
    """A decoder with random weights, and what it is made of."""

    shape: Shape
    stack: DecoderStack

    @property
    def products(self) -> list[PackedLinear]:
        layers = self.stack.layers
        return [*(item for layer in layers for item in layer.products), self.stack.head]


def make_model(shape: Shape, dtype: torch.dtype, max_length: int = MAX_LENGTH) -> Model:
    query = shape.num_heads * HEAD_DIM
    mixed = query + 2 * shape.num_kv_heads * HEAD_DIM

    def linear(inputs: int, outputs: int) -> PackedLinear:
        return pack_linear(torch.randn(outputs, inputs).to(dtype) * inputs**-0.5)

    norm = RowNorm(torch.ones(shape.width, dtype=dtype), 1e-5)
    layers = tuple(
        DecoderLayer(
            attention_norm=norm,
            head_norms=None,
            query_key_value=linear(shape.width, mixed),
            output=linear(query, shape.width),
            mlp_norm=norm,
            gate_up=linear(shape.width, 2 * shape.inner),
            down=linear(shape.inner, shape.width),
            scale=HEAD_DIM**-0.5,
        )
        for _ in range(shape.num_layers)
    )
    embedding = torch.randn(shape.vocab_size, shape.width).to(dtype)
    cosines, sines = RotaryTable(Angles(), max_length).tables(embedding)
    heads = (shape.num_heads, shape.num_kv_heads, HEAD_DIM)
    head = pack_linear(embedding)
    return Model(shape, DecoderStack(embedding, cosines, sines, layers, norm, head, *heads))


def make_rows(num_sequences: int, num_rows: int) -> list[SequenceRows]:
    """Chains of rows after a context, each sequence on blocks of its own."""
    blocks = -(-(CONTEXT + num_rows) // BLOCK_SIZE)
    return [
        SequenceRows.chain(
            range(num_rows), CONTEXT, range(index * blocks, (index + 1) * blocks), range(num_rows)
        )
        for index in range(num_sequences)
    ]


def make_caches(model: Model, num_sequences: int) -> LayerCaches:
    blocks = (num_sequences * 8, BLOCK_SIZE, model.shape.num_kv_heads, HEAD_DIM)
    pool = torch.zeros(model.shape.num_layers, 2, *blocks).to(model.stack.dtype)
    return LayerCaches(tuple((layer[0], layer[1]) for layer in pool))


def read_weights(model: Model) -> None:
    for item in model.products:
        panels = None if item.native_weight is None else item.native_weight.tensors[0]
        if panels is not None:
            panels.view(torch.float32).sum()


def run_pass(model: Model, num_sequences: int, num_rows: int, rounds: int) -> dict[str, object]:
    """One line: the step, its parts, and its floor."""
    dtype, decoder = model.stack.dtype, FusedDecoder(model.stack)
    caches, rows = make_caches(model, num_sequences), make_rows(num_sequences, num_rows)
    batch = build_batch(rows, BLOCK_SIZE)
    laid_out = DecoderRows(
        batch.token_ids, batch.positions, batch.slot_mapping, batch.logit_index, batch.layout
    )

    def step() -> Tensor:
        batch = build_batch(rows, BLOCK_SIZE)
        return decoder(batch, PagedPass(batch.layout, batch.slot_mapping, caches))

    alone = partial(decoder_logits, laid_out, model.stack, caches)
    candidates: dict[str, Callable[[], object]] = {
        "step": step,
        "decoder": alone,
        "ops": partial(alone, backend="reference"),
        "numbers": partial(build_batch, rows, BLOCK_SIZE),
        "read": partial(read_weights, model),
        **peak_candidates(dtype),
    }
    seconds = swept(candidates, rounds)
    floor = floors(model, batch.num_rows, seconds.pop("read"), pop_peaks(seconds))
    name = str(dtype).removeprefix("torch.")
    over = statistics.median(map(float.__truediv__, seconds["step"], floor))
    label = f"{name} {num_sequences} sequences of {num_rows} rows"
    print_row(f"{label}, over floor {over:.2f}", seconds, "step")
    facts = {"dtype": name, "sequences": num_sequences, "rows": num_sequences * num_rows}
    return facts | {"over_floor": round(over, 3)} | summary_of(seconds, "step")


def swept(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Interleaved seconds of each, with caches as cold as a large model's pass leaves them."""
    other = torch.zeros(SWEPT_BYTES // 4)
    both: dict[str, Callable[[], object]] = {}
    for name, run in candidates.items():
        both |= {f"sweep {name}": other.sum, name: run}
    seconds = interleaved(both, rounds)
    return {name: seconds[name] for name in candidates}


def floors(model: Model, num_rows: int, reads: list[float], peaks: list[float]) -> list[float]:
    """Seconds that a step takes at least, for each round."""
    weights = sum(item.in_features * item.out_features for item in model.products)
    share = weights * num_rows / PEAK_SIZE**3  # of the multiply-adds of the large product
    return [max(read, peak * share) for read, peak in zip(reads, peaks, strict=True)]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="narrow", choices=sorted(SHAPES))
    add_json_option(parser)


def main() -> None:
    arguments = parse_arguments("step overhead", add_options)
    lines = []
    with torch.inference_mode():
        for dtype in DTYPES:
            model = make_model(SHAPES[arguments.model], dtype)
            lines += [run_pass(model, *shape, arguments.rounds) for shape in PASSES]
    save(arguments, lines)


if __name__ == "__main__":
    main()
