from __future__ import annotations

import pytest

from prw_flux.evaluation.published import compare, disagreement, load, names, parse, tables_of

OURS = parse(
    "bench=magicbrush;split=test;items=all;reference=source;turns=single;"
    "clip=clip:openai/clip-vit-base-patch32;dino=dino:facebook/dino-vits16"
)
SCORES = {"CLIP-I": 0.9, "CLIP-T": 0.3, "L1": 0.06, "DINO": 0.91}


def test_every_table_loads_with_a_source_and_a_protocol_per_row() -> None:
    tables = {name: load(name) for name in names()}
    assert {name: len(table.rows) for name, table in tables.items()} == {
        "control_coco": 5, "dreambench": 9, "dreambench_ablation": 5, "dreambench_data": 6,
        "emu_edit": 11, "gedit": 5, "magicbrush": 10, "magicbrush_ablation": 5, "multigen": 9,
        "multigen_coco": 2,
    }  # fmt: skip
    for table in tables.values():
        for row in table.rows:
            assert row.source.startswith("arXiv 2602.22150v1, ")
            assert row.metrics and "bench" in row.protocol
            assert set(row.metrics) <= set(table.metrics)


def test_the_papers_tables_agree_with_one_another() -> None:
    """CoLoGen's own row is printed in two or three tables of the paper each."""

    def of(name: str, method: str) -> dict[str, float]:
        return dict(next(row.metrics for row in load(name).rows if row.method == method))

    main = of("magicbrush", "CoLoGen")
    assert main == {"CLIP-I": 0.931, "CLIP-T": 0.301, "L1": 0.063, "DINO": 0.932}
    ablated = of("magicbrush_ablation", "Rc&Rl CoLoGen")
    assert ablated == {key: main[key] for key in ablated}
    assert of("dreambench", "CoLoGen") == of("dreambench_ablation", "Rc&Rl CoLoGen")
    assert of("dreambench", "CoLoGen") == of("dreambench_data", "CoLoGen (200k)")
    assert (
        of("multigen", "CoLoGen")["canny CLIP-S"]
        == of("control_coco", "CoLoGen (FLUX)")["canny CLIP-S"]
    )
    assert "CLIP-T" not in of("magicbrush", "UltraEdit")  # a dash in the paper is no zero


def test_a_row_of_the_same_protocol_stands_under_the_published_ones() -> None:
    shown = compare(load("magicbrush"), "mine", SCORES, OURS)
    assert shown.columns == ("method", "CLIP-I", "CLIP-T", "L1", "DINO")
    assert shown.rows[-1] == ("mine", "0.900", "0.300", "0.060", "0.910")
    assert ("CoLoGen", "0.931", "0.301", "0.063", "0.932") in shown.rows
    assert any(
        note.startswith("the source does not state turns (CLIP-I, CLIP-T") for note in shown.notes
    )
    assert "the source does not state clip (CLIP-I, CLIP-T)" in shown.notes


@pytest.mark.parametrize(
    ("change", "refused", "said"),
    [
        ({"reference": "target"}, {"CLIP-I", "L1", "DINO"}, "reference is target here and"),
        ({"items": "13 of 1053"}, set(SCORES), "items is 13 of 1053 here and all there"),
        ({"clip": "own:mine:encode"}, {"CLIP-I", "CLIP-T"}, "clip is own:mine:encode here"),
        ({"dino": "dinov2:facebook/dinov2-small"}, {"DINO"}, "and dino:? there"),
        ({"bench": "emu_edit"}, set(SCORES), "bench is emu_edit here and magicbrush there"),
    ],
)  # fmt: skip
def test_a_number_of_another_protocol_is_refused(
    change: dict[str, str], refused: set[str], said: str
) -> None:
    shown = compare(load("magicbrush"), "mine", SCORES, {**OURS, **change})
    own = dict(zip(shown.columns, shown.rows[-1], strict=True))
    assert {metric for metric in SCORES if own[metric] == "refused"} == refused
    assert any(said in note for note in shown.notes)


@pytest.mark.parametrize(
    ("table", "metric", "protocol", "theirs"),
    [
        ("magicbrush", "L1", "split=test;reference=source;turns=single", "reference=target"),
        ("magicbrush", "DINO", "split=test;reference=source;dino=dino:x", "split=dev"),
        ("magicbrush_ablation", "CLIP-T", "split=test;clip=clip:x", "clip=own:x"),
        ("emu_edit", "CLIP-T", "split=test;reference=source;clip=clip:x", "split=validation"),
        ("dreambench", "DINO", "against=all photos;dino=dino:x", "dino=dinov2:x"),
        ("dreambench_ablation", "CLIP-I", "against=the reference;clip=clip:x", "items=8 of 750"),
        ("dreambench_data", "CLIP-T", "clip=clip:x", "clip=own:x"),
        (
            "magicbrush_ablation",
            "DINO",
            "split=test;reference=source;dino=dino:x",
            "reference=target",
        ),
        (
            "multigen_coco",
            "seg mIoU COCO-Stuff",
            "groups=4;seg maps=deeplabv3:x",
            "seg maps=mask2former:x",
        ),
        ("multigen", "depth RMSE", "groups=4;depth maps=dpt:x", "depth maps=own:x"),
        ("gedit", "G_O", "set=full;language=en;judge=x;questions=viescore", "set=intersection"),
    ],
)
def test_every_benchmark_takes_its_own_protocol_and_no_other(
    table: str, metric: str, protocol: str, theirs: str
) -> None:
    found = load(table)
    ours = {"bench": found.rows[0].protocol["bench"], "items": "all", **parse(protocol)}
    place = found.metrics.index(metric) + 1
    assert compare(found, "mine", {metric: 0.5}, ours).rows[-1][place] == "0.500"
    shown = compare(found, "mine", {metric: 0.5}, {**ours, **parse(theirs)})
    assert shown.rows[-1][place] == "refused" and shown.notes[0].startswith(f"{metric} refused: ")


def test_what_is_open_is_named_and_what_differs_is_not() -> None:
    assert disagreement("L1", {"a": "1"}, {"a": "?", "b": "2"}) == ((), ("a", "b"))
    assert disagreement("L1", {"clip": "x"}, {"clip": "y"}) == ((), ())  # L1 needs no CLIP
    assert disagreement("CLIP-I", {"clip": "x"}, {"clip": "y"})[0]


def test_what_there_is_not() -> None:
    with pytest.raises(ValueError, match="no published table 'gone'; there are control_coco"):
        load("gone")
    with pytest.raises(ValueError, match="field=value"):
        parse("bench=;x")
    assert tables_of("refcoco") == ()
    assert [t.name for t in tables_of("dreambench")] == [
        "dreambench", "dreambench_ablation", "dreambench_data"
    ]  # fmt: skip
