"""State after thousands of steps: lengths, epochs, blocks; with all ways that a session can end."""

from __future__ import annotations

import random
from concurrent.futures import wait
from dataclasses import dataclass, field

import pytest

from specinfer.errors import InvalidRequest, InvalidTree, NotFound, SpecinferError, StaleEpoch
from specinfer.messages import VerifyResult
from specinfer.sampling import SamplingParams
from specinfer.tree import TokenTree
from specinfer_verify.engine import VerifyEngine
from tests.kit.table_models import Draft, TableModel, draft_nothing, random_drafter
from tests.kit.verify_driver import TIMEOUT, running, table_engine

VOCAB = 4
EOS = 3
MAX_LEN = 48
NUM_STEPS = 5_000


@dataclass
class Client:
    """What a router knows of one session."""

    session_id: str
    tokens: list[int]
    draft: Draft
    epoch: int = 0
    last: VerifyResult | None = None
    history: list[int] = field(default_factory=list)


class Fuzzer:
    """Random rounds over many sessions, checked against the greedy table model."""

    def __init__(self, engine: VerifyEngine, seed: int) -> None:
        self.engine = engine
        self.rng = random.Random(seed)
        self.model = TableModel(VOCAB)
        self.clients: list[Client] = []
        self.num_steps = 0
        self.ended: dict[str, int] = {}

    def open(self) -> None:
        prompt = [self.rng.randrange(VOCAB) for _ in range(self.rng.randrange(1, 30))]
        known = list(prompt)
        while len(known) < MAX_LEN:
            known.append(int(self.model.logits(known).argmax()))
        guessing = random_drafter(self.rng, VOCAB, max_nodes=8, known=known)
        draft = draft_nothing if self.rng.random() < 0.3 else guessing
        client = Client(f"s{self.num_steps}-{len(self.clients)}", prompt, draft)
        greedy = SamplingParams(temperature=0.0)
        self.engine.open(client.session_id, 0, prompt, greedy, len(prompt))
        self.clients.append(client)

    def end(self, client: Client, reason: str) -> None:
        self.clients.remove(client)
        self.engine.close(client.session_id)
        self.ended[reason] = self.ended.get(reason, 0) + 1

    def commit(self, client: Client, result: VerifyResult, most: int) -> None:
        """Check a result against the model, as the router's commit would take it."""
        assert result.epoch == client.epoch + 1
        assert 1 <= len(result.token_ids) - len(result.accepted) <= most
        for token_id in result.token_ids:
            assert token_id == int(self.model.logits(client.tokens).argmax())
            client.tokens.append(token_id)
        client.epoch, client.last = result.epoch, result
        if EOS in result.token_ids and self.rng.random() < 0.3:
            self.end(client, "end token")
        elif len(client.tokens) >= MAX_LEN:
            assert len(client.tokens) == MAX_LEN
            self.expect(client, client.epoch, client.tokens[-1], InvalidRequest)
            self.end(client, "length")

    def expect(self, client: Client, epoch: int, root: int, kind: type[SpecinferError]) -> None:
        """An item that must fail and leave no trace."""
        error = self.engine.step(client.session_id, epoch, TokenTree.root_only(root)).exception(
            TIMEOUT
        )
        assert isinstance(error, kind)

    def disturb(self, client: Client) -> None:
        """One of the things that go wrong between a router and a worker."""
        draw = self.rng.random()
        if draw < 0.05:
            self.end(client, "cancelled")
        elif draw < 0.10:
            pending = self.engine.step(
                client.session_id, client.epoch, draft_nothing(client.tokens)
            )
            self.end(client, "cancelled in a step")
            assert pending.exception(TIMEOUT) is None or isinstance(pending.exception(), NotFound)
        elif draw < 0.2:
            self.expect(client, client.epoch + 1, client.tokens[-1], StaleEpoch)
        elif draw < 0.3:
            self.expect(client, client.epoch, (client.tokens[-1] + 1) % VOCAB, InvalidTree)
        elif draw < 0.4 and client.epoch >= 2:
            self.expect(client, client.epoch - 2, client.tokens[-1], StaleEpoch)
        elif draw < 0.5 and client.last is not None:
            again = self.engine.step(
                client.session_id, client.epoch - 1, draft_nothing(client.tokens)
            )
            assert again.result(TIMEOUT) == client.last

    def round(self) -> None:
        while len(self.clients) < 12:
            self.open()
        active = self.rng.sample(self.clients, self.rng.randrange(1, 12))
        pending = []
        for client in active:
            tree = client.draft(client.tokens)
            most = self.rng.randrange(1, 6) if len(tree) == 1 else 1
            step = self.engine.step(client.session_id, client.epoch, tree, num_tokens=most)
            pending.append((client, most, step))
        wait([step for _, _, step in pending], TIMEOUT)
        for client, most, step in pending:
            self.commit(client, step.result(TIMEOUT), most)
            self.num_steps += 1
        for client in self.rng.sample(self.clients, 2):
            self.disturb(client)


@pytest.mark.parametrize("roots_ahead", [False, True])
def test_thousands_of_random_steps_leak_nothing(roots_ahead: bool) -> None:
    engine, _, blocks = table_engine(
        VOCAB, num_blocks=70, max_model_len=MAX_LEN, yield_seconds=0.0, roots_ahead=roots_ahead
    )
    with running(engine):
        fuzzer = Fuzzer(engine, seed=17)
        while fuzzer.num_steps < NUM_STEPS:
            fuzzer.round()
        for client in list(fuzzer.clients):
            fuzzer.end(client, "done")
        assert engine.drain(TIMEOUT)
        assert engine.num_preemptions > 0
    assert {"cancelled", "cancelled in a step", "end token", "length"} <= set(fuzzer.ended)
    assert blocks.num_free_blocks == blocks.num_blocks
    blocks.drop_cache()
    assert sorted(blocks.allocate(blocks.num_blocks)) == list(range(blocks.num_blocks))
