"""How many samples to draw at once: as many as memory holds, up to where more are of no use.

What a number of samples takes is counted from the models' sizes: nothing has to be tried, and a machine finds the same
number each time, unless it is short of memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dalle_cli.config.schema import DOWNSAMPLING
from dalle_cli.dvae.encode import pictures_at_once
from dalle_cli.dvae.model import DVAE
from dalle_cli.prior.decode import READ_AT_ONCE, Decoder

SHARE = 0.5
"""Of the free memory: the rest is for other programs, for fragments and for what is not counted here."""
MOST = {"cpu": 64, "cuda": 512}
"""Samples at once beyond which throughput hardly grows: on one core, at the quickstart's size, 128 spare 6 % of
the time that 64 take."""
DECODED_AT_ONCE = 16
"""Pictures that the dVAE decodes together, fewer where they are large: it is quick beside the prior, and more of them
would take most of the memory."""
FLOAT, DOUBLE = 4, 8
STREAM = 16
"""Numbers of a layer at one position, in units of d_model: stream, queries, keys, values, the perceptron's inside."""
ACTIVATIONS = 8
"""The dVAE decoder's memory, in units of one activation of n_hid channels at every pixel."""


@dataclass(frozen=True)
class Need:
    """Bytes that sampling takes beside the models' weights.

    ``cache``, ``step`` and ``draw`` are of one sequence of tokens, ``text`` and ``reading`` of one caption;
    ``picture`` of one of the ``together`` pictures that the dVAE decodes at once.
    """

    cache: int
    step: int
    draw: int
    text: int
    reading: int
    captions_read: int
    picture: int
    together: int
    sequences: int

    def of(self, samples: int, n: int) -> int:
        """Bytes at the peak of ``samples`` drawn at once, of captions of which each has ``n``."""
        captions = self.sequences * max(1, samples // n)
        kept = captions * self.text
        reading = min(captions, self.captions_read) * self.reading
        drawing = self.sequences * samples * (self.cache + max(self.step, self.draw))
        decoding = min(samples, self.together) * self.picture
        return max(kept + max(reading, drawing), decoding)

    def samples(self, free: int | None, n: int, most: int) -> int:
        """The largest power of two, from 1 to ``most``, of samples that need no more than SHARE of ``free`` bytes.

        A power of two, so that a little more or less memory seldom changes it. None is an unknown amount.
        """
        count = 1 << (most.bit_length() - 1)
        while free is not None and count > 1 and self.of(count, n) > SHARE * free:
            count //= 2
        return count


def sampling_need(decoder: Decoder, dvae: DVAE, guided: bool, given: int = 0) -> Need:
    """What the models' sizes say; ``given`` image tokens are read with the caption."""
    vocabulary, d_model = decoder.image_embedding.shape
    slots = [layer.slots.count for layer in decoder.layers]
    token = 2 * d_model * decoder.dtype.itemsize
    weights = 3 * decoder.layers[0].heads * (decoder.text_length + max(slots)) * FLOAT
    positions = decoder.text_length + (decoder.image_length if given else 0)
    side = DOWNSAMPLING * decoder.grid
    return Need(
        cache=token * sum(slots),
        step=STREAM * d_model * FLOAT + weights,
        draw=vocabulary * (4 * FLOAT + 3 * DOUBLE),
        text=token * (len(slots) * decoder.text_length + sum(min(count, given) for count in slots)),
        reading=STREAM * d_model * FLOAT * positions,
        captions_read=max(1, READ_AT_ONCE // positions),
        picture=ACTIVATIONS * side**2 * dvae.settings.n_hid * FLOAT,
        together=min(DECODED_AT_ONCE, pictures_at_once(dvae, side, side)),
        sequences=2 if guided else 1,
    )


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process may still take on ``device``; None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    known = [amount for amount in (_available(), *_left_to_groups()) if amount is not None]
    return min(known, default=None)


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _left_to_groups(
    memberships: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")
) -> Iterator[int]:
    """What the limits of a container or of a batch system's job leave: of each control group that this process is in,
    version 2 or 1, and those above it. Caches of files give way and are not counted as taken.
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
                most, taken = (int((group / name).read_text()) for name in files)
                statistics = (group / "memory.stat").read_text().splitlines()
            except (OSError, ValueError):  # not of this version, not shown here, or "max"
                continue
            inactive = "inactive_file " if not controllers else "total_inactive_file "
            yield max(0, most - taken + sum(int(line.split()[1]) for line in statistics if line.startswith(inactive)))
