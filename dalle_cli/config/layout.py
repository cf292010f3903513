"""Which layer of the prior has which attention, as a recipe writes it."""

from __future__ import annotations

from typing import Literal, get_args

AttentionKind = Literal["row", "column", "conv", "full"]
KINDS: tuple[AttentionKind, ...] = get_args(AttentionKind)


def paper_layout(layers: int) -> list[AttentionKind]:
    """The paper's rule (appendix B.1): with layers numbered from 1, column where (i - 2) mod 4 = 0, row otherwise,
    convolutional in the last layer only.
    """
    kinds: list[AttentionKind] = ["column" if (i - 2) % 4 == 0 else "row" for i in range(1, layers + 1)]
    kinds[-1] = "conv"
    return kinds


def parse_layout(layout: str | list[str], layers: int) -> list[AttentionKind]:
    """Spell out ``layout`` for ``layers`` layers, first layer first.

    ``"paper"`` is the paper's rule. Otherwise kinds separated by commas or blanks, or a list of them; ``...`` repeats
    the kinds before it until those after it end the stack: ``"row, column, row, row, ... conv"``.

    Raises:
        ValueError: an unknown kind, a count that is not ``layers``, or a misplaced ``...``.
    """
    if layout == "paper":
        return paper_layout(layers)
    words = layout.replace(",", " ").replace("...", " ... ").split() if isinstance(layout, str) else list(layout)
    for word in words:
        if word != "..." and word not in KINDS:
            raise ValueError(f"layout names an unknown attention '{word}'; known are {', '.join(KINDS)}, or 'paper'")
    if "..." in words:
        at = words.index("...")
        cycle, tail = words[:at], words[at + 1 :]
        if not cycle or "..." in tail or len(cycle) + len(tail) > layers:
            raise ValueError(
                f"layout '{' '.join(words)}' cannot be stretched to {layers} layers; write one '...' after the kinds "
                "that repeat"
            )
        repeated = layers - len(tail)
        words = [cycle[i % len(cycle)] for i in range(repeated)] + tail
    if len(words) != layers:
        raise ValueError(f"layout names {len(words)} layers, the model has {layers}; name each layer or use '...'")
    return [kind for word in words for kind in KINDS if kind == word]
