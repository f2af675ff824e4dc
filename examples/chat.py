"""A conversation of two turns: Conversation keeps them, `chat` answers the last one."""

import argparse

from specinfer import Client, Conversation

QUESTIONS = ("What does textwrap.dedent do?", "And textwrap.indent?")


def main(router: str) -> None:
    talk = Conversation.begin(system="Answer in one sentence.")
    with Client(router, timeout=60) as client:
        for question in QUESTIONS:
            talk = talk.ask(question)
            reply = client.chat(talk, max_tokens=64, temperature=0)
            talk = talk.answer(reply)
            print(f"> {question}\n{reply.text.strip()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--router", default="127.0.0.1:50051")
    main(parser.parse_args().router)
