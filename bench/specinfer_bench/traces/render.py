"""A trace as text: a tree with times, and what each kind of span said. Knows of no services."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from specinfer_bench.traces.collector import ReceivedSpan, children_of, roots_of

MAX_ROUNDS = 2
BAR_WIDTH = 24


def rendered_tree(spans: Sequence[ReceivedSpan]) -> str:
    """The spans of one trace, one line each; of many rounds the first and the last are drawn."""
    roots = roots_of(spans)
    begin, end = min(span.start for span in spans), max(span.end for span in spans)
    rows = [("span", "kind", "from", "takes", "")]
    for root in roots:
        rows += _rows(root, spans, 0, (begin, end))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(_line(row, widths) for row in rows)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    name, kind, start, took, bar = row
    left = f"{name:<{widths[0]}}  {kind:<{widths[1]}}"
    return f"{left}  {start:>{widths[2]}}  {took:>{widths[3]}}  {bar}".rstrip()


def _rows(
    span: ReceivedSpan, spans: Sequence[ReceivedSpan], depth: int, whole: tuple[int, int]
) -> Iterator[tuple[str, str, str, str, str]]:
    name = f"{'  ' * depth}{span.name} ({span.service.removeprefix('specinfer-')})"
    start, took = f"{(span.start - whole[0]) / 1e6:.2f}", f"{(span.end - span.start) / 1e6:.2f}"
    yield name, span.kind, start, took, _bar(span, whole)
    below = children_of(span, spans)
    rounds = [child for child in below if child.name == "round"]
    hidden = {child.span_id for child in rounds[1:-1]} if len(rounds) > MAX_ROUNDS else set()
    told = False
    for child in below:
        if child.span_id not in hidden:
            yield from _rows(child, spans, depth + 1, whole)
        elif not told:
            yield f"{'  ' * (depth + 1)}... {len(hidden)} rounds like it", "", "", "", ""
            told = True


def _bar(span: ReceivedSpan, whole: tuple[int, int]) -> str:
    scale = BAR_WIDTH / max(1, whole[1] - whole[0])
    left = min(BAR_WIDTH - 1, round((span.start - whole[0]) * scale))
    right = max(left + 1, round((span.end - whole[0]) * scale))
    return f"|{' ' * left}{'=' * (right - left)}{' ' * (BAR_WIDTH - right)}|"


def rendered_attributes(spans: Sequence[ReceivedSpan]) -> str:
    """What the first span of each name said, with its moments."""
    seen: set[tuple[str, str]] = set()
    lines: list[str] = []
    for span in sorted(spans, key=lambda span: span.start):
        if (span.service, span.name) in seen:
            continue
        seen.add((span.service, span.name))
        about = [f"  {key} = {value!r}" for key, value in sorted(span.attributes.items())]
        about += [
            f"  at {(at - span.start) / 1e6:.2f} ms: {name} {attributes or ''}".rstrip()
            for at, name, attributes in span.events
        ]
        if about:
            lines += [f"{span.name} ({span.service})", *about, ""]
    return "\n".join(lines).rstrip()
