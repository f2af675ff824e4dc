"""JSON that fits a schema: only tokens that the schema allows can be drawn."""

import argparse
import json

from specinfer import Client

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "stars": {"enum": [1, 2, 3]}},
    "required": ["name", "stars"],
    "additionalProperties": False,
}


def main(router: str) -> None:
    with Client(router, timeout=60) as client:
        reply = client.chat("Review a book.", json_schema=SCHEMA, max_tokens=96, seed=1)
    review = json.loads(reply.text)
    print(f"{review['name']}: {'*' * review['stars']}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--router", default="127.0.0.1:50051")
    main(parser.parse_args().router)
