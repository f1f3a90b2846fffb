"""Rules that hold while some clients lie: K updates in, one update out, whatever a minority sends.

All take the updates of a round as K rows of shape [p], which are not copied, and how many of them may lie, f.
None looks at what a client says of itself (how many examples it has, say): a liar would say a million. Most
need distances and inner products only, and those are all in the **Gram matrix** of the rows, K by K: it costs
one pass over the updates, and everything after it works on K numbers instead of p (`gram`). What comes out is
then coefficients, one for each row.

Sources: trimmed mean: Yin et al. 2018 (arXiv 1803.01498), definition 2; MultiKrum: Blanchard et al. 2017
(NeurIPS), section 4; geometric median: Pillutla et al. 2022 (arXiv 1912.13445), algorithm 2; Flag Aggregator:
Almansoori et al. 2024 (arXiv 2302.05865), section 2 and algorithm 1. Why workers send momentum where such a
rule is used: Karimireddy et al. 2021 (arXiv 2012.10333), section 5.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mycel.protocol.errors import LocalProtocolError

Rows = Sequence[NDArray[np.float32]] | NDArray[np.float32]
Matrix = NDArray[np.float64]

COLUMNS = 1 << 16
"""Taken at a time: K rows of them stay in the cache."""
LOOK_BYTES = 16
"""What is copied for that, for each number that is looked at."""
_TINY = 1e-12


def gram(rows: Rows) -> Matrix:
    """All inner products of the rows, shape [K, K], summed in float64."""
    total = np.zeros((len(rows), len(rows)))
    for at in range(0, len(rows[0]), COLUMNS):
        part = np.array([row[at : at + COLUMNS] for row in rows], np.float64)
        total += part @ part.T
    return total


def distances(products: Matrix) -> Matrix:
    """Squared distances between rows, from their Gram matrix."""
    squares = np.diag(products)
    return np.maximum(squares[:, None] + squares[None, :] - 2.0 * products, 0.0)


def mix(rows: Rows, shares: Matrix) -> NDArray[np.float32]:
    """The sum of `shares[i]` times row i, shape [p]. Rows with a share of 0 are not looked at."""
    used = [int(index) for index in np.flatnonzero(shares)]
    out = np.zeros(len(rows[0]), np.float32)
    for at in range(0, len(out) if len(used) else 0, COLUMNS):
        part = np.array([rows[index][at : at + COLUMNS] for index in used], np.float64)
        out[at : at + COLUMNS] = shares[used] @ part
    return out


def trimmed_mean(rows: Rows, liars: int) -> NDArray[np.float32]:
    """In each coordinate the mean of what is left without the `liars` smallest and largest values."""
    check_liars(len(rows), liars)
    out = np.empty(len(rows[0]), np.float32)
    for at in range(0, len(out), COLUMNS):
        part = np.sort([row[at : at + COLUMNS] for row in rows], axis=0)
        out[at : at + COLUMNS] = part[liars : len(rows) - liars].mean(axis=0, dtype=np.float64)
    return out


def multi_krum(rows: Rows, liars: int) -> NDArray[np.float32]:
    """The mean of the K - f rows whose K - f - 2 nearest neighbours are nearest."""
    check_liars(len(rows), liars)
    return mix(rows, krum_shares(gram(rows), liars))


def krum_shares(products: Matrix, liars: int) -> Matrix:
    """Each row's share under MultiKrum; ties go to whoever is nearer to all others."""
    count = len(products)
    apart = distances(products)
    near = max(1, count - liars - 2)
    ordered = np.sort(apart, axis=1)[:, 1 : near + 1] if count > 1 else np.zeros((1, 1))
    order = np.lexsort((np.diag(products), apart.sum(axis=1), ordered.sum(axis=1)))
    kept = order[: count - liars]
    shares = np.zeros(count)
    shares[kept] = 1.0 / len(kept)
    return shares


def geometric_median(rows: Rows, liars: int, *, steps: int = 64) -> NDArray[np.float32]:
    """The point with the least sum of distances to all rows: Weiszfeld's iteration, smoothed."""
    check_liars(len(rows), liars)
    return mix(rows, median_shares(gram(rows), steps))


def median_shares(products: Matrix, steps: int) -> Matrix:
    """Each row's share in the geometric median."""
    count = len(products)
    shares = np.full(count, 1.0 / count)
    squares = np.diag(products)
    smooth = 1e-6 * float(np.sqrt(np.median(distances(products)))) + _TINY
    for _ in range(steps):
        inner = products @ shares
        apart = np.sqrt(np.maximum(squares - 2.0 * inner + shares @ inner, 0.0))
        fresh = 1.0 / np.maximum(apart, smooth)
        fresh /= fresh.sum()
        moved = float(np.abs(fresh - shares).max())
        shares = fresh
        if moved < 1e-9:
            break
    return shares


def flag(rows: Rows, liars: int, *, steps: int = 20, pairs: float = 1.0) -> NDArray[np.float32]:
    """The mean of the rows, projected on the subspace that most rows agree on.

    That subspace, of dimension ceil((K + 1) / 2), minimises the sum of the sines between it and the rows, and
    `pairs` / (K - 1) times those between it and the rows' differences; found by reweighted least squares,
    which here needs the Gram matrix only. Rows longer than the median are first shortened to it, so that the
    result is never longer than an honest row (that is not in the paper, which bounds no lengths).
    """
    check_liars(len(rows), liars)
    return mix(rows, flag_shares(gram(rows), steps, pairs))


def flag_shares(products: Matrix, steps: int, pairs: float) -> Matrix:
    """Each row's coefficient in the Flag Aggregator's result."""
    count = len(products)
    mean = np.full(count, 1.0 / count)
    lengths = np.sqrt(np.diag(products))
    bound = float(np.sort(lengths)[(count - 1) // 2])
    clip = np.minimum(1.0, bound / np.maximum(lengths, _TINY))
    if bound <= _TINY:
        return mean * clip
    values, vectors = np.linalg.eigh(products * clip[:, None] * clip[None, :])
    is_there = values > 1e-12 * values[-1]
    root = np.sqrt(values[is_there])[:, None] * vectors[:, is_there].T  # rows as columns of few coordinates
    columns, weights = _columns(root, pairs)
    found = np.ones(columns.shape[1])
    size = min(len(root), (count + 2) // 2)
    basis = np.eye(len(root))
    for _ in range(steps):
        scaled = columns * np.sqrt(weights * found)
        basis = np.linalg.eigh(scaled @ scaled.T)[1][:, -size:]
        inside = np.minimum(((basis.T @ columns) ** 2).sum(axis=0), 1.0)
        fresh = 1.0 / np.sqrt(np.maximum(1.0 - inside, 1e-6))
        moved = float(np.abs(fresh - found).max() / fresh.max())
        found = fresh
        if moved < 1e-6:
            break
    flat = basis @ (basis.T @ (root @ mean))
    result: Matrix = (np.linalg.pinv(root) @ flat) * clip
    return result


def _columns(root: Matrix, pairs: float) -> tuple[Matrix, Matrix]:
    """Rows and their differences as unit vectors [coordinates, columns], and their weights."""
    count = root.shape[1]
    firsts, seconds = np.triu_indices(count, 1)
    columns = np.concatenate([root, root[:, firsts] - root[:, seconds]], axis=1)
    share = pairs / max(1, count - 1)
    weights = np.concatenate([np.ones(count), np.full(len(firsts), share)])
    lengths = np.sqrt((columns**2).sum(axis=0))
    is_there = lengths > 1e-9 * float(lengths.max())
    return columns[:, is_there] / lengths[is_there], weights[is_there]


def check_liars(count: int, liars: int) -> None:
    """Raise `LocalProtocolError` where so many liars among `count` cannot be told from honest ones."""
    if liars < 0 or 2 * liars >= count:
        raise LocalProtocolError(f"{liars} liars among {count} updates: fewer than half can be borne")
