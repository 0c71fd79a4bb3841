"""The feature stream: what it computes, what it leaves alone, and what it refuses."""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from prw import CheckpointError, ConfigError
from prw_flux import TwoPass
from prw_flux.coredi import (
    REDI,
    CoReDi,
    CoReDiConfig,
    DinoV2,
    FunctionEncoder,
    Projection,
    Watch,
    carrying,
    covariance,
    effective_rank,
    feature_loss,
    joined,
    latent_only_guidance,
    load_encoder,
    orthogonality,
    representation_guidance,
    similarity,
)
from prw_flux.coredi.collapse import remedy
from prw_flux.coredi.grid import maps, place
from prw_flux.coredi.pixels import patchify, unpatchify, velocity_of_clean

WIDTH = 12
CONFIG = CoReDiConfig(enabled=True, channels=3)


def features(images: int = 6, rows: int = 2, columns: int = 2, width: int = WIDTH) -> Tensor:
    """Correlated channels of very different sizes, none of them centred."""
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(images, rows, columns, width, generator=draw)
    mixed = x @ torch.randn(width, width, generator=draw)
    return mixed * torch.logspace(-2, 2, width) + 5.0


def made(transformer: Any, config: CoReDiConfig = CONFIG) -> CoReDi:
    """Fitted, and with a stream that acts."""
    stream = CoReDi.for_transformer(transformer, config, WIDTH)
    stream.projection.fit(features(20))
    with torch.no_grad():
        for parameter in stream.stream.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return stream


def call(transformer: Any, batch: dict[str, Tensor], image: Tensor | None = None) -> Tensor:
    velocity: Tensor = transformer(
        hidden_states=batch["noisy_BNC"] if image is None else image,
        encoder_hidden_states=batch["text_BLE"],
        pooled_projections=batch["pooled_BP"],
        timestep=batch["timestep_B"],
        guidance=torch.ones(2),
        img_ids=batch["noisy_ids_N3"],
        txt_ids=torch.zeros(5, 3),
        return_dict=False,
    )[0]
    return velocity


# Projection ----------------------------------------------------------------------------------


def test_the_projection_begins_as_principal_components_of_standardised_features() -> None:
    from sklearn.decomposition import PCA

    seen = features(30)
    projection = Projection(WIDTH, 3, normalise="none")
    projection.fit(seen)
    x = seen.flatten(0, -2).double().numpy()
    unit = (x - x.mean(0)) / x.std(0)
    wanted = PCA(3).fit(unit)
    found = projection(seen).flatten(0, -2).detach().numpy()
    for channel, other in enumerate(wanted.transform(unit).T):
        sign = math.copysign(1.0, float(found[:, channel] @ other))
        # fp32 sums of 12 products of numbers below 10
        torch.testing.assert_close(
            torch.tensor(found[:, channel]).double(), torch.tensor(sign * other),
            rtol=1e-4, atol=1e-5,
        )  # fmt: skip
    assert orthogonality(projection.weight_DK).item() < 1e-10


def test_it_normalises_as_torch_does_and_follows_the_batches() -> None:
    seen = features()
    ours, theirs = Projection(WIDTH, 3), torch.nn.BatchNorm1d(3, affine=False)
    ours.fit(features(20))
    theirs.running_mean, theirs.running_var = (
        ours.running_mean_K.clone(), ours.running_var_K.clone()
    )  # fmt: skip
    raw = ours.linear(seen).flatten(0, -2)
    for _ in range(2):
        torch.testing.assert_close(ours(seen).flatten(0, -2), theirs(raw))
    torch.testing.assert_close(ours.running_mean_K, theirs.running_mean)
    torch.testing.assert_close(ours.running_var_K, theirs.running_var)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(seen[:1]).flatten(0, -2), theirs(raw[:4]))


def test_under_autocast_nothing_of_it_is_narrow() -> None:
    projection = Projection(WIDTH, 3)
    projection.fit(features(20))
    seen = features()
    wide = projection(seen)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(projection(seen), wide)
        assert covariance(wide).dtype == orthogonality(projection.weight_DK).dtype == torch.float32


def test_a_frozen_projection_has_no_gradient() -> None:
    projection = Projection(WIDTH, 3, learn=False)
    projection.fit(features(20))
    assert not projection.weight_DK.requires_grad and not projection(features()).requires_grad


def test_constant_channels_are_named_or_dropped() -> None:
    seen = features(20)
    seen[..., [2, 7]] = 0.25
    with pytest.raises(ConfigError, match=r"2 of the encoder's 12 channels never vary .*\(2, 7\)"):
        Projection(WIDTH, 3).fit(seen)
    projection = Projection(WIDTH, 3)
    projection.fit(seen, "drop")
    assert not projection.weight_DK[[2, 7]].any()
    assert torch.isfinite(projection(seen)).all()


def test_bad_features_are_refused() -> None:
    projection = Projection(WIDTH, 3)
    with pytest.raises(ConfigError, match="call fit first"):
        projection(features())
    with pytest.raises(ConfigError, match="at most the encoder's width 12, got 13"):
        Projection(WIDTH, 13)
    with pytest.raises(ConfigError, match="span 2 directions, channels is 3"):
        projection.fit(features(1, 1, 3))
    with pytest.raises(ConfigError, match="not finite"):
        projection.fit(features() * math.inf)
    projection.fit(features(20))
    with pytest.raises(ConfigError, match="width 5, the projection was made for 12"):
        projection(features(width=5))
    with pytest.raises(ConfigError, match="got a batch of one: raise batch_size"):
        projection(features(1))
    projection.eval()(features(1))
    projection.train().normalise = "none"
    projection(features(1))


# Losses --------------------------------------------------------------------------------------


def test_the_gradient_stops_at_the_target_alone() -> None:
    config = replace(CONFIG, drop=0.0, covariance=0.0, layout="token")
    coredi = CoReDi(config, WIDTH, 32)
    coredi.projection.fit(features(20))
    weight = coredi.projection.weight_DK

    def gradient(through: bool, stop: bool) -> Tensor | None:
        """Of P, where the prediction is the noisy features or a constant."""
        coredi.config = replace(config, stop_gradient=stop)
        batch = coredi.noised(features(), (2, 2), torch.full((6,), 0.5), torch.Generator())
        read = batch.noisy_BTF if through else batch.noisy_BTF.detach()
        loss, penalty = coredi.loss(2.0 * read, batch)
        assert penalty.item() == 0.0
        if not loss.requires_grad:
            return None
        return torch.autograd.grad(loss, weight)[0]

    assert gradient(through=False, stop=True) is None
    read, both = gradient(through=True, stop=True), gradient(through=True, stop=False)
    target = gradient(through=False, stop=False)
    assert read is not None and both is not None and target is not None
    assert float(read.abs().max()) > 0 and float(target.abs().max()) > 0
    torch.testing.assert_close(both, read + target, rtol=1e-4, atol=1e-6)


def test_dropped_samples_read_zero_and_cost_nothing() -> None:
    coredi = CoReDi(replace(CONFIG, drop=0.5), WIDTH, 32)
    coredi.projection.fit(features(20))
    times = torch.full((20,), 0.5)
    batch = coredi.noised(features(20), (2, 2), times, torch.Generator().manual_seed(0))
    dropped = batch.keep_B == 0
    assert 0 < int(dropped.sum()) < 20
    assert not batch.noisy_BTF[dropped].any() and batch.noisy_BTF[~dropped].all()
    right = batch.noise_BTF - batch.clean_BTF
    wrong = torch.where(dropped[:, None, None], right + 9.0, right)
    assert float(feature_loss(wrong, batch.clean_BTF, batch.noise_BTF, batch.keep_B).detach()) == 0
    again = coredi.noised(features(20), (2, 2), times, torch.Generator().manual_seed(0))
    assert torch.equal(again.noisy_BTF, batch.noisy_BTF)


def test_regularisers_are_their_equations() -> None:
    p = torch.randn(5, 3).double()
    wanted = sum((float(p[:, i] @ p[:, j]) - (i == j)) ** 2 for i in range(3) for j in range(3))
    assert float(orthogonality(p)) == pytest.approx(wanted)
    z = torch.randn(4, 2, 2, 3).double()
    c = torch.cov(z.flatten(0, -2).T, correction=0)
    wanted = sum(float(c[i, j]) ** 2 for i in range(3) for j in range(3) if i != j) / 3
    assert float(covariance(z)) == pytest.approx(wanted)
    r = torch.corrcoef(z.flatten(0, -2).T)
    wanted = sum(float(r[i, j]) ** 2 for i in range(3) for j in range(3) if i != j) / 3
    assert float(covariance(7.0 * z, unit=True)) == pytest.approx(wanted)
    f = torch.randn(4, 2, 2, 5).double()
    total, count = 0.0, 0
    for image in range(4):
        rows, wide = z[image].flatten(0, 1), f[image].flatten(0, 1)
        for i in range(4):
            for j in range(4):
                ours = torch.cosine_similarity(rows[i], rows[j], dim=0)
                theirs = torch.cosine_similarity(wide[i], wide[j], dim=0)
                total += max(0.0, abs(float(ours - theirs)) - 0.25)
                count += 1
    assert float(similarity(z, f)) == pytest.approx(total / count)
    assert float(similarity(f, f)) == 0.0


@given(st.integers(1, 6), st.integers(0, 1000))
def test_effective_rank_counts_independent_channels(rank: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(200, rank, generator=draw).double())[0]
    basis = torch.linalg.qr(basis - basis.mean(0))[0]  # uncorrelated, of one variance
    mixed = basis @ torch.linalg.qr(torch.randn(6, 6, generator=draw).double())[0][:rank]
    assert float(effective_rank(mixed)) == pytest.approx(rank, abs=1e-6)
    assert float(effective_rank(mixed * 1e-6 + 3.0)) == pytest.approx(rank, abs=1e-4)
    assert float(effective_rank(torch.ones(9, 4))) == 0.0


# Grids ---------------------------------------------------------------------------------------


def test_features_lie_where_their_token_lies() -> None:
    z = torch.randn(2, 3, 4, 5)
    assert torch.equal(place(z, (3, 4), "token")[:, 4 * 1 + 2], z[:, 1, 2])
    packed = place(z, (3, 4), "latent")
    assert packed.shape == (2, 12, 20)
    wanted = torch.nn.functional.interpolate(
        z.permute(0, 3, 1, 2), scale_factor=2, mode="bilinear", align_corners=False
    )
    assert torch.equal(maps(packed, (3, 4), "latent"), wanted)
    fine = torch.randn(1, 6, 8, 5)
    assert torch.equal(maps(place(fine, (3, 4), "latent"), (3, 4), "latent"),
                       fine.permute(0, 3, 1, 2))  # fmt: skip
    assert torch.equal(maps(place(z, (3, 4), "token"), (3, 4), "token"), z.permute(0, 3, 1, 2))


@pytest.mark.parametrize("grid", [(5, 4), (3, 8), (4, 3), (12, 16)])
def test_a_grid_that_does_not_match_is_refused(grid: tuple[int, int]) -> None:
    z = torch.randn(1, *grid, 2)
    with pytest.raises(ConfigError, match=r"does not match a latent grid of 6 x 8: .* as 3 x 4"):
        place(z, (3, 4), "latent")
    with pytest.raises(ConfigError, match="must give 3 x 4"):
        place(z, (3, 4), "token")


def test_pixels_go_to_patches_and_back() -> None:
    pixels = torch.randn(2, 3, 16, 24)
    tokens = patchify(pixels, 8)
    assert tokens.shape == (2, 6, 192)
    assert torch.equal(tokens[:, 4], pixels[:, :, 8:, 8:16].flatten(1))
    assert torch.equal(unpatchify(tokens, 16, 24, 8), pixels)
    with pytest.raises(ConfigError, match="16 x 24 pixels do not divide into patches of 7"):
        patchify(pixels, 7)
    noise, t = torch.randn(2, 6, 192), torch.tensor([0.3, 0.9])
    noisy = (1 - t.view(2, 1, 1)) * tokens + t.view(2, 1, 1) * noise
    torch.testing.assert_close(
        velocity_of_clean(tokens, noisy, t), noise - tokens, rtol=1e-4, atol=1e-5
    )


# Stream --------------------------------------------------------------------------------------


def test_a_new_stream_leaves_the_image_path_bit_equal(
    make_transformer: Callable[..., Any], make_batch: Callable[..., dict[str, Tensor]]
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        transformer, batch = make_transformer(dtype=dtype), make_batch(dtype=dtype)
        stream = CoReDi.for_transformer(transformer, CONFIG, WIDTH).stream
        before = call(transformer, batch)
        with joined(transformer, stream, torch.randn(2, 4, 12)) as joint:
            assert torch.equal(call(transformer, batch), before)
        assert joint.velocity_BTF.shape == (2, 4, 12)
        assert torch.equal(call(transformer, batch), before)
        acting = made(transformer).stream
        with joined(transformer, acting, torch.zeros(2, 4, 12)):  # as dropped samples are
            assert torch.equal(call(transformer, batch), before)
        with joined(transformer, acting, torch.randn(2, 4, 12)):
            assert not torch.equal(call(transformer, batch), before)


def test_merged_tokens_are_one_wider_layer_in_and_out(
    make_transformer: Callable[..., Any], make_batch: Callable[..., dict[str, Tensor]]
) -> None:
    transformer, batch = make_transformer().double(), make_batch(dtype=torch.float64)
    stream = made(transformer).stream.double()
    z = torch.randn(2, 4, 12).double()
    with joined(transformer, stream, z) as joint:
        image = call(transformer, batch)
    wide_in, wide_out = torch.nn.Linear(76, 32).double(), torch.nn.Linear(32, 76).double()
    with torch.no_grad():
        wide_in.weight.copy_(torch.cat([transformer.x_embedder.weight, stream.embed.weight], 1))
        wide_in.bias.copy_(transformer.x_embedder.bias)
        wide_out.weight.copy_(torch.cat([transformer.proj_out.weight, stream.head.weight]))
        wide_out.bias.copy_(torch.cat([transformer.proj_out.bias, stream.head.bias]))
    transformer.x_embedder, transformer.proj_out = wide_in, wide_out
    both = call(transformer, batch, torch.cat([batch["noisy_BNC"], z], -1))
    torch.testing.assert_close(both, torch.cat([image, joint.velocity_BTF], -1))


def test_separate_tokens_stand_beside_the_image(
    make_transformer: Callable[..., Any], make_batch: Callable[..., dict[str, Tensor]]
) -> None:
    transformer, batch = make_transformer(), make_batch()
    stream = made(transformer, replace(CONFIG, tokens="separate")).stream
    seen = []
    handle = transformer.transformer_blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    with joined(transformer, stream, torch.randn(2, 4, 12)) as joint:
        image = call(transformer, batch)
    handle.remove()
    assert seen[0]["hidden_states"].shape == (2, 8, 32) and image.shape == (2, 4, 64)
    assert seen[0]["image_rotary_emb"][0].shape[0] == 5 + 8
    assert joint.velocity_BTF.shape == (2, 4, 12)
    assert not torch.equal(image, call(transformer, batch))


@pytest.mark.parametrize("tokens", ["merged", "separate"])
def test_a_source_pass_has_no_features(
    make_transformer: Callable[..., Any],
    make_adapter: Callable[..., Any],
    make_batch: Callable[..., dict[str, Tensor]],
    tokens: str,
) -> None:
    transformer, batch = make_transformer(), make_batch()
    passes = TwoPass(transformer, make_adapter(transformer))
    stream = made(transformer, replace(CONFIG, tokens=tokens)).stream
    plain = passes(**batch)
    z = torch.randn(2, 4, 12, requires_grad=True)
    with joined(transformer, stream, z) as joint:
        seen = passes(**batch)
    assert seen.shape == plain.shape and not torch.equal(seen, plain)
    (seen.sum() + joint.velocity_BTF.sum()).backward()
    assert z.grad is not None and float(z.grad.abs().min()) > 0
    learning = [p.grad for p in passes.adapter.weave.parameters()]
    assert any(g is not None and g.any() for g in learning)
    assert all(p.grad is not None for p in stream.parameters())
    assert torch.equal(passes(**batch), plain)


def test_features_that_do_not_fit_the_call_are_refused(
    make_transformer: Callable[..., Any], make_batch: Callable[..., dict[str, Tensor]]
) -> None:
    transformer, batch = make_transformer(), make_batch()
    stream = made(transformer).stream
    before = call(transformer, batch)
    for z in (None, torch.zeros(2, 5, 12), torch.zeros(1, 4, 12)):
        with (
            pytest.raises(ConfigError, match="2 samples of 4 image tokens need as many"),
            joined(transformer, stream, z),
        ):
            call(transformer, batch)
    assert torch.equal(call(transformer, batch), before)  # nothing of it stays
    with (
        pytest.raises(ConfigError, match="width 48, not 32"),
        joined(transformer, CoReDi(CONFIG, WIDTH, 48).stream),
    ):
        pass


@pytest.mark.parametrize("space", ["latent", "pixel"])
def test_both_losses_fall_in_latent_and_in_pixel_space(
    make_transformer: Callable[..., Any],
    make_batch: Callable[..., dict[str, Tensor]],
    space: str,
) -> None:
    from diffusers import FluxTransformer2DModel

    transformer, batch = make_transformer(), make_batch()
    config = replace(CONFIG, layout="latent" if space == "latent" else "token", drop=0.0)
    clean = batch["noisy_BNC"]
    if space == "pixel":
        transformer = FluxTransformer2DModel.from_config(transformer.config, in_channels=48)
        clean = patchify(torch.rand(2, 3, 8, 8) * 2 - 1, 4)
    coredi = CoReDi.for_transformer(transformer, config, WIDTH)
    coredi.projection.fit(features(20))
    learners = [*transformer.parameters(), *coredi.learners()]
    optimizer = torch.optim.AdamW(learners, lr=3e-3)
    first = coredi.projection.weight_DK.detach().clone()
    seen: list[tuple[float, float]] = []
    for _ in range(30):
        draw = torch.Generator().manual_seed(0)
        noise = torch.randn(clean.shape, generator=draw)
        times = batch["timestep_B"]
        noised = coredi.noised(features(2), (2, 2), times, draw)
        t = times.view(-1, 1, 1)
        with joined(transformer, coredi.stream, noised.noisy_BTF) as joint:
            velocity = call(transformer, batch, (1 - t) * clean + t * noise)
        image = (velocity - (noise - clean)).square().mean()
        feature, penalty = coredi.loss(joint.velocity_BTF, noised)
        optimizer.zero_grad()
        (image + feature + penalty).backward()
        optimizer.step()
        seen.append((float(image.detach()), float(feature.detach())))
    assert seen[-1][0] < 0.7 * seen[0][0] and seen[-1][1] < 0.7 * seen[0][1]
    assert not torch.equal(coredi.projection.weight_DK, first)


# Sampling ------------------------------------------------------------------------------------


def test_guidance_is_its_equations() -> None:
    a, b, c, d = torch.randn(4, 3).double()
    torch.testing.assert_close(representation_guidance(a, b, 1.5), b + 1.5 * (a - b))
    image, feature = latent_only_guidance((a, b), (c, d), 2.0)
    torch.testing.assert_close(image, c + 2.0 * (a - c))
    assert torch.equal(feature, b)


@pytest.mark.parametrize("tokens", ["merged", "separate"])
@pytest.mark.parametrize(("weight", "guide"), [(1.0, "image"), (1.7, "image"), (1.7, "all")])
def test_features_are_carried_along_any_loop(
    make_transformer: Callable[..., Any],
    make_batch: Callable[..., dict[str, Tensor]],
    tokens: str,
    weight: float,
    guide: Any,
) -> None:
    """Three Euler steps, the second asked twice, as true CFG does."""
    transformer, batch = make_transformer(), make_batch()
    coredi = made(transformer, replace(CONFIG, tokens=tokens)).eval()
    times, x0 = (1.0, 0.6, 0.25, 0.0), batch["noisy_BNC"]

    def asked(x: Tensor, time: float) -> Tensor:
        return call(transformer, {**batch, "timestep_B": torch.full((2,), time)}, x)

    def by_hand() -> tuple[Tensor, Tensor]:
        x, z = x0, torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(5))
        for time, after in zip(times, times[1:], strict=False):
            with joined(transformer, coredi.stream, z) as joint:
                image, feature = asked(x, time), joint.velocity_BTF
            with joined(transformer, coredi.stream, torch.zeros_like(z)) as joint:
                image_0, feature_0 = asked(x, time), joint.velocity_BTF
            x = x + (after - time) * representation_guidance(image, image_0, weight)
            guided = representation_guidance(feature, feature_0, weight)
            z = z + (after - time) * (guided if guide == "all" else feature)
        return x, z

    with torch.no_grad():
        wanted = by_hand()
        x = x0
        generator = torch.Generator().manual_seed(5)
        with carrying(
            transformer, coredi, generator=generator, representation=weight, guide=guide
        ) as carried:
            for time, after in zip(times, times[1:], strict=False):
                velocity = asked(x, time)
                if time == 0.6:
                    asked(x + 1.0, time)
                x = x + (after - time) * velocity
    assert carried.calls == 4 and carried.features_BTF is not None
    torch.testing.assert_close((x, carried.features_BTF), wanted, rtol=1e-4, atol=1e-5)
    assert not transformer._forward_hooks and not transformer._forward_pre_hooks


def test_an_untrained_stream_does_not_sample(make_transformer: Callable[..., Any]) -> None:
    transformer = make_transformer()
    coredi = CoReDi.for_transformer(transformer, CONFIG, WIDTH)
    with pytest.raises(ConfigError, match="has not been trained"), carrying(transformer, coredi):
        pass


@pytest.mark.parametrize("source_timestep", ["zero", "current"])
def test_the_pipeline_carries_features_beside_a_source(
    tiny_base: Path, make_adapter: Callable[..., Any], source_timestep: str
) -> None:
    from prw_flux import CoLoGenPipeline

    pipe = CoLoGenPipeline.from_pretrained(tiny_base)
    pipe.set_progress_bar_config(disable=True)
    pipe = CoLoGenPipeline.from_pipe(
        pipe, prw=make_adapter(pipe.transformer, source_timestep=source_timestep)
    )
    coredi = made(pipe.transformer)
    given = {
        "prompt": "a red circle", "image": torch.rand(3, 64, 64), "task": "edit",
        "num_inference_steps": 2, "output_type": "latent",
    }  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    plain = pipe(**given, generator=torch.Generator().manual_seed(0)).images
    with carrying(pipe.transformer, coredi, generator=torch.Generator().manual_seed(1)) as carried:
        seen = pipe(**given, generator=torch.Generator().manual_seed(0)).images
    assert carried.calls == 2 and carried.features_BTF is not None
    assert carried.features_BTF.shape == (1, 4, 12)  # 32 pixels, the adapter's resolution
    assert seen.shape == plain.shape and not torch.equal(seen, plain)
    again = pipe(**given, generator=torch.Generator().manual_seed(0)).images
    assert torch.equal(again, plain)


# Encoders ------------------------------------------------------------------------------------


@pytest.mark.parametrize("registers", [0, 2])
def test_dinov2_gives_its_patch_tokens_at_the_grid_that_is_asked(
    tmp_path: Path, registers: int
) -> None:
    from transformers import (
        Dinov2Config,
        Dinov2Model,
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
    )

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "image_size": 28, "patch_size": 14}  # fmt: skip
    torch.manual_seed(0)
    model = (
        Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**small, num_register_tokens=registers))
        if registers
        else Dinov2Model(Dinov2Config(**small))
    )
    model.save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path))
    assert isinstance(encoder, DinoV2) and encoder.width == 16
    found = encoder(torch.rand(2, 3, 48, 64) * 2 - 1, (3, 4))
    assert found.shape == (2, 3, 4, 16) and not found.requires_grad
    pixels = torch.rand(1, 3, 42, 56) * 2 - 1  # its own size: 14 pixels a patch
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        out = model.eval()(((pixels + 1) / 2 - mean) / std)
    wanted = out.last_hidden_state[:, -12:].unflatten(1, (3, 4))
    torch.testing.assert_close(encoder(pixels, (3, 4)), wanted)


def test_encoders_that_cannot_work_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import ViTConfig, ViTModel

    with pytest.raises(ConfigError, match="there is no encoder at /nowhere"):
        load_encoder("/nowhere")
    ViTModel(
        ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    ).save_pretrained(tmp_path / "vit")
    with pytest.raises(ConfigError, match="one of dinov2, dinov2_with_registers, got 'vit'"):
        load_encoder(str(tmp_path / "vit"))
    (tmp_path / "mine_coredi.py").write_text("def a(): return 3\nb = 4\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="returned a int, not a FeatureEncoder"):
        load_encoder("mine_coredi:a")
    with pytest.raises(ConfigError, match="is a int, not a function"):
        load_encoder("mine_coredi:b")
    with pytest.raises(ConfigError, match="cannot import 'mine_other'"):
        load_encoder("mine_other:a")
    narrow = FunctionEncoder(lambda pixels, grid: torch.zeros(len(pixels), 4, *grid), width=5)
    with pytest.raises(ConfigError, match=r"shape \(2, 3, 3, 4\), wanted \(2, 3, 3, 5\)"):
        narrow(torch.zeros(2, 3, 9, 9), (3, 3))


def test_a_real_encoder_sees_more_in_real_photos_than_in_grey(
    assets: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image
    from safetensors.torch import load_file

    from prw_flux.encode import to_pixels

    monkeypatch.syspath_prepend(repository)
    net = importlib.import_module("benchmarks._squeezenet")
    encoder = load_encoder("benchmarks._squeezenet:encoder")
    files = sorted((assets / "photos").glob("*.jpg"))
    photos = [Image.open(file).convert("RGB").resize((225, 225)) for file in files]
    found = encoder(to_pixels(photos), (13, 13))
    assert found.shape == (len(files), 13, 13, 512)
    state = {k: v.float() for k, v in load_file(net.weights()).items()}
    logits = torch.nn.functional.conv2d(
        found.permute(0, 3, 1, 2), state["classifier.1.weight"], state["classifier.1.bias"]
    )
    names = [file.stem for file in files]
    cat = int(logits.relu().mean((2, 3))[names.index("chelsea")].argmax())
    assert cat in (281, 282, 285)  # ImageNet's tabby, tiger cat, Egyptian cat
    projection = Projection(512, 8)
    projection.fit(found, "drop")
    assert float(effective_rank(projection(found))) == pytest.approx(8.0, abs=1e-3)


# Files and collapse --------------------------------------------------------------------------


def test_files_bring_back_every_bit_and_every_stage(
    make_transformer: Callable[..., Any], tmp_path: Path
) -> None:
    coredi = made(make_transformer())
    coredi.close_stage("one")
    then = {name: value.clone() for name, value in coredi.state_dict().items()}
    with torch.no_grad():
        coredi.projection.weight_DK.add_(1.0)
    coredi.save(tmp_path / "stream")
    again = CoReDi.load(tmp_path / "stream", width=WIDTH, config=replace(CONFIG, weight=2.0))
    assert again.config.weight == 2.0
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in coredi.state_dict().items())
    with again.at_stage("one"):
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in then.items())
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in coredi.state_dict().items())
    with pytest.raises(ConfigError, match="no stage 'two', it knows one"), again.at_stage("two"):
        pass


def test_a_checkpoint_of_another_encoder_or_kind_is_refused(
    make_transformer: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "stream"
    made(make_transformer()).save(folder)
    with pytest.raises(CheckpointError, match="features of width 12, this encoder gives 768"):
        CoReDi.load(folder, width=768)
    with pytest.raises(ConfigError, match="coredi.channels 3, this run asks for 8: use --set"):
        CoReDi.load(folder, config=replace(CONFIG, channels=8))
    (folder / "coredi.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="stream cannot be read"):
        CoReDi.load(folder)
    with pytest.raises(CheckpointError, match="cannot be read"):
        CoReDi.load(tmp_path / "nothing")


def test_collapse_is_told_once_with_its_remedy(caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch(replace(CONFIG, channels=8, stop_gradient=False))

    def facts(rank: float, scale: float = 0.1) -> dict[str, float]:
        return {"feature_rank": rank, "feature_scale": scale}

    with caplog.at_level(logging.WARNING):
        assert not watch.look(facts(4.0), 10)
        assert watch.look(facts(3.9), 20) and not watch.look(facts(1.0), 30)
    (record,) = list(caplog.records)
    assert record.getMessage() == (
        "the projected features collapse: effective rank 3.9 of 8 channels at step 20, below 4.0; "
        "set coredi.stop_gradient=true"
    )
    assert remedy(replace(CONFIG, normalise="none"), False) == "set coredi.normalise=batch"
    assert "coredi.orthogonality=0.1" in remedy(replace(CONFIG, covariance=0.0), True)
    assert "raise coredi.covariance" in remedy(CONFIG, True)
    assert "coredi.channels lower" in remedy(REDI, True)
    vanishing = Watch(replace(CONFIG, normalise="none"))
    assert not vanishing.look(facts(3.0, 0.6), 1)
    assert vanishing.look(facts(3.0, 0.4), 2)
    assert "scale 0.40 at step 2, beside noise of scale 1" in caplog.records[-1].getMessage()
    assert Watch(CONFIG).look(facts(math.nan), 3)


def test_settings_that_cannot_work_are_refused() -> None:
    for bad in ({"channels": 0}, {"drop": 1.5}, {"weight": -1.0}, {"encoder": ""}, {"lr": -1.0}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            CoReDiConfig(**bad)
    assert not REDI.learn_projection and REDI.normalise == "none"
