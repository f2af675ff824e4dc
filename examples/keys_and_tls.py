"""A key over TLS, and several routers: the next one takes over when one is gone."""

import argparse
from pathlib import Path

from specinfer import Client, TlsSettings


def main(routers: list[str], ca: Path | None, key_file: Path | None) -> None:
    # A provider is asked for each call, so a key that is changed in the file is found.
    provider = None if key_file is None else lambda: key_file.read_text().strip()
    tls = None if ca is None else TlsSettings(ca=ca)
    with Client(routers, tls=tls, token_provider=provider, timeout=60) as client:
        served = client.capabilities()
        print(f"{served.model} ({served.dtype}), {served.num_drafters} drafters")
        print(
            client.generate(
                "The function textwrap.dedent(text):", max_tokens=16, temperature=0
            ).text
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--router", action="append")
    parser.add_argument("--ca", type=Path, help="certificate of who signed the router's")
    parser.add_argument("--key-file", type=Path, help="file that holds the API key")
    given = parser.parse_args()
    main(given.router or ["127.0.0.1:50051"], given.ca, given.key_file)
