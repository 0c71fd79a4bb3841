"""What a benchmark is scored with: presets, the public scripts' encoders, what is given."""

from __future__ import annotations

import pytest

from prw_flux.cli import build_parser, main
from prw_flux.cli.bench_open import settled
from prw_flux.cli.bench_presets import B16, B32, DINO, L14, PRESETS


def options(*words: str) -> tuple[object, ...]:
    args = settled(build_parser().parse_args(["evaluate", "run", "--bench", *words]))
    return args.clip, args.dino, args.captions, args.size, args.samples


def test_what_is_not_given_is_the_presets_and_then_the_public_scripts() -> None:
    assert options("emu_edit") == (B32, DINO, "all", None, None)
    assert options("multigen")[0] == B16
    assert options("emu_edit", "--preset", "icedit") == (L14, DINO, "changed", None, None)
    assert options("emu_edit", "--preset", "omnigen") == (L14, DINO, "all", 512, None)
    given = ("--clip", "none", "--dino", "x/y", "--size", "256")
    assert options("emu_edit", "--preset", "omnigen", *given) == ("none", "x/y", "all", 256, None)
    assert options("dreambench", "--preset", "dreambooth", "--samples", "1")[-1] == 1
    assert options("dreambench", "--preset", "dreambooth")[-1] == 4


def test_every_preset_says_where_it_is_from_and_holds_options_of_the_command() -> None:
    for bench, those in PRESETS.items():
        known = vars(build_parser().parse_args(["evaluate", "run", "--bench", bench]))
        for name, one in those.items():
            assert one.source and one.stated() and set(one.stated()) <= set(known), name
            assert all(known[option] is None for option in one.stated())


def test_a_preset_that_is_not_there_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "run", "--bench", "emu_edit", "--preset", "emu"]) == 1
    said = "emu_edit has no preset 'emu'; it has: ultraedit, omnigen, icedit."
    assert capsys.readouterr().err == f"prw-flux: {said}\n"
