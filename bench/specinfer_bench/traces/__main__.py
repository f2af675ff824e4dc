"""`python -m specinfer_bench.traces`: trace a chat request for docs/tracing.md.

Redis, a verify worker, a draft worker and a router as processes; the SDK in this one, as an
application that traces itself; and a collector that receives what they send over OTLP.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from specinfer import AsyncClient
from specinfer.errors import InvalidRequest, SpecinferError
from specinfer_bench.traces.cluster import Models, traced_application, traced_cluster
from specinfer_bench.traces.collector import Collector, ReceivedSpan
from specinfer_bench.traces.cost import measured_cost
from specinfer_bench.traces.render import rendered_attributes, rendered_tree

DEMO = Path("models/demo")
QUESTION = "Name three rivers."
ANSWER = "chat"
SETTLE_SECONDS = 2.5


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m specinfer_bench.traces", description=__doc__)
    parser.add_argument("--model", type=Path, default=DEMO / "target", help="the target's folder")
    parser.add_argument("--draft", type=Path, default=DEMO / "draft", help="the drafter's folder")
    parser.add_argument("--tokens", type=int, default=24, help="tokens of the answer")
    parser.add_argument("--document", type=Path, default=Path("docs/tracing.md"))
    parser.add_argument(
        "--cost", type=int, default=0, help="also measure the cost, in so many runs"
    )
    return parser.parse_args()


async def _trace(models: Models, tokens: int) -> list[ReceivedSpan]:
    async with traced_cluster(models) as traced:
        async with AsyncClient(traced.router) as client:
            # The first request pays for what is built once.
            await client.chat(QUESTION, max_tokens=tokens, temperature=0)
            async with traced_application(traced.collector):
                await client.chat(QUESTION, max_tokens=tokens, temperature=0, detail=True)
        return await _settled(traced.collector)


async def _settled(collector: Collector) -> list[ReceivedSpan]:
    """The application's trace, once every process has had the time to send its part."""
    (call,) = await collector.named(ANSWER)
    await asyncio.sleep(SETTLE_SECONDS)
    return collector.trace(call.trace_id)


def written(text: str, mark: str, block: str) -> str:
    """A document with the block between its marks replaced; raises InvalidRequest without them."""
    begin, end = f"<!-- {mark} begins -->", f"<!-- {mark} ends -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise InvalidRequest(f"the document has no {begin} and {end}", field="document")
    return f"{before}{begin}\n{block}\n{end}{after}"


def main() -> int:
    """Write the trace, and the cost where it is asked for, into the document."""
    arguments = _arguments()
    models = Models(arguments.model.resolve(), arguments.draft.resolve())
    try:
        text = arguments.document.read_text(encoding="utf-8")
        spans = asyncio.run(_trace(models, arguments.tokens))
        text = written(text, "trace", f"```text\n{rendered_tree(spans)}\n```")
        text = written(text, "attributes", f"```text\n{rendered_attributes(spans)}\n```")
        if arguments.cost:
            cost = asyncio.run(measured_cost(models, arguments.cost))
            text = written(text, "cost", cost)
        arguments.document.write_text(text, encoding="utf-8")
    except (SpecinferError, OSError) as error:
        print(f"specinfer_bench.traces: {error}", file=sys.stderr)
        return 1
    print(rendered_tree(spans))
    return 0


if __name__ == "__main__":
    sys.exit(main())
