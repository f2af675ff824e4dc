"""One of some answers, and text of a given form."""

import argparse

from specinfer import Client


def main(router: str) -> None:
    with Client(router, timeout=60) as client:
        sky = client.chat("Is the sky blue?", choice=["yes", "no"], temperature=0)
        date = client.chat("Any date?", regex=r"20\d\d-[01]\d-[0-3]\d", max_tokens=32, seed=2)
    print(f"choice: {sky.text}")
    print(f"regex: {date.text}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--router", default="127.0.0.1:50051")
    main(parser.parse_args().router)
