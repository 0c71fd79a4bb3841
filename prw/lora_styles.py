"""How other tools write a LoRA: the names of its tensors, its settings, and what is no plain LoRA.

Shape suffixes: D input width, O output width, R rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from prw.errors import CheckpointError

_FACTOR = re.compile(
    r"(?P<layer>.+)\.(?:(?P<A>lora_A(?:\.[^.]+)?|lora_down|lora\.down|lora_linear_layer\.down)"
    r"|(?:lora_B(?:\.[^.]+)?|lora_up|lora\.up|lora_linear_layer\.up))\.weight"
)
_ALPHA = re.compile(r"(?P<layer>.+)\.alpha")

_COMPONENTS = (
    "base_model.model.",
    "transformer.",
    "unet.",
    "text_encoder.",
    "text_encoder_2.",
    "text_encoder_3.",
    "prior.",
    "diffusion_model.",
    "model.diffusion_model.",
)
"""What PEFT, diffusers and ComfyUI write before the name of a layer."""

_FLAT = ("lora_unet_", "lora_transformer_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_")
"""What kohya's tools write before a name whose dots they turned into underscores."""

_OTHER_KINDS = (
    (r"lora_magnitude_vector|dora_scale", "DoRA, whose magnitudes are no low-rank pair"),
    (r"hada_w\d|hada_t\d", "LoHa, a product of pairs"),
    (r"lokr_", "LoKr, a Kronecker product"),
    (r"lora_mid", "a LoRA of convolutions"),
    (r"lora_embedding_", "a LoRA of an embedding"),
    (r"modules_to_save", "a LoRA with whole layers beside it (modules_to_save)"),
    (r"bias$|diff_b$|bias_indices", "a LoRA with biases"),
    (r"\.diff$|\.weight$", "more than a LoRA: it holds whole weights"),
)

_PLAIN = {
    "use_dora": "DoRA, whose magnitudes are no low-rank pair",
    "lora_bias": "a LoRA with biases",
    "modules_to_save": "a LoRA with whole layers beside it (modules_to_save)",
    "trainable_token_indices": "a LoRA with trained tokens beside it (trainable_token_indices)",
    "target_parameters": "a LoRA of bare parameters (target_parameters)",
    "layer_replication": "a LoRA of a base with repeated layers (layer_replication)",
    "alora_invocation_tokens": "an activated LoRA (alora_invocation_tokens)",
    "use_qalora": "QALoRA, which pools its input",
    "use_bdlora": "a block-diagonal LoRA (use_bdlora)",
    "arrow_config": "an Arrow router over several LoRAs (arrow_config)",
    "kasa_config": "KaSA, which changes the base weights (kasa_config)",
    "monteclora_config": "MonteCLoRA, which samples its weights (monteclora_config)",
}
"""Settings of PEFT that, when set, make something else of a LoRA."""

_HARMLESS_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of PEFT's init_lora_weights that leave the base weights as they are."""


@dataclass(frozen=True)
class Pair:
    """The factors of one layer of a file.

    Attributes:
        A: ``[R, D]``.
        B: ``[O, R]``.
        alpha: as the file says; None where it does not.
        written: the name of the layer in the file.
    """

    A: Tensor
    B: Tensor
    alpha: float | None
    written: str

    @property
    def rank(self) -> int:
        """R."""
        return int(self.A.shape[0])


def read_pairs(
    tensors: Mapping[str, Tensor], targets: Collection[str], source: str
) -> dict[str, Pair]:
    """The pair of each target, from tensors named as PEFT, diffusers or kohya's tools do.

    Args:
        tensors: everything a file holds.
        targets: full names of the layers that may have a pair.
        source: the file, for messages.

    Raises:
        CheckpointError: a tensor belongs to another kind of adapter or to a layer that is not
            adapted, one of two factors is missing, or a factor is no finite matrix.
    """
    sides: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    for key, tensor in tensors.items():
        if (match := _FACTOR.fullmatch(key)) is not None:
            side = "A" if match["A"] else "B"
            if side in sides.setdefault(match["layer"], {}):
                raise CheckpointError(f"{source} holds several adapters; keep one ({key!r})")
            _check_factor(key, tensor, source)
            sides[match["layer"]][side] = tensor
        elif (match := _ALPHA.fullmatch(key)) is not None and tensor.numel() == 1:
            alphas[match["layer"]] = float(tensor)
        else:
            raise CheckpointError(f"{source} is {_kind(key)} ({key!r}); only plain LoRA joins")
    _check_complete(sides, alphas, source)
    found: dict[str, Pair] = {}
    for layer, target in _resolve(list(sides), targets, source).items():
        # kohya's tools write no alpha, or 0, where it equals the rank
        pair = Pair(sides[layer]["A"], sides[layer]["B"], alphas.get(layer) or None, layer)
        found[target] = pair
    return found


def _check_factor(key: str, tensor: Tensor, source: str) -> None:
    if tensor.dim() != 2:
        raise CheckpointError(
            f"{source} is a LoRA of convolutions: {key!r} is {list(tensor.shape)}; only those of "
            "linear layers join"
        )
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        raise CheckpointError(f"{source}: {key!r} is {tensor.dtype}; convert it to 16 or 32 bits")
    if not tensor.isfinite().all():
        raise CheckpointError(f"{source}: {key!r} holds values that are not finite")


def _check_complete(
    sides: Mapping[str, Mapping[str, Tensor]], alphas: Collection[str], source: str
) -> None:
    if not sides:
        raise CheckpointError(f"{source} holds no LoRA")
    for layer, pair in sides.items():
        if len(pair) < 2:
            missing = "A (down)" if "B" in pair else "B (up)"
            raise CheckpointError(f"{source} lacks the factor {missing} of {layer!r}")
    lonely = [layer for layer in alphas if layer not in sides]
    if lonely:
        raise CheckpointError(f"{source} holds an alpha but no factors of {lonely[0]!r}")


def _kind(key: str) -> str:
    kinds = (kind for mark, kind in _OTHER_KINDS if re.search(mark, key))
    return next(kinds, "no plain LoRA")


def _resolve(layers: list[str], targets: Collection[str], source: str) -> dict[str, str]:
    """The target of each layer of a file; raises for a layer without one and for a target twice."""
    flat: dict[str, list[str]] = {}
    for target in targets:
        flat.setdefault(target.replace(".", "_"), []).append(target)
    found: dict[str, str] = {}
    unknown = []
    for layer in layers:
        names = [layer] if layer in targets else _names(layer, targets, flat)
        if not names:
            unknown.append(layer)
        elif len(names) > 1:
            raise CheckpointError(f"{source}: {layer!r} may be {names[0]!r} or {names[1]!r}")
        else:
            found[layer] = names[0]
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise CheckpointError(
            f"{source} changes layers that this weave does not adapt, {', '.join(unknown[:3])}"
            f"{more}; name them in target_modules, or take them out of the file"
        )
    owners: dict[str, str] = {}
    for layer, target in found.items():
        if target in owners:
            raise CheckpointError(
                f"{source} changes {target!r} twice, as {owners[target]!r} and {layer!r}; "
                "keep the part for this model only"
            )
        owners[target] = layer
    return found


def _names(layer: str, targets: Collection[str], flat: Mapping[str, list[str]]) -> list[str]:
    """The targets that a layer without a target of its very name may mean."""
    for prefix in _COMPONENTS:
        if layer.startswith(prefix) and layer.removeprefix(prefix) in targets:
            return [layer.removeprefix(prefix)]
    for prefix in _FLAT:
        if layer.startswith(prefix) and layer.removeprefix(prefix) in flat:
            return flat[layer.removeprefix(prefix)]
    return []


def check_settings(data: Mapping[str, Any], source: str) -> None:
    """Refuse settings of PEFT under which the pairs alone are not the adapter.

    Raises:
        CheckpointError: one sentence that names the setting.
    """
    kind = data.get("peft_type", "LORA")
    if kind != "LORA":
        raise CheckpointError(f"{source} is a {kind} adapter (peft_type); only plain LoRA joins")
    for name, what in _PLAIN.items():
        if data.get(name):
            raise CheckpointError(f"{source} is {what}; only plain LoRA joins")
    if data.get("bias", "none") != "none":
        raise CheckpointError(f"{source} is a LoRA with biases (bias={data['bias']!r})")
    start = data.get("init_lora_weights")
    if start not in _HARMLESS_STARTS:
        raise CheckpointError(
            f"{source} was made with init_lora_weights={start!r}, which changes the base weights; "
            "let PEFT save it as a plain LoRA (path_initial_model_for_weight_conversion)"
        )


def alpha_rule(data: Mapping[str, Any], source: str) -> Callable[[Sequence[str], int], float]:
    """What PEFT's settings say about alpha, as a function of a layer's names and its rank.

    ``alpha / rank`` is the scaling; for rank-stabilised LoRA (arXiv 2312.03732) it is
    ``alpha / sqrt(rank)``, which is expressed by another alpha.

    Raises:
        CheckpointError: the settings lack ``r`` or ``lora_alpha``, a pattern is no expression, or,
            from the function, a rank is not the one that the settings give.
    """
    try:
        rank, alpha = int(data["r"]), float(data["lora_alpha"])
        ranks = {_pattern(k): int(r) for k, r in dict(data.get("rank_pattern") or {}).items()}
        patterns = dict(data.get("alpha_pattern") or {})
        alphas = {_pattern(k): float(a) for k, a in patterns.items()}
    except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
        raise CheckpointError(f"{source} has damaged settings: {error!r}") from None

    def rule(names: Sequence[str], found: int) -> float:
        said = next((r for p, r in ranks.items() if any(map(p.match, names))), rank)
        if said != found:
            raise CheckpointError(
                f"{source}: {names[0]!r} has rank {found}, but by its settings it should be {said}"
            )
        own = next((a for p, a in alphas.items() if any(map(p.match, names))), alpha)
        return _as_alpha(own / math.sqrt(found), found) if data.get("use_rslora") else own

    return rule


def _pattern(key: str) -> re.Pattern[str]:
    """PEFT's reading of a key: an expression that ends at the end of a name."""
    return re.compile(rf"(.*\.)?({key})$")


def _as_alpha(scaling: float, rank: int) -> float:
    """An alpha for which ``alpha / rank`` has, where there is one, the very bits of `scaling`."""
    alpha = scaling * rank
    near = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return next((a for a in near if a / rank == scaling), alpha)
