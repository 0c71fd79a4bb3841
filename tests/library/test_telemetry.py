"""Summaries count what a hand count finds, forget nothing when merged, and never see padding."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import prw
from prw.call import GroupRecord
from prw.telemetry import MARGIN_BINS, RoutingSummary, flip_rate, merged, summarise

WIDTH = 6


def routing(probs: Tensor) -> prw.Routing:
    gate, expert = probs.max(-1)
    return prw.Routing(expert, gate, probs)


def record_of(
    groups: dict[str, list[Tensor]], newest: int = 0, masks: list[Tensor | None] | None = None
) -> prw.Record:
    """A record as if every group had seen these probabilities, a tensor per forward."""
    record = prw.Record()
    zero = torch.zeros((), dtype=torch.int64)
    for name, forwards in groups.items():
        routings = [routing(probs) for probs in forwards]
        kept = masks or [None] * len(forwards)
        record.tally.groups[name] = GroupRecord(zero, zero, (), (), routings, newest, kept)
    return record


def woven(stages: int, **fields: Any) -> tuple[torch.nn.Module, prw.Weave]:
    """A model whose routers look trained, in evaluation mode."""
    model = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH))
    weave = prw.weave(model, prw.Config(target_modules=["0", "1"], rank=2, **fields))
    for stage in range(stages):
        weave.unlock(f"s{stage}")
        for parameter in weave.parameters():
            torch.nn.init.normal_(parameter)
    return model.eval(), weave


PROBS = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.5, 0.3, 0.2], [0.05, 0.9, 0.05]])


def test_figures_equal_a_hand_count() -> None:
    summary = summarise(record_of({"a": [PROBS], "b": [PROBS[:2]]}, newest=2))
    assert summary.groups == ("a", "b")
    assert summary.count().item() == 6
    assert summary.usage("group").tolist() == [[0.5, 0.25, 0.25], [0.5, 0.0, 0.5]]
    assert summary.usage().tolist() == [0.5, 1 / 6, 2 / 6]
    assert summary.count("stage").tolist() == [0, 0, 6]
    margins = [0.5, 0.7, 0.2, 0.85]
    entropies = [-sum(p * math.log(p) for p in row) for row in PROBS.tolist()]
    # fp32 probabilities hold these decimals to 6e-8.
    close = {"rtol": 0.0, "atol": 1e-6}
    wanted = {"margin": margins, "entropy": entropies, "confidence": [0.7, 0.8, 0.5, 0.9]}
    for name, rows in wanted.items():
        found = getattr(summary, name)("group")
        means = torch.tensor([sum(rows) / 4, sum(rows[:2]) / 2], dtype=torch.float64)
        torch.testing.assert_close(found, means, **close)
    histogram = torch.zeros(MARGIN_BINS, dtype=torch.int64)
    for margin in PROBS.double().topk(2).values.diff(dim=-1).neg().flatten().tolist():
        histogram[min(int(margin * MARGIN_BINS), MARGIN_BINS - 1)] += 1
    only = summarise(record_of({"a": [PROBS]}))
    assert torch.equal(only.margin_histogram(), histogram)


def test_one_expert_is_certain() -> None:
    summary = summarise(record_of({"a": [torch.ones(3, 1)]}))
    assert summary.margin().item() == summary.confidence().item() == 1.0
    assert summary.entropy().item() == 0.0
    assert summary.margin_histogram()[-1].item() == 3


def test_bins_hold_the_samples_that_fall_into_them() -> None:
    probs_BTE = PROBS.repeat(2, 1, 1).transpose(0, 1)  # 4 samples of 2 equal tokens
    values = torch.tensor([0.1, 0.5, 0.49, 7.0])
    summary = summarise(record_of({"a": [probs_BTE]}), values, cuts=(0.25, 0.5))
    assert summary.count("bin").tolist() == [2, 2, 4]
    assert summary.usage("bin").tolist() == [[1, 0, 0], [1, 0, 0], [0, 0.5, 0.5]]
    per_forward = summarise(record_of({"a": [PROBS, PROBS]}), [values, -values], cuts=(0.0,))
    assert per_forward.count("bin").tolist() == [4, 4]


def test_rows_outside_the_mask_do_not_exist() -> None:
    keep = torch.tensor([True, False, True, False])
    dirty = PROBS.clone()
    dirty[~keep] = float("nan")
    masked = summarise(record_of({"a": [dirty]}, masks=[keep]))
    removed = summarise(record_of({"a": [PROBS[keep]]}))
    assert masked.to_dict() == removed.to_dict()
    nothing = summarise(record_of({"a": [dirty]}, masks=[torch.zeros(4, dtype=torch.bool)]))
    told = nothing.to_dict()
    assert told["all"] == dict.fromkeys(["usage", "entropy", "margin", "confidence"]) | {"rows": 0}
    assert json.loads(nothing.to_json()) == told


@pytest.mark.parametrize("granularity", ["token", "sample"])
def test_a_mask_given_to_record_is_honoured(granularity: str) -> None:
    model, weave = woven(3, granularity=granularity)
    x, mask = torch.randn(3, 4, WIDTH), torch.ones(3, 4, dtype=torch.bool)
    mask[0], mask[1, 2:] = False, False
    with weave.record(mask=mask) as record, torch.no_grad():
        model(x)
    summary = summarise(record, torch.arange(3.0), cuts=(0.5, 1.5))
    per_layer = [0, 2, 4] if granularity == "token" else [0, 1, 1]
    assert summary.count("bin").tolist() == [2 * rows for rows in per_layer]
    used, count = summary.usage()[2] * summary.count(), summary.count().item()
    assert record.usage() == pytest.approx(used.item() / count)


parts = st.lists(
    st.tuples(
        st.lists(st.sampled_from("abc"), min_size=1, max_size=3, unique=True),
        st.integers(1, 4),  # experts
        st.integers(1, 5),  # rows
        st.integers(0, 3),  # newest
        st.integers(0, 10_000),
    ),
    min_size=1,
    max_size=4,
)


def drawn(part: tuple[list[str], int, int, int, int]) -> RoutingSummary:
    names, experts, rows, newest, seed = part
    generator = torch.Generator().manual_seed(seed)
    probs = {n: [torch.rand(rows, experts, generator=generator).softmax(-1)] for n in names}
    return summarise(
        record_of(probs, newest), torch.rand(rows, generator=generator), cuts=(0.3, 0.6)
    )


def equal(one: RoutingSummary, two: RoutingSummary) -> None:
    """The same but for the order of groups and of floating-point sums."""
    order = [two.groups.index(name) for name in one.groups]
    assert sorted(one.groups) == sorted(two.groups) and one.cuts == two.cuts
    assert torch.equal(one.rows_GSBE, two.rows_GSBE[order])
    assert torch.equal(one.margins_GSH, two.margins_GSH[order])
    # sums of some ten fp64 numbers below 2
    torch.testing.assert_close(one.sums_GSB3, two.sums_GSB3[order], rtol=1e-13, atol=1e-13)


@given(parts, st.randoms())
def test_merging_is_order_free_and_counts_every_row_once(given_parts: Any, random: Any) -> None:
    summaries = [drawn(part) for part in given_parts]
    whole = merged(summaries)
    assert whole.count().item() == sum(len(part[0]) * part[2] for part in given_parts)
    shuffled = random.sample(summaries, len(summaries))
    equal(whole, merged(shuffled))
    half = len(summaries) // 2
    if half:
        equal(whole, merged(summaries[:half]).merge(merged(summaries[half:])))


@given(st.integers(1, 5), st.integers(0, 5), st.integers(0, 10_000))
def test_merging_two_halves_is_summarising_the_whole(one: int, two: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probs = torch.rand(one + two, 3, generator=generator).softmax(-1)
    values = torch.rand(one + two, generator=generator)
    whole = summarise(record_of({"a": [probs]}), values, cuts=(0.5,))
    halves = [
        summarise(record_of({"a": [probs[part]]}), values[part], cuts=(0.5,))
        for part in (slice(one), slice(one, None))
    ]
    equal(whole, merged(halves))


def test_a_summary_is_a_value() -> None:
    one = summarise(record_of({"a": [PROBS]}))
    before = one.to_json()
    one.merge(one, one)
    assert one.to_json() == before
    with pytest.raises(AttributeError):
        one.groups = ()  # type: ignore[misc]


def test_nothing_is_read_back_before_it_is_asked_for() -> None:
    """A tensor on the meta device has no values to read."""
    probs = torch.rand(2, 3, 4, device="meta")
    keep = torch.ones(2, 3, dtype=torch.bool, device="meta")
    record = record_of({"a": [probs], "b": [probs]}, newest=1, masks=[keep])
    summary = summarise(record, torch.rand(2, device="meta"), cuts=(0.5,))
    both = summary.merge(summary)
    for by in ("group", "stage", "bin", None):
        for figure in (both.usage, both.entropy, both.margin, both.confidence, both.count):
            assert figure(by).is_meta


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cuts": (0.5,)}, "both values and cuts"),
        ({"values": torch.zeros(4)}, "both values and cuts"),
        ({"values": torch.zeros(4), "cuts": (0.5, 0.5)}, r"must rise, got \[0.5, 0.5\]"),
        ({"values": torch.zeros(3), "cuts": (0.5,)}, r"needs 4 values, .* got \[3\]"),
        ({"values": [torch.zeros(4)] * 2, "cuts": (0.5,)}, "saw 1 forwards, .* values for 2"),
    ],
)
def test_bad_bins_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(prw.ConfigError, match=message):
        summarise(record_of({"a": [PROBS]}), **fields)


def test_what_cannot_be_summarised_or_merged_is_refused() -> None:
    with pytest.raises(prw.ConfigError, match="holds no routing"):
        summarise(prw.Record())
    with pytest.raises(prw.ConfigError, match="no summary to merge"):
        merged([])
    binned = summarise(record_of({"a": [PROBS]}), torch.zeros(4), cuts=(0.5,))
    with pytest.raises(prw.ConfigError, match=r"other bins .* \[0.5\] and \[\]"):
        summarise(record_of({"a": [PROBS]})).merge(binned)
    with pytest.raises(prw.ConfigError, match="got 'layer'"):
        binned.usage("layer")  # type: ignore[arg-type]


def test_flip_rate_is_the_share_of_changed_choices() -> None:
    before = record_of({"a": [PROBS], "b": [PROBS]})
    after = record_of({"a": [PROBS.flip(-1)], "b": [PROBS]})  # rows 0, 1 and 2 of a change
    assert flip_rate(before, after) == 3 / 8
    assert flip_rate(before, before) == 0.0
    keep = torch.tensor([True, False, False, True])
    assert (
        flip_rate(record_of({"a": [PROBS]}, masks=[keep]), record_of({"a": [PROBS.flip(-1)]}))
        == 0.5
    )
    wider = torch.cat([PROBS, torch.zeros(4, 1)], -1)
    assert flip_rate(before, record_of({"a": [wider], "b": [wider]})) == 0.0


def test_flip_rate_refuses_records_of_something_else() -> None:
    before = record_of({"a": [PROBS]})
    with pytest.raises(prw.ConfigError, match="other groups"):
        flip_rate(before, record_of({"b": [PROBS]}))
    with pytest.raises(prw.ConfigError, match=r"'a' routed \[\[4\]\] before and \[\[2\]\] after"):
        flip_rate(before, record_of({"a": [PROBS[:2]]}))


def observed(model: torch.nn.Module, weave: prw.Weave, x: Tensor) -> prw.Record:
    with weave.record() as record, torch.no_grad():
        model(x)
    return record


@pytest.mark.parametrize(("kind", "moved"), [("zero", True), ("mean", False)])
def test_a_mean_column_moves_no_input_and_a_zero_column_does(kind: Any, moved: bool) -> None:
    model, weave = woven(3, new_column=kind)
    x = torch.randn(200, WIDTH)
    before = observed(model, weave, x)
    weave.unlock("next")
    assert (flip_rate(before, observed(model, weave, x)) > 0.05) == moved
    with weave.at_stage("s2"):
        assert flip_rate(before, observed(model, weave, x)) == 0.0


@given(st.integers(0, 10_000), st.integers(1, 18))
def test_a_mean_column_never_wins(seed: int, experts: int) -> None:
    torch.manual_seed(seed)
    _, weave = woven(experts, new_column="mean")
    h_TD = torch.randn(50, WIDTH)
    pool = weave.pools["0"]
    before = pool.router.route(h_TD, tuple(c.detach() for c in pool.columns.signal))
    weave.unlock("next")
    after = pool.router.route(h_TD, tuple(c.detach() for c in pool.columns.signal))
    top = torch.nn.functional.pad(before.probs, (0, 1)).topk(2).values
    clear = top[:, 0] - top[:, 1] > 1e-5  # outside the tie margin
    assert torch.equal(before.expert[clear], after.expert[clear])
    assert (after.probs[:, -1] > 0).all()


def test_the_kind_of_column_is_saved_and_loading_does_not_draw_one(tmp_path: Any) -> None:
    model, weave = woven(2, new_column="mean")
    weave.unlock("third")
    weave.save(tmp_path / "w")
    states = [pool.columns.state()[0] for pool in weave.pools.values()]
    weave.unload()
    loaded = prw.load(model, tmp_path / "w")
    assert loaded.config.new_column == "mean"
    for pool, state in zip(loaded.pools.values(), states, strict=True):
        assert torch.equal(pool.columns.state()[0], state)
        assert torch.equal(state[2], state[:2].double().mean(0).float())


def render(renderable: Any) -> str:
    import io

    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=100).print(renderable)
    return out.getvalue()


def test_the_report_names_every_stage_and_figure_and_prints_nothing(capsys: Any) -> None:
    model, weave = woven(3)
    summary = summarise(observed(model, weave, torch.randn(20, WIDTH)))
    text = render(weave.report(summary))
    assert max(len(line) for line in text.splitlines()) <= 100
    assert all(name in text for name in ("s0", "s1", "s2", "learning", "frozen", "entropy"))
    for figure in summary.to_dict()["by_group"].values():
        assert all(f"{share:.2f}" in text for share in figure["usage"])
        assert f"{figure['margin']:.2f}" in text
    assert "entropy" not in render(weave.report())
    assert capsys.readouterr().out == ""


def test_a_report_of_many_experts_lists_the_most_used() -> None:
    model, weave = woven(11)
    text = render(weave.report(summarise(observed(model, weave, torch.randn(20, WIDTH)))))
    assert "most used of 11" in text and max(map(len, text.splitlines())) <= 100


def test_a_report_with_long_names_keeps_the_groups_readable() -> None:
    model, weave = woven(1)
    for index in range(5):
        weave.unlock(f"a-rather-long-stage-name-{index}")
    text = render(weave.report(summarise(observed(model, weave, torch.randn(20, WIDTH)))))
    heading = next(line for line in text.splitlines() if "margin" in line)
    assert heading.split("┃")[2:8] == [f"    {i} " for i in range(6)]


def test_a_report_refuses_the_summary_of_another_weave() -> None:
    _, weave = woven(2)
    with pytest.raises(prw.ConfigError, match="the group 'a'"):
        weave.report(summarise(record_of({"a": [PROBS]})))
    with pytest.raises(prw.ConfigError, match="3 experts"):
        weave.report(summarise(record_of({"0": [PROBS]})))
