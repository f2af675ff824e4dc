"""Say what you expect: an edit repeats most of a text, and what is predicted is not waited for.

The prediction becomes one more branch of guesses. It changes no token, only how many rounds they
take.
"""

import argparse

from specinfer import Client

BEFORE = "def area(width, height):\n    return width * height\n"
TASK = f"Repeat this with the name surface:\n{BEFORE}"


def main(router: str) -> None:
    with Client(router, timeout=60) as client:
        plain = client.generate(TASK, max_tokens=48, temperature=0)
        helped = client.generate(TASK, max_tokens=48, temperature=0, prediction=BEFORE)
    assert helped.token_ids == plain.token_ids
    print(f"without: {plain.speculation.num_rounds} rounds")
    print(f"with: {helped.speculation.num_rounds} rounds, the same tokens")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--router", default="127.0.0.1:50051")
    main(parser.parse_args().router)
