"""Number of samples to draw at once: as many as fit into memory, up to a number that hardly raises throughput.

The memory is computed from the models' sizes, not measured, so the same machine chooses the same number each time
unless it is short of memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dalle_cli.dvae.encode import images_per_pass
from dalle_cli.dvae.model import DVAE
from dalle_cli.prior.decode import POSITIONS_PER_PASS, Decoder

MEMORY_SHARE = 0.5
"""Share of the free memory to use; the rest is for other programs, fragmentation and memory not counted here."""
MAX_SAMPLES = {"cpu": 64, "cuda": 512, "mps": 64}
"""Batch size beyond which throughput hardly grows: 128 instead of 64 saves one core 6 % at the quickstart's size."""
DECODED_AT_ONCE = 16
"""Pictures that the dVAE decodes at once, fewer if they are large; larger batches would take most of the memory."""
FLOAT, DOUBLE = 4, 8
LAYER_ACTIVATIONS = 16
"""Values of a layer's activations at one position, in units of d_model: residual stream, queries, keys, values, MLP."""
DECODER_ACTIVATIONS = 8
"""Memory of the dVAE's decoder, in units of n_hid values at every pixel."""


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that sampling takes in addition to the models' weights."""

    cache: int
    """KV cache of one sequence's image tokens."""
    step: int
    """Activations of one sequence in a step of the prior."""
    draw: int
    """Logits and probabilities of one sequence."""
    text: int
    """KV cache of one caption and of the image tokens given with it."""
    prefill: int
    """Activations of one caption during prefill."""
    captions_prefilled: int
    """Number of captions in a prefill batch."""
    picture: int
    """Activations of one picture in the dVAE's decoder."""
    pictures_decoded: int
    """Number of pictures that the dVAE decodes at once."""
    sequences: int
    """Sequences per sample: 2 with guidance, else 1."""

    def peak(self, samples: int, n: int) -> int:
        """Return the peak bytes of drawing ``samples`` at once, ``n`` of each caption."""
        captions = self.sequences * max(1, samples // n)
        prefilling = min(captions, self.captions_prefilled) * self.prefill
        drawing = self.sequences * samples * (self.cache + max(self.step, self.draw))
        decoding = min(samples, self.pictures_decoded) * self.picture
        return max(captions * self.text + max(prefilling, drawing), decoding)

    def fitting_samples(self, free: int | None, n: int, most: int) -> int:
        """Return the largest power of two up to ``most`` of samples that fit, ``n`` of each caption.

        They may take MEMORY_SHARE of ``free`` bytes (None: unknown, any number fits). A power of two seldom changes
        when there is a little more or less memory.
        """
        count = 1 << (most.bit_length() - 1)
        while free is not None and count > 1 and self.peak(count, n) > MEMORY_SHARE * free:
            count //= 2
        return count


def sampling_need(decoder: Decoder, dvae: DVAE, guided: bool, given: int = 0) -> MemoryNeed:
    """Compute the memory of sampling, with or without guidance, with ``given`` image tokens given for each caption."""
    vocabulary, d_model = decoder.image_embedding.shape
    slots = [layer.slots.count for layer in decoder.layers]
    token = 2 * d_model * decoder.dtype.itemsize
    weights = 3 * decoder.layers[0].heads * (decoder.text_length + max(slots)) * FLOAT
    positions = decoder.text_length + (decoder.image_length if given else 0)
    side = dvae.settings.downsampling * decoder.grid
    return MemoryNeed(
        cache=token * sum(slots),
        step=LAYER_ACTIVATIONS * d_model * FLOAT + weights,
        draw=vocabulary * (4 * FLOAT + 3 * DOUBLE),
        text=token * (len(slots) * decoder.text_length + sum(min(count, given) for count in slots)),
        prefill=LAYER_ACTIVATIONS * d_model * FLOAT * positions,
        captions_prefilled=max(1, POSITIONS_PER_PASS // positions),
        picture=DECODER_ACTIVATIONS * side**2 * dvae.settings.n_hid * FLOAT,
        pictures_decoded=min(DECODED_AT_ONCE, images_per_pass(dvae, side, side)),
        sequences=2 if guided else 1,
    )


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that this process can still allocate on ``device``, or None if the system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    known = [amount for amount in (_available(), *cgroup_headroom()) if amount is not None]
    return min(known, default=None)


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def cgroup_headroom(
    memberships: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")
) -> Iterator[int]:
    """Yield the bytes left under each memory limit of this process's cgroups (v1 or v2) and their parents.

    Containers and batch systems set such limits. Inactive file cache does not count as used.
    """
    try:
        lines = memberships.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        files = (
            ("memory.max", "memory.current") if not controllers else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        )
        own = mounted / controllers / path.lstrip("/")
        for group in (own, *own.parents):
            try:
                limit, taken = (int((group / name).read_text()) for name in files)
                statistics = (group / "memory.stat").read_text().splitlines()
            except (OSError, ValueError):  # another cgroup version, not mounted here, or the limit is "max"
                continue
            inactive = "inactive_file " if not controllers else "total_inactive_file "
            yield max(0, limit - taken + sum(int(line.split()[1]) for line in statistics if line.startswith(inactive)))
