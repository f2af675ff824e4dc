"""Ask one question and print the answer as it is made: `python examples/generate.py "..."`.

Needs a running cluster (`specinfer up`) and nothing but `pip install specinfer`.
"""

import sys

from specinfer import Client, SpecinferError


def main() -> int:
    question = " ".join(sys.argv[1:]) or "What does textwrap.dedent do?"
    try:
        with (
            Client("127.0.0.1:50051", timeout=60) as client,
            client.stream(
                messages=[{"role": "user", "content": question}], max_tokens=128, temperature=0
            ) as stream,
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
    sys.exit(main())
