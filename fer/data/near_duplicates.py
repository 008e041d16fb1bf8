"""Near duplicates: one picture brightened, compressed again, resized or moved a little.

Linear in the number of images, on a small thumbnail of each instead of its pixels:

1. 64 bits per thumbnail, from its coarsest cosine coefficients (`hashes`);
2. pairs whose bits nearly agree, found in buckets, never by comparing all with all (`candidates`);
3. those pairs of which one thumbnail explains the other (`unexplained`), joined into groups (`near_groups`).
"""

import itertools
from collections.abc import Iterator

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from fer.data.manifest import Array
from fer.data.store import fit

SIDE = 16  # px of a thumbnail
MAX_BITS = 12  # by which the hashes of near duplicates differ; a move by a pixel of 48 changes 5, seldom 10
MAX_UNEXPLAINED = 0.125  # looked at on FER2013's pairs: one picture nearly always up to 0.15, mostly up to 0.2
MAX_MOVE = 1.0  # px of a thumbnail, each way
MIN_RANGE = 4  # grey levels between the darkest and the brightest pixel of a thumbnail; flatter ones show nothing
MANY = 100  # images whose median says something; among fewer it may lie between two that are alike
WINDOW = 64  # images that one is compared with in a bucket
_BLOCKS = 8  # of 8 bits, the coarsest first; two of them make a bucket's key
_CHUNK = 4096


def thumbnail(image: Array) -> Array:
    """(H, W) or (H, W, 3) uint8 -> (SIDE, SIDE) uint8 grey."""
    return fit(image, SIDE, 1)[..., 0]


def _cosines() -> Array:
    """(SIDE * SIDE, 64) float32, the coarsest two-dimensional cosines without the constant one."""
    wave = np.cos(np.pi * np.outer(np.arange(SIDE), 2 * np.arange(SIDE) + 1) / (2 * SIDE))
    frequencies = sorted(itertools.product(range(SIDE), repeat=2), key=lambda ij: (ij[0] ** 2 + ij[1] ** 2, ij))
    return np.stack([np.outer(wave[i], wave[j]).ravel() for i, j in frequencies[1:65]], axis=1).astype(np.float32)


def hashes(thumbnails: Array) -> Array:
    """64 bits per thumbnail, of which small changes of the picture change few.

    A bit tells whether a cosine coefficient, relative to the thumbnail's contrast, lies above its median over the data
    set. Above zero, as perceptual hashes usually ask, faces would crowd a few buckets: their coarse shape is the same.

    Args:
        thumbnails: (N, SIDE, SIDE) uint8.

    Returns:
        (N,) uint64.
    """
    basis = _cosines()
    weight = np.empty((len(thumbnails), basis.shape[1]), dtype=np.float32)
    for start in range(0, len(thumbnails), _CHUNK):
        flat = thumbnails[start : start + _CHUNK].reshape(-1, SIDE * SIDE).astype(np.float32)
        contrast = flat.std(1, keepdims=True)
        weight[start : start + _CHUNK] = flat @ basis / np.maximum(contrast, 1e-6)
    middle = np.median(weight, axis=0) if len(weight) >= MANY else 0
    bits: Array = np.packbits(weight > middle, axis=1).view(np.uint64)[:, 0]
    return bits


def candidates(bits: Array) -> Iterator[Array]:
    """Pairs of images whose hashes differ in at most `MAX_BITS` bits.

    For each of the 28 choices of two of eight blocks of bits the images are sorted with these in front, and within a
    bucket of equal ones each is compared with the next `WINDOW` in order. So the cost is 28 * `WINDOW` comparisons per
    image at most, also where near-black images fill one bucket. In a bucket of up to `WINDOW` images no pair is missed
    of which two blocks agree: by the pigeonhole principle none that differs in up to six bits.

    Args:
        bits: (N,) uint64.

    Yields:
        (M, 2) int64 rows; a pair may come several times.
    """
    blocks = bits.view(np.uint8).reshape(len(bits), _BLOCKS)
    for front in itertools.combinations(range(_BLOCKS), 2):
        columns = [*front, *(block for block in range(_BLOCKS) if block not in front)]
        key = np.ascontiguousarray(blocks[:, columns]).view(">u8")[:, 0].astype(np.uint64)
        order = np.argsort(key, kind="stable")
        key = key[order]
        bucket = key >> np.uint64(48)
        for step in range(1, min(WINDOW + 1, len(bits))):
            together = np.flatnonzero(bucket[step:] == bucket[:-step])
            if not len(together):
                break
            near = together[np.bitwise_count(key[together] ^ key[together + step]) <= MAX_BITS]
            yield np.stack([order[near], order[near + step]], axis=1)


def unexplained(a: Array, b: Array) -> Array:
    """How much of thumbnails ``a`` their partners ``b`` leave unexplained, whatever brightness, contrast and place.

    Least squares of ``a`` on ``b`` and its two derivatives, of which a small move adds some, inside the border.

    Args:
        a: (M, SIDE, SIDE) uint8.
        b: (M, SIDE, SIDE) uint8.

    Returns:
        (M,) share of the variance of ``a``, 0 to 1; 1 where contrast is reversed or the move exceeds `MAX_MOVE`.
    """
    a, b = a.astype(np.float32), b.astype(np.float32)
    target = a[:, 1:-1, 1:-1].reshape(len(a), -1)
    across, down = (b[:, 1:-1, 2:] - b[:, 1:-1, :-2]) / 2, (b[:, 2:, 1:-1] - b[:, :-2, 1:-1]) / 2
    terms = np.stack([part.reshape(len(b), -1) for part in (b[:, 1:-1, 1:-1], across, down)], axis=1)
    target -= target.mean(1, keepdims=True)
    terms -= terms.mean(2, keepdims=True)
    normal = terms @ terms.transpose(0, 2, 1) + 1e-3 * np.eye(3, dtype=np.float32)
    product = terms @ target[..., None]
    factor = np.linalg.solve(normal, product)
    left = 1 - (factor * product).sum((1, 2)) / np.maximum((target**2).sum(1), 1e-6)
    contrast, move = factor[:, 0, 0], np.abs(factor[:, 1:, 0]).max(1)
    return np.where((contrast > 0) & (move <= MAX_MOVE * contrast), left, 1.0)


def near_groups(thumbnails: Array, sequence: Array | None = None) -> Array:
    """Which images are near duplicates of each other, directly or through others; flat ones are of none.

    Args:
        thumbnails: (N, SIDE, SIDE) uint8.
        sequence: (N,) the number of each image's video; frames of one video, near by nature, are not compared.

    Returns:
        (N,) int64, equal for images of one group.
    """
    group = np.arange(len(thumbnails))
    pixels = thumbnails.reshape(len(thumbnails), SIDE * SIDE)
    rows = np.flatnonzero(pixels.max(1, initial=0) >= pixels.min(1, initial=255).astype(np.int64) + MIN_RANGE)
    for pairs in candidates(hashes(thumbnails[rows])):
        a, b = rows[pairs].T
        apart = group[a] != group[b]
        if sequence is not None:
            apart &= sequence[a] != sequence[b]
        a, b = a[apart], b[apart]
        near = np.zeros(len(a), dtype=bool)
        for start in range(0, len(a), _CHUNK):
            part = slice(start, start + _CHUNK)
            near[part] = unexplained(thumbnails[a[part]], thumbnails[b[part]]) <= MAX_UNEXPLAINED
        if near.any():
            edges = (np.ones(near.sum(), dtype=bool), (group[a[near]], group[b[near]]))
            graph = coo_array(edges, shape=(len(group), len(group)))
            group = connected_components(graph, directed=False)[1][group]
    return group.astype(np.int64)
