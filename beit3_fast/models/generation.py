"""Caption decoding: the image encoded once, keys and values kept, beam search with the public code's scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..layout import TokenLayout

CANDIDATES_PER_BEAM = 3


@dataclass(frozen=True)
class Captions:
    """Best caption of each image.

    Attributes:
        tokens: per image the token ids, without BOS, EOS, padding and mask tokens.
        scores: per image ``sum of log-probabilities / length ** length_penalty``.
    """

    tokens: list[list[int]]
    scores: list[float]


class ImagePrefix:
    """Runs the image's own attention and keeps its keys and values: image rows never see text, so once is enough."""

    def __init__(self, layout: TokenLayout, num_heads: int) -> None:
        self.layout = layout
        self.num_heads = num_heads
        self.layers: list[Tensor] = []  # each (N, 2, H, d)

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """(N, 3, H, d) -> (N, H * d); layers come in order."""
        self.layers.append(qkv[:, 1:].contiguous())
        return ops.attention(qkv, self.layout, self.num_heads)


class BeamCache:
    """Keys and values of the words of every beam, beside an image prefix that all beams of an image share.

    Each step feeds two tokens a beam, the last word and a MASK; the word's keys are kept in the beam's slot and stay
    there. Which slot holds the t-th word of a beam stands in `history`, and re-ordering beams re-orders that alone.
    """

    def __init__(self, prefix: ImagePrefix, num_beams: int, columns: int) -> None:
        self.prefix = prefix
        self.length = 0
        first = prefix.layers[0]
        slots = prefix.layout.batch_size * num_beams
        self.words = first.new_zeros(len(prefix.layers), columns, slots, *first.shape[1:])
        self.history = torch.arange(slots, dtype=torch.int32, device=first.device).repeat(columns, 1)

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """(R * 2, 3, H, d), R = batch * beams -> (R * 2, H * d)."""
        words = self.words[layer]
        words[self.length] = qkv[::2, 1:]
        return ops.decode_attention(
            qkv, self.prefix.layers[layer], self.prefix.layout, words, self.history, self.length
        )

    def advance(self, beams: Tensor) -> None:
        """Keep the last word; beam r goes on from beam ``beams[r]``."""
        self.length += 1
        self.history[: self.length] = self.history[: self.length].index_select(1, beams)


@dataclass
class _Hypothesis:
    """The best finished caption of an image so far (public ``BeamHypotheses`` with one kept)."""

    words: list[int] = field(default_factory=list)
    score: float | None = None

    def offer(self, words: list[int], log_probability: float, length: int, length_penalty: float) -> None:
        score = log_probability / length**length_penalty
        if self.score is None or score > self.score:
            self.words, self.score = words, score


def beam_search(
    step: Callable[[Tensor, int], Tensor],
    reorder: Callable[[Tensor], None],
    *,
    batch_size: int,
    num_beams: int,
    max_length: int,
    length_penalty: float,
    bos_token_id: int,
    eos_token_id: int,
    pad_token_id: int,
    special_token_ids: set[int],
    device: torch.device,
) -> Captions:
    """Beam search as the public generation loop does it (unilm/beit3 ``CaptioningHandler.eval_batch``).

    Args:
        step: (last words (R,), position) -> logits (R, vocabulary) of the next word, R = batch_size * num_beams.
        reorder: called with the beam (R,) that each beam continues.
        max_length: of BOS, words and the placeholder of the next word; the last word is scored but not kept.

    One wait for the device a step: the candidates' scores and words, together.
    """
    rows = batch_size * num_beams
    last_words = torch.full((rows,), bos_token_id, dtype=torch.long, device=device)
    beam_scores = torch.full((batch_size, num_beams), -1e9, device=device)
    beam_scores[:, 0] = 0  # all beams start equal: only the first may speak
    words: list[list[int]] = [[] for _ in range(rows)]
    best = [_Hypothesis() for _ in range(batch_size)]
    done = [False] * batch_size
    idle = [(0.0, pad_token_id, 0)] * num_beams  # what a finished image's beams do

    for length in range(2, max_length):
        log_probabilities = F.log_softmax(step(last_words, length - 2), dim=-1)
        vocabulary = log_probabilities.shape[-1]
        totals = (log_probabilities + beam_scores.view(rows, 1)).view(batch_size, -1)
        top = torch.topk(totals, CANDIDATES_PER_BEAM * num_beams, dim=1)
        candidates = torch.stack([top.values.double(), top.indices.double()]).tolist()  # exact: indices < 2 ** 53
        chosen: list[tuple[float, int, int]] = []  # score, word, beam
        for sample, (scores, flat_words) in enumerate(zip(*candidates, strict=True)):
            hypothesis = best[sample]
            if hypothesis.score is not None:
                bound = max(scores) / (max_length - 1) ** length_penalty
                done[sample] = done[sample] or hypothesis.score >= bound
            going_on: list[tuple[float, int, int]] = []
            if not done[sample]:
                finished, going_on = _split_candidates(
                    scores, flat_words, vocabulary, num_beams, eos_token_id, last=length + 1 == max_length
                )
                for score, beam in finished:
                    hypothesis.offer(words[sample * num_beams + beam], score, length, length_penalty)
            chosen += [(score, word, sample * num_beams + beam) for score, word, beam in going_on] or idle
        if all(done) or length + 1 == max_length:
            break
        beams = [beam for _, _, beam in chosen]
        words = [words[beam] + [word] for _, word, beam in chosen]
        last_words = torch.tensor([word for _, word, _ in chosen], device=device)
        beam_scores = torch.tensor([score for score, _, _ in chosen], device=device)
        reorder(torch.tensor(beams, device=device))

    return Captions(
        tokens=[[word for word in hypothesis.words if word not in special_token_ids] for hypothesis in best],
        scores=[hypothesis.score if hypothesis.score is not None else float("-inf") for hypothesis in best],
    )


def _split_candidates(
    scores: list[float], flat_words: list[float], vocabulary: int, num_beams: int, eos_token_id: int, last: bool
) -> tuple[list[tuple[float, int]], list[tuple[float, int, int]]]:
    """An image's candidates, best first: (score, beam) that end here, and (score, word, beam) that go on, until every
    beam has one. In the last step all end."""
    finished: list[tuple[float, int]] = []
    going_on: list[tuple[float, int, int]] = []
    for score, flat_word in zip(scores, flat_words, strict=True):
        beam, word = divmod(int(flat_word), vocabulary)
        if word == eos_token_id or last:
            finished.append((score, beam))
        else:
            going_on.append((score, word, beam))
        if len(going_on) == num_beams:
            break
    return finished, going_on
