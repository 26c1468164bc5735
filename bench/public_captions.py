"""The public generation loop (unilm/beit3, ``CaptioningHandler.eval_batch``), tensor operation for tensor operation.

Its original is written to be run from its own folder with a tokenizer file at hand. What makes it slow is kept: an
image encoded once a beam, keys and values of image and words copied whenever beams are re-ordered, candidates looked at
one tensor element at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3_fast.models import Captions

BOS, PAD, EOS, MASK = 0, 1, 2, 64001
CANDIDATES_PER_BEAM = 3


@torch.no_grad()
def generate(
    model: nn.Module,
    image: Tensor,
    *,
    num_beams: int,
    max_length: int,
    length_penalty: float = 0.6,
    mask_token: int = MASK,
) -> Captions:
    """Captions of ``image`` (B, C, H, W) by a model with the public ``BEiT3ForCaptioning``'s incremental protocol."""
    batch, device = image.shape[0], image.device
    rows = batch * num_beams
    words = torch.tensor([[BOS, mask_token]], device=device).expand(rows, 2).contiguous()
    decoded = torch.full((rows, max_length), mask_token, device=device)
    decoded[:, 0] = BOS
    image = image.unsqueeze(1).expand(batch, num_beams, *image.shape[1:]).contiguous().flatten(0, 1)

    beam_scores = torch.zeros((batch, num_beams), device=device)
    beam_scores[:, 1:] = -1e9
    beam_scores = beam_scores.view(-1)
    best: list[tuple[float, Tensor] | None] = [None] * batch
    done = [False] * batch
    state: dict[int, dict[str, Tensor]] = {}

    for length in range(2, max_length + 1):
        logits, state = model(
            image=image if length == 2 else None,
            text_ids=words,
            language_masked_pos=None,
            padding_mask=torch.zeros_like(words),
            text_len=length,
            incremental_state=state,
        )
        scores = F.log_softmax(logits[:, 1, :], dim=-1)
        vocabulary = scores.shape[1]
        scores = (scores + beam_scores[:, None]).view(batch, num_beams * vocabulary)
        next_scores, next_words = torch.topk(scores, CANDIDATES_PER_BEAM * num_beams, dim=1)

        chosen: list[tuple[Any, Any, Any]] = []
        idle = [(0, PAD, 0)] * num_beams
        for sample in range(batch):
            caption = best[sample]
            limit = next_scores[sample].max().item() / (max_length - 1) ** length_penalty
            done[sample] = done[sample] or (caption is not None and caption[0] >= limit)
            if done[sample]:
                chosen += idle
                continue
            beams: list[tuple[Any, Any, Any]] = []
            for candidate, score in zip(next_words[sample], next_scores[sample], strict=True):
                beam, word = candidate // vocabulary, candidate % vocabulary
                row = sample * num_beams + beam
                if (word.item() == EOS and length + 1 <= max_length) or length + 1 == max_length:
                    value = score.item() / length**length_penalty
                    caption = best[sample]
                    if caption is None or value > caption[0]:
                        best[sample] = value, decoded[row, :length].clone()
                else:
                    beams.append((score, word, row))
                if len(beams) == num_beams:
                    break
            chosen += beams or idle

        beam_scores = beam_scores.new_tensor([score for score, _, _ in chosen])
        last = words.new_tensor([word for _, word, _ in chosen])
        source = words.new_tensor([row for _, _, row in chosen])
        decoded = decoded[source]
        for layer in state:
            for key in state[layer]:
                state[layer][key] = state[layer][key].index_select(0, source)[:, :, :-1, :]
        words = torch.cat([last.unsqueeze(1), words.new_full((rows, 1), mask_token)], dim=1)
        decoded[:, length - 1] = last
        if all(done):
            break

    found = [caption for caption in best if caption is not None]
    special = {BOS, PAD, EOS, mask_token}
    return Captions(
        [[word for word in caption.tolist() if word not in special] for _, caption in found],
        [score for score, _ in found],
    )
