"""Print an answer as it is made, and handle what may go wrong."""

import argparse
import sys

from specinfer import Client, SpecinferError


def main(router: str) -> int:
    question = [{"role": "user", "content": "What does textwrap.dedent do?"}]
    try:
        with (
            Client(router, timeout=60) as client,
            client.stream(messages=question, max_tokens=128, temperature=0) as stream,
        ):
            for event in stream:
                print(event.text, end="", flush=True)
            summary = stream.completion.speculation
    except SpecinferError as error:
        print(f"{error.reason}: {error} (retryable: {error.retryable})", file=sys.stderr)
        return 1
    print(f"\n[{summary.num_accepted_tokens} of {summary.num_draft_tokens} guesses confirmed]")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--router", default="127.0.0.1:50051")
    sys.exit(main(parser.parse_args().router))
