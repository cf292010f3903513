"""The layout of a recipe: the kind of attention of each layer of the prior."""

from __future__ import annotations

from typing import Literal, get_args

AttentionKind = Literal["row", "column", "conv", "full"]
KINDS: tuple[AttentionKind, ...] = get_args(AttentionKind)


def paper_layout(layers: int) -> list[AttentionKind]:
    """Return the paper's layout (appendix B.1): column attention in layers 2, 6, 10 ..., conv in the last, else row."""
    kinds: list[AttentionKind] = ["column" if (i - 2) % 4 == 0 else "row" for i in range(1, layers + 1)]
    kinds[-1] = "conv"
    return kinds


def parse_layout(layout: str | list[str], layers: int) -> list[AttentionKind]:
    """Return the kind of attention of each layer, first layer first.

    ``layout`` is ``"paper"``, or kinds as a list or separated by commas or blanks, as in ``"row, column, row, row, ...
    conv"``: ``...`` repeats the kinds before it up to the last layers, which have the kinds after it.

    Raises:
        ValueError: ``layout`` names an unknown kind, has another number of layers, or a misplaced ``...``.
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
