"""How sure the target was of each token, and what else it thought of."""

import argparse
import math

from specinfer import Client


def main(router: str) -> None:
    with Client(router, timeout=60) as client:
        completion = client.generate("The function textwrap.", max_tokens=5, logprobs=2, seed=1)
    for entry in completion.logprobs:
        others = ", ".join(f"{token} {math.exp(logprob):.0%}" for token, logprob in entry.top)
        print(f"token {entry.token_id}: {math.exp(entry.logprob):.0%} (best: {others})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--router", default="127.0.0.1:50051")
    main(parser.parse_args().router)
