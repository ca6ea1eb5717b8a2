"""Tokenized sequences as batches for torch."""

from collections.abc import Iterator

import numpy as np
import torch

from samq.data.tokens import TokenBatch

IGNORED = -100  # the label that torch's cross entropy skips


def batches(tokens: TokenBatch, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield (ids, attention mask, labels) of the sequences in order, each int64 (B, T) with T the batch's longest.

    The labels are the ids, not shifted, and -100 on padding, as transformers expects them.
    """
    for first in range(0, len(tokens), batch_size):
        lengths = torch.from_numpy(tokens.lengths[first : first + batch_size].astype(np.int64))
        longest = int(lengths.max())
        ids = torch.from_numpy(tokens.ids[first : first + batch_size, :longest].astype(np.int64))
        mask = (torch.arange(longest) < lengths[:, None]).long()
        yield ids, mask, ids.masked_fill(mask == 0, IGNORED)
