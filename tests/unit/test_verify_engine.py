"""The verify engine: lifecycle, epochs, bad items, limits, logprobs. A table model computes."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from specinfer.errors import (
    Cancelled,
    InternalError,
    InvalidRequest,
    InvalidTree,
    NotFound,
    ResourceExhausted,
    SpecinferError,
    StaleEpoch,
    Unavailable,
)
from specinfer.sampling import SamplingParams
from specinfer.tree import TokenTree
from specinfer_verify.engine import VerifyEngine
from tests.kit.table_models import TableModel, TableRunner, random_drafter
from tests.kit.verify_driver import TIMEOUT, Job, decode, decode_rounds, running, table_engine

GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture
def engine() -> Iterator[VerifyEngine]:
    built, _, _ = table_engine()
    with running(built):
        yield built


def open_session(engine: VerifyEngine, session_id: str = "a", epoch: int = 0) -> None:
    engine.open(session_id, epoch, (1, 2, 3), GREEDY, 3).result(TIMEOUT)


def step(engine: VerifyEngine, epoch: int, *token_ids: int, session_id: str = "a") -> list[int]:
    tree = TokenTree.chain(token_ids)
    return list(engine.step(session_id, epoch, tree).result(TIMEOUT).token_ids)


def test_a_root_alone_is_plain_decoding(engine: VerifyEngine) -> None:
    open_session(engine)
    model = TableModel(5)
    tokens = [1, 2, 3]
    for epoch in range(6):
        (token_id,) = step(engine, epoch, tokens[-1])
        assert token_id == int(model.logits(tokens).argmax())
        tokens.append(token_id)


def test_a_right_chain_is_accepted_whole_with_a_tail(engine: VerifyEngine) -> None:
    plain = decode(engine, "plain", Job((1, 2, 3), GREEDY, 6))
    open_session(engine)
    result = engine.step("a", 0, TokenTree.chain([3, *plain[:5]])).result(TIMEOUT)
    assert result.accepted == (1, 2, 3, 4, 5)
    assert list(result.token_ids) == plain
    assert result.epoch == 1


def test_a_repeated_step_gets_the_same_answer_and_an_old_one_is_stale(
    engine: VerifyEngine,
) -> None:
    open_session(engine)
    first = engine.step("a", 0, TokenTree.root_only(3)).result(TIMEOUT)
    again = engine.step("a", 0, TokenTree.root_only(3)).result(TIMEOUT)
    assert again == first
    step(engine, 1, first.token_ids[-1])
    for epoch in (0, 3):
        with pytest.raises(StaleEpoch):
            step(engine, epoch, 3)


def test_an_unknown_session_is_not_found_and_its_close_is_fine(engine: VerifyEngine) -> None:
    with pytest.raises(NotFound):
        step(engine, 0, 1, session_id="nobody")
    engine.close("nobody").result(TIMEOUT)


def test_a_closed_session_is_gone_and_frees_its_blocks(engine: VerifyEngine) -> None:
    free = engine.load().num_free_blocks
    open_session(engine)
    step(engine, 0, 3)
    assert engine.load().num_free_blocks < free
    engine.close("a").result(TIMEOUT)
    assert engine.load().num_free_blocks == free
    with pytest.raises(NotFound):
        step(engine, 1, 3)


@pytest.mark.parametrize(
    ("tree", "kind"),
    [
        (TokenTree.root_only(4), InvalidTree),
        (TokenTree((3, 5), (-1, 0)), InvalidTree),
        (TokenTree.chain([3] + [1] * 32), InvalidTree),
    ],
    ids=["another root", "token out of vocabulary", "too many nodes"],
)
def test_a_bad_tree_fails_alone(
    engine: VerifyEngine, tree: TokenTree, kind: type[SpecinferError]
) -> None:
    open_session(engine)
    open_session(engine, "b")
    bad = engine.step("a", 0, tree)
    good = engine.step("b", 0, TokenTree.root_only(3))
    with pytest.raises(kind):
        bad.result(TIMEOUT)
    assert good.result(TIMEOUT).epoch == 1
    assert step(engine, 0, 3) == list(good.result().token_ids)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (("", 0, (1,), GREEDY, 1), "session_id"),
        (("a", -1, (1,), GREEDY, 1), "epoch"),
        (("a", 0, (), GREEDY, 0), "token_ids"),
        (("a", 0, (1, 5), GREEDY, 1), "token_ids"),
        (("a", 0, (-1, 1), GREEDY, 1), "token_ids"),
        (("a", 0, (1,) * 200, GREEDY, 1), "token_ids"),
        (("a", 0, (1, 2), GREEDY, 3), "num_prompt_tokens"),
        (("a", 0, (1, 2), GREEDY, 0), "num_prompt_tokens"),
        (("a", 0, (1, 2), GREEDY, 2, 21), "num_logprobs"),
        (("a", 0, (1, 2), SamplingParams(logit_bias={5: 1.0}), 2), "logit_bias"),
    ],
)
def test_a_bad_open_names_its_field(
    engine: VerifyEngine, arguments: tuple[object, ...], field: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        engine.open(*arguments).result(TIMEOUT)  # type: ignore[arg-type]
    assert caught.value.field == field
    assert engine.load().num_sessions == 0


def test_a_session_longer_than_the_pool_is_refused_at_open() -> None:
    engine, _, _ = table_engine(num_blocks=4, block_size=4)
    with running(engine):
        assert engine.limits.max_model_len == 16
        with pytest.raises(InvalidRequest, match="leave no room"):
            engine.open("a", 0, (1,) * 16, GREEDY, 16).result(TIMEOUT)


def test_one_session_too_many_is_told_to_come_back() -> None:
    engine, _, _ = table_engine(max_sessions=2)
    with running(engine):
        open_session(engine, "a")
        open_session(engine, "b")
        with pytest.raises(ResourceExhausted) as caught:
            open_session(engine, "c")
        assert caught.value.retry_after
        engine.close("a").result(TIMEOUT)
        open_session(engine, "c")


def test_opening_again_replaces_and_never_goes_back(engine: VerifyEngine) -> None:
    open_session(engine)
    (first,) = step(engine, 0, 3)
    open_session_at_one = engine.open("a", 1, (1, 2, 3, first), GREEDY, 3)
    open_session_at_one.result(TIMEOUT)
    with pytest.raises(StaleEpoch):
        open_session(engine, epoch=0)
    (second,) = step(engine, 1, first)
    engine.open("a", 5, (1, 2, 3, first), GREEDY, 3).result(TIMEOUT)
    assert step(engine, 5, first) == [second]


def test_the_walk_ends_at_the_models_length_and_the_session_is_then_full() -> None:
    plain_engine, _, _ = table_engine(max_model_len=12)
    with running(plain_engine):
        plain = decode(plain_engine, "plain", Job((1, 2, 3), GREEDY, 9))
        open_session(plain_engine)
        tokens = step(plain_engine, 0, 3, *plain, 0, 0)
        assert tokens == plain
        with pytest.raises(InvalidRequest, match="may not grow"):
            step(plain_engine, 1, plain[-1])


def test_indices_of_accepted_nodes_are_those_of_the_tree_that_came() -> None:
    engine, _, _ = table_engine(max_model_len=6)
    with running(engine):
        plain = decode(engine, "plain", Job((1, 2, 3), GREEDY, 3))
        other = (plain[0] + 1) % 5
        open_session(engine)
        # A deep wrong branch stands before the right nodes and is cut away for its depth.
        tree = TokenTree((3, other, 0, 0, plain[0], plain[1]), (-1, 0, 1, 2, 0, 4))
        result = engine.step("a", 0, tree).result(TIMEOUT)
        assert result.accepted == (4, 5)
        assert list(result.token_ids) == plain


def test_logprobs_are_the_targets_own(engine: VerifyEngine) -> None:
    sampling = SamplingParams(temperature=0.7, top_k=2, seed=3)
    draft = random_drafter(random.Random(1), 5)
    tokens, results = decode_rounds(engine, "a", Job((1, 2), sampling, 12, draft), num_logprobs=2)
    reported = [logprob for result in results for logprob in result.logprobs][: len(tokens)]
    context = [1, 2]
    for token_id, logprob in zip(tokens, reported, strict=True):
        expected = torch.log_softmax(TableModel(5).logits(context).double(), 0)
        assert logprob.token_id == token_id
        assert logprob.logprob == pytest.approx(float(expected[token_id]), abs=1e-12)
        assert [ranked for ranked, _ in logprob.top] == expected.topk(2).indices.tolist()
        context.append(token_id)


def test_facts_of_a_result(engine: VerifyEngine) -> None:
    open_session(engine)
    result = engine.step("a", 0, TokenTree.chain([3, 1])).result(TIMEOUT)
    assert result.num_rows >= 2
    assert result.compute_seconds > 0
    assert result.queue_seconds >= 0
    assert result.logprobs == ()


class FailingRunner(TableRunner):
    """Makes a NaN after token 4, and fails the whole pass after token 0."""

    def forward(self, rows: object) -> list[torch.Tensor]:
        logits = super().forward(rows)  # type: ignore[arg-type]
        for part, values in zip(rows, logits, strict=True):  # type: ignore[call-overload]
            if part.token_ids[-1] == 0:
                raise RuntimeError("the device is gone")
            if part.token_ids[-1] == 4:
                values[:] = torch.nan
        return logits


def test_a_nan_fails_its_session_alone() -> None:
    engine, _, blocks = table_engine(make_runner=FailingRunner)
    with running(engine):
        engine.open("bad", 0, (1, 4), GREEDY, 2)
        engine.open("good", 0, (1, 2), GREEDY, 2)
        bad = engine.step("bad", 0, TokenTree.root_only(4))
        good = engine.step("good", 0, TokenTree.root_only(2))
        with pytest.raises(InternalError, match="NaN"):
            bad.result(TIMEOUT)
        assert good.result(TIMEOUT).epoch == 1
        assert engine.healthy
        engine.close("good").result(TIMEOUT)
        assert blocks.num_free_blocks == blocks.num_blocks


def test_a_failed_pass_fails_everything_pending_and_is_unhealthy() -> None:
    engine, _, _ = table_engine(make_runner=FailingRunner)
    with running(engine):
        engine.open("a", 0, (1, 0), GREEDY, 2)
        with pytest.raises(InternalError, match="device is gone"):
            engine.step("a", 0, TokenTree.root_only(0)).result(TIMEOUT)
        assert not engine.healthy
        with pytest.raises(InternalError):
            engine.step("a", 0, TokenTree.root_only(0))


def test_idle_sessions_are_closed() -> None:
    now = [100.0]
    engine, _, blocks = table_engine(clock=lambda: now[0], session_idle_seconds=60.0)
    with running(engine):
        open_session(engine, "old")
        step(engine, 0, 3, session_id="old")
        now[0] += 59.0
        open_session(engine, "new")
        now[0] += 2.0
        step(engine, 0, 3, session_id="new")
        with pytest.raises(NotFound):
            step(engine, 1, 3, session_id="old")
        assert engine.load().num_sessions == 1
        engine.close("new").result(TIMEOUT)
    assert blocks.num_free_blocks == blocks.num_blocks


def test_draining_refuses_new_sessions_and_lets_open_ones_go_on(engine: VerifyEngine) -> None:
    open_session(engine)
    assert not engine.drain(0.0)
    with pytest.raises(Unavailable):
        open_session(engine, "b")
    assert len(step(engine, 0, 3)) == 1
    engine.close("a").result(TIMEOUT)
    assert engine.drain(TIMEOUT)
    assert engine.load().draining


def test_items_that_wait_together() -> None:
    engine, runner, _ = table_engine()
    # Submitted before the thread starts, so that all of them wait for the same pass.
    engine.open("a", 0, (1, 2, 3), GREEDY, 3)
    first = engine.step("a", 0, TokenTree.root_only(3))
    second = engine.step("a", 0, TokenTree.chain([3, 1]))
    same = engine.step("a", 0, TokenTree.chain([3, 1]))
    with running(engine):
        with pytest.raises(Cancelled, match="another tree"):
            first.result(TIMEOUT)
        assert second.result(TIMEOUT) == same.result(TIMEOUT)
        assert runner.num_rows == [4]


def test_opening_again_cancels_the_step_that_waits() -> None:
    engine, _, _ = table_engine()
    engine.open("a", 0, (1, 2, 3), GREEDY, 3)
    waiting = engine.step("a", 0, TokenTree.root_only(3))
    engine.open("a", 0, (1, 2, 4), GREEDY, 3)
    closed = engine.step("a", 0, TokenTree.root_only(4))
    engine.close("a")
    with running(engine):
        with pytest.raises(Cancelled):
            waiting.result(TIMEOUT)
        # Perhaps of another router, which has taken the session over and opens it again now.
        with pytest.raises(NotFound):
            closed.result(TIMEOUT)
