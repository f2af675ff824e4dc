"""The official `openai` client at the HTTP gateway. Needs `pip install openai`."""

import argparse

from openai import OpenAI


def main(gateway: str, key: str) -> None:
    with OpenAI(base_url=f"http://{gateway}/v1", api_key=key) as client:
        model = client.models.list().data[0].id
        stream = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "What does textwrap.dedent do?"}],
            max_tokens=64,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        for chunk in stream:
            if chunk.choices:
                print(chunk.choices[0].delta.content or "", end="", flush=True)
            elif chunk.usage is not None:
                print(f"\n[{model}: {chunk.usage.completion_tokens} tokens]")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gateway", default="127.0.0.1:8000")
    parser.add_argument("--key", default="none", help="where the gateway asks for one")
    given = parser.parse_args()
    main(given.gateway, given.key)
