"""Supervised fine-tuning on texts that are tokenised at random a little finer than usual.

    floor(p n) times: draw one of a row's n text tokens; if it can be written as two tokens of the vocabulary,
    replace it by one such pair, drawn uniformly

The text stays the same, and so does what trains: both halves of a target are targets. The model learns how tokens are
spelt.

Source: "StochasTok: Improving Fine-Grained Subword Understanding in LLMs", arXiv 2506.01687. There: p 0.1, in
pretraining and for a short time after it.
Differs: only text tokens are counted and drawn. Special tokens, media placeholders, the chat template's added tokens
and the marks around answers are never split. Each time that a row is drawn it is split anew, by ``seed`` and its number
in the run. Rows may get longer than ``data.max_length`` by the share p.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from mmpost.core.batch import Encoded
from mmpost.core.seeding import generator
from mmpost.train.method import Method
from mmpost.train.parts import Parts

# Tokens that spell these are what rewards find answers by.
MARKS = ("<answer>", "</answer>", "<think>", "</think>", "\\boxed{")


class SplitTable:
    """Pairs of tokens that spell a token, from a tokenizer's vocabulary; made when they are first asked for."""

    def __init__(self, tokenizer: Any, media: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.vocabulary: dict[str, int] = tokenizer.get_vocab()
        self.spared = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder, *media}
        self._pairs: dict[int, list[tuple[int, int]]] = {}

    def pairs(self, token: int) -> list[tuple[int, int]]:
        """All pairs whose text is that of the token; empty for tokens that must stay whole."""
        if token not in self._pairs:
            self._pairs[token] = [] if token in self.spared else self._find(token)
        return self._pairs[token]

    def _find(self, token: int) -> list[tuple[int, int]]:
        piece = self.tokenizer.convert_ids_to_tokens(token)
        text = self.tokenizer.decode([token])
        halves = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        known = [(self.vocabulary[a], self.vocabulary[b]) for a, b in halves if {a, b} <= self.vocabulary.keys()]
        allowed = [pair for pair in known if not self.spared.intersection(pair)]
        # Vocabularies mark the start of words in different ways; what decodes to the same text is right in all of them.
        return [pair for pair in allowed if self.tokenizer.decode(list(pair)) == text]

    def may_split(self, ids: Sequence[int]) -> list[bool]:
        """Per token, whether it is text and no part of a mark."""
        pieces = [str(piece) for piece in self.tokenizer.convert_ids_to_tokens(list(ids))]
        ends = np.cumsum([len(piece) for piece in pieces])
        spelt = "".join(pieces)
        may = np.array([token not in self.spared for token in ids], dtype=bool)
        for mark in MARKS:
            start = spelt.find(mark)
            while start >= 0:
                first = int(np.searchsorted(ends, start, side="right"))
                last = int(np.searchsorted(ends, start + len(mark) - 1, side="right"))
                may[first : last + 1] = False
                start = spelt.find(mark, start + 1)
        return may.tolist()


@dataclass
class Split:
    """Splits tokens of encoded rows.

    Attributes:
        share: p, in [0, 1].
        seed: Of the draws.
    """

    share: float = 0.1
    seed: int = 0
    _tables: dict[int, SplitTable] = field(default_factory=dict, repr=False)

    def __call__(self, row: Encoded, adapter: Any, number: int) -> Encoded:
        """The row with some tokens split; all else follows."""
        table = self._tables.setdefault(id(adapter), SplitTable(adapter.tokenizer, adapter.media_token_ids))
        ids, train = row.ids.tolist(), row.train.tolist()
        may = table.may_split(ids)
        random = generator(self.seed, "stochastok", number)
        for _ in range(int(self.share * sum(may))):
            places = np.flatnonzero(may)
            place = int(places[random.integers(len(places))])
            pairs = table.pairs(ids[place])
            if pairs:
                ids[place : place + 1] = pairs[int(random.integers(len(pairs)))]
                train[place : place + 1] = [train[place]] * 2
                may[place : place + 1] = [True] * 2
        tokens = torch.tensor(ids, dtype=row.ids.dtype)
        return replace(row, ids=tokens, train=torch.tensor(train), positions=adapter.positions(tokens, row.media))


def preset(share: float = 0.1, seed: int = 0) -> Method:
    """Parts of demonstrations.

    Args:
        share: p, splits per text token.
        seed: Of the draws.
    """
    return Method(demo=Parts(aggregate="token"), encode=Split(share, seed))
