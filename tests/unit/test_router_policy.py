"""Which shape a request asks for, that it fits into the room that is left, and what passes cost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specinfer.messages import ShapeQuery, SpeculationOptions, StepCost
from specinfer.step_curve import StepCurve
from specinfer_router.policy import StaticShape, clip, num_nodes, within

FLAT = StepCurve([StepCost(1, 0, 0.010), StepCost(12, 0, 0.010), StepCost(64, 0, 0.100)])
ANY = SpeculationOptions()


def test_static_shapes_follow_the_request_and_else_the_cluster() -> None:
    policy = StaticShape(ShapeQuery(max_nodes=8, max_depth=4))
    history = policy.history(0.0, 100)
    assert policy.plan(ANY, history, 1) == ShapeQuery(max_nodes=8, max_depth=4)
    assert policy.plan(SpeculationOptions(enabled=False), history, 1).max_nodes == 0
    assert policy.plan(SpeculationOptions(max_nodes=3), history, 1).max_nodes == 3
    assert policy.plan(SpeculationOptions(widths=(2, 2)), history, 1) == ShapeQuery(
        max_nodes=6, max_depth=2, widths=(2, 2)
    )


def test_a_larger_tree_than_there_may_be_is_asked_for_as_the_largest() -> None:
    assert within(SpeculationOptions(max_nodes=255, max_depth=9), 64) == SpeculationOptions(
        max_nodes=63, max_depth=9
    )
    for options in (ANY, SpeculationOptions(max_nodes=63), SpeculationOptions(widths=(2, 2))):
        assert within(options, 64) is options


@pytest.mark.parametrize(
    ("rows", "seconds"), [(1, 0.010), (12, 0.010), (38, 0.055), (64, 0.1), (116, 0.19), (0, 0.010)]
)
def test_costs_between_and_beyond_measurements_lie_on_a_line(rows: int, seconds: float) -> None:
    assert FLAT.at(rows) == pytest.approx(seconds)


def test_costs_that_shrink_with_rows_are_noise_and_none_is_one() -> None:
    noisy = StepCurve([StepCost(1, 0, 0.02), StepCost(8, 0, 0.01), StepCost(1, 512, 9.0)])
    assert [noisy.at(rows) for rows in (1, 8, 16)] == [0.02, 0.02, 0.02]
    assert StepCurve([]).at(5) == 1.0


@given(
    st.lists(st.integers(1, 4), max_size=4),
    st.integers(0, 40),
    st.integers(0, 10),
    st.integers(-1, 30),
    st.integers(-1, 10),
)
def test_a_clipped_shape_always_fits(
    widths: list[int], nodes: int, depth: int, max_nodes: int, max_depth: int
) -> None:
    shape = ShapeQuery(max_nodes=nodes, max_depth=depth, widths=tuple(widths), branch=2)
    clipped = clip(shape, max_nodes=max_nodes, max_depth=max_depth)
    assert clipped.branch == 2
    assert 0 <= clipped.max_nodes <= max(0, min(nodes, max_nodes))
    assert 0 <= clipped.max_depth <= max(0, min(depth, max_depth))
    assert num_nodes(clipped.widths) <= clipped.max_nodes
    assert clipped.widths == shape.widths[: len(clipped.widths)]
    assert (clipped.max_nodes == 0) == (clipped.max_depth == 0)


GRID = StepCurve(
    [
        *(StepCost(1, 128, 0.010), StepCost(9, 128, 0.018)),
        *(StepCost(1, 1024, 0.020), StepCost(9, 1024, 0.036), StepCost(9, 4096, 0.030)),
    ]
)


@pytest.mark.parametrize(
    ("rows", "context", "seconds"),
    [
        *((1, 0, 0.010), (1, 128, 0.010), (5, 128, 0.014), (1, 576, 0.015), (5, 576, 0.021)),
        *((9, 1024, 0.036), (9, 4096, 0.036), (9, 9999, 0.036), (17, 1024, 0.052)),
    ],
)
def test_costs_between_contexts_are_bilinear(rows: int, context: int, seconds: float) -> None:
    assert GRID.at(rows, context) == pytest.approx(seconds)


def test_a_longer_context_goes_on_as_it_began() -> None:
    curve = StepCurve([StepCost(1, 128, 0.010), StepCost(1, 1128, 0.020)])
    assert curve.at(1, 2128) == pytest.approx(0.030)


def test_beyond_the_longest_context_more_rows_cost_no_less() -> None:
    near = [StepCost(1, 0, 0.010), StepCost(9, 0, 0.018)]
    curve = StepCurve([*near, StepCost(1, 1000, 0.020), StepCost(9, 1000, 0.020)])
    assert [curve.at(rows, 3000) for rows in (1, 5, 9)] == pytest.approx([0.024] * 3)


@given(
    st.lists(
        st.tuples(st.integers(1, 64), st.integers(0, 4096), st.floats(1e-4, 1.0)), max_size=12
    ),
    st.integers(0, 100),
    st.integers(0, 8000),
)
def test_more_rows_never_cost_less(
    points: list[tuple[int, int, float]], rows: int, context: int
) -> None:
    curve = StepCurve([StepCost(*point) for point in points])
    assert curve.at(rows + 1, context) >= curve.at(rows, context) * (1 - 1e-12)
