"""`specinfer chat`: a conversation in the terminal, or line by line from a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

import typer
from rich.console import Console

from specinfer import ChatMessage, Client
from specinfer.errors import InvalidRequest, SpecinferError
from specinfer.options import GenerateOptions
from specinfer_cli import arguments
from specinfer_cli.console import friendly, messages, write
from specinfer_cli.statistics import Statistics

HELP = """\
/stats   what speculation did so far: confirmed guesses by depth, tokens a round, tokens/s
/reset   forget the conversation
/quit    leave (or Ctrl-D); Ctrl-C stops an answer"""

_System = Annotated[str | None, typer.Option("--system", help="System message to put first.")]


@dataclass
class Conversation:
    """A conversation with one cluster.

    Attributes:
        client: the open client.
        options: options of every call.
        system: system message, or None.
        turns: what was said, without the system message.
        statistics: sums over all answers since the start.
    """

    client: Client
    options: GenerateOptions
    system: str | None = None
    turns: list[ChatMessage] = field(default_factory=list)
    statistics: Statistics = field(default_factory=Statistics)

    def ask(self, text: str, show: Callable[[str], None]) -> None:
        """Stream the answer to `text` through `show`; an error or an interrupt forgets the turn."""
        question = ChatMessage("user", text)
        first = [ChatMessage("system", self.system)] if self.system is not None else []
        began = time.perf_counter()
        options = self.options.copy()
        options["messages"] = [*first, *self.turns, question]
        with self.client.stream(**options) as stream:
            for event in stream:
                show(event.text)
            completion = stream.completion
        self.statistics = self.statistics.add(completion, time.perf_counter() - began)
        self.turns += [question, ChatMessage("assistant", completion.text)]


@friendly
def chat(
    router: arguments.Router = arguments.DEFAULT_ADDRESS,
    system: _System = None,
    max_tokens: arguments.MaxTokens = None,
    temperature: arguments.Temperature = 0.0,
    top_k: arguments.TopK = 0,
    top_p: arguments.TopP = 1.0,
    min_p: arguments.MinP = 0.0,
    seed: arguments.Seed = None,
    no_speculation: arguments.NoSpeculation = False,
    max_nodes: arguments.MaxNodes = None,
    max_depth: arguments.MaxDepth = None,
) -> None:
    """Talk with the model of a running cluster; /help lists what else can be typed."""
    options: GenerateOptions = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
        "speculation": arguments.speculation_options(no_speculation, max_nodes, max_depth),
    }
    with Client(router) as client:
        capabilities = client.capabilities()
        if not capabilities.chat:
            raise InvalidRequest(
                f"{capabilities.model} has no chat template; use `specinfer generate --raw`"
            )
        interactive = sys.stdin.isatty()
        if interactive:
            messages().print(f"{capabilities.model}. /help lists the commands.", markup=False)
        _loop(Conversation(client, options, system), interactive)


def _loop(conversation: Conversation, interactive: bool) -> None:
    """Answer line after line; from a pipe the first failed answer ends the command."""
    console = messages()
    read = _prompted if interactive else _piped
    while (line := read()) is not None:
        text = line.strip()
        if text == "/quit":
            return
        if text.startswith("/"):
            _command(conversation, text, console)
        elif text:
            try:
                conversation.ask(text, write)
            except SpecinferError as error:
                if not interactive:
                    raise
                console.print(f"\nerror: {error.message}", style="red", markup=False)
            except KeyboardInterrupt:
                if not interactive:
                    raise
                console.print("\nstopped; the turn is forgotten", style="dim", markup=False)
            else:
                write("\n")


def _command(conversation: Conversation, text: str, console: Console) -> None:
    if text == "/stats":
        for line in conversation.statistics.lines():
            console.print(line, markup=False, soft_wrap=True)
    elif text == "/reset":
        conversation.turns.clear()
        console.print("forgotten", markup=False)
    elif text == "/help":
        console.print(HELP, markup=False)
    else:
        console.print(f"unknown command {text}\n{HELP}", markup=False)


def _prompted() -> str | None:
    """A line typed at the prompt; None at Ctrl-D, an empty line after Ctrl-C."""
    try:
        return input("> ")
    except EOFError:
        return None
    except KeyboardInterrupt:
        write("\n")
        return ""


def _piped() -> str | None:
    line = sys.stdin.readline()
    return line or None
