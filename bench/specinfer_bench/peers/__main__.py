"""Our engine beside those a user could pick instead: `python -m specinfer_bench.peers --help`.

The same prompts, weights, number format, threads and lengths; every engine in turn. The target is a
grown one (`specinfer_training.grow`): it costs what a model of that size costs and says what the
demo's says. Limit the cores for all engines alike with `taskset`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from specinfer.cores import usable_cores, whole_cores
from specinfer.errors import SpecinferError
from specinfer.messages import ChatMessage
from specinfer_bench.grown import default_cache, grown_target
from specinfer_bench.load.cluster import DEMO
from specinfer_bench.machine import machine_facts
from specinfer_bench.options import GROWN_PRESETS
from specinfer_bench.peers.apart import Apart
from specinfer_bench.peers.hugging_face import Transformers
from specinfer_bench.peers.interleave import Outcome, joined, run_all
from specinfer_bench.peers.llama_cpp import LlamaCpp
from specinfer_bench.peers.open_vino import OpenVino
from specinfer_bench.peers.others import Sglang, Vllm
from specinfer_bench.peers.ours import PLAIN, SPECULATIVE, Cluster, OneProcess
from specinfer_bench.peers.peer import Arm, Pair, Peer, Task
from specinfer_bench.peers.report import build_report
from specinfer_bench.peers.table import peers_table
from specinfer_bench.prompts import read_prompts
from specinfer_engine.checkpoint import read_checkpoint
from specinfer_router.tokenizer import ServedTokenizer

MODULE = "specinfer_bench.peers"
PEERS: tuple[Peer, ...] = (
    Cluster(),
    Apart(OneProcess),
    Apart(Transformers),
    LlamaCpp(),
    Apart(Vllm),
    Apart(Sglang),
    Apart(OpenVino),
)


def bench_parser(module: str, document: str | None) -> argparse.ArgumentParser:
    """Arguments that the comparison shares with the ablations."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", description=(document or "").splitlines()[0]
    )
    add = parser.add_argument
    add("--grow", choices=GROWN_PRESETS, help="size of the target; default: the demo's own")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the weights")
    add("--model", type=Path, default=DEMO / "target", help="folder of the target")
    add("--draft", type=Path, default=DEMO / "draft", help="folder of the drafter")
    add("--prompts", type=Path, default=DEMO / "prompts.jsonl", help="JSON lines with a prompt")
    add("--num-prompts", type=at_least_one, default=8, help="how many of them")
    add("--max-tokens", type=at_least_one, default=64, help="most tokens for a prompt")
    add("--repeats", type=at_least_one, default=2, help="runs of every prompt for each load")
    add("--loads", type=at_least_one, default=1, help="how often every engine is loaded")
    add(
        "--max-seconds",
        type=at_least_one,
        default=math.inf,
        help="for each load and temperature; only the first prompt may take longer",
    )
    add("--seed", type=int, default=1, help="of the first prompt; each has its own")
    add(
        "--temperatures",
        type=float,
        nargs="+",
        default=[0.0, 0.8],
        metavar="T",
        help="one report for each; 0 is greedy",
    )
    parser.set_defaults(device="cpu")
    add("--output", type=Path, help="write the results to this file as JSON")
    return parser


def at_least_one(text: str) -> int:
    """A number of a command line that counts something; raises ArgumentTypeError."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1, not {text!r}")
    return int(text)


def make_pair(arguments: argparse.Namespace) -> Pair:
    """The models that were asked for, the target grown; raises InvalidRequest."""
    target = arguments.model
    if arguments.grow is not None:
        target = grown_target(target, arguments.grow, arguments.dtype)
    return Pair(
        target=target,
        draft=arguments.draft,
        dtype=arguments.dtype,
        # What our cluster shares out: a second thread of a core makes no product faster.
        threads=len(whole_cores(usable_cores())),
        eos_token_ids=frozenset(read_checkpoint(target).eos_token_ids),
        cache=default_cache().parent / "peers",
        device=arguments.device,
    )


def make_tasks(arguments: argparse.Namespace, pair: Pair, temperature: float) -> list[Task]:
    """The prompts as text and tokens, through the chat template where the model has one.

    One more than asked for, if the file has it: the last one is for warming up.
    """
    files = read_checkpoint(pair.target).tokenizer_files
    tokenizer = ServedTokenizer(
        files.tokenizer_json,
        chat_template=files.chat_template or "",
        bos_token=files.bos_token,
        eos_token=files.eos_token,
    )

    async def task(index: int, prompt: str) -> Task:
        if tokenizer.has_chat_template:
            token_ids = await tokenizer.encode_chat([ChatMessage("user", prompt)])
        else:
            token_ids = await tokenizer.encode(prompt)
        text = await tokenizer.decode(token_ids)
        seed = arguments.seed + index
        return Task(text, tuple(token_ids), arguments.max_tokens, temperature, seed)

    async def every() -> list[Task]:
        prompts = read_prompts(arguments.prompts, arguments.num_prompts + 1)
        return [await task(index, prompt) for index, prompt in enumerate(prompts)]

    return asyncio.run(every())


def load_peers(
    peers: Sequence[Peer], pair: Pair, stack: ExitStack
) -> tuple[dict[str, Arm], dict[str, str]]:
    """The arms of all engines that load, kept until `stack` ends; and why others are skipped.

    The last ones load first: they convert the checkpoints, which takes memory for a moment.
    """
    arms: dict[str, Arm] = {}
    skipped: dict[str, str] = {}
    for peer in reversed(peers):
        reason = peer.missing()
        if reason is None:
            say(f"loading {peer.name}")
            try:
                arms = {**stack.enter_context(peer.load(pair)), **arms}
            except (SpecinferError, RuntimeError, ValueError, OSError, ImportError) as error:
                reason = f"{type(error).__name__}: {error}"
        if reason is not None:
            skipped[peer.name] = reason
            say(f"skipping {peer.name}: {reason}")
    return arms, skipped


def run_comparison(
    module: str,
    peers: Sequence[Peer],
    arguments: argparse.Namespace,
    baseline: str,
    ours: str,
    left_out: Sequence[str] = (),
) -> None:
    """Load, run every temperature, write the results and print the table.

    The file is written after each temperature, so that a run that is cut short leaves what it has.
    Where `ours` is `baseline`, only what decodes without guesses runs. The results say who was
    `left_out`.

    Raises:
        InvalidRequest: when models or prompts are none.
        ValueError: when `baseline` or `ours`, arms of our own, gave no numbers.
    """
    pair = make_pair(arguments)
    outcomes: dict[float, Outcome] = {}
    reports: dict[float, dict[str, object]] = {}
    skipped = dict.fromkeys(left_out, "left out by --skip")
    result: dict[str, object] = {}
    for load in range(arguments.loads):
        with ExitStack() as stack:
            arms, missing = load_peers(peers if load % 2 == 0 else peers[::-1], pair, stack)
            skipped |= missing
            if ours == baseline:
                arms = {name: arm for name, arm in arms.items() if arm.plain}
            for temperature in arguments.temperatures:
                say(f"load {load + 1} of {arguments.loads}, temperature {temperature:g}")
                outcome = _run(arguments, arms, pair, temperature)
                outcomes[temperature] = joined(outcomes.get(temperature), outcome)
                reports[temperature] = build_report(
                    outcomes[temperature],
                    arms,
                    temperature=temperature,
                    eos_token_ids=pair.eos_token_ids,
                    baseline=baseline,
                    ours=ours,
                ).as_dict()
                result["reports"], result["skipped"] = list(reports.values()), skipped
                result["setup"] = setup_facts(module, arguments, pair)
                write_result(result, arguments.output)
    print(peers_table(result))


def _run(
    arguments: argparse.Namespace, arms: Mapping[str, Arm], pair: Pair, temperature: float
) -> Outcome:
    """What all arms that run at a temperature give."""
    chosen = {name: arm for name, arm in arms.items() if not (temperature and arm.greedy_only)}
    tasks = make_tasks(arguments, pair, temperature)
    return run_all(
        chosen,
        tasks[-1],
        tasks[: arguments.num_prompts],
        arguments.repeats,
        max_seconds=arguments.max_seconds,
    )


def setup_facts(module: str, arguments: argparse.Namespace, pair: Pair) -> dict[str, object]:
    """The command, the models and the machine; how busy it was at the end."""
    words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    return {
        "command": f"python -m {module} {shlex.join(words)}".strip(),
        "model": f"demo grown to {arguments.grow}" if arguments.grow else arguments.model.name,
        "dtype": pair.dtype,
        "threads": pair.threads,
        "num_prompts": arguments.num_prompts,
        "max_tokens": arguments.max_tokens,
        "num_loads": arguments.loads,
        "machine": machine_facts(),
        "load_average": os.getloadavg()[1],
    }


def write_result(result: Mapping[str, object], output: Path | None) -> None:
    """Write the results to a file, if there is to be one."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def say(text: str) -> None:
    """Tell the person who waits."""
    print(text, file=sys.stderr, flush=True)


def peers_parser() -> argparse.ArgumentParser:
    """Arguments of this comparison."""
    parser = bench_parser(MODULE, __doc__)
    names = [peer.name for peer in PEERS]
    add = parser.add_argument
    add("--skip", nargs="*", default=[], choices=names, metavar="NAME", help="engines to leave")
    add("--plain", action="store_true", help="only decoding without guesses")
    return parser


def main() -> None:
    """Compare, write the results and print the table."""
    arguments = peers_parser().parse_args()
    kept = [peer for peer in PEERS if peer.name not in arguments.skip]
    ours = PLAIN if arguments.plain else SPECULATIVE
    run_comparison(MODULE, kept, arguments, PLAIN, ours, arguments.skip)


if __name__ == "__main__":
    main()
