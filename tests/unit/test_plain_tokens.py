"""Several plain tokens for one step: as many passes, the same tokens, one answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from torch import Tensor

from specinfer.errors import Cancelled, InternalError, InvalidRequest
from specinfer.messages import RoundFacts, StepCost, VerifyResult
from specinfer.sampling import SamplingParams
from specinfer.step_curve import StepCurve
from specinfer.tree import TokenTree
from specinfer_engine.batch import SequenceRows
from specinfer_router.calibration import Calibration
from specinfer_router.deadlines import StepDeadline
from specinfer_router.plain_pace import MOST_TOKENS, PlainPace
from specinfer_router.policy import PlainSpeed
from specinfer_router.round_history import RoundHistory
from specinfer_router.seats import Checked, Guess
from specinfer_verify.engine import VerifyEngine
from specinfer_verify.session import PendingStep
from tests.kit.table_models import TableRunner, greedy_output, random_drafter
from tests.kit.verify_driver import TIMEOUT, Job, decode, running, table_engine

GREEDY = SamplingParams(temperature=0.0)
VOCAB = 5
PROMPT: tuple[int, ...] = (1, 2, 3)


@pytest.fixture
def counted() -> Iterator[tuple[VerifyEngine, TableRunner]]:
    engine, runner, _ = table_engine()
    with running(engine):
        engine.open("a", 0, PROMPT, GREEDY, len(PROMPT)).result(TIMEOUT)
        yield engine, runner


def right_tokens(num_tokens: int) -> tuple[int, ...]:
    """Output of the greedy table model."""
    return greedy_output(PROMPT, num_tokens, VOCAB)


def ask(engine: VerifyEngine, epoch: int, root: int, num_tokens: int) -> VerifyResult:
    step = engine.step("a", epoch, TokenTree.root_only(root), num_tokens=num_tokens)
    return step.result(TIMEOUT)


def test_a_step_brings_as_many_tokens_as_it_asks_for(
    counted: tuple[VerifyEngine, TableRunner],
) -> None:
    engine, runner = counted
    first = ask(engine, 0, PROMPT[-1], 4)
    assert (first.epoch, first.accepted, first.token_ids) == (1, (), right_tokens(4))
    assert runner.num_rows[-3:] == [1, 1, 1]
    assert first.compute_seconds > 0
    second = ask(engine, 1, first.token_ids[-1], 1)
    assert first.token_ids + second.token_ids == right_tokens(5)


def test_it_ends_with_the_text_and_with_the_session(
    counted: tuple[VerifyEngine, TableRunner],
) -> None:
    right = right_tokens(16)
    engine, _, _ = table_engine(end_token_ids=(right[2],))
    with running(engine):
        engine.open("a", 0, PROMPT, GREEDY, len(PROMPT)).result(TIMEOUT)
        assert ask(engine, 0, PROMPT[-1], 16).token_ids == right[: right.index(right[2]) + 1]
    engine, _, _ = table_engine(max_model_len=8)
    with running(engine):
        engine.open("a", 0, PROMPT, GREEDY, len(PROMPT)).result(TIMEOUT)
        assert ask(engine, 0, PROMPT[-1], 16).token_ids == right[:5]


@pytest.mark.parametrize(
    ("tree", "num_tokens"),
    [
        (TokenTree.root_only(3), 0),
        (TokenTree.root_only(3), 17),
        (TokenTree.chain((3, 1)), 2),
    ],
)
def test_what_cannot_be_asked_for(
    counted: tuple[VerifyEngine, TableRunner], tree: TokenTree, num_tokens: int
) -> None:
    engine, _ = counted
    failed = engine.step("a", 0, tree, num_tokens=num_tokens).exception(TIMEOUT)
    assert isinstance(failed, InvalidRequest)
    assert failed.field == "num_tokens"
    assert ask(engine, 0, PROMPT[-1], 2).token_ids == right_tokens(2)


def test_a_repeated_step_gets_the_same_answer(counted: tuple[VerifyEngine, TableRunner]) -> None:
    engine, _ = counted
    first = ask(engine, 0, PROMPT[-1], 3)
    assert ask(engine, 0, PROMPT[-1], 3) == first


class PausingRunner(TableRunner):
    """Lets something happen after the second pass with a root alone."""

    between: Callable[[], None] | None = None

    def forward(self, rows: Sequence[SequenceRows]) -> list[Tensor]:
        """As the table's."""
        logits = super().forward(rows)
        if self.num_rows[-2:] == [1, 1] and self.between is not None:
            happening, self.between = self.between, None
            happening()
        return logits


def interrupted(act: str) -> tuple[BaseException | None, list[VerifyResult]]:
    """A step of eight tokens, and what comes after its second one; how it ends, and the act."""
    engine, runner, _ = table_engine(make_runner=PausingRunner)
    assert isinstance(runner, PausingRunner)
    opened: list[Future[None]] = []
    stepped: list[Future[VerifyResult]] = []
    guesses = TokenTree.chain((PROMPT[-1], *right_tokens(2)))
    acts: dict[str, Callable[[], None]] = {
        "open": lambda: opened.append(engine.open("a", 0, PROMPT, GREEDY, len(PROMPT))),
        "tree": lambda: stepped.append(engine.step("a", 0, guesses)),
    }
    runner.between = acts[act]
    with running(engine):
        engine.open("a", 0, PROMPT, GREEDY, len(PROMPT)).result(TIMEOUT)
        step = engine.step("a", 0, TokenTree.root_only(PROMPT[-1]), num_tokens=8)
        error = step.exception(TIMEOUT)
        done = [*([] if error else [step]), *stepped]
        assert all(future.exception(TIMEOUT) is None for future in opened)
        return error, [future.result(TIMEOUT) for future in done]


def test_a_session_that_is_opened_again_between_two_passes_begins_the_step_again() -> None:
    error, results = interrupted("open")
    assert error is None
    assert [result.token_ids for result in results] == [right_tokens(8)]


def test_a_tree_that_comes_between_two_passes_takes_the_steps_place() -> None:
    error, results = interrupted("tree")
    assert isinstance(error, Cancelled)
    assert [result.token_ids for result in results] == [right_tokens(3)]


class SpoiledRunner(TableRunner):
    """Makes a NaN in the fourth pass with a root alone."""

    def forward(self, rows: Sequence[SequenceRows]) -> list[Tensor]:
        """As the table's, but for that pass."""
        logits = super().forward(rows)
        if self.num_rows[-4:] == [1, 1, 1, 1]:
            logits[-1][:] = float("nan")
        return logits


def test_a_pass_that_fails_leaves_the_tokens_before_it() -> None:
    engine, _, _ = table_engine(make_runner=SpoiledRunner)
    with running(engine):
        engine.open("a", 0, PROMPT[:1], GREEDY, 1).result(TIMEOUT)
        first = ask(engine, 0, PROMPT[0], 8)
        assert len(first.token_ids) == 3
        spoiled = engine.step("a", 1, TokenTree.root_only(first.token_ids[-1]))
        assert isinstance(spoiled.exception(TIMEOUT), InternalError)


def test_a_step_that_asks_for_another_number_is_another_step() -> None:
    engine, _, _ = table_engine()
    engine.open("a", 0, PROMPT, GREEDY, len(PROMPT))
    root = TokenTree.root_only(PROMPT[-1])
    steps = [engine.step("a", 0, root, num_tokens=count) for count in (4, 4, 2)]
    with running(engine):
        assert isinstance(steps[0].exception(TIMEOUT), Cancelled)
        assert isinstance(steps[1].exception(TIMEOUT), Cancelled)
        assert steps[2].result(TIMEOUT).token_ids == right_tokens(2)


def test_negative_control_a_step_that_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PendingStep, "begin_again", lambda step: None)
    _, results = interrupted("open")
    assert [result.token_ids for result in results] != [right_tokens(8)]


@pytest.mark.parametrize("roots_ahead", [False, True])
@pytest.mark.parametrize("num_blocks", [256, 40])
def test_no_token_changes_in_company_or_preempted(num_blocks: int, roots_ahead: bool) -> None:
    rng = random.Random(11)
    laws = [GREEDY, SamplingParams(seed=3), SamplingParams(repetition_penalty=1.3, seed=4)]
    jobs, outputs = [], []
    for index in range(12):
        prompt = tuple(rng.randrange(VOCAB) for _ in range(rng.randrange(1, 40)))
        jobs.append(Job(prompt, laws[index % 3], 40))
        engine, _, _ = table_engine(VOCAB)
        with running(engine):
            outputs.append(decode(engine, "alone", jobs[-1]))
    engine, _, blocks = table_engine(
        VOCAB, num_blocks=num_blocks, roots_ahead=roots_ahead, yield_seconds=0.0
    )

    def run(index: int) -> list[int]:
        job, own = jobs[index], random.Random(index)
        tokens, epoch, name = list(job.prompt), 0, f"s{index}"
        known = (*job.prompt, *outputs[index])
        guess = random_drafter(own, VOCAB, known=known)
        engine.open(name, 0, tokens, job.sampling, len(tokens)).result(TIMEOUT)
        while len(tokens) < len(known):
            plain = own.random() < 0.7
            tree = TokenTree.root_only(tokens[-1]) if plain else guess(tokens)
            most = own.randrange(1, 9) if len(tree) == 1 else 1
            result = engine.step(name, epoch, tree, num_tokens=most).result(TIMEOUT)
            tokens, epoch = [*tokens, *result.token_ids], result.epoch
        engine.close(name).result(TIMEOUT)
        return tokens[len(job.prompt) :][: job.num_tokens]

    with running(engine), ThreadPoolExecutor(len(jobs)) as pool:
        assert list(pool.map(run, range(len(jobs)))) == outputs
        assert blocks.num_free_blocks == blocks.num_blocks


def test_a_round_asks_for_what_comes_within_its_time() -> None:
    pace = PlainPace(0.05)
    assert pace.num_tokens(100) == 1, "nothing is known yet"
    pace.observe(0.3, 1)
    assert pace.num_tokens(100) == 1, "the first pass read a prompt"
    pace.observe(0.015, 1)
    assert pace.num_tokens(100) == 3
    assert pace.num_tokens(2) == 2, "no more than are wanted"
    pace.observe(0.002, 2)
    assert pace.num_tokens(100) == MOST_TOKENS
    alone = PlainPace(0.0)
    alone.observe(0.001, 1)
    assert alone.num_tokens(100) == 1


def test_what_plain_decoding_takes_is_told_by_the_token() -> None:
    speed = PlainSpeed([StepCost(1, 8, 0.02)])
    facts = RoundFacts(epoch=1, verify_seconds=0.08)
    for _ in range(200):
        speed.observe(facts, 8)
    assert speed.seconds == pytest.approx(0.01, rel=0.01)


@pytest.mark.parametrize(
    ("reason", "counts"),
    [("disabled", True), ("no_drafter", True), ("budget", False), ("deadline", False)],
)
def test_a_single_token_between_guesses_is_no_plain_decoding(reason: str, counts: bool) -> None:
    """It waits for the wire by itself, and would make speculation look faster than it is."""
    speed = PlainSpeed([StepCost(1, 8, 0.01)])
    facts = RoundFacts(epoch=1, verify_seconds=0.01, network_seconds=0.04, root_only_reason=reason)
    for _ in range(200):
        speed.observe(facts, 1)
    assert speed.seconds == pytest.approx(0.05 if counts else 0.01, rel=0.01)


def test_a_round_of_several_passes_may_take_as_long_as_they_do() -> None:
    costs = StepCurve([StepCost(1, 8, 0.1)])
    fixed = StepDeadline(fixed_seconds=0.2)
    assert fixed.wait(costs, num_rows=1, num_steps=8).seconds == pytest.approx(1.6)
    derived = StepDeadline()
    one, eight = (derived.wait(costs, num_rows=1, num_steps=count).seconds for count in (1, 8))
    work = one - derived.floor_seconds
    assert eight == pytest.approx(derived.floor_seconds + 8 * work)


def test_the_costs_of_a_row_are_learned_from_single_passes_alone() -> None:
    def believed(num_tokens: int) -> float:
        calibration = Calibration(StepCurve([StepCost(1, 8, 0.01), StepCost(64, 8, 0.1)]))
        history = RoundHistory(calibration, temperature=0.0, context_len=8)
        tokens = (1,) * num_tokens
        for epoch in range(12):
            result = VerifyResult(
                epoch=epoch + 1, accepted=(), token_ids=tokens, num_rows=1, compute_seconds=0.8
            )
            guess = Guess(TokenTree.root_only(1), "budget", 0.0)
            history.observe(guess, Checked(result, 0.8), context_len=8)
        return calibration.costs.at(1, 8)

    assert believed(8) == pytest.approx(0.01), "what shared each of the passes is not known"
    assert believed(1) > 0.01
