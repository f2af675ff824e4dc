"""Where the time of a request went, round by round."""

import argparse

from specinfer import Client


def main(router: str) -> None:
    with Client(router, timeout=60) as client:
        completion = client.generate(
            "The function textwrap.dedent(text):", max_tokens=16, temperature=0
        )
        report = client.explain(completion.request_id)
    print(f"{report.outcome}, first token after {report.timings.first_token_seconds * 1e3:.1f} ms")
    for one in report.rounds:
        facts = one.facts
        print(
            f"tokens {one.offset}-{one.offset + one.num_tokens - 1}: "
            f"draft {facts.draft_seconds * 1e3:.1f} ms, verify {facts.verify_seconds * 1e3:.1f} ms"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--router", default="127.0.0.1:50051")
    main(parser.parse_args().router)
