"""How `benchmarks.pipeline` tells its result to people."""

from __future__ import annotations

from typing import Any

from benchmarks._common import head


def tell(result: dict[str, Any]) -> None:
    """Everything that was counted and timed."""
    _counted(result)
    print()
    head(result, "size", "parameters", "rank", "dtype")
    for name, value in result["variants"].items():
        print(f"{name:>16}  {value['median_ms']:9.2f} ms a step  "
              f"[{value['p20_ms']:.2f}, {value['p80_ms']:.2f}]")  # fmt: skip
    print(f"a generation of {result['steps']} steps, in time and in operations:")
    labels = {
        "joint_over_ours": "Kontext-style / zero, cached",
        "current_over_ours": "current / zero, cached",
        "ours_over_text": "zero, cached / text to image",
    }
    for one in result["generations"]:
        for name, label in labels.items():
            print(f"{one['pixels']:>6} px  {label:<30} {one['time'][name]:.2f} x  "
                  f"{one['flops'][name]:.2f} x")  # fmt: skip
    beside = result["text_to_image"]
    print(
        f"text to image, attached / stock: {beside['ratio_of_medians']:.3f} x in "
        f"{beside['pairs']} pairs of {beside['steps']} steps at {beside['pixels']} px "
        f"(median of the pairs' ratios {beside['median_of_ratios']:.3f}); attaching took "
        f"{beside['attach_s']} s"
    )
    for row in result["training"]:
        told = row.get("problem") or f"{row['median_ms']:.0f} ms, peak {row['peak_GiB']} GiB"
        print(f"training {row['pixels']} px, base {row['base']}, batch {row['batch']}: {told}")


def _counted(result: dict[str, Any]) -> None:
    print(f"FLUX.1-dev, counted on the meta device; generations of {result['steps']} steps")
    for one in result["counted"]:
        work = "  ".join(f"{name} {value}" for name, value in one["TFLOP"].items())
        pixels = 16 * int(one["tokens"]["noisy"] ** 0.5)
        print(f"{pixels:>6} px  TFLOP a step: {work}")
        print(
            f"           Kontext-style / zero, cached {one['joint_over_ours']:.2f} x, zero, cached "
            f"/ text {one['ours_over_text']:.2f} x, cache {one['cache_GiB']['bf16']} GiB in bf16, "
            f"{one['cache_GiB']['fp8']} in fp8"
        )
    full = result["attach_full_width"]
    print(
        f"  five experts of rank 128 ({full['expert_parameters']} parameters): made in "
        f"{full['make_s']} s, attached in {full['attach_s']} s"
    )
