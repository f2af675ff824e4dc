"""Command line: train the demo pair, or grow a checkpoint. Wiring only."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path


def _train_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="specinfer_training",
        description="Train the demo pair from the standard library's own documentation. "
        "The word 'grow' first grows a checkpoint instead (see 'grow --help').",
    )
    parser.add_argument("--out", type=Path, default=Path("models/demo"), help="folder of the pair")
    parser.add_argument("--work", type=Path, default=Path("training/runs/demo"), help="states")
    parser.add_argument("--minutes", type=float, default=85.0, help="wall-clock budget")
    return parser


def _grow_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="specinfer_training grow",
        description="Widen and deepen a Llama checkpoint without changing its function.",
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of the source")
    parser.add_argument("--preset", choices=("200m", "1b", "7b"), required=True)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    return parser


def _grow(arguments: Sequence[str]) -> None:
    import torch

    from .grow import grow_checkpoint

    options = _grow_parser().parse_args(arguments)
    dtype: torch.dtype = getattr(torch, options.dtype)
    print(grow_checkpoint(options.model, options.out, options.preset, dtype))


def _train(arguments: Sequence[str]) -> None:
    options = _train_parser().parse_args(arguments)
    from .pipeline import PipelineOptions, run_pipeline

    run_pipeline(PipelineOptions(options.out, options.work, options.minutes))


def main(arguments: Sequence[str]) -> None:
    """Run one of the two commands."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if arguments and arguments[0] == "grow":
        _grow(arguments[1:])
    else:
        _train(arguments)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
