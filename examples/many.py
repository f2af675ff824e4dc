"""Many requests at once from asyncio; the cluster puts them into shared passes."""

import argparse
import asyncio

from specinfer import AsyncClient, RetryPolicy

QUESTIONS = (
    "What does textwrap.dedent do?",
    "Explain itertools.groupby.",
    "What does functools.lru_cache do?",
)


async def main(router: str) -> None:
    retry = RetryPolicy(max_attempts=6, max_backoff=2.0)
    async with AsyncClient(router, timeout=60, retry=retry) as client:
        calls = (
            client.chat(question, max_tokens=96, temperature=0.7, seed=number)
            for number, question in enumerate(QUESTIONS)
        )
        replies = await asyncio.gather(*calls)
    for question, reply in zip(QUESTIONS, replies, strict=True):
        print(f"{question}\n  {reply.text.strip()}  [{reply.completion.finish_reason}]")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--router", default="127.0.0.1:50051")
    asyncio.run(main(parser.parse_args().router))
