"""What a chat shows of a round: tinted tokens, the tree, acceptance and speed."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from specinfer import RoundDetail, RoundFacts, TokensEvent, TokenTree
from specinfer_cli.console import visible
from specinfer_cli.conversation import PlainSpeed
from specinfer_cli.round_view import (
    MAX_TREE_ROWS,
    Progress,
    depth_line,
    panel,
    speed_line,
    tinted,
    tree_rows,
)

TREE = TokenTree((1, 2, 3, 4, 5, 6), (-1, 0, 0, 1, 1, 3))
NODES = ("def", " add", " sub", "(", "_", "a")


def event(
    tokens: tuple[str, ...] = (" add", "(", "x"),
    accepted: tuple[int, ...] = (1, 3),
    *,
    text: str | None = None,
    tree: TokenTree = TREE,
    nodes: tuple[str, ...] = NODES,
) -> TokensEvent:
    detail = RoundDetail(tree, accepted, nodes, tokens)
    facts = RoundFacts(1, tree.num_draft_tokens, len(accepted))
    shown = "".join(tokens) if text is None else text
    return TokensEvent(0, shown, (9,) * len(tokens), len(accepted), (), facts, detail)


def detail_of(made: TokensEvent) -> RoundDetail:
    assert made.detail is not None
    return made.detail


def plain(rows: object) -> str:
    console = Console(file=io.StringIO(), width=60, no_color=True)
    console.print(rows)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_tree_is_drawn_with_the_accepted_path_first() -> None:
    rows = [row.plain for row in tree_rows(detail_of(event()))]
    assert rows == [
        "def━┯━·add━┯━(━┯━x",
        "    │      │   └─a",
        "    │      └─_",
        "    └─·sub",
    ]


def test_the_accepted_path_need_not_be_the_first_child() -> None:
    rows = [row.plain for row in tree_rows(detail_of(event((" sub", "!"), (2,))))]
    assert rows[0] == "def━┯━·sub━━━!"
    assert rows[1].startswith("    └─·add─┬─(───a")


def test_a_root_alone_leads_to_the_targets_token() -> None:
    alone = event(("x",), (), tree=TokenTree.root_only(1), nodes=("def",))
    assert [row.plain for row in tree_rows(detail_of(alone))] == ["def━━━x"]


def test_a_text_that_ended_on_a_guess_has_no_token_of_the_target() -> None:
    ended = event((" add", "("), (1, 3))
    rows = [row.plain for row in tree_rows(detail_of(ended))]
    assert rows[0] == "def━┯━·add━┯━(───a"


def test_a_wide_tree_is_cut_and_says_so() -> None:
    many = TokenTree(tuple(range(31)), (-1, *([0] * 30)))
    wide = event(("x",), (), tree=many, nodes=tuple(f"t{node}" for node in range(31)))
    rows = tree_rows(detail_of(wide))
    assert len(rows) == MAX_TREE_ROWS
    assert rows[-1].plain == "… 25 more branches"


def test_tokens_are_told_apart_with_and_without_colour() -> None:
    text = tinted(event())
    assert text.plain == " add(x"
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert styles == {" add": "green", "(": "green", "x": "underline"}


def test_text_that_its_tokens_do_not_add_up_to_has_no_tint() -> None:
    text = tinted(event(text=" ad"))
    assert (text.plain, text.spans) == (" ad", [])


def test_a_models_output_never_steers_the_terminal() -> None:
    assert visible("\x1b[2Jhi\r\x9b\n\t") == "␛[2Jhi␍\ufffd\n\t"
    assert "\x1b" not in tinted(event(("\x1b]0;x", "(", "x"))).plain


def test_progress_counts_depths_and_speed() -> None:
    progress = Progress()
    for second, accepted in enumerate([(1, 3), (1,), (), (1, 3)]):
        progress.add(event(("t",) * (len(accepted) + 1), accepted), now=10.0 + second)
    assert (progress.num_tokens, progress.num_rounds, progress.num_drafts) == (9, 4, 4)
    assert progress.accepted_by_depth == [3, 2]
    assert progress.tokens_per_second == pytest.approx(6 / 3)
    assert "175%" not in depth_line(progress).plain
    assert "1▆ 75%   2▄ 50%" in depth_line(progress).plain
    told = speed_line(progress, PlainSpeed(1.0, "measured here")).plain
    assert told == "2.25 tokens a round  2.0 tokens/s  plain decoding 1.0 (measured here)  2.00x"
    assert "not measured yet" in speed_line(progress, None).plain


def test_the_panel_keeps_its_height_and_its_width() -> None:
    progress = Progress()
    heights = set()
    for made in (event(), event(("x",), (), tree=TokenTree.root_only(1), nodes=("d" * 70,))):
        progress.add(made, now=1.0)
        shown = plain(panel(progress, None, tree=True)).splitlines()
        heights.add(len(shown))
        assert all(len(line) <= 60 for line in shown)
    assert len(heights) == 1
    assert len(plain(panel(progress, None, tree=False)).splitlines()) == 4
