"""What crosses between machines with PowerSGD, in closed form. Imports nothing heavy.

Each of a machine's m processes has a shard of each matrix's gradient, and factorises it alone: its r/m columns of the
factors are no part of a factorisation of the whole matrix (paper, section 2.4). So ``rank``, wherever a recipe or a
table says it, is r, that of a matrix's m shards together. An M x N shard costs (M + N) r/m numbers instead of M N.

The paper's rate, 1 - 5 r / (8 d_model), follows for one layer from its appendix E.1: query, key, value and output
matrices of d x d, and the perceptron's of d x 4d and 4d x d, each split among m = 8 processes along its 4d side where
it has one. The sides that are not split come to 6 d and those that are to 12 d / m, so

    (6 d + 12 d / m) (r / m)  of  12 d^2 / m  numbers,  that is  (m + 2) r / (2 m d).

This project's shards are consecutive rows of (out, in) weights, and query, key and value are one matrix: then the
sides come to 7 d and 9 d / m, for m = 8 to 65 r / (96 d).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

Shape = tuple[int, int]
GPUS_PER_MACHINE = 8
"""Of the paper's machines (section 2.4)."""
TOGETHER = 32 * 2**20
"""Numbers of the matrices that are compressed at a time, or of one that has more."""


def shard_rank(rank: int, shards: int) -> int:
    """The rank of each shard's factors where a matrix's ``shards`` have ``rank`` together."""
    return _up(rank, shards)


def shard_shape(shape: Shape, shards: int) -> Shape:
    """A shard of an (M, N) matrix that is split by rows in ``shards`` of equal length, padded to full rows of N."""
    rows, columns = shape
    return _up(_up(rows * columns, shards), columns), columns


def factor_rank(shape: Shape, rank: int) -> int:
    """The rank of the factors of an (M, N) matrix: ``rank``, or what the matrix has at most."""
    return min(rank, *shape)


def is_compressed(shape: Shape, rank: int, min_compression: float = 1.0) -> bool:
    """Whether the factors of ``rank`` are sent for an (M, N) matrix: if they have more than ``min_compression`` times
    fewer numbers. Past break-even, r (M + N) >= M N, a matrix that is sent whole costs less and loses nothing.
    """
    return rank > 0 and min_compression * _factors(shape, rank) < shape[0] * shape[1]


def sent(shape: Shape, rank: int, min_compression: float = 1.0) -> int:
    """Numbers that each process sends for its (M, N) matrix: r (M + N), or M N where it is not compressed."""
    return _factors(shape, rank) if is_compressed(shape, rank, min_compression) else shape[0] * shape[1]


def compression(shapes: Iterable[Shape], rank: int, min_compression: float = 1.0) -> float:
    """The share of their numbers that matrices of ``shapes`` need not send, each with factors of ``rank``.

    Shapes and rank are a process's own: of shards, ``shard_shape`` and ``shard_rank``.
    """
    shapes = list(shapes)
    whole = sum(rows * columns for rows, columns in shapes)
    return 1 - sum(sent(shape, rank, min_compression) for shape in shapes) / whole


def shapes_together(shapes: Sequence[Shape]) -> Iterator[slice]:
    """Which of a process's matrices, in their order, are compressed at a time: places of TOGETHER numbers at most."""
    first, numbers = 0, 0
    for place, (rows, columns) in enumerate(shapes):
        if place > first and numbers + rows * columns > TOGETHER:
            yield slice(first, place)
            first, numbers = place, 0
        numbers += rows * columns
    if shapes:
        yield slice(first, len(shapes))


def paper_compression(d_model: int, rank: int, gpus: int = GPUS_PER_MACHINE) -> float:
    """``compression`` of the paper's matrices: 1 - 5 r / (8 d_model) with eight GPUs a machine (section 2.4)."""
    return 1 - (gpus + 2) * rank / (2 * gpus * d_model)


def _factors(shape: Shape, rank: int) -> int:
    return factor_rank(shape, rank) * sum(shape)


def _up(total: int, parts: int) -> int:
    """``total`` / ``parts``, rounded up."""
    return -(-total // parts)
