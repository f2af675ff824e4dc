"""Say what you expect: an edit repeats most of a text, and what is predicted is guessed for free.

The prediction becomes one more branch of guesses. It changes no token, only how many rounds they
take. Here the prediction is what the same seed gave before, so nearly all of it comes true.
"""

import argparse

from specinfer import Client

QUESTION = "Explain itertools.groupby."


def main(router: str) -> None:
    with Client(router, timeout=60) as client:
        first = client.chat(QUESTION, max_tokens=48, temperature=1.5, seed=1).completion
        again = client.chat(
            QUESTION, max_tokens=48, temperature=1.5, seed=1, prediction=first.text
        ).completion
    assert again.token_ids == first.token_ids
    print(f"without: {first.speculation.num_rounds} rounds")
    print(f"with: {again.speculation.num_rounds} rounds, the same tokens")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--router", default="127.0.0.1:50051")
    main(parser.parse_args().router)
