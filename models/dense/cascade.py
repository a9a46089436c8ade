"""Cascade R-CNN (Cai and Vasconcelos, arXiv 1712.00726): box heads in a row, each trained on what the last one made.

torchvision has every part of it: a stage is its ``RoIHeads``, with a threshold and box weights of its own. What differs
from the paper is as in mmdetection 2, which the published detectors of NAT, DiNAT and Swin were trained with: every
stage has a mask head, samples anew, and scores are averaged before the softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, maskrcnn_inference, maskrcnn_loss
from torchvision.ops import clip_boxes_to_image, generalized_box_iou_loss

GIOU_WEIGHT = 10.0


class CascadeHeads(nn.Module):
    """The region heads of a cascade, in place of torchvision's ``RoIHeads``.

    Args:
        stages: thresholds, samplers, box coders and heads; with mask heads in all of them, or in none.
        loss_weights: of the losses of each stage.
        box_loss: ``smooth_l1`` of torchvision, or ``giou`` of the decoded boxes with weight 10.
    """

    # a ModuleList of RoIHeads, whose items no type checker knows
    stages: Any

    def __init__(
        self, stages: Sequence[RoIHeads], loss_weights: Sequence[float] = (1.0, 0.5, 0.25), box_loss: str = "smooth_l1"
    ) -> None:
        super().__init__()
        if len(stages) != len(loss_weights):
            raise ValueError(
                f"loss_weights has {len(loss_weights)} entries for {len(stages)} stages: give one for each"
            )
        self.stages = nn.ModuleList(stages)
        self.loss_weights = tuple(loss_weights)
        self.box_loss = box_loss

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """As ``RoIHeads``: detections in evaluation, losses by name and number of the stage in training."""
        if not self.training:
            return self._detect(features, proposals, image_shapes), {}
        assert targets is not None
        losses = {}
        for i, (stage, weight) in enumerate(zip(self.stages, self.loss_weights, strict=True)):
            proposals, matched, labels, deltas = stage.select_training_samples(proposals, targets)
            scores, regressed = self._boxes(stage, features, proposals, image_shapes)
            loss_class, loss_box = fastrcnn_loss(scores, regressed, labels, deltas)
            if self.box_loss == "giou":
                loss_box = giou_loss(stage, regressed, labels, deltas, proposals)
            losses[f"loss_classifier_{i}"] = weight * loss_class
            losses[f"loss_box_reg_{i}"] = weight * loss_box
            if stage.has_mask():
                losses[f"loss_mask_{i}"] = weight * mask_loss(stage, features, proposals, matched, labels, targets)
            if i + 1 < len(self.stages):
                refined = refine(stage, scores, regressed, proposals, image_shapes, labels)
                # the next stage adds the true boxes itself
                proposals = [
                    boxes[~_among(before, target["boxes"])]
                    for boxes, before, target in zip(refined, proposals, targets, strict=True)
                ]
        return [], losses

    def _detect(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        scores: list[Tensor] = []
        for i, stage in enumerate(self.stages):
            logits, regressed = self._boxes(stage, features, proposals, image_shapes)
            scores.append(logits)
            if i + 1 < len(self.stages):
                proposals = refine(stage, logits, regressed, proposals, image_shapes)
        found = self.stages[-1].postprocess_detections(torch.stack(scores).mean(0), regressed, proposals, image_shapes)
        results = [
            {"boxes": boxes, "scores": score, "labels": labels} for boxes, score, labels in zip(*found, strict=True)
        ]
        if self.stages[-1].has_mask():
            boxes, labels = [r["boxes"] for r in results], [r["labels"] for r in results]
            regions = self.stages[-1].mask_roi_pool(features, boxes, image_shapes)
            masks = [maskrcnn_inference(s.mask_predictor(s.mask_head(regions)), labels) for s in self.stages]
            for result, by_stage in zip(results, zip(*masks, strict=True), strict=True):
                result["masks"] = torch.stack(by_stage).mean(0)
        return results

    @staticmethod
    def _boxes(
        stage: RoIHeads, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Class scores (n, classes) and box deltas (n, 4 * classes) of all proposals."""
        return stage.box_predictor(stage.box_head(stage.box_roi_pool(features, proposals, image_shapes)))


def refine(
    stage: RoIHeads,
    scores: Tensor,
    regressed: Tensor,
    proposals: list[Tensor],
    image_shapes: list[tuple[int, int]],
    labels: list[Tensor] | None = None,
) -> list[Tensor]:
    """The boxes that a stage makes of its proposals, within their images; no gradient flows through them.

    Args:
        stage: has the box coder.
        scores: (n, classes), background first.
        regressed: (n, 4 * classes).
        proposals: (n_i, 4) of each image.
        image_shapes: (height, width) of each image.
        labels: (n_i,) of each image, 0 for background: true objects take the box of their class, all else (and all,
            without labels) that of the best one.
    """
    boxes = stage.box_coder.decode(regressed.detach(), proposals).reshape(-1, scores.shape[1], 4)
    chosen = scores[:, 1:].argmax(1) + 1
    if labels is not None:
        true = torch.cat(labels)
        chosen = torch.where(true > 0, true, chosen)
    boxes = boxes[torch.arange(len(boxes), device=boxes.device), chosen]
    per_image = boxes.split([len(p) for p in proposals])
    return [clip_boxes_to_image(b, shape) for b, shape in zip(per_image, image_shapes, strict=True)]


def giou_loss(
    stage: RoIHeads, regressed: Tensor, labels: list[Tensor], deltas: Sequence[Tensor], proposals: list[Tensor]
) -> Tensor:
    """Generalised IoU loss of the boxes of true objects, over the number of all proposals (as torchvision's L1).

    Args:
        stage: has the box coder.
        regressed: (n, 4 * classes).
        labels: (n_i,) of each image, 0 for background.
        deltas: (n_i, 4) of each image, from the proposal to its object.
        proposals: (n_i, 4) of each image.
    """
    label = torch.cat(labels)
    true = torch.where(label > 0)[0]
    start = torch.cat(proposals)[true]
    predicted = regressed.unflatten(1, (-1, 4))[true, label[true]]
    predicted = stage.box_coder.decode_single(predicted, start)
    wanted = stage.box_coder.decode_single(torch.cat(list(deltas))[true], start)
    return GIOU_WEIGHT * generalized_box_iou_loss(predicted, wanted, reduction="sum") / label.numel()


def mask_loss(
    stage: RoIHeads,
    features: dict[str, Tensor],
    proposals: list[Tensor],
    matched: list[Tensor],
    labels: list[Tensor],
    targets: list[dict[str, Tensor]],
) -> Tensor:
    """torchvision's mask loss of the proposals that are true objects.

    Args:
        stage: has the mask heads.
        features: maps by name.
        proposals: (n_i, 4) of each image.
        matched: (n_i,) number of the object that each belongs to.
        labels: (n_i,), 0 for background.
        targets: ``masks`` and ``labels`` of each image.
    """
    true = [torch.where(label > 0)[0] for label in labels]
    boxes = [p[keep] for p, keep in zip(proposals, true, strict=True)]
    logits = stage.mask_predictor(stage.mask_head(stage.mask_roi_pool(features, boxes, None)))
    objects = [m[keep] for m, keep in zip(matched, true, strict=True)]
    return maskrcnn_loss(logits, boxes, [t["masks"] for t in targets], [t["labels"] for t in targets], objects)


def _among(boxes: Tensor, others: Tensor) -> Tensor:
    """(n,): whether a box is, exactly, one of the others."""
    return (boxes[:, None] == others.to(boxes.dtype)[None]).all(2).any(1)
