"""The same from asyncio: every method of Client has its twin in AsyncClient."""

import argparse
import asyncio

from specinfer import AsyncClient


async def main(router: str) -> None:
    async with (
        AsyncClient(router, timeout=60) as client,
        client.stream(
            "The function functools.reduce(", max_tokens=48, temperature=0.8, seed=1
        ) as stream,
    ):
        async for event in stream:
            print(event.text, end="", flush=True)
    print(f"\n[{stream.completion.finish_reason}]")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--router", default="127.0.0.1:50051")
    asyncio.run(main(parser.parse_args().router))
