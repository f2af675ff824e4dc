"""Where a chat shows its answers: a plain stream, or a terminal with a live panel below the text.

This module knows nothing of clusters or commands.
"""

from __future__ import annotations

import threading
import time
from typing import Protocol

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.text import Text

from specinfer import TokensEvent
from specinfer_cli.console import write
from specinfer_cli.conversation import PlainSpeed, Show
from specinfer_cli.round_view import LEGEND, Progress, depth_line, panel, speed_line, tinted

REFRESHES_PER_SECOND = 12
MARGIN_COLUMNS = 1


class Answering(Protocol):
    """A context that shows one answer while it is open."""

    def __enter__(self) -> Show:
        """What takes the events."""
        ...

    def __exit__(self, *_: object) -> None:
        """Leave the whole text behind."""
        ...


class PlainAnswer:
    """The text as it is made, and nothing else: for pipes and for terminals that cannot redraw."""

    def __enter__(self) -> Show:
        return _show_plain

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            write("\n")


def _show_plain(event: TokensEvent) -> None:
    write(event.text)


class LiveAnswer:
    """Tinted text that scrolls, and below it a panel that is redrawn a few times a second.

    Rows that are complete are printed for good; only the last row and the panel are live, so an
    answer may be longer than the terminal is high.
    """

    def __init__(self, console: Console, plain: PlainSpeed | None, *, tree: bool) -> None:
        """Show on `console`; `plain` is what to compare with, `tree` whether trees are drawn."""
        self._console = console
        self._plain = plain
        self._tree = tree
        self._lock = threading.Lock()
        self._progress = Progress()
        self._row = Text()
        # The panel is made on the thread that draws, a few times a second, not for every event.
        self._live = Live(
            self,
            console=console,
            transient=True,
            refresh_per_second=REFRESHES_PER_SECOND,
        )

    def __enter__(self) -> Show:
        self._live.start()
        return self._show

    def __exit__(self, kind: object, *_: object) -> None:
        self._live.stop()
        with self._lock:
            row, self._row = self._row, Text()
        self._console.print(row, soft_wrap=True)
        if kind is None and self._progress.num_rounds:
            self._console.print(self._summary(), soft_wrap=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        with self._lock:
            yield Group(self._row.copy(), panel(self._progress, self._plain, tree=self._tree))

    def _summary(self) -> Text:
        """What stays below an answer; one without guesses has nothing to be compared with."""
        if not self._progress.num_drafts:
            return speed_line(self._progress, None)
        lines = [depth_line(self._progress), speed_line(self._progress, self._plain)]
        return Text("\n").join(lines if self._progress.detail is None else [*lines, LEGEND])

    def _show(self, event: TokensEvent) -> None:
        text = tinted(event)
        with self._lock:
            self._progress.add(event, time.perf_counter())
            self._row.append_text(text)
            done, self._row = _complete_rows(self._console, self._row)
        if done is not None:
            self._live.console.print(done)


def _complete_rows(console: Console, text: Text) -> tuple[Text | None, Text]:
    """The rows of `text` that can grow no more, if any, and the last one, which can."""
    rows = text.wrap(console, console.width - MARGIN_COLUMNS, no_wrap=False)
    if len(rows) < 2:
        return None, text
    *done, last = rows
    return Text("\n").join(done), last
