"""The ledger is a value; the schedule is a function of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prw import Config, StageError
from prw.ledger import Ledger, Stage
from prw.schedule import Learning, schedule

histories = st.lists(
    st.sampled_from(["unlock", "close", "rollback", "freeze", "thaw", "rename"]), max_size=12
)


def play(history: list[str]) -> Ledger:
    ledger = Ledger()
    for step, action in enumerate(history):
        if action == "unlock":
            ledger = ledger.unlock(f"s{step}")
        elif action == "close":
            ledger = ledger.close()
        elif ledger.stages and (action != "thaw" or ledger.newest is not None):
            name = ledger.names[step % len(ledger)]
            further = (f"r{step}",) if action == "rename" else ()
            ledger = getattr(ledger, action)(name, *further)
    return ledger


@given(histories)
def test_any_history_keeps_the_rules(history: list[str]) -> None:
    ledger = play(history)
    assert [stage.index for stage in ledger.stages] == list(range(len(ledger)))
    open_stages = [stage for stage in ledger.stages if stage.open]
    assert len(open_stages) <= 1
    assert ledger.newest == (open_stages[0] if open_stages else None)
    assert ledger.close().newest is None
    assert all(ledger[name].name == name for name in ledger.names)


@given(histories, st.sampled_from(["all", "new"]))
def test_schedule(history: list[str], router_train: str) -> None:
    ledger = play(history)
    config = Config(router_train=router_train)  # type: ignore[arg-type]
    learning = schedule(ledger, config)
    if ledger.newest is None:
        assert learning == Learning()
    else:
        newest = ledger.newest.index
        assert learning.experts == {s.index for s in ledger.stages if s.open != s.exempt}
        columns = range(len(ledger)) if router_train == "all" else [newest]
        assert learning.columns == set(columns)


def test_the_newest_is_the_open_stage_and_not_the_last() -> None:
    ledger = Ledger((Stage("a", 0, open=True), Stage("imported", 1, open=False)))
    assert schedule(ledger, Config()).experts == {0}


@pytest.mark.parametrize("name", ["", "..", ".a", "a/b", "a b", "ä", "x" * 65, "-a", "a\n"])
def test_names_that_could_not_be_a_folder(name: str) -> None:
    with pytest.raises(StageError, match="cannot name a stage"):
        Ledger().unlock(name)


def test_names_differ_even_where_case_does_not_count() -> None:
    with pytest.raises(StageError, match="exists already"):
        Ledger().unlock("a").unlock("a")
    with pytest.raises(StageError, match="must differ"):
        Ledger().unlock("a").unlock("A")


def test_an_unknown_stage_is_named_with_the_nearest() -> None:
    with pytest.raises(StageError, match="no stage 'colour'; did you mean 'colours'"):
        Ledger().unlock("colours").rollback("colour")
    with pytest.raises(StageError, match="there are: colours"):
        Ledger().unlock("colours")["xyz"]
    with pytest.raises(StageError, match="unlock one"):
        Ledger()["xyz"]


@pytest.mark.parametrize(
    "stages",
    [
        (Stage("a", 1, open=False),),
        (Stage("a", 0, open=True), Stage("b", 1, open=True)),
    ],
)
def test_impossible_ledgers(stages: tuple[Stage, ...]) -> None:
    with pytest.raises(StageError):
        Ledger(stages)


def test_freeze_and_thaw_last_until_the_open_stage_ends() -> None:
    ledger = Ledger().unlock("a").unlock("b").unlock("c")
    turned = ledger.freeze("c").thaw("a")
    for config in (Config(), Config(router_train="new")):
        assert schedule(turned, config).experts == {0}
        assert schedule(turned, config).columns == schedule(ledger, config).columns
    assert turned.freeze("a").thaw("c") == ledger
    assert turned.thaw("a") == turned == turned.freeze("c")
    assert ledger.freeze("a") == ledger == ledger.thaw("c")
    assert turned.close() == ledger.close()
    assert schedule(turned.unlock("d"), Config()).experts == {3}
    assert turned.rollback("b") == ledger.rollback("b")
    with pytest.raises(StageError, match="no stage is open, so 'a' cannot learn; unlock"):
        ledger.close().thaw("a")
    assert ledger.close().freeze("a") == ledger.close()
    with pytest.raises(StageError, match="'a' cannot learn while no stage is open"):
        Ledger((Stage("a", 0, open=False, exempt=True),))


def test_rename() -> None:
    ledger = Ledger().unlock("a").unlock("b").thaw("a")
    renamed = ledger.rename("a", "A")
    assert renamed.names == ("A", "b")
    assert renamed.stages[0].exempt and renamed.stages[1] == ledger.stages[1]
    for new, message in (("b", "exists already"), ("a", "exists already"), ("B", "must differ")):
        with pytest.raises(StageError, match=message):
            ledger.rename("a", new)
    with pytest.raises(StageError, match="cannot name a stage"):
        ledger.rename("a", "../a")
    with pytest.raises(StageError, match="no stage 'x'"):
        ledger.rename("x", "y")
