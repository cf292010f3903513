"""BPE dropout (Provilkov et al. 2020), reproducible, for a block of captions at once.

At each step of a word the pairs that could be merged are tried in the order of their ranks, each is skipped with chance
p, the first that is not skipped is merged, and all pairs can be tried again; the word ends when none is left. So one
draw a step decides everything: how many pairs are passed over. Here all words of a block take each step together, in
numpy, and words that pass over nothing keep the library's encoding, which is the same. The library itself draws from a
generator that cannot be seeded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dalle_cli.randomness import SPLITMIX_STEP, splitmix64
from dalle_cli.text.ragged import Ragged, running_total, spans

NEVER = np.int32(2**20)
"""Rank of a pair of symbols that is never merged; a vocabulary has fewer merges."""
WIDTHS = (4, 6, 8, 10, 12, 16, 24, 32, 64, 128, 256, 512, 1024)
"""Words are handled in groups of about the same number of symbols. One of more is no word: it is never dropped."""


class BpeDropout:
    """The merges of a BPE vocabulary with a chance ``p`` of skipping each.

    ``merges`` are pairs of tokens in the order of their ranks; ``prefix`` is what the vocabulary writes before a symbol
    that does not begin a word, if anything.
    """

    def __init__(self, vocab: Mapping[str, int], merges: Sequence[Sequence[str]], p: float, prefix: str = "") -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"dropout {p} is no probability")
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
        # A draw below p^k passes over k pairs or more.
        powers = np.cumprod(np.full(WIDTHS[-1], p)) * 2.0**53
        self._below = powers[powers >= 1].astype(np.uint64)

    def drop(self, ids: Ragged, words: np.ndarray, streams: np.ndarray) -> Ragged:
        """Encode captions anew with dropout.

        Args:
            ids: the captions' tokens without dropout.
            words: (total,) which word of its caption each token belongs to, ascending in each caption.
            streams: (n,) uint64; a caption's result depends on its tokens and its stream alone.
        """
        n, tokens = len(ids.counts), len(ids.values)
        if tokens == 0:
            return ids
        row = np.repeat(np.arange(n), ids.counts)
        begins = np.ones(tokens, bool)
        begins[1:] = (words[1:] != words[:-1]) | (row[1:] != row[:-1])
        word_start = np.flatnonzero(begins)
        word_tokens = np.diff(word_start, append=tokens)

        of_token = self._symbols.take(ids.values)
        edges = np.append(of_token.starts, len(of_token.values))
        symbols_before = edges[running_total(ids.counts)]
        passed = self._draw(np.diff(symbols_before), streams)
        starts = edges[word_start]
        counts = np.diff(starts, append=edges[-1])
        # As long as nothing is passed over, a word of s symbols ends as t tokens after s - t merges.
        deviations = running_total(passed > 0)
        deviates = deviations[starts + counts - word_tokens] > deviations[starts]

        out_tokens = word_tokens.copy()
        done: list[tuple[np.ndarray, Ragged]] = []
        for above, width in zip((0, *WIDTHS), WIDTHS, strict=False):
            which = np.flatnonzero(deviates & (counts > above) & (counts <= width))
            if len(which):
                symbols = Ragged(of_token.values, counts)  # every word's
                at = Ragged(passed, counts)
                merged = self._merge(symbols.take(which).padded(width, -1), at.take(which).padded(width))
                out_tokens[which] = merged.counts
                done.append((which, merged))
        same = np.ones(len(counts), bool)
        for which, _ in done:
            same[which] = False
        kept = np.flatnonzero(same)
        out_starts = running_total(out_tokens)
        out = np.empty(out_starts[-1], ids.values.dtype)
        kept_tokens = spans(word_start[kept], word_tokens[kept])
        out[spans(out_starts[kept], word_tokens[kept])] = ids.values[kept_tokens]
        for which, merged in done:
            out[spans(out_starts[which], merged.counts)] = merged.values
        words_before = np.searchsorted(word_start, running_total(ids.counts))
        return Ragged(out, np.diff(out_starts[words_before]))

    def _draw(self, counts: np.ndarray, streams: np.ndarray) -> np.ndarray:
        """How many pairs the step at each symbol passes over: (sum of counts,) int32."""
        place = spans(np.ones_like(counts), counts).astype(np.uint64)
        draws = splitmix64(np.repeat(streams, counts) + place * SPLITMIX_STEP) >> np.uint64(11)
        passed = np.zeros(len(draws), np.int32)
        if len(self._below):
            some = np.flatnonzero(draws < self._below[0])
            passed[some] = len(self._below) - np.searchsorted(self._below[::-1], draws[some], side="right")
        return passed

    def _merge(self, symbols: np.ndarray, passed: np.ndarray) -> Ragged:
        """Tokens of words: ``symbols`` (m, width) end in -1, ``passed`` (m, width) pairs are passed over at each step.

        Arrays are (width, words) inside: a step then works on long rows.
        """
        m, width = symbols.shape
        symbol, passed = np.ascontiguousarray(symbols.T), np.ascontiguousarray(passed.T)
        never = np.int32(NEVER * width)
        # A pair's priority holds its rank and, for ties, its place, so that the least is the next and says where it is.
        place = np.arange(width, dtype=np.int32)[:, None]
        priority = np.full((width, m), never, np.int32)
        priority[:-1] = self._ranks.look_up(symbol[:-1], symbol[1:]) * width
        priority += place
        following, previous = np.repeat(place + 1, m, axis=1), np.repeat(place - 1, m, axis=1)
        result = np.empty((width, m), np.int32)
        word = np.arange(m)
        for step in range(width):
            least = _pass_over(priority, passed[step], never)
            going = least < never
            if not going.all():
                result[:, word[~going]] = symbol[:, ~going]
                word, least, passed = word[going], least[going], passed[:, going]
                symbol, priority = symbol[:, going], priority[:, going]
                following, previous = following[:, going], previous[:, going]
                if len(word) == 0:
                    break
            at, column = least % width, np.arange(len(word))
            merged = self._merged[least // width]
            right, before = following[at, column], previous[at, column]
            after = following[right, column]
            symbol[at, column], symbol[right, column] = merged, -1
            priority[right, column] = never + right
            following[at, column] = after
            # The pairs on both sides of the new symbol.
            last = after == width
            after[last] = 0  # any place: the rank is overwritten
            next_symbol = np.where(last, -1, symbol[after, column])
            priority[at, column] = self._ranks.look_up(merged, next_symbol) * width + at
            previous[after[~last], column[~last]] = at[~last]
            inner = before >= 0
            left, column = before[inner], column[inner]
            priority[left, column] = self._ranks.look_up(symbol[left, column], merged[inner]) * width + left
        words = result.T
        kept = words >= 0
        return Ragged(words[kept], kept.sum(axis=1))


def _pass_over(priority: np.ndarray, passed: np.ndarray, never: np.int32) -> np.ndarray:
    """(words,) the least priority of each column after the ``passed`` (words,) least ones; ``never`` or more: none."""
    least: np.ndarray = priority.min(axis=0)
    more = np.flatnonzero(passed)
    rest = priority[:, more]
    for count in range(1, int(passed.max(initial=0)) + 1):
        open_ = (passed[more] >= count) & (least[more] < never)
        more, rest = more[open_], rest[:, open_]
        if len(more) == 0:
            break
        rest[least[more] % len(rest), np.arange(len(more))] = np.iinfo(np.int32).max
        least[more] = rest.min(axis=0)
    return least


class _PairTable:
    """Ranks of pairs of symbols. Hashed: a binary search for each pair would take most of the time."""

    def __init__(self, symbols: int, pairs: np.ndarray) -> None:
        self._stride = symbols + 1
        # Of a pair that is listed twice the first rank counts.
        self._keys, ranks = np.unique(self._key(pairs[:, 0], pairs[:, 1]), return_index=True)
        self._ranks = ranks.astype(np.int32)
        self._bits = np.uint64(64 - max(10, 4 * len(ranks)).bit_length())
        self._slot_key = np.full(2 ** (64 - int(self._bits)), np.iinfo(np.int64).min)
        self._slot_rank = np.full(len(self._slot_key), NEVER)
        slots = self._slot(self._keys)
        self._slot_key[slots], self._slot_rank[slots] = self._keys, self._ranks
        self._shared = np.bincount(slots, minlength=len(self._slot_key)) > 1

    def look_up(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Ranks of pairs, of any shape; -1 stands for no symbol."""
        keys = self._key(left, right)
        slots = self._slot(keys)
        ranks = np.where(self._slot_key[slots] == keys, self._slot_rank[slots], NEVER)
        unsure = self._shared[slots]  # another pair has the slot
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
