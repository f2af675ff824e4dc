"""`specinfer chat`: a conversation in the terminal, or line by line from a pipe.

This module reads lines and decides which failure ends the command; it knows nothing of how answers
are drawn or what the commands do.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from contextlib import AbstractContextManager
from typing import Annotated

import typer
from rich.console import Console

from specinfer import Client
from specinfer.errors import InvalidRequest, SpecinferError
from specinfer.options import GenerateOptions
from specinfer_cli import arguments
from specinfer_cli.chat_commands import COMMANDS, Chat, Screen, run_command
from specinfer_cli.chat_screen import LiveAnswer, PlainAnswer
from specinfer_cli.console import friendly, messages, output, write
from specinfer_cli.conversation import Conversation, Show

_System = Annotated[str | None, typer.Option("--system", help="System message to put first.")]


class PipeScreen:
    """Answers as plain text."""

    tree = False

    def answering(self, conversation: Conversation) -> AbstractContextManager[Show]:
        """The text alone."""
        return PlainAnswer()


class TerminalScreen:
    """Answers with their rounds."""

    def __init__(self, console: Console) -> None:
        self.tree = True
        self._console = console

    def answering(self, conversation: Conversation) -> AbstractContextManager[Show]:
        """The text, tinted, with a live panel below it."""
        return LiveAnswer(self._console, conversation.plain_speed(), tree=self.tree)


@friendly
def chat(
    router: arguments.Router = arguments.DEFAULT_ADDRESS,
    api_key: arguments.ApiKey = None,
    tls_ca: arguments.TlsCa = None,
    tls_certificate: arguments.TlsCertificate = None,
    tls_key: arguments.TlsKey = None,
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
    """Talk with the model of a running cluster and see how speculation makes its answers.

    /help lists what else can be typed.
    """
    options: GenerateOptions = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
        "speculation": arguments.speculation_options(no_speculation, max_nodes, max_depth),
    }
    tls = arguments.connection([router], api_key, tls_ca, tls_certificate, tls_key)
    with Client(router, tls=tls, api_key=api_key) as client:
        capabilities = client.capabilities()
        if not capabilities.chat:
            raise InvalidRequest(
                f"{capabilities.model} has no chat template; use `specinfer generate --raw`"
            )
        interactive = sys.stdin.isatty()
        screen: Screen = PipeScreen()
        if interactive and _can_redraw(output()):
            screen = TerminalScreen(output())
            options["detail"] = True
        if interactive:
            messages().print(f"{capabilities.model}. /help lists the commands.", markup=False)
            _edit_lines()
        _loop(Chat(Conversation(client, options, system), screen, messages()), interactive)


def _can_redraw(console: Console) -> bool:
    return console.is_terminal and not console.is_dumb_terminal


def _edit_lines() -> None:
    """Arrow keys, history and Tab for commands, where Python was built with readline."""
    with contextlib.suppress(ModuleNotFoundError):
        readline = importlib.import_module("readline")
        readline.set_completer_delims(" ")
        readline.set_completer(_completed)
        readline.parse_and_bind("tab: complete")


def _completed(start: str, number: int) -> str | None:
    found = [name for name in COMMANDS if start and name.startswith(start)]
    return found[number] if number < len(found) else None


def _loop(chat: Chat, interactive: bool) -> None:
    """Answer line after line; from a pipe the first failed answer ends the command."""
    read = _prompted if interactive else _piped
    while (line := read()) is not None:
        try:
            _answer(chat, line.strip(), interactive)
        except EOFError:
            return


def _answer(chat: Chat, text: str, interactive: bool) -> None:
    is_command = text.startswith("/")
    try:
        if is_command:
            run_command(chat, text)
        elif text:
            chat.ask(text)
    except SpecinferError as error:
        if not interactive and not (is_command and isinstance(error, InvalidRequest)):
            raise
        chat.console.print(f"error: {error.message}", style="red", markup=False, soft_wrap=True)
    except KeyboardInterrupt:
        if not interactive:
            raise
        chat.console.print("\nstopped; the turn is forgotten", style="dim", markup=False)


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
