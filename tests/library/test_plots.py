"""Figures show the numbers of the summary; what they draw is read back and compared."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import prw
from prw import plots
from prw.call import GroupRecord
from prw.telemetry import RoutingSummary, summarise


def summary(
    experts: Sequence[int], count: int = 3, cuts: Sequence[float] = (), groups: int = 2
) -> RoutingSummary:
    """Each group sends one row to each of these experts with margin 0.6 or more."""
    probs = torch.full((len(experts), count), 0.2 / max(count - 1, 1))
    probs[torch.arange(len(experts)), torch.tensor(experts)] = 0.8
    record = prw.Record()
    zero = torch.zeros((), dtype=torch.int64)
    for index in range(groups):
        chosen = prw.Routing(probs.argmax(-1), probs.amax(-1), probs)
        record.tally.groups[f"layer.{index}"] = GroupRecord(zero, zero, (), (), [chosen], 0, [None])
    values: Tensor | None = torch.arange(float(len(experts))) if cuts else None
    return summarise(record, values, cuts=cuts)


def drawn(figure: Any) -> Any:
    """The first axes of a figure that has been rendered once."""
    figure.draw_without_rendering()
    return figure.axes[0]


def test_usage_map_shows_usage() -> None:
    axes = drawn(plots.usage_map(summary([0, 0, 0, 2]), names=["a", "b", "c"]))
    assert axes.images[0].get_array().tolist() == [[0.75, 0.0, 0.25]] * 2
    assert [text.get_text() for text in axes.texts] == ["0.75", "0.00", "0.25"] * 2
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "c"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["layer.0", "layer.1"]


def test_a_map_of_many_layers_labels_some() -> None:
    axes = drawn(plots.usage_map(summary([0, 1], groups=90)))
    assert not axes.texts
    assert [label.get_text() for label in axes.get_yticklabels()][:2] == ["layer.0", "layer.3"]


def test_bars_stack_to_one_in_every_bin_that_has_rows() -> None:
    axes = drawn(plots.usage_by_bin(summary([0, 1, 1, 2], cuts=(1, 3, 9)), label="timestep"))
    heights = [[bar.get_height() for bar in bars] for bars in axes.containers]
    assert heights == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["< 1", "1 to 3", "3 to 9", "≥ 9"]
    assert axes.get_xlabel() == "timestep"


def test_lines_begin_where_their_expert_joined() -> None:
    given = [summary([0], count=1), summary([0, 1], count=2), summary([1, 1], count=2)]
    axes = drawn(plots.usage_over_steps([0, 10, 20], given, density=0.8))
    first, second, target = axes.lines
    assert first.get_xydata().tolist() == [[0, 1], [10, 0.5], [20, 0]]
    assert second.get_xydata().tolist() == [[10, 0.5], [20, 1]]
    assert set(target.get_ydata()) == {0.8}


def test_margins_are_shares() -> None:
    axes = drawn(plots.margin_histogram(summary([0, 1], count=2)))
    heights = [bar.get_height() for bar in axes.containers[0]]
    assert sum(heights) == 1 and len(heights) == 20
    assert heights.index(1.0) in (11, 12)  # 0.8 - 0.2, on the edge of two bins in fp32


def test_forgetting_matrix_leaves_out_what_was_not_measured() -> None:
    scores = torch.tensor([[0.9, float("nan")], [0.7, 0.8]])
    axes = drawn(plots.forgetting_matrix(scores, ["a", "b"]))
    assert [text.get_text() for text in axes.texts] == ["0.90", "0.70", "0.80"]
    listed = drawn(plots.forgetting_matrix([[0.9, None], [0.7, 0.8]], ["a", "b"]))
    assert [text.get_text() for text in listed.texts] == ["0.90", "0.70", "0.80"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["after a", "after b"]


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(prw.ConfigError, match="no bins"):
        plots.usage_by_bin(summary([0]))
    with pytest.raises(prw.ConfigError, match="2 steps and 1 summaries"):
        plots.usage_over_steps([1, 2], [summary([0])])
    with pytest.raises(prw.ConfigError, match="3 experts, but only 1 names"):
        plots.usage_map(summary([0]), names=["a"])
    with pytest.raises(prw.ConfigError, match="each of the 2 tasks"):
        plots.forgetting_matrix([[0.5]], ["a", "b"])


def test_figures_leave_the_global_state_of_matplotlib_alone() -> None:
    plots.margin_histogram(summary([0, 1]))
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()
