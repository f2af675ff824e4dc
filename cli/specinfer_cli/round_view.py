"""Speculation made visible: tinted tokens, a round's tree in box characters, facts in a panel.

Everything is told without colour too: the target's own tokens are underlined, the accepted path
is drawn with heavy lines. This module knows nothing of conversations or of where it is shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text

from specinfer import RoundDetail, RoundFacts, TokensEvent
from specinfer_cli.console import visible
from specinfer_cli.conversation import PlainSpeed

GUESSED = "green"
OWN = "underline"
REJECTED = "dim"
MAX_TREE_ROWS = 7
MAX_LABEL = 14
MAX_DEPTHS = 8
BARS = " ▁▂▃▄▅▆▇█"
LEGEND = Text.assemble(
    ("guessed", GUESSED),
    (" and confirmed, ", "dim"),
    ("underlined", OWN),
    (": the target's own", "dim"),
)


@dataclass
class Progress:
    """What speculation did in the answer under way.

    Attributes:
        num_tokens: tokens so far.
        num_rounds: rounds so far.
        num_drafts: rounds with a guess.
        num_draft_tokens: guessed tokens.
        accepted_by_depth: confirmed tokens, depth 1 first.
        first_seconds, last_seconds: clock at the first event and at the newest.
        num_first_tokens: tokens of the first event.
        round: facts of the newest round, or None.
        detail: its tree, or None.
    """

    num_tokens: int = 0
    num_rounds: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    accepted_by_depth: list[int] = field(default_factory=list)
    first_seconds: float = 0.0
    last_seconds: float = 0.0
    num_first_tokens: int = 0
    round: RoundFacts | None = None
    detail: RoundDetail | None = None

    def add(self, event: TokensEvent, now: float) -> None:
        """Count one event that came at `now`."""
        if not self.num_rounds:
            self.first_seconds, self.num_first_tokens = now, len(event.token_ids)
        self.last_seconds = now
        self.num_tokens += len(event.token_ids)
        self.num_rounds += 1
        self.num_drafts += event.round.num_draft_tokens > 0
        self.num_draft_tokens += event.round.num_draft_tokens
        missing = event.num_accepted_tokens - len(self.accepted_by_depth)
        self.accepted_by_depth += [0] * missing
        for depth in range(event.num_accepted_tokens):
            self.accepted_by_depth[depth] += 1
        self.round = event.round
        self.detail = event.detail or self.detail

    @property
    def tokens_per_second(self) -> float:
        """Speed since the first event; 0 until there is a second one."""
        seconds = self.last_seconds - self.first_seconds
        return (self.num_tokens - self.num_first_tokens) / seconds if seconds > 0 else 0.0


def tinted(event: TokensEvent) -> Text:
    """The event's text, each token by how it came.

    Texts of tokens are used where they add up to the event's text; where a character or a stop
    string spans events, they do not, and the text is shown without a tint.
    """
    detail = event.detail
    if detail is None or "".join(detail.token_texts) != event.text:
        return Text(visible(event.text))
    result = Text()
    for place, token in enumerate(detail.token_texts):
        guessed = place < event.num_accepted_tokens
        result.append_text(_guessed(token) if guessed else _own(token))
    return result


def _guessed(token: str) -> Text:
    return Text(visible(token), GUESSED)


def _own(token: str) -> Text:
    # A line under spaces would look like text.
    shown = visible(token)
    start = len(shown) - len(shown.lstrip())
    end = len(shown.rstrip())
    result = Text(shown)
    if start < end:
        result.stylize(OWN, start, end)
    return result


@dataclass
class _Node:
    label: str
    accepted: bool
    children: list[_Node] = field(default_factory=list)
    own: bool = False


def tree_rows(detail: RoundDetail, max_rows: int = MAX_TREE_ROWS) -> list[Text]:
    """The tree from left to right, a row for each leaf; the accepted path is the first row.

    Heavy lines lead along the accepted path to the target's own token, light ones to guesses that
    the target did not choose.
    """
    rows = list(_rows(_nodes(detail)))
    if len(rows) <= max_rows:
        return rows
    hidden = len(rows) - max_rows + 1
    return [*rows[: max_rows - 1], Text(f"… {hidden} more branches", "dim")]


def _nodes(detail: RoundDetail) -> _Node:
    accepted = (0, *detail.accepted)
    nodes = [_Node(_label(text), place in accepted) for place, text in enumerate(detail.node_texts)]
    for place, parent in enumerate(detail.tree.parents):
        if parent >= 0:
            nodes[parent].children.append(nodes[place])
    last = nodes[accepted[-1]]
    for text in detail.token_texts[len(detail.accepted) :]:
        last.children.append(_Node(_label(text), True, own=True))
        last = last.children[-1]
    for node in nodes:
        node.children.sort(key=lambda child: not child.accepted)
    return nodes[0]


def _label(text: str) -> str:
    shown = visible(text).replace("\n", "↵").replace("\t", "⇥").replace(" ", "·") or "∅"
    return shown if len(shown) <= MAX_LABEL else shown[: MAX_LABEL - 1] + "…"


def _rows(node: _Node) -> Iterator[Text]:
    style = f"bold {GUESSED}" if node.accepted else REJECTED
    if node.own or (node.accepted and not any(child.accepted for child in node.children)):
        style = f"bold {OWN}"
    label = Text(node.label, style)
    if not node.children:
        yield label
        return
    indent = " " * cell_len(node.label)
    last = len(node.children) - 1
    for place, child in enumerate(node.children):
        for line, row in enumerate(_rows(child)):
            first = place == 0 and line == 0
            connector = _connector(place, last, line, accepted=child.accepted)
            lit = GUESSED if first and child.accepted else REJECTED
            yield Text.assemble(label if first else indent, (connector, lit), row)


def _connector(place: int, last: int, line: int, *, accepted: bool) -> str:
    if line:
        return " │ " if place < last else "   "
    if place:
        return " ├─" if place < last else " └─"
    if not last:
        return "━━━" if accepted else "───"
    return "━┯━" if accepted else "─┬─"


def panel(progress: Progress, plain: PlainSpeed | None, *, tree: bool) -> RenderableType:
    """The newest round's tree, acceptance by depth and the speed beside plain decoding's."""
    rows: list[RenderableType] = []
    detail = progress.detail
    if tree and detail is not None:
        shown = tree_rows(detail)
        rows += shown
        # A panel of one height does not jump while it is redrawn.
        rows += [Text()] * (MAX_TREE_ROWS - len(shown))
    rows += [depth_line(progress), speed_line(progress, plain)]
    for row in rows:
        if isinstance(row, Text):
            row.no_wrap, row.overflow = True, "ellipsis"
    return Panel(Group(*rows), title=_title(progress), title_align="left", border_style="dim")


def _title(progress: Progress) -> Text:
    facts = progress.round
    if facts is None:
        return Text("waiting for the first tokens")
    if facts.root_only_reason:
        what = f"no guesses ({facts.root_only_reason.replace('_', ' ')})"
    else:
        what = f"{facts.num_accepted_tokens} of {facts.num_draft_tokens} guesses confirmed"
    return Text(f"round {progress.num_rounds}: {what}")


def depth_line(progress: Progress) -> Text:
    """Share of the guessing rounds whose guess was confirmed at each depth, as bars."""
    if not progress.num_drafts:
        return Text("acceptance by depth: no guesses yet", "dim")
    shares = [count / progress.num_drafts for count in progress.accepted_by_depth]
    shown = [f"{depth}{bar(share)} {share:.0%}" for depth, share in _numbered(shares)]
    rest = " …" if len(shares) > MAX_DEPTHS else ""
    return Text.assemble(("acceptance by depth  ", "dim"), "   ".join(shown) + rest)


def _numbered(shares: Sequence[float]) -> Iterator[tuple[int, float]]:
    return iter(enumerate(shares[:MAX_DEPTHS], start=1))


def bar(share: float) -> str:
    """One character as high as the share."""
    return BARS[round(min(max(share, 0.0), 1.0) * (len(BARS) - 1))]


def speed_line(progress: Progress, plain: PlainSpeed | None) -> Text:
    """Tokens a round and tokens a second, beside what plain decoding does where that matters."""
    a_round = progress.num_tokens / progress.num_rounds if progress.num_rounds else 0.0
    speed = progress.tokens_per_second
    result = Text.assemble(f"{a_round:.2f} ", ("tokens a round  ", "dim"))
    if speed:
        result.append_text(Text.assemble((f"{speed:.1f}", "bold"), (" tokens/s  ", "dim")))
    if not progress.num_drafts:
        return result.append("plain decoding", "dim")
    if plain is None:
        return result.append("plain decoding: not measured yet", "dim")
    told = f"plain decoding {plain.tokens_per_second:.1f} ({plain.source})"
    result.append(told, "dim")
    return result.append(f"  {speed / plain.tokens_per_second:.2f}x") if speed else result
