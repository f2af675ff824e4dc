"""Watch speculation at work: each round's tree, with what the target confirmed marked by a star."""

import argparse

from specinfer import Client, RoundDetail


def draw(detail: RoundDetail) -> None:
    """Print a tree, a node a line."""
    for node in range(1, len(detail.tree)):
        mark = "*" if node in detail.accepted else " "
        print(f"  {mark} {'  ' * detail.tree.depths[node]}{detail.node_texts[node]!r}")
    print(f"    the target's own: {detail.token_texts[-1]!r}")


def main(router: str) -> None:
    with Client(router, timeout=60) as client:
        stream = client.stream(
            "The function textwrap.dedent(text):", max_tokens=12, temperature=0, detail=True
        )
        for number, event in enumerate(stream, start=1):
            print(f"round {number}: {event.num_accepted_tokens} guesses confirmed")
            if event.detail is not None:
                draw(event.detail)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--router", default="127.0.0.1:50051")
    main(parser.parse_args().router)
