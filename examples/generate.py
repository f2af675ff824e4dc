"""Generate to the end and look at what came back."""

import argparse

from specinfer import Client

PROMPT = "The function textwrap.dedent(text):"


def main(router: str) -> None:
    with Client(router, timeout=60) as client:
        completion = client.generate(PROMPT, max_tokens=32, temperature=0, stop=["\n\n"])
    print(completion.text)
    summary, usage = completion.speculation, completion.usage
    print(f"{usage.num_completion_tokens} tokens in {summary.num_rounds} rounds")
    print(f"{summary.num_accepted_tokens} of {summary.num_draft_tokens} guesses confirmed")
    print(f"ended by {completion.finish_reason}; seed {completion.seed}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--router", default="127.0.0.1:50051")
    main(parser.parse_args().router)
