"""Where the time of one request went, as shares, words and rows.

Works on a finished or running request's report alone; this module knows nothing of clusters or of
where the report comes from.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from specinfer import RequestReport, RoundReport
from specinfer_cli.console import visible

BAR_WIDTH = 20
WIDE_COLUMNS = 120


@dataclass(frozen=True)
class Part:
    """One kind of time.

    Attributes:
        name: short, as in the table's head.
        meaning: what it is spent on, to be read after "went to".
        mark: character of its bars, so that they can be told apart without colour.
        style: colour of its bars.
    """

    name: str
    meaning: str
    mark: str
    style: str


DRAFT = Part("draft", "the drafter's guessing", "▒", "yellow")
VERIFY = Part("verify", "the target's passes", "█", "green")
QUEUE = Part("queue", "waiting inside the workers for other sessions", "·", "red")
NETWORK = Part("network", "the way to the workers and back", "╌", "blue")
ROUTER = Part("router", "the router's own work", "░", "magenta")
COMMIT = Part("commit", "the store", "▓", "cyan")
IN_ROUNDS = (DRAFT, VERIFY, QUEUE, NETWORK, ROUTER, COMMIT)
ADMISSION = Part("admission", "waiting to be admitted", "", "")
PREPARE = Part("prepare", "template, tokenizer and store before the first round", "", "")
BETWEEN = Part("between", "waiting between rounds, such as for a slow reader", "", "")


@dataclass(frozen=True)
class Totals:
    """Sums over a request.

    Attributes:
        seconds: from arrival to the end, or to the last round that is known.
        parts: each kind of time with its seconds, in the order of a request's life.
        num_tokens, num_draft_tokens, num_accepted_tokens: over the rounds that are known.
    """

    seconds: float
    parts: tuple[tuple[Part, float], ...]
    num_tokens: int
    num_draft_tokens: int
    num_accepted_tokens: int

    @property
    def dominant(self) -> tuple[Part, float]:
        """The kind of time that took most, with its seconds."""
        return max(self.parts, key=lambda part: part[1])


def round_parts(report: RoundReport) -> tuple[tuple[Part, float], ...]:
    """The seconds of one round by kind; the store's part is taken out of the router's."""
    facts = report.facts
    seconds = (
        facts.draft_seconds,
        facts.verify_seconds,
        facts.queue_seconds,
        facts.network_seconds,
        max(0.0, facts.router_seconds - facts.commit_seconds),
        facts.commit_seconds,
    )
    return tuple(zip(IN_ROUNDS, seconds, strict=True))


def totals(report: RequestReport) -> Totals:
    """The sums; what lies before the rounds that are kept counts as time between rounds."""
    rounds, timings = report.rounds, report.timings
    ends = (timings.total_seconds, *(each.start_seconds + each.seconds for each in rounds))
    seconds = max(ends)
    sums = {part: 0.0 for part in IN_ROUNDS}
    for each in rounds:
        for part, spent in round_parts(each):
            sums[part] += spent
    known = timings.queue_seconds + timings.prepare_seconds + sum(each.seconds for each in rounds)
    before = ((ADMISSION, timings.queue_seconds), (PREPARE, timings.prepare_seconds))
    return Totals(
        seconds=seconds,
        parts=(*before, *sums.items(), (BETWEEN, max(0.0, seconds - known))),
        num_tokens=sum(each.num_tokens for each in rounds),
        num_draft_tokens=sum(each.facts.num_draft_tokens for each in rounds),
        num_accepted_tokens=sum(each.facts.num_accepted_tokens for each in rounds),
    )


def words(report: RequestReport) -> list[str]:
    """What there is to say about the request as a whole."""
    found, timings = totals(report), report.timings
    head = f"request {report.request_id}: {report.outcome}, {found.seconds * 1e3:.1f} ms"
    prompt = f"prompt {report.num_prompt_tokens} tokens, {report.num_cached_tokens} of them cached"
    before = (
        f"admitted after {timings.queue_seconds * 1e3:.1f} ms, prepared in "
        f"{timings.prepare_seconds * 1e3:.1f} ms, first token after "
        f"{timings.first_token_seconds * 1e3:.1f} ms"
    )
    lines = [head, prompt, before]
    if report.rounds:
        a_round = found.num_tokens / len(report.rounds)
        lines.append(
            f"{found.num_tokens} tokens in {len(report.rounds)} rounds, {a_round:.2f} a round, "
            f"{found.num_accepted_tokens} of {found.num_draft_tokens} guesses confirmed"
        )
    if report.rounds and report.rounds[0].offset:
        lines.append(f"the rounds of the first {report.rounds[0].offset} tokens are not kept")
    part, seconds = found.dominant
    share = seconds / found.seconds if found.seconds else 0.0
    return [*lines, f"most of the time, {share:.0%}, went to {part.meaning}"]


def picture(report: RequestReport, max_rounds: int, *, wide: bool = True) -> RenderableType:
    """A row for each of the last `max_rounds` rounds, the sums, and what the bars mean.

    Takes WIDE_COLUMNS, or 80 when not `wide`: the bars alone tell a round's parts then.
    """
    shown = report.rounds[-max_rounds:]
    longest = max((each.seconds for each in shown), default=0.0)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("token", "at ms", "took", "tokens", "guessed", "right"):
        table.add_column(name, justify="right", no_wrap=True)
    for part in IN_ROUNDS if wide else ():
        table.add_column(part.name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for each in shown:
        numbers = _times(each) if wide else ()
        table.add_row(*_counts(each), *numbers, _bar(each, longest))
    hidden = len(report.rounds) - len(shown)
    above = [Text(f"{hidden} earlier rounds are left out; --rounds shows more", "dim")]
    return Group(*(above if hidden else []), table, Text(), _shares(report), Text(), legend())


def _counts(each: RoundReport) -> list[str]:
    facts = each.facts
    counts = (each.num_tokens, facts.num_draft_tokens, facts.num_accepted_tokens)
    return [
        str(each.offset),
        _milliseconds(each.start_seconds),
        _milliseconds(each.seconds),
        *(str(count) for count in counts),
    ]


def _times(each: RoundReport) -> list[str]:
    return [_milliseconds(seconds) for _, seconds in round_parts(each)]


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"


def _bar(each: RoundReport, longest: float) -> Text:
    """The round's parts in a row, the longest round being as long as a bar can be."""
    result = Text()
    scale = BAR_WIDTH / longest if longest else 0.0
    spent = drawn = 0.0
    for part, seconds in round_parts(each):
        # Rounding the running sum keeps the whole bar as long as it should be.
        spent += seconds
        length = round(spent * scale) - round(drawn)
        drawn += length
        result.append(part.mark * length, part.style)
    if each.facts.root_only_reason:
        result.append(f" {visible(each.facts.root_only_reason).replace('_', ' ')}", "dim")
    return result


def _shares(report: RequestReport) -> Table:
    """All the time by kind, with its share."""
    found = totals(report)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    for part, seconds in found.parts:
        share = seconds / found.seconds if found.seconds else 0.0
        table.add_row(
            part.name, f"{seconds * 1e3:.1f} ms", f"{share:.0%}", Text(part.meaning, "dim")
        )
    return table


def legend() -> Text:
    """What the bars are made of."""
    return Text("  ").join(Text(f"{part.mark} {part.name}", part.style) for part in IN_ROUNDS)
