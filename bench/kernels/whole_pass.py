"""A whole pass of the 200 M or 1.1 B model against its floor, by number of rows and context.

    python bench/kernels/whole_pass.py [--rounds N] [--threads N] [--model 1b] [--rows 1,8,32]
        [--contexts 64,256] [--json FILE]

The rows are a chain of one session after its context; a pass lays them out, runs every layer and
the head, and gives logits of all of them. The floor is the larger of reading every weight once,
measured on those very weights, and of their products at the rate of a large matrix product, both in
the same rounds: neither attention nor keys and values count in it. `products` are those of the pass
alone, one call each. Ratios are medians over rounds; weights are random, in bfloat16.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from step_overhead import (
    BLOCK_SIZE,
    HEAD_DIM,
    SHAPES,
    Model,
    floors,
    make_model,
    read_weights,
)
from timing import interleaved, parse_arguments, peak_candidates, pop_peaks, print_row
from torch import Tensor

from results import add_json_option, save, summary_of
from specinfer_engine.attention import PagedPass
from specinfer_engine.batch import SequenceRows, build_batch
from specinfer_engine.fused import FusedDecoder
from specinfer_kernels import LayerCaches

DTYPE = torch.bfloat16


def make_pass(model: Model, num_rows: int, context: int) -> Callable[[], Tensor]:
    """The pass of `num_rows` rows behind `context` keys, as a function."""
    shape, blocks = model.shape, -(-(context + num_rows) // BLOCK_SIZE)
    decoder = FusedDecoder(model.stack)
    block = (BLOCK_SIZE, shape.num_kv_heads, HEAD_DIM)
    pool = torch.randn(shape.num_layers, 2, blocks, *block).to(DTYPE)
    caches = LayerCaches(tuple((layer[0], layer[1]) for layer in pool))
    rows = [SequenceRows.chain(range(num_rows), context, range(blocks), range(num_rows))]

    def run() -> Tensor:
        batch = build_batch(rows, BLOCK_SIZE)
        return decoder(batch, PagedPass(batch.layout, batch.slot_mapping, caches)).float()

    return run


def multiply_all(model: Model, inputs: dict[int, Tensor]) -> None:
    for item in model.products:
        item(inputs[item.in_features])


def run_line(model: Model, num_rows: int, context: int, rounds: int) -> dict[str, object]:
    """One line: the pass, its products, and its floor."""
    widths = {item.in_features for item in model.products}
    inputs = {width: torch.randn(num_rows, width).to(DTYPE) for width in widths}
    candidates: dict[str, Callable[[], object]] = {
        "pass": make_pass(model, num_rows, context),
        "products": partial(multiply_all, model, inputs),
        "read": partial(read_weights, model),
        **peak_candidates(DTYPE),
    }
    seconds = interleaved(candidates, rounds)
    floor = floors(model, num_rows, seconds["read"], pop_peaks(seconds))
    over = statistics.median(map(float.__truediv__, seconds["pass"], floor))
    label = f"{num_rows} rows after {context}, over floor {over:.2f}"
    print_row(label, seconds, "pass")
    facts = {"rows": num_rows, "context": context, "over_floor": round(over, 3)}
    return facts | summary_of(seconds, "pass")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="200m", choices=sorted(SHAPES))
    parser.add_argument("--rows", default="1,2,4,8,12,16,24,32", help="with commas")
    parser.add_argument("--contexts", default="64,256", help="with commas")
    add_json_option(parser)


def main() -> None:
    arguments = parse_arguments("whole pass", add_options)
    lines = []
    with torch.inference_mode():
        contexts, counts = arguments.contexts.split(","), arguments.rows.split(",")
        max_length = max(map(int, contexts)) + max(map(int, counts))
        model = make_model(SHAPES[arguments.model], DTYPE, max_length)
        for context in map(int, contexts):
            for num_rows in map(int, counts):
                lines.append(run_line(model, num_rows, context, arguments.rounds))
    save(arguments, lines)


if __name__ == "__main__":
    main()
