"""BPE dropout (Provilkov et al. 2020), reproducible, for a block of captions at once.

A word is encoded in steps. In each step, the pairs of symbols that could be merged are tried in the order of their
ranks. Each is skipped with probability p, and the first that is not skipped is merged. The word is finished when every
pair is skipped or none is left. So one random number per step suffices: the number of pairs that are skipped.

All words of a block take each step together, in numpy. A word that skips nothing keeps the library's encoding, which is
the same. The library's own dropout is not used because its random generator cannot be seeded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dalle_cli.randomness import SPLITMIX_STEP, splitmix64
from dalle_cli.text.ragged import Ragged, running_total, spans

NEVER = np.int32(2**20)
"""Rank of a pair of symbols that is never merged; no vocabulary has so many merges."""
WIDTHS = (4, 6, 8, 10, 12, 16, 24, 32, 64, 128, 256, 512, 1024)
"""Maximum numbers of symbols in a word, by which words are grouped. A word above the last has no dropout."""


class BpeDropout:
    """Merges (pairs of tokens, in the order of their ranks) of a BPE vocabulary, each skipped with probability ``p``.

    ``prefix`` is the string, if any, that the vocabulary writes before a symbol which does not begin a word.
    """

    def __init__(self, vocab: Mapping[str, int], merges: Sequence[Sequence[str]], p: float, prefix: str = "") -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"dropout {p} is not a probability")
        ids = np.array([(vocab[a], vocab[b]) for a, b in merges], np.int64).reshape(-1, 2)
        results = [a + b.removeprefix(prefix) for a, b in merges]
        self._size = max(vocab.values()) + 1
        self._merged = np.array([vocab[token] for token in results], np.int32)
        self._ranks = _PairTable(self._size, ids)

        symbols: dict[str, tuple[int, ...]] = {}
        for (a, b), token in zip(merges, results, strict=True):
            parts = symbols.get(a, (vocab[a],)) + symbols.get(b, (vocab[b],))
            symbols.setdefault(token, parts)
        by_id: list[tuple[int, ...]] = [(token,) for token in range(self._size)]
        for token, parts in symbols.items():
            by_id[vocab[token]] = parts
        counts = np.array([len(parts) for parts in by_id])
        self._symbols = Ragged(np.array([s for parts in by_id for s in parts], np.int32), counts)
        # A 53-bit random number below p^k 2^53 skips k pairs or more.
        powers = np.cumprod(np.full(WIDTHS[-1], p)) * 2.0**53
        self._below = powers[powers >= 1].astype(np.uint64)

    def drop(self, ids: Ragged, words: np.ndarray, streams: np.ndarray) -> Ragged:
        """Return the tokens of captions with dropout.

        Args:
            ids: the captions' tokens without dropout.
            words: (total,) number of each token's word in its caption, ascending.
            streams: (n,) uint64 random stream of each caption; a result depends on its tokens and its stream alone.
        """
        n, tokens = len(ids.counts), len(ids.values)
        if tokens == 0:
            return ids
        row = np.repeat(np.arange(n), ids.counts)
        begins = np.ones(tokens, bool)
        begins[1:] = (words[1:] != words[:-1]) | (row[1:] != row[:-1])
        word_start = np.flatnonzero(begins)
        word_tokens = np.diff(word_start, append=tokens)

        symbols = self._symbols.take(ids.values)
        edges = np.append(symbols.starts, len(symbols.values))
        symbols_before = edges[running_total(ids.counts)]
        skipped = self._draw(np.diff(symbols_before), streams)
        starts = edges[word_start]
        counts = np.diff(starts, append=edges[-1])
        # A word of s symbols that becomes t tokens takes s - t merges; without a skip in these steps it is unchanged.
        skips = running_total(skipped > 0)
        changed = skips[starts + counts - word_tokens] > skips[starts]

        out_tokens = word_tokens.copy()
        word_symbols, word_skips = Ragged(symbols.values, counts), Ragged(skipped, counts)
        merged_groups: list[tuple[np.ndarray, Ragged]] = []
        for above, width in zip((0, *WIDTHS), WIDTHS, strict=False):
            group = np.flatnonzero(changed & (counts > above) & (counts <= width))
            if len(group):
                merged = self._merge(word_symbols.take(group).padded(width, -1), word_skips.take(group).padded(width))
                out_tokens[group] = merged.counts
                merged_groups.append((group, merged))
        unchanged = np.flatnonzero(~changed | (counts > WIDTHS[-1]))
        out_starts = running_total(out_tokens)
        out = np.empty(out_starts[-1], ids.values.dtype)
        unchanged_tokens = spans(word_start[unchanged], word_tokens[unchanged])
        out[spans(out_starts[unchanged], word_tokens[unchanged])] = ids.values[unchanged_tokens]
        for group, merged in merged_groups:
            out[spans(out_starts[group], merged.counts)] = merged.values
        words_before = np.searchsorted(word_start, running_total(ids.counts))
        return Ragged(out, np.diff(out_starts[words_before]))

    def _draw(self, counts: np.ndarray, streams: np.ndarray) -> np.ndarray:
        """Return the number of pairs that each step skips, (sum of counts,) int32; there is a step for each symbol."""
        step = spans(np.ones_like(counts), counts).astype(np.uint64)
        draws = splitmix64(np.repeat(streams, counts) + step * SPLITMIX_STEP) >> np.uint64(11)
        skipped = np.zeros(len(draws), np.int32)
        if len(self._below):
            some = np.flatnonzero(draws < self._below[0])
            skipped[some] = len(self._below) - np.searchsorted(self._below[::-1], draws[some], side="right")
        return skipped

    def _merge(self, symbols: np.ndarray, skipped: np.ndarray) -> Ragged:
        """Return the tokens of m words, given their symbols (m, width), padded with -1, and skips a step (m, width)."""
        m, width = symbols.shape
        # Arrays are (width, words) from here on, so that a step works on long contiguous rows.
        symbol, skipped = np.ascontiguousarray(symbols.T), np.ascontiguousarray(skipped.T)
        never = np.int32(NEVER * width)
        # A pair's priority combines its rank and its place: the least one is merged next, the leftmost of equal ranks.
        place = np.arange(width, dtype=np.int32)[:, None]
        priority = np.full((width, m), never, np.int32)
        priority[:-1] = self._ranks.look_up(symbol[:-1], symbol[1:]) * width
        priority += place
        following, previous = np.repeat(place + 1, m, axis=1), np.repeat(place - 1, m, axis=1)
        result = np.empty((width, m), np.int32)
        word = np.arange(m)
        for step in range(width):
            least = _least_after_skips(priority, skipped[step], never)
            unfinished = least < never
            if not unfinished.all():
                result[:, word[~unfinished]] = symbol[:, ~unfinished]
                word, least, skipped = word[unfinished], least[unfinished], skipped[:, unfinished]
                symbol, priority = symbol[:, unfinished], priority[:, unfinished]
                following, previous = following[:, unfinished], previous[:, unfinished]
                if len(word) == 0:
                    break
            at, column = least % width, np.arange(len(word))
            merged = self._merged[least // width]
            right, before = following[at, column], previous[at, column]
            after = following[right, column]
            symbol[at, column], symbol[right, column] = merged, -1
            priority[right, column] = never + right
            following[at, column] = after
            # The pairs on both sides of the new symbol have new ranks.
            last = after == width
            after[last] = 0  # any valid index, since next_symbol is -1 there
            next_symbol = np.where(last, -1, symbol[after, column])
            priority[at, column] = self._ranks.look_up(merged, next_symbol) * width + at
            previous[after[~last], column[~last]] = at[~last]
            inner = before >= 0
            left, column = before[inner], column[inner]
            priority[left, column] = self._ranks.look_up(symbol[left, column], merged[inner]) * width + left
        words = result.T
        filled = words >= 0
        return Ragged(words[filled], filled.sum(axis=1))


def _least_after_skips(priority: np.ndarray, skipped: np.ndarray, never: np.int32) -> np.ndarray:
    """Return the least priority (words,) of each word after skipping ``skipped``; ``never`` or more means none."""
    least: np.ndarray = priority.min(axis=0)
    more = np.flatnonzero(skipped)
    rest = priority[:, more]
    for count in range(1, int(skipped.max(initial=0)) + 1):
        open_ = (skipped[more] >= count) & (least[more] < never)
        more, rest = more[open_], rest[:, open_]
        if len(more) == 0:
            break
        rest[least[more] % len(rest), np.arange(len(more))] = np.iinfo(np.int32).max
        least[more] = rest.min(axis=0)
    return least


class _PairTable:
    """Hash table of the ranks of pairs of symbols; a binary search for each pair would take most of the time."""

    def __init__(self, symbols: int, pairs: np.ndarray) -> None:
        self._stride = symbols + 1
        # Where a pair is listed twice, its first rank counts.
        self._keys, ranks = np.unique(self._key(pairs[:, 0], pairs[:, 1]), return_index=True)
        self._ranks = ranks.astype(np.int32)
        self._bits = np.uint64(64 - max(10, 4 * len(ranks)).bit_length())
        self._slot_key = np.full(2 ** (64 - int(self._bits)), np.iinfo(np.int64).min)
        self._slot_rank = np.full(len(self._slot_key), NEVER)
        slots = self._slot(self._keys)
        self._slot_key[slots], self._slot_rank[slots] = self._keys, self._ranks
        self._shared = np.bincount(slots, minlength=len(self._slot_key)) > 1

    def look_up(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Return the ranks of pairs, in arrays of any shape; -1 stands for no symbol."""
        keys = self._key(left, right)
        slots = self._slot(keys)
        ranks = np.where(self._slot_key[slots] == keys, self._slot_rank[slots], NEVER)
        unsure = self._shared[slots]  # the slot may hold another pair's rank
        if unsure.any():
            keys = keys[unsure]
            at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
            ranks[unsure] = np.where(self._keys[at] == keys, self._ranks[at], NEVER)
        return ranks

    def _key(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        key: np.ndarray = left.astype(np.int64) * self._stride + right + 1
        return key

    def _slot(self, keys: np.ndarray) -> np.ndarray:
        slots: np.ndarray = (keys.astype(np.uint64) * SPLITMIX_STEP) >> self._bits
        return slots.astype(np.int64)
