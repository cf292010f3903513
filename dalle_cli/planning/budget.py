"""A time budget: how many updates of each stage this machine makes in it."""

from __future__ import annotations

from dalle_cli.clip.train import clip_update
from dalle_cli.config.schema import Recipe
from dalle_cli.data.source import Source
from dalle_cli.distributed.device import choose_device, fast_matmul, prepare_process, use_settings
from dalle_cli.distributed.group import Group
from dalle_cli.dvae.train import dvae_update
from dalle_cli.precision.choice import seconds_of
from dalle_cli.prior.train import prior_update
from dalle_cli.stores.checkpoint import Kind
from dalle_cli.training.precision_choice import Update, settle_precision

SHARES: dict[Kind, float] = {"dvae": 0.55, "prior": 0.39, "clip": 0.06}
"""Share of a budget that each stage gets, found with scripts/bench/quality."""
UPDATES_SHARE = 0.85
"""Share of a stage's time that its updates get; the rest is its start, validations, checkpoints and encoding."""
CHECKPOINTS = 8
"""Number of checkpoints, with a validation each, in a training."""


def updates_within(recipe: Recipe, source: Source, minutes: float) -> dict[Kind, int]:
    """Return how many updates of each stage fit into ``minutes`` on this machine, by timing a few.

    Pictures and tokens are random; ``source`` is the one to be trained on.
    """
    seconds = seconds_per_update(recipe, source)
    return {
        kind: max(100, 10 * round(6 * minutes * SHARES[kind] * UPDATES_SHARE / each)) for kind, each in seconds.items()
    }


def seconds_per_update(recipe: Recipe, source: Source) -> dict[Kind, float]:
    """Return the time of an update of each stage on this machine, without loading its data."""
    use_settings(recipe)
    device = choose_device(recipe.device)
    prepare_process(device)
    group = Group(device=device)

    def dvae(tried: Recipe) -> Update:
        return dvae_update(tried, source, device)

    def prior(tried: Recipe) -> Update:
        return prior_update(tried, device)

    found: dict[Kind, float] = {"dvae": seconds_of(dvae(settle_precision(recipe, "dvae", None, group, dvae)))}
    with fast_matmul():
        found["prior"] = seconds_of(prior(settle_precision(recipe, "prior", None, group, prior)))
    return found | {"clip": seconds_of(clip_update(recipe, device))}
