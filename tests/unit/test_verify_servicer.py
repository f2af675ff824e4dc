"""VerifyService over a real channel: frames, one result an item, bad items alone, tokenizer."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from torch import Tensor

from specinfer.convert import (
    grammar_to_wire,
    sampling_to_wire,
    status_error,
    tree_to_wire,
    verify_result_from_wire,
    worker_info_from_wire,
)
from specinfer.errors import InvalidRequest, InvalidTree, NotFound, SpecinferError, StaleEpoch
from specinfer.messages import Grammar, WorkerInfo
from specinfer.rpc import open_channel
from specinfer.sampling import SamplingParams
from specinfer.server import build_server
from specinfer.tree import TokenTree
from specinfer.v1 import tree_pb2, verify_pb2, verify_pb2_grpc
from specinfer_engine.batch import SequenceRows
from specinfer_engine.checkpoint import TokenizerFiles
from specinfer_verify import servicer
from specinfer_verify.engine import VerifyEngine
from specinfer_verify.servicer import SERVICE_NAME, TOKENIZER_PIECE_BYTES, VerifyServicer
from tests.kit.stream_ends import StreamEnds
from tests.kit.table_models import TableRunner
from tests.kit.tokenizers import letters_tokenizer
from tests.kit.verify_driver import TIMEOUT, running, table_engine

INFO = WorkerInfo(
    worker_id="w",
    model_name="table",
    model_hash="m",
    tokenizer_hash="t",
    vocab_size=5,
    dtype="float32",
    device="cpu",
    max_model_len=200,
    max_sessions=256,
    max_tree_nodes=32,
    num_blocks=64,
    block_size=4,
    row_invariant=True,
    acceptance_rules=("match",),
)
LETTERS = ("a", "b", "ab", "<|end|>", "<|stop|>")
TOKENIZER_JSON = letters_tokenizer(*LETTERS).to_str().encode() + b" " * TOKENIZER_PIECE_BYTES
TOKENIZER = TokenizerFiles(TOKENIZER_JSON, "{{ messages }}", "<s>", "</s>")
Results = dict[int, verify_pb2.VerifyItemResult]


@pytest.fixture
async def engine() -> AsyncIterator[VerifyEngine]:
    built, _, _ = table_engine()
    with running(built):
        yield built


@pytest.fixture
async def channel(engine: VerifyEngine) -> AsyncIterator[grpc.aio.Channel]:
    async with serving(engine) as opened:
        yield opened


@asynccontextmanager
async def serving(engine: VerifyEngine) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a server of the engine."""
    server = build_server("127.0.0.1:0", [SERVICE_NAME])
    added = VerifyServicer(engine, INFO, TOKENIZER, (3, 4))
    verify_pb2_grpc.add_VerifyServiceServicer_to_server(added, server.server)
    await server.start()
    async with open_channel(f"127.0.0.1:{server.port}") as opened:
        yield opened
    await server.drain(0)


def open_item(
    item_id: int, session_id: str, *token_ids: int, **fields: Any
) -> verify_pb2.VerifyItem:
    greedy = sampling_to_wire(SamplingParams(temperature=0.0))
    opening = verify_pb2.OpenVerify(
        token_ids=token_ids, num_prompt_tokens=len(token_ids), sampling=greedy, **fields
    )
    return verify_pb2.VerifyItem(item_id=item_id, session_id=session_id, open=opening)


def step_item(
    item_id: int, session_id: str, epoch: int, tree: tree_pb2.TokenTree
) -> verify_pb2.VerifyItem:
    return verify_pb2.VerifyItem(
        item_id=item_id, session_id=session_id, epoch=epoch, step=verify_pb2.VerifyStep(tree=tree)
    )


def root(token_id: int) -> tree_pb2.TokenTree:
    return tree_to_wire(TokenTree.root_only(token_id))


async def exchange(
    channel: grpc.aio.Channel, frames: Sequence[Sequence[verify_pb2.VerifyItem]]
) -> Results:
    """Send frames on one stream and collect every result until the server ends it."""
    stub = verify_pb2_grpc.VerifyServiceStub(channel)
    requests = iter([verify_pb2.VerifyRequest(items=items) for items in frames])
    results: Results = {}
    async for response in stub.Verify(requests, timeout=TIMEOUT):
        assert not response.load.draining
        for result in response.results:
            assert result.item_id not in results
            results[result.item_id] = result
    return results


async def read(call: Any) -> list[verify_pb2.VerifyItemResult]:
    """Results of the next frame."""
    response: verify_pb2.VerifyResponse = await call.read()
    return list(response.results)


def error_of(result: verify_pb2.VerifyItemResult) -> SpecinferError | None:
    return status_error(result.status)


async def test_open_and_step_share_a_frame_and_are_handled_in_order(
    channel: grpc.aio.Channel,
) -> None:
    tree = tree_to_wire(TokenTree((3, 0, 1, 2, 4), (-1, 0, 0, 0, 0)))
    items = [open_item(1, "a", 1, 2, 3, num_logprobs=2), step_item(2, "a", 0, tree)]
    results = await exchange(channel, [items])
    assert set(results) == {1, 2}
    assert error_of(results[1]) is None
    result = verify_result_from_wire(results[2])
    assert result.epoch == 1
    assert len(result.token_ids) == len(result.accepted) + 1
    assert len(result.logprobs) == len(result.token_ids)
    assert len(result.logprobs[0].top) == 2


async def test_every_bad_item_fails_alone(channel: grpc.aio.Channel) -> None:
    orphan = tree_pb2.TokenTree(token_ids=[3, 1], parents=[-1, 1])
    huge = tree_pb2.TokenTree(token_ids=[3] * 2000, parents=[-1] * 2000)
    negative = open_item(8, "h", 1)
    negative.open.sampling.temperature = -1.0
    items = [
        open_item(1, "good", 1, 2, 3),
        step_item(2, "good", 0, orphan),
        step_item(3, "good", 0, huge),
        step_item(4, "good", 0, tree_pb2.TokenTree()),
        verify_pb2.VerifyItem(item_id=5, session_id="good"),
        step_item(6, "nobody", 0, root(3)),
        open_item(7, "rule", 1, acceptance_rule="typical"),
        negative,
        open_item(9, "empty"),
        step_item(10, "good", 7, root(3)),
        step_item(11, "good", 0, root(3)),
    ]
    results = await exchange(channel, [items])
    kinds = {number: type(error_of(result)) for number, result in results.items()}
    assert kinds == {
        1: type(None),
        2: InvalidTree,
        3: InvalidTree,
        4: InvalidTree,
        5: InvalidRequest,
        6: NotFound,
        7: InvalidRequest,
        8: InvalidRequest,
        9: InvalidRequest,
        10: StaleEpoch,
        11: type(None),
    }
    assert results[11].epoch == 1


async def test_many_sessions_in_one_frame_come_back_in_few(
    channel: grpc.aio.Channel, engine: VerifyEngine
) -> None:
    sessions = [f"s{number}" for number in range(40)]
    items = [open_item(number, name, 1, 2, 3) for number, name in enumerate(sessions)]
    steps = [step_item(100 + n, name, 0, root(3)) for n, name in enumerate(sessions)]
    results = await exchange(channel, [[*items, *steps]])
    assert len(results) == 80
    assert not [result for result in results.values() if result.status.code]
    assert len({result.token_ids[0] for number, result in results.items() if number >= 100}) == 1
    closes = [
        verify_pb2.VerifyItem(item_id=n, session_id=name, close=verify_pb2.CloseVerify())
        for n, name in enumerate(sessions)
    ]
    assert len(await exchange(channel, [closes])) == 40
    assert engine.load().num_sessions == 0


async def test_a_stream_that_ends_takes_its_sessions_along(
    channel: grpc.aio.Channel, engine: VerifyEngine
) -> None:
    ends = StreamEnds(engine)
    await exchange(channel, [[open_item(1, "a", 1, 2, 3), open_item(2, "b", 1, 2, 3)]])
    await ends.one()
    assert engine.load().num_sessions == 0
    results = await exchange(channel, [[step_item(1, "a", 0, root(3))]])
    assert isinstance(error_of(results[1]), NotFound)


async def test_a_peer_that_breaks_off_leaves_no_session_and_takes_none_of_others(
    channel: grpc.aio.Channel, engine: VerifyEngine
) -> None:
    ends = StreamEnds(engine)
    stub = verify_pb2_grpc.VerifyServiceStub(channel)
    staying, leaving = stub.Verify(timeout=TIMEOUT), stub.Verify(timeout=TIMEOUT)
    for call, name in ((staying, "s"), (leaving, "l")):
        await call.write(verify_pb2.VerifyRequest(items=[open_item(1, name, 1, 2, 3)]))
        await read(call)
    assert engine.load().num_sessions == 2
    leaving.cancel()
    await ends.one()
    assert engine.load().num_sessions == 1
    await staying.write(verify_pb2.VerifyRequest(items=[step_item(2, "s", 0, root(3))]))
    assert (await read(staying))[0].epoch == 1
    await staying.done_writing()


@pytest.mark.parametrize("epoch", [0, 1])
async def test_a_session_opened_again_on_a_new_stream_outlives_the_old_one(
    channel: grpc.aio.Channel, engine: VerifyEngine, epoch: int
) -> None:
    ends = StreamEnds(engine)
    stub = verify_pb2_grpc.VerifyServiceStub(channel)
    old, new = stub.Verify(timeout=TIMEOUT), stub.Verify(timeout=TIMEOUT)
    items = [open_item(1, "a", 1, 2, 3), open_item(2, "b", 1, 2, 3)]
    await old.write(verify_pb2.VerifyRequest(items=items))
    while engine.load().num_sessions < 2:
        await read(old)
    again = open_item(1, "a", 1, 2, 3)
    again.epoch = epoch
    await new.write(verify_pb2.VerifyRequest(items=[again]))
    assert error_of((await read(new))[0]) is None
    old.cancel()
    await ends.one()
    assert engine.load().num_sessions == 1
    await new.write(verify_pb2.VerifyRequest(items=[step_item(2, "a", epoch, root(3))]))
    assert (await read(new))[0].epoch == epoch + 1
    await new.done_writing()


async def test_a_malformed_frame_ends_its_stream_and_no_other(
    channel: grpc.aio.Channel,
) -> None:
    stub = verify_pb2_grpc.VerifyServiceStub(channel)
    good = stub.Verify(timeout=TIMEOUT)
    await good.write(verify_pb2.VerifyRequest(items=[open_item(1, "a", 1, 2, 3)]))
    assert (await read(good))[0].item_id == 1
    raw: Any = channel.stream_stream(f"/{SERVICE_NAME}/Verify")
    broken = raw(iter([b"\xff\xff\xff"]), timeout=TIMEOUT)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in broken:
            pass
    assert caught.value.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.INVALID_ARGUMENT)
    await good.write(verify_pb2.VerifyRequest(items=[step_item(2, "a", 0, root(3))]))
    assert (await read(good))[0].epoch == 1
    await good.done_writing()


async def test_an_oversized_frame_is_refused(channel: grpc.aio.Channel) -> None:
    raw: Any = channel.stream_stream(f"/{SERVICE_NAME}/Verify")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in raw(iter([b"\x0a" * (9 << 20)]), timeout=TIMEOUT):
            pass
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_client_that_leaves_in_the_middle_harms_nobody(
    channel: grpc.aio.Channel, engine: VerifyEngine
) -> None:
    stub = verify_pb2_grpc.VerifyServiceStub(channel)
    leaving = stub.Verify(timeout=TIMEOUT)
    items = [open_item(1, "a", 1, 2, 3), step_item(2, "a", 0, root(3))]
    await leaving.write(verify_pb2.VerifyRequest(items=items))
    leaving.cancel()
    results = await exchange(channel, [[open_item(1, "b", 1, 2), step_item(2, "b", 0, root(2))]])
    assert error_of(results[2]) is None
    assert engine.healthy


async def test_what_a_worker_tells_of_itself(channel: grpc.aio.Channel) -> None:
    stub = verify_pb2_grpc.VerifyServiceStub(channel)
    answer = await stub.GetInfo(verify_pb2.VerifyServiceGetInfoRequest())
    assert worker_info_from_wire(answer.info) == INFO
    pieces = [piece async for piece in stub.GetTokenizer(verify_pb2.GetTokenizerRequest())]
    assert len(pieces) == 2
    assert b"".join(piece.tokenizer_json for piece in pieces) == TOKENIZER.tokenizer_json
    assert pieces[0].chat_template == "{{ messages }}"
    assert list(pieces[0].eos_token_ids) == [3, 4]
    assert (pieces[0].bos_token, pieces[0].eos_token) == ("<s>", "</s>")


class WaitingRunner(TableRunner):
    """A pass that takes until somebody lets it go on."""

    gate = threading.Event()

    def forward(self, rows: Sequence[SequenceRows]) -> list[Tensor]:
        assert self.gate.wait(TIMEOUT)
        return super().forward(rows)


async def test_health_answers_during_a_long_pass() -> None:
    engine, _, _ = table_engine(make_runner=WaitingRunner)
    with running(engine):
        async with serving(engine) as channel:
            stub = verify_pb2_grpc.VerifyServiceStub(channel)
            items = [open_item(1, "a", 1, 2, 3), step_item(2, "a", 0, root(3))]
            call = stub.Verify(iter([verify_pb2.VerifyRequest(items=items)]), timeout=TIMEOUT)
            assert [result.item_id for result in await read(call)] == [1]
            health: Any = health_pb2_grpc.HealthStub(channel)
            answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=5.0)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            await stub.GetInfo(verify_pb2.VerifyServiceGetInfoRequest(), timeout=5.0)
            WaitingRunner.gate.set()
            assert [result.item_id for result in await read(call)] == [2]


async def test_results_too_large_for_one_frame_leave_in_several(
    channel: grpc.aio.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servicer, "MAX_FRAME_BYTES", 1)
    stub = verify_pb2_grpc.VerifyServiceStub(channel)
    items = [open_item(number, f"s{number}", 1, 2, 3) for number in range(5)]
    requests = iter([verify_pb2.VerifyRequest(items=items)])
    frames = [list(frame.results) async for frame in stub.Verify(requests, timeout=TIMEOUT)]
    assert [len(frame) for frame in frames] == [1] * 5
    assert sorted(frame[0].item_id for frame in frames) == [0, 1, 2, 3, 4]


async def test_an_open_that_asks_for_other_answers_replaces_the_session(
    channel: grpc.aio.Channel,
) -> None:
    items = [open_item(1, "a", 1, 2, 3), open_item(2, "a", 1, 2, 3, num_logprobs=1)]
    results = await exchange(channel, [[*items, step_item(3, "a", 0, root(3))]])
    assert len(results[3].logprobs) == 1


def within(kind: str, text: str) -> tree_pb2.Grammar:
    wire = grammar_to_wire(Grammar(kind, text))
    assert wire is not None
    return wire


async def test_an_open_with_a_grammar_and_its_step_share_a_frame(
    channel: grpc.aio.Channel,
) -> None:
    tree = tree_to_wire(TokenTree((3, 0, 1, 2, 4), (-1, 0, 0, 0, 0)))
    items = []
    for number, pattern in enumerate(("ba", "ab?b", "(ab)+")):
        opening = open_item(2 * number, pattern, 1, 2, 3, grammar=within("regex", pattern))
        items += [opening, step_item(2 * number + 1, pattern, 0, tree)]
    resumed = open_item(6, "resumed", 1, 2, 3, 1, grammar=within("regex", "ba"))
    resumed.open.num_prompt_tokens = 3
    results = await exchange(channel, [[*items, resumed, step_item(7, "resumed", 0, root(1))]])
    assert all(error_of(result) is None for result in results.values())
    first = {n: verify_result_from_wire(results[n]).token_ids for n in (1, 3, 5, 7)}
    assert first[1][0] == 1
    assert first[3][0] in (0, 2)
    assert first[5][0] in (0, 2)
    assert first[7] == (0,)


async def test_a_bad_grammar_fails_its_session_alone(channel: grpc.aio.Channel) -> None:
    wrong = open_item(5, "output", 1, 2, 0, grammar=within("regex", "b+"))
    wrong.open.num_prompt_tokens = 2
    items = [
        open_item(1, "regex", 1, 2, 3, grammar=within("regex", "(a")),
        step_item(2, "regex", 0, root(3)),
        open_item(3, "kind", 1, 2, 3, grammar=tree_pb2.Grammar(text="a")),
        open_item(4, "huge", 1, grammar=within("regex", "a" * 100_000)),
        wrong,
        open_item(6, "good", 1, 2, 3),
        step_item(7, "good", 0, root(3)),
    ]
    results = await exchange(channel, [items])
    kinds = {number: type(error_of(result)) for number, result in results.items()}
    refused = dict.fromkeys((1, 3, 4, 5), InvalidRequest)
    assert kinds == {**refused, 2: NotFound, 6: type(None), 7: type(None)}
    assert "does not match" in str(error_of(results[5]))
