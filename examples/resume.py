"""Go on with a stream in another process: keep its token, and call `resume` with it.

A connection that breaks while you read needs none of this: the client resumes by itself.
"""

import argparse

from specinfer import Client

PROMPT = "The function textwrap.dedent(text):"


def main(router: str) -> None:
    with Client(router, timeout=60) as client, client.stream(PROMPT, max_tokens=24) as stream:
        head = next(stream).text
    token = stream.resume_token
    assert token is not None
    print(f"read {token.offset} tokens, then left")

    with Client(router, timeout=60) as another, another.resume(*token) as stream:
        tail = "".join(event.text for event in stream)
    usage = stream.completion.usage
    print(f"read the other {usage.num_completion_tokens - token.offset} tokens")
    print(head + tail)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--router", default="127.0.0.1:50051")
    main(parser.parse_args().router)
