"""Drawing from raw logits and walking trees on a GPU, against torch's sort and a walk on the host.

    python bench/kernels/gpu_sampling.py [--rounds N] [--output FILE] [--check]

`torch` is what engines do: softmax, sort, running sums, a mask and an argmax over noise, for all
rows at once, the noise made beforehand. The floor reads the logits once. `host` copies the draws to
the host and walks there.
"""

from functools import partial

import torch
from gpu_timing import Bench, Work, parse
from torch import Tensor

from specinfer_kernels import Laws, gumbel_noise, sample_law, walk_trees

CASES = ((1, 32000), (8, 32000), (64, 32000), (64, 128256), (256, 128256))
LAWS = {
    "greedy": (0.0, 0, 1.0, 0.0),
    "temperature 0.8": (0.8, 0, 1.0, 0.0),
    "top-k 40, top-p 0.95": (0.8, 40, 0.95, 0.0),
    "min-p 0.05": (0.8, 0, 1.0, 0.05),
}
NUM_NODES = 64


def make_laws(num_rows: int, values: tuple[float, int, float, float], device: torch.device) -> Laws:
    """The same law for every row."""
    temperature, top_k, top_p, min_p = values
    return Laws(
        torch.full((num_rows,), temperature, device=device, dtype=torch.float32),
        torch.full((num_rows,), top_k, device=device, dtype=torch.int32),
        torch.full((num_rows,), top_p, device=device, dtype=torch.float64),
        torch.full((num_rows,), min_p, device=device, dtype=torch.float64),
    )


def sort_and_draw(logits: Tensor, noise: Tensor, values: tuple[float, int, float, float]) -> Tensor:
    """Tokens [num_rows] drawn by a sort of the vocabulary, as most engines do."""
    temperature, top_k, top_p, min_p = values
    if temperature == 0:
        return logits.argmax(-1)
    ordered, order = (logits / temperature).sort(-1, descending=True)
    if top_k:
        ordered[:, top_k:] = -torch.inf
    masses = ordered.softmax(-1)
    dropped = masses.cumsum(-1) - masses >= top_p
    dropped |= masses < min_p * masses[:, :1]
    kept = ordered.masked_fill(dropped, -torch.inf) + noise.gather(1, order)
    return order.gather(1, kept.argmax(-1, keepdim=True))[:, 0]


def draw(bench: Bench, num_rows: int, vocab_size: int) -> None:
    """All laws at one shape."""
    logits = torch.randn(num_rows, vocab_size, device=bench.device) * 4
    seeds = torch.arange(num_rows, device=bench.device)
    positions = torch.arange(num_rows, device=bench.device) + 100
    noise = gumbel_noise(seeds, positions, vocab_size)
    for name, values in LAWS.items():
        laws = make_laws(num_rows, values, bench.device)
        candidates = {
            "ours": partial(sample_law, logits, laws, seeds, positions),
            "torch": partial(sort_and_draw, logits, noise, values),
        }
        label = f"{name}, {num_rows} rows of {vocab_size}"
        bench.measure(label, Work(num_rows * vocab_size * 4), candidates, {})


def walk(bench: Bench, num_trees: int, num_nodes: int) -> None:
    """Trees whose draws follow the first child for half of the depth."""
    parents = torch.arange(-1, num_nodes - 1).clamp_min(-1)
    token_ids = torch.arange(num_nodes).repeat(num_trees)
    draws = token_ids + 1
    draws[num_nodes // 2 :: num_nodes] = 1 << 20
    offsets = torch.arange(num_trees + 1, dtype=torch.int32) * num_nodes
    all_parents = parents.int().repeat(num_trees)
    drawn, *rest = (tensor.to(bench.device) for tensor in (draws, token_ids, all_parents, offsets))

    def walk_here() -> Tensor:
        return walk_trees(drawn, rest[0], rest[1], rest[2], num_nodes).cpu()

    def walk_on_host() -> Tensor:
        host = drawn.cpu()
        return walk_trees(host, token_ids, all_parents, offsets, num_nodes, backend="reference")

    candidates = {"ours": walk_here, "host": walk_on_host}
    num_bytes = num_trees * num_nodes * (8 + 8 + 4)
    bench.measure(f"walk of {num_trees} trees of {num_nodes}", Work(num_bytes), candidates, {})


def main() -> None:
    """All shapes and laws, then walks."""
    bench = Bench("sampling", parse("sampling on a GPU"))
    for num_rows, vocab_size in ((2, 300),) if bench.check else CASES:
        draw(bench, num_rows, vocab_size)
    for num_trees in (2,) if bench.check else (1, 8, 64):
        walk(bench, num_trees, 6 if bench.check else NUM_NODES)
    bench.finish()


if __name__ == "__main__":
    main()
