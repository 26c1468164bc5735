"""Losses of the released heads. Image classification and NLVR2 use ``F.cross_entropy``."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ClipLoss(nn.Module):
    """Symmetric contrastive loss over all ranks' pairs (unilm/beit3 ``utils.ClipLoss``).

    Args:
        cache_labels: accepted for the public signature; labels are an ``arange``, which costs nothing to make.
        rank, world_size: of this process.
    """

    def __init__(self, cache_labels: bool = False, rank: int = 0, world_size: int = 1) -> None:
        super().__init__()
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, D), (B, D) unit rows, scalar -> loss, logits_per_image, logits_per_text (B, B * world_size)."""
        all_image, all_text = image_features, text_features
        if self.world_size > 1:
            import torch.distributed.nn.functional as distributed  # not in every build of PyTorch

            all_image = torch.cat(distributed.all_gather(image_features))
            all_text = torch.cat(distributed.all_gather(text_features))
        logits_per_image = logit_scale * image_features @ all_text.T
        logits_per_text = logit_scale * text_features @ all_image.T
        batch_size = image_features.shape[0]
        labels = torch.arange(batch_size, device=image_features.device) + batch_size * self.rank
        loss = (F.cross_entropy(logits_per_image, labels) + F.cross_entropy(logits_per_text, labels)) / 2
        return loss, logits_per_image, logits_per_text


class BertCaptioningLoss(nn.Module):
    """Label-smoothed masked-token loss that drops the worst tokens late in training (unilm/beit3 ``utils.py``).

    ``KL(q || p)`` with ``q`` = 1 - eps on the target and eps / (n - 1) on each other class, written as a cross entropy
    with PyTorch's label smoothing plus a constant, so that nothing of the logits' size is built.

    Args:
        label_smoothing: eps.
        drop_worst_ratio: share of tokens dropped after ``drop_worst_after`` iterations.
    """

    def __init__(self, label_smoothing: float, drop_worst_ratio: float, drop_worst_after: int) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.drop_worst_ratio = drop_worst_ratio
        self.drop_worst_after = drop_worst_after

    def forward(self, logits: Tensor, target: Tensor, iter: int) -> Tensor:
        """(N, classes), (N,) -> scalar."""
        eps, others = self.label_smoothing, logits.shape[1] - 1
        entropy = 0.0
        if 0 < eps < 1:
            entropy = (1 - eps) * math.log(1 - eps) + eps * math.log(eps / others)
        smoothing = eps * (others + 1) / others
        if self.drop_worst_ratio > 0 and iter > self.drop_worst_after:
            losses = F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)
            kept = int(losses.shape[0] * (1 - self.drop_worst_ratio))
            return torch.topk(losses, kept, largest=False).values.mean() + entropy
        return F.cross_entropy(logits, target, label_smoothing=smoothing) + entropy


def vqa_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross entropy over soft answer scores, summed over answers (unilm/beit3 ``VQAHandler``).

    Args:
        logits, labels: (B, answers); labels are scores in [0, 1].
    """
    return F.binary_cross_entropy_with_logits(logits.float(), labels.float()) * labels.shape[1]
