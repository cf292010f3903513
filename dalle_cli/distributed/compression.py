"""The traffic between nodes with PowerSGD, in closed form. Imports nothing heavy.

Each of a node's m ranks holds a shard of each matrix's gradient and factorises it alone. Its r/m columns of the factors
are not part of a factorisation of the whole matrix (paper, section 2.5). In recipes and tables, ``rank`` is r, the
total over a matrix's m shards. An M x N shard costs (M + N) r/m numbers instead of M N.

The paper's rate, 1 - 5 r / (8 d_model), follows for one layer from its appendix E.1: query, key, value and output
matrices of d x d, and the MLP's of d x 4d and 4d x d, each split among m = 8 ranks along one side, the MLP's along 4d.
The sides that are not split add up to 6 d and the split ones to 12 d / m, so

    (6 d + 12 d / m) (r / m)  of  12 d^2 / m  numbers,  that is  (m + 2) r / (2 m d).

This project splits (out, in) weights along the same sides, but query, key and value are one matrix with one
factorisation. The sides then add up to 4 d and 12 d / m, which for m = 8 makes the rate 1 - 11 r / (24 d).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

Shape = tuple[int, int]
GPUS_PER_NODE = 8
"""Number of GPUs in each of the paper's nodes (section 2.5)."""
BATCH_NUMBERS = 32 * 2**20
"""Maximum number of values in matrices that are compressed together; a larger matrix is compressed alone."""


def shard_rank(rank: int, shards: int) -> int:
    """Return the rank of each shard's factors if the ``shards`` of a matrix have ``rank`` in total."""
    return _ceil_div(rank, shards)


def shard_axis(shape: Shape, shards: int) -> int:
    """Return the axis along which an (M, N) matrix is split among ranks: its longer side, as in the paper's table 2.

    Columns are split only into equal parts, since ``fully_shard`` needs that. A square matrix is split along its rows.
    """
    rows, columns = shape
    return 1 if columns > rows and columns % shards == 0 else 0


def shard_shape(shape: Shape, shards: int) -> Shape:
    """Return the shape of the largest of the shards into which ``fully_shard`` splits an (M, N) matrix."""
    rows, columns = shape
    return (rows, columns // shards) if shard_axis(shape, shards) else (_ceil_div(rows, shards), columns)


def flat_shard_shape(shape: Shape, shards: int) -> Shape:
    """Return the shape of one of ``shards`` equal pieces of a flattened (M, N) matrix, padded to full rows of N."""
    rows, columns = shape
    return _ceil_div(_ceil_div(rows * columns, shards), columns), columns


def factor_rank(shape: Shape, rank: int) -> int:
    """Return the rank of the factors of an (M, N) matrix: ``rank``, or the matrix's shorter side if that is less."""
    return min(rank, *shape)


def is_compressed(shape: Shape, rank: int, min_compression: float = 1.0) -> bool:
    """Return whether an (M, N) matrix is sent as factors of ``rank`` rather than whole.

    It is if the matrix has more than ``min_compression`` times as many numbers as its factors. From break-even on,
    r (M + N) >= M N, sending the matrix whole costs no more and loses nothing.
    """
    return rank > 0 and min_compression * _factor_numbers(shape, rank) < shape[0] * shape[1]


def numbers_sent(shape: Shape, rank: int, min_compression: float = 1.0) -> int:
    """Return how many numbers a rank sends for an (M, N) matrix: r (M + N) if compressed, else M N."""
    if is_compressed(shape, rank, min_compression):
        return _factor_numbers(shape, rank)
    return shape[0] * shape[1]


def compression_rate(shapes: Iterable[Shape], rank: int, min_compression: float = 1.0) -> float:
    """Return the share of the numbers in shards of ``shapes`` that a rank need not send; ``rank`` is a shard's."""
    shapes = list(shapes)
    whole = sum(rows * columns for rows, columns in shapes)
    return 1 - sum(numbers_sent(shape, rank, min_compression) for shape in shapes) / whole


def paper_compression_rate(d_model: int, rank: int, gpus: int = GPUS_PER_NODE) -> float:
    """Return the paper's compression rate: 1 - 5 r / (8 d_model) with eight GPUs a node (section 2.5)."""
    return 1 - (gpus + 2) * rank / (2 * gpus * d_model)


def compression_batches(shapes: Sequence[Shape]) -> Iterator[slice]:
    """Yield slices of a rank's matrices, in order, of at most BATCH_NUMBERS numbers or one matrix each."""
    first, numbers = 0, 0
    for place, (rows, columns) in enumerate(shapes):
        if place > first and numbers + rows * columns > BATCH_NUMBERS:
            yield slice(first, place)
            first, numbers = place, 0
        numbers += rows * columns
    if shapes:
        yield slice(first, len(shapes))


def _factor_numbers(shape: Shape, rank: int) -> int:
    return factor_rank(shape, rank) * sum(shape)


def _ceil_div(total: int, parts: int) -> int:
    return -(-total // parts)
