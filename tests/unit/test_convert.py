"""Every message survives the wire, and absent fields take their documented defaults."""

import math
from dataclasses import replace

import pytest

from specinfer import convert
from specinfer.errors import InvalidRequest, InvalidTree, StaleEpoch
from specinfer.messages import (
    Capabilities,
    ChatMessage,
    DraftResult,
    Finished,
    GenerateEvent,
    GenerateRequest,
    RoundFacts,
    ShapeQuery,
    SpeculationOptions,
    SpeculationSummary,
    Started,
    StepCost,
    TokenLogprob,
    TokensEvent,
    Usage,
    VerifyResult,
    WorkerInfo,
    WorkerLoad,
)
from specinfer.sampling import SamplingParams, StopConditions
from specinfer.tree import MAX_TREE_NODES, TokenTree
from specinfer.v1 import draft_pb2, router_pb2, tree_pb2, verify_pb2

SAMPLING = SamplingParams(0.5, 3, 0.25, 0.125, 1.5, 0.5, -0.5, {4: 1.5}, 2**63 - 1)
LOGPROB = TokenLogprob(5, -0.25, ((5, -0.25), (6, -2.0)))
INFO = WorkerInfo(
    "w", "m", "h", "t", 11, "float32", "cpu", 64, 8, 32, 100, 16, True, ("match",),
    (StepCost(4, 128, 0.5),), "0.1.0", "float8_e4m3fn", 1.5e9,
)  # fmt: skip


def test_a_tree_survives_the_wire() -> None:
    tree = TokenTree((1, 2, 3), (-1, 0, 0), (0, 1, 1), (0.0, -0.5, -1.5))
    wire = tree_pb2.TokenTree.FromString(convert.tree_to_wire(tree).SerializeToString())
    assert convert.tree_from_wire(wire) == tree


def test_a_hostile_tree_is_refused() -> None:
    with pytest.raises(InvalidTree):
        convert.tree_from_wire(tree_pb2.TokenTree(token_ids=[1, 2], parents=[-1, 5]))
    with pytest.raises(InvalidTree, match="at most"):
        convert.tree_from_wire(tree_pb2.TokenTree(token_ids=[1] * (MAX_TREE_NODES + 1)))


def test_sampling_survives_the_wire() -> None:
    assert convert.sampling_from_wire(convert.sampling_to_wire(SAMPLING)) == SAMPLING


def test_absent_sampling_fields_are_the_defaults() -> None:
    assert convert.sampling_from_wire(tree_pb2.SamplingParams()) == SamplingParams()
    zero = convert.sampling_from_wire(tree_pb2.SamplingParams(temperature=0.0))
    assert zero.greedy


def test_bad_sampling_names_its_field() -> None:
    with pytest.raises(InvalidRequest) as caught:
        convert.sampling_from_wire(tree_pb2.SamplingParams(temperature=-1.0))
    assert caught.value.field == "temperature"
    with pytest.raises(InvalidRequest):
        convert.sampling_from_wire(tree_pb2.SamplingParams(seed=2**64 - 1))


@pytest.mark.parametrize(
    "request_",
    [
        GenerateRequest(prompt="hello", random_seed=True),
        GenerateRequest(token_ids=(1, 2), sampling=SAMPLING, num_logprobs=0),
        GenerateRequest(
            messages=(ChatMessage("user", "hi"),),
            model="m",
            sampling=SamplingParams(seed=0),
            stop=StopConditions(9, ("\n",), (3,), True),
            num_logprobs=4,
            speculation=SpeculationOptions(False, 0, 3, (2, 2)),
            request_id="r",
        ),
    ],
)
def test_a_request_survives_the_wire(request_: GenerateRequest) -> None:
    wire = convert.request_to_wire(request_)
    again = router_pb2.GenerateRequest.FromString(wire.SerializeToString())
    assert convert.request_from_wire(again) == request_


def test_a_request_without_input_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="prompt"):
        convert.request_from_wire(router_pb2.GenerateRequest())


@pytest.mark.parametrize(
    "event",
    [
        Started("r", "s", "m", 2**63 - 1, 12),
        TokensEvent(
            3, "text", (5, 6), 1, (LOGPROB,), RoundFacts(4, 7, 1, "", 0.1, 0.2, 0.3, 0.4, 0.5)
        ),
        Finished(
            "stop",
            "\n",
            Usage(1, 2, 3),
            SpeculationSummary(3, 2, 8, 4, (3, 1), (("deadline", 1),)),
        ),
    ],
)
def test_events_survive_the_wire(event: GenerateEvent) -> None:
    wire = convert.event_to_wire(event)
    again = router_pb2.GenerateResponse.FromString(wire.SerializeToString())
    assert convert.event_from_wire(again) == event


def test_every_field_of_a_rounds_facts_survives_the_wire() -> None:
    """They are written one by one, where a new field would be forgotten."""
    names = RoundFacts._fields
    assert set(names) == set(router_pb2.RoundFacts.DESCRIPTOR.fields_by_name)
    facts = RoundFacts(1, 2, 3, "why", 0.5, 0.25, 0.125, 2.5, 1.5, 3.5, 4)
    unset = RoundFacts(0)
    assert not [name for name in names if getattr(facts, name) == getattr(unset, name)]
    event = TokensEvent(3, "text", (5, 6), 1, (), facts)
    wire = convert.event_to_wire(event).SerializeToString()
    assert convert.event_from_wire(router_pb2.GenerateResponse.FromString(wire)) == event


def test_an_unknown_event_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        convert.event_from_wire(router_pb2.GenerateResponse())


def test_results_survive_the_wire() -> None:
    draft = DraftResult(4, TokenTree.chain([1, 2]), 0.5, 0.25)
    item = draft_pb2.DraftItem(item_id=9, session_id="s")
    assert convert.draft_result_from_wire(convert.draft_result_to_wire(item, draft)) == draft
    verified = VerifyResult(5, (1, 3), (8, 9, 10), (LOGPROB,), 16, 12, 0.5, 0.25)
    step = verify_pb2.VerifyItem(item_id=9, session_id="s")
    wire = convert.verify_result_to_wire(step, verified)
    assert wire.item_id == 9
    assert convert.verify_result_from_wire(wire) == verified


def test_worker_facts_survive_the_wire() -> None:
    assert convert.worker_info_from_wire(convert.worker_info_to_wire(INFO)) == INFO
    load = WorkerLoad(1, 2, 3, True)
    assert convert.load_from_wire(convert.load_to_wire(load)) == load
    capabilities = Capabilities(
        "m", "h", "t", 11, "float32", 64, 32, True, ("match",), True, 1, 1, True, "0.1.0"
    )
    wire = convert.capabilities_to_wire(capabilities)
    assert convert.capabilities_from_wire(wire) == capabilities


@pytest.mark.parametrize(
    "absurd",
    [
        *(StepCost(1, 8, seconds) for seconds in (0.0, -0.5, 5e-324, math.inf, math.nan, 1e300)),
        StepCost(0, 8, 0.5),
    ],
)
def test_a_worker_of_absurd_costs_is_one_without_costs(absurd: StepCost) -> None:
    wire = convert.worker_info_to_wire(INFO)
    wire.step_costs.add(num_rows=absurd.num_rows, context_len=8, seconds=absurd.seconds)
    assert convert.worker_info_from_wire(wire) == replace(INFO, step_costs=())


def test_shapes_survive_the_wire_and_absurd_ones_are_refused() -> None:
    shape = ShapeQuery(8, 4, (2, 2), 3)
    assert convert.shape_from_wire(convert.shape_to_wire(shape)) == shape
    with pytest.raises(InvalidRequest):
        convert.shape_from_wire(draft_pb2.ShapeQuery(max_nodes=MAX_TREE_NODES))
    with pytest.raises(InvalidRequest):
        convert.shape_from_wire(draft_pb2.ShapeQuery(max_nodes=8, widths=[0]))


def test_a_status_becomes_its_error_again() -> None:
    error = convert.status_error(convert.status_to_wire(StaleEpoch("moved on")))
    assert isinstance(error, StaleEpoch)
    assert error.message == "moved on"
    assert (error.field, error.retry_after) == ("", None)
    told = InvalidRequest("too long", field="token_ids", retry_after=0.5)
    again = convert.status_error(convert.status_to_wire(told))
    assert again is not None
    assert (again.field, again.retry_after) == ("token_ids", 0.5)
    assert convert.status_error(tree_pb2.ItemStatus()) is None
