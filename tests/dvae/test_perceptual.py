from __future__ import annotations

import pytest
import torch
from helpers.tiny_network import write_tiny_network

from dalle_cli.config.schema import DvaeModel, DvaeObjective, DvaeSettings, Perceptual, Recipe
from dalle_cli.distributed.group import ALONE
from dalle_cli.dvae.model import DVAE
from dalle_cli.dvae.objective import LossSettings, dvae_loss, validation_metrics
from dalle_cli.dvae.perceptual import PerceptualDistance
from dalle_cli.dvae.train import DvaeTask

SIZES = DvaeModel(n_hid=8, n_init=8, blocks_per_group=1, codebook_size=16)


@pytest.fixture(scope="module")
def distance(tmp_path_factory: pytest.TempPathFactory) -> PerceptualDistance:
    folder = tmp_path_factory.mktemp("net")
    write_tiny_network(folder)
    return PerceptualDistance(str(folder))


def pictures(seed: int) -> torch.Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def test_the_distance_is_that_of_unit_vectors(distance: PerceptualDistance) -> None:
    rebuilt, originals = pictures(1).requires_grad_(), pictures(2)
    found = distance(rebuilt, originals)
    expected = torch.zeros(3)
    for a, b in zip(distance.features.stages(rebuilt), distance.features.stages(originals), strict=True):
        cosine = torch.nn.functional.cosine_similarity(a, b, dim=1)
        expected += (2 - 2 * cosine).mean(dim=(1, 2)) / 5
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert float(distance(originals, originals).abs().max()) < 1e-6
    found.sum().backward()
    assert rebuilt.grad is not None
    assert rebuilt.grad.abs().min() > 0
    alone = torch.cat([distance(rebuilt[i : i + 1], originals[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


def test_enlarged_pictures_add_their_distance(distance: PerceptualDistance) -> None:
    rebuilt, originals = pictures(1), pictures(2)
    twice = [torch.nn.functional.interpolate(each, (64, 64), mode="bicubic") for each in (rebuilt, originals)]
    expected = distance(rebuilt, originals) + distance(*twice)
    torch.testing.assert_close(distance(rebuilt, originals, enlarged=True), expected)


def test_a_run_enlarges_from_its_update_on_and_in_all_validations() -> None:
    seen: list[bool] = []

    def recorder(rebuilt: torch.Tensor, originals: torch.Tensor, *, enlarged: bool) -> torch.Tensor:
        seen.append(enlarged)
        return torch.zeros(len(rebuilt))

    for since, expected in ((None, [False] * 3), (7, [False, True, True])):
        objective = DvaeObjective(perceptual=Perceptual(weight=2.0, enlarged_from=since))
        task = DvaeTask.__new__(DvaeTask)
        task.recipe = Recipe(dvae=DvaeSettings(model=SIZES, objective=objective))
        task.model, task.group, task.perceptual, task._replaced = DVAE(SIZES), ALONE, recorder, 0.0  # type: ignore[assignment]
        task.validation_images = (pictures(3).permute(0, 2, 3, 1) * 255).to(torch.uint8)
        seen.clear()
        task.loss((0, task.validation_images), 6)
        task.loss((0, task.validation_images), 7)
        task.validate(0)
        assert seen == expected


def test_the_loss_has_the_weighted_distance_of_the_median_picture(distance: PerceptualDistance) -> None:
    model, images = DVAE(SIZES), (pictures(3).permute(0, 2, 3, 1) * 255).to(torch.uint8)

    def loss(weight: float) -> tuple[float, float, torch.Tensor]:
        settings = LossSettings(0.5, 2.0, 0.7, 0.1, -1.0, "gumbel", 2, perceptual_weight=weight)
        model.zero_grad()
        generator = torch.Generator().manual_seed(0)
        found = dvae_loss(model, images, settings, generator, perceptual=distance if weight else None)
        found.loss.backward()
        gradient = model.encoder.get_parameter("blocks.input.w").grad
        assert gradient is not None
        return found.loss.item(), float(found.perceptual), gradient.clone()

    (plain, none, g0), (one, d1, g1), (two, d2, g2) = (loss(weight) for weight in (0.0, 1.0, 2.0))
    assert none == 0
    assert d1 == d2 > 0
    assert one - plain == pytest.approx(d1, rel=1e-4)
    assert two - plain == pytest.approx(2 * d1, rel=1e-4)
    torch.testing.assert_close(g2 - g0, 2 * (g1 - g0), rtol=1e-3, atol=1e-6)


def test_validation_measures_it_on_hard_codes(distance: PerceptualDistance) -> None:
    model, images = DVAE(SIZES), (pictures(4).permute(0, 2, 3, 1) * 255).to(torch.uint8)
    metrics = validation_metrics(model, images, 0.1, -1.0, torch.Generator().manual_seed(0), distance)
    mu, _ = model(images.permute(0, 3, 1, 2).float() * (0.8 / 255) + 0.1)
    rebuilt = ((torch.sigmoid(mu) - 0.1) / 0.8).clamp(0, 1)
    torch.testing.assert_close(
        metrics.perceptual, distance(rebuilt, images.permute(0, 3, 1, 2) / 255), rtol=1e-3, atol=1e-5
    )
    assert metrics.summary()["perceptual"] == pytest.approx(float(metrics.perceptual.mean()))


def test_it_needs_the_relaxed_codes() -> None:
    with pytest.raises(ValueError, match="set estimator: gumbel"):
        DvaeObjective.model_validate({"estimator": "reinforce", "perceptual": {"weight": 1}})
