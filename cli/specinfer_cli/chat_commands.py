"""What can be typed in a chat beside questions, each command a small function.

This module knows nothing of how lines are read or answers drawn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

from rich.console import Console

from specinfer.errors import InvalidRequest
from specinfer_cli import chat_settings
from specinfer_cli.console import indented_json
from specinfer_cli.conversation import Comparison, Conversation, Show, speculation_of
from specinfer_cli.round_view import tree_rows

HELP = """\
/speculation on|off   guess ahead or not, from the next message on; no token changes
/again                the last question once more, same seed, speculation the other way
/tree on|off          draw each round's tree below the answer while it comes
/rounds               the trees of the last answer, round by round
/settings             what answers are made with
/set NAME VALUE       change a setting, such as /set temperature 0.7; none is the default
/system TEXT          set the system message; without a text there is none
/save FILE            write the conversation as JSON
/stats                confirmed guesses by depth, tokens a round and tokens/s so far
/reset                forget the conversation
/help                 this
/quit                 leave (or Ctrl-D); Ctrl-C stops an answer"""


class Screen(Protocol):
    """Where answers appear."""

    tree: bool

    def answering(self, conversation: Conversation) -> AbstractContextManager[Show]:
        """A context that shows the answer to come."""
        ...


@dataclass
class Chat:
    """A conversation and where it is shown.

    Attributes:
        conversation: what was said and how.
        screen: where answers appear.
        console: where everything else is said.
    """

    conversation: Conversation
    screen: Screen
    console: Console

    def say(self, text: str) -> None:
        """One line about the chat."""
        self.console.print(text, markup=False, soft_wrap=True)

    def ask(self, text: str) -> None:
        """Show the answer to `text`."""
        with self.screen.answering(self.conversation) as show:
            self.conversation.ask(text, show)


def run_command(chat: Chat, line: str) -> None:
    """Do what a line that starts with a slash asks for.

    Raises:
        InvalidRequest: when there is no such command, or it cannot be done as it was typed.
        SpecinferError: when a command asks the cluster and that fails.
    """
    name, _, rest = line.partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        raise InvalidRequest(f"unknown command {name}\n{HELP}")
    command(chat, rest.strip())


def _speculation(chat: Chat, rest: str) -> None:
    chat.conversation.speculate(_switch("/speculation", rest))
    if chat.conversation.speculating:
        chat.say("speculation is on")
    else:
        chat.say("speculation is off; /again compares")


def _tree(chat: Chat, rest: str) -> None:
    chat.screen.tree = _switch("/tree", rest)
    chat.say(f"trees are {'drawn' if chat.screen.tree else 'not drawn'}")


def _rounds(chat: Chat, rest: str) -> None:
    if not chat.conversation.trees:
        raise InvalidRequest("no rounds are known: ask something, in a terminal")
    for detail in chat.conversation.trees:
        for row in tree_rows(detail):
            chat.console.print(row, no_wrap=True, overflow="ellipsis")
        chat.console.print()


def _switch(command: str, rest: str) -> bool:
    if rest not in ("on", "off"):
        raise InvalidRequest(f"{command} on, or {command} off")
    return rest == "on"


def _again(chat: Chat, rest: str) -> None:
    if chat.conversation.last is None:
        raise InvalidRequest("nothing was asked yet")
    way = "without" if chat.conversation.last.speculated else "with"
    seed = chat.conversation.last.completion.seed
    chat.say(f"once more {way} speculation, seed {seed}:")
    with chat.screen.answering(chat.conversation) as show:
        comparison = chat.conversation.ask_again(show)
    chat.say(_told(comparison))


def _told(comparison: Comparison) -> str:
    if comparison.identical:
        same = f"identical: all {comparison.num_equal} tokens"
    else:
        same = f"NOT identical: the first {comparison.num_equal} tokens are"
    return f"{same}; speculation ran at {comparison.ratio:.2f}x the speed of plain decoding"


def _settings(chat: Chat, rest: str) -> None:
    for line in chat_settings.lines(chat.conversation.options, chat.conversation.system):
        chat.say(line)


def _set(chat: Chat, rest: str) -> None:
    name, _, value = rest.partition(" ")
    if not value.strip():
        raise InvalidRequest("/set NAME VALUE; /settings lists the names")
    options = chat_settings.changed(chat.conversation.options, name, value.strip())
    chat.conversation.options = options
    chat.say(f"{name} is {value.strip()}")


def _system(chat: Chat, rest: str) -> None:
    chat.conversation.system = rest or None
    chat.say("the system message is set" if rest else "there is no system message")


def _save(chat: Chat, rest: str) -> None:
    if not rest:
        raise InvalidRequest("/save FILE")
    path = Path(rest).expanduser()
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(indented_json(_document(chat.conversation)))
    except FileExistsError as error:
        raise InvalidRequest(f"{path} is there already; choose another name") from error
    except OSError as error:
        raise InvalidRequest(f"cannot write {path}: {error.strerror}") from error
    chat.say(f"written to {path}")


def _document(conversation: Conversation) -> dict[str, Any]:
    settings: dict[str, Any] = {k: v for k, v in conversation.options.items() if v is not None}
    settings["speculation"] = dataclasses.asdict(speculation_of(conversation.options))
    last = conversation.last
    return {
        "model": last.completion.model if last else "",
        "system": conversation.system,
        "messages": [{"role": turn.role, "content": turn.content} for turn in conversation.turns],
        "settings": settings,
        "statistics": conversation.statistics.as_dict(),
        "last_request_id": last.completion.request_id if last else "",
        "last_seed": last.completion.seed if last else None,
    }


def _stats(chat: Chat, rest: str) -> None:
    for line in chat.conversation.statistics.lines():
        chat.say(line)
    if chat.conversation.last is not None:
        request_id = chat.conversation.last.completion.request_id
        chat.say(f"the last answer, round by round: specinfer explain {request_id}")


def _reset(chat: Chat, rest: str) -> None:
    chat.conversation.reset()
    chat.say("forgotten")


def _help(chat: Chat, rest: str) -> None:
    chat.say(HELP)


def _quit(chat: Chat, rest: str) -> NoReturn:
    raise EOFError


COMMANDS: dict[str, Callable[[Chat, str], None]] = {
    "/speculation": _speculation,
    "/again": _again,
    "/tree": _tree,
    "/rounds": _rounds,
    "/settings": _settings,
    "/set": _set,
    "/system": _system,
    "/save": _save,
    "/stats": _stats,
    "/reset": _reset,
    "/help": _help,
    "/quit": _quit,
}
