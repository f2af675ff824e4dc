"""Many requests at once from asyncio; the cluster puts them into shared passes.

Needs a running cluster (`specinfer up`) and nothing but `pip install specinfer`.
"""

import asyncio

from specinfer import AsyncClient, RetryPolicy

QUESTIONS = (
    "What does textwrap.dedent do?",
    "Explain itertools.groupby.",
    "What does functools.lru_cache do?",
)


async def main() -> None:
    retry = RetryPolicy(max_attempts=6, max_backoff=2.0)
    async with AsyncClient("127.0.0.1:50051", timeout=60, retry=retry) as client:
        answers = await asyncio.gather(
            *(
                client.generate(
                    messages=[{"role": "user", "content": question}],
                    max_tokens=96,
                    temperature=0.7,
                    seed=number,
                )
                for number, question in enumerate(QUESTIONS)
            )
        )
    for question, answer in zip(QUESTIONS, answers, strict=True):
        print(f"{question}\n  {answer.text.strip()}  [{answer.finish_reason}]")


if __name__ == "__main__":
    asyncio.run(main())
