"""Cascade R-CNN by hand: thresholds, refinement, losses, averages; one stage is Faster R-CNN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nearfield.models.dense import Detector, create_detector
from nearfield.models.dense.cascade import CascadeHeads, giou_loss, refine
from nearfield.models.dense.heads import AgnosticPredictor, region_heads
from nearfield.models.dense.options import CascadeMaskOptions, CascadeOptions
from torch import Tensor, nn

SIZE = [(64, 64)]
MAPS = {"0": torch.zeros(1, 4, 16, 16)}


def stages(count: int = 3, **options: Any) -> list[Any]:
    """Stages of two classes and background, on one map of stride 4."""
    given = {"box_convs": 0, "box_features": 8, "samples": 16, **options}
    made: Any = (CascadeMaskOptions if "mask_size" in options else CascadeOptions)(**given)
    settings = list(zip(made.stage_ious, made.stage_box_weights, strict=True))[:count]
    return [region_heads(4, 3, [4], made, iou=iou, box_weights=weights) for iou, weights in settings]


def fix(stage: Any, scores: list[float], deltas: list[float]) -> None:
    """Let a stage say the same of every proposal: class scores (background first) and deltas of every class."""
    for p in stage.box_predictor.parameters():
        nn.init.zeros_(p)
    stage.box_predictor.cls_score.bias.data = torch.tensor(scores)
    stage.box_predictor.bbox_pred.bias.data = torch.tensor(deltas).repeat(len(scores))


def target(*boxes: tuple[float, ...], labels: tuple[int, ...] = (1,)) -> dict[str, Tensor]:
    return {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.tensor(labels)}


def test_each_stage_asks_for_more_overlap() -> None:
    truth = target((0.0, 0.0, 20.0, 20.0))
    # a box of the same corner and height has the overlap width / 20
    proposals = torch.tensor([[0.0, 0.0, 20 * iou, 20.0] for iou in (0.45, 0.55, 0.65, 0.75)])
    for stage, wanted in zip(stages(), ([0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]), strict=True):
        _, labels = stage.assign_targets_to_proposals([proposals], [truth["boxes"]], [truth["labels"]])
        assert labels[0].tolist() == wanted
    assert [s.proposal_matcher.high_threshold for s in stages()] == [0.5, 0.6, 0.7]


def test_each_stage_measures_deltas_in_finer_units() -> None:
    start = [torch.tensor([[10.0, 10, 30, 20]])]
    moved = [torch.tensor([[11.0, 10, 31, 20]])]
    # a twentieth of the width to the right
    for stage, unit in zip(stages(), (10, 20, 30), strict=True):
        torch.testing.assert_close(stage.box_coder.encode(moved, start)[0], torch.tensor([[unit / 20, 0, 0, 0]]))


def test_proposals_are_refined_by_the_box_of_their_class_or_of_the_best_one() -> None:
    stage = stages(1)[0]
    proposals = [torch.tensor([[10.0, 10, 30, 20], [10, 10, 30, 20]]), torch.tensor([[50.0, 40, 70, 60]])]
    # class 0 (background) would move far off, class 1 moves a width right, class 2 half a height down
    deltas = torch.tensor([[90.0, 90, 9, 9], [10, 0, 0, 0], [0, 5, 0, 0]]).flatten().repeat(3, 1)
    scores = torch.tensor([[9.0, 1, 2], [9, 2, 1], [9, 1, 2]])
    sizes = [(64, 64), (64, 64)]
    right, down, low = [30.0, 10, 50, 20], [10.0, 15, 30, 25], [50.0, 50, 64, 64]
    boxes = refine(stage, scores, deltas, proposals, sizes)
    assert [b.tolist() for b in boxes] == [[down, right], [low]]
    # the first is an object of class 1, the others are background
    labels = [torch.tensor([1, 0]), torch.tensor([0])]
    boxes = refine(stage, scores, deltas.requires_grad_(), proposals, sizes, labels)
    assert [b.tolist() for b in boxes] == [[right, right], [low]]
    assert not boxes[0].requires_grad
    empty = refine(stage, scores[:0], deltas[:0].detach(), [torch.zeros(0, 4)], SIZE)
    assert empty[0].shape == (0, 4)


def test_a_stage_is_given_what_the_last_one_made_and_not_the_true_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    row = stages(2)
    heads = CascadeHeads(row, (1.0, 1.0)).train()
    fix(row[0], [0.0, 1.0, 0.0], [2.0, 0.0, 0.0, 0.0])
    given: list[Tensor] = []
    select = row[1].select_training_samples

    def spy(proposals: list[Tensor], targets: Any) -> Any:
        given.extend(p.clone() for p in proposals)
        return select(proposals, targets)

    monkeypatch.setattr(row[1], "select_training_samples", spy)
    proposals = [torch.tensor([[4.0, 4, 14, 14], [30, 30, 50, 50]])]
    heads(MAPS, proposals, SIZE, [target((4.0, 4.0, 16.0, 16.0))])
    # a fifth of the width to the right
    assert given[0].tolist() == [[6.0, 4.0, 16.0, 14.0], [34.0, 30.0, 54.0, 50.0]]


def test_losses_are_those_of_each_stage_with_its_weight() -> None:
    row = stages()
    truth, proposals = [target((4.0, 4.0, 20.0, 20.0))], [torch.tensor([[4.0, 4, 20, 18], [40, 40, 60, 60]])]
    by_weight = []
    for weights in ((1.0, 1.0, 1.0), (1.0, 0.5, 0.25)):
        torch.manual_seed(0)
        results, losses = CascadeHeads(row, weights).train()(MAPS, list(proposals), SIZE, truth)
        assert results == []
        by_weight.append(losses)
    plain, weighted = by_weight
    assert list(plain) == [f"{name}_{i}" for i in range(3) for name in ("loss_classifier", "loss_box_reg")]
    for name, value in weighted.items():
        torch.testing.assert_close(value, plain[name] * (1.0, 0.5, 0.25)[int(name[-1])])


def test_box_loss_by_hand() -> None:
    row = stages(1)
    fix(row[0], [0.0, 0.0, 0.0], [0.0] * 4)
    # the proposal has the overlap 1/2 and is one of two: the true box is added and fits
    truth, proposals = [target((0.0, 0.0, 20.0, 20.0))], [torch.tensor([[0.0, 0, 20, 10]])]
    for kind, wanted in (("giou", 10 * (1 - 0.5) / 2), ("smooth_l1", None)):
        losses = CascadeHeads(row, (1.0,), kind).train()(MAPS, list(proposals), SIZE, truth)[1]
        torch.testing.assert_close(losses["loss_classifier_0"], torch.tensor(3.0).log())
        if wanted is None:
            # half a height down, in tenths; twice the height, in fifths; less half of beta = 1/9 each
            wanted = (10 * 0.5 + 5 * torch.tensor(2.0).log().item() - 2 * 0.5 / 9) / 2
        torch.testing.assert_close(losses["loss_box_reg_0"], torch.tensor(wanted))


def test_generalised_overlap_by_hand() -> None:
    stage = stages(1)[0]
    proposals = [torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 10]])]
    labels = [torch.tensor([2, 0, 1])]
    # class 2 of the first is right; class 1 of the last is a proposal that should have moved two widths to the right
    regressed = torch.zeros(3, 3, 4)
    regressed[0, :2] = regressed[1] = 7.0
    deltas = [torch.tensor([[0.0] * 4, [3.0] * 4, [20.0, 0, 0, 0]])]
    loss = giou_loss(stage, regressed.flatten(1), labels, deltas, proposals)
    # no overlap; of the 300 around both 100 are in neither
    torch.testing.assert_close(loss, torch.tensor(10 * (1 + 100 / 300) / 3))
    none = giou_loss(
        stage, regressed.flatten(1).requires_grad_(), [torch.zeros(3, dtype=torch.long)], deltas, proposals
    )
    assert none == 0
    none.backward()


def test_detections_have_the_mean_score_and_the_box_of_the_last_stage() -> None:
    row = stages(score_threshold=0.0, nms_threshold=1.0)
    logits = ([0.0, 3.0, 0.0], [0.0, 1.0, 2.0], [3.0, 2.0, 1.0])
    # each a tenth of the width to the right
    for stage, scores, unit in zip(row, logits, (10.0, 20.0, 30.0), strict=True):
        fix(stage, list(scores), [unit / 10, 0.0, 0.0, 0.0])
    results, losses = CascadeHeads(row).eval()(MAPS, [torch.tensor([[10.0, 10, 20, 20]])], SIZE)
    assert losses == {}
    wanted = torch.tensor([1.0, 2.0, 1.0]).softmax(0)
    assert results[0]["labels"].tolist() == [1, 2]
    torch.testing.assert_close(results[0]["scores"], wanted[1:])
    torch.testing.assert_close(results[0]["boxes"], torch.tensor([[13.0, 10, 23, 20]]).expand(2, 4))


def test_masks_are_the_mean_of_all_stages() -> None:
    row = stages(score_threshold=0.1, mask_size=14, mask_convs=0, mask_channels=4)
    for i, stage in enumerate(row):
        fix(stage, [0.0, 5.0, 0.0], [0.0] * 4)
        for p in stage.mask_predictor.parameters():
            nn.init.zeros_(p)
        stage.mask_predictor.mask_fcn_logits.bias.data += (-1.0, 0.0, 3.0)[i]
    results, _ = CascadeHeads(row).eval()(MAPS, [torch.tensor([[10.0, 10, 20, 20]])], SIZE)
    wanted = torch.tensor([-1.0, 0.0, 3.0]).sigmoid().mean()
    torch.testing.assert_close(results[0]["masks"], wanted.expand(1, 1, 14, 14))


def test_one_box_for_all_classes() -> None:
    predictor = AgnosticPredictor(8, 3)
    scores, deltas = predictor(torch.randn(5, 8))
    assert scores.shape == (5, 3)
    assert deltas.shape == (5, 12)
    assert torch.equal(deltas[:, :4], deltas[:, 8:])
    agnostic, each = (
        create_detector("nat_nano", "cascade_rcnn", num_classes=3, channels=32, box_features=16, class_agnostic=a)
        for a in (True, False)
    )
    fewer = sum(p.numel() for p in each.parameters()) - sum(p.numel() for p in agnostic.parameters())
    assert fewer == 3 * (16 + 1) * (4 * 4 - 4)


@pytest.mark.parametrize("kind", ["faster_rcnn", "mask_rcnn"])
def test_one_stage_is_the_detector_without_cascade(kind: str) -> None:
    options: dict[str, Any] = {"num_classes": 3, "channels": 32, "box_features": 16, "samples": 32, "proposals": 30}
    options |= {"mask_convs": 1, "mask_channels": 8, "min_size": 64, "max_size": 96, "score_threshold": 0.0}
    plain = create_detector("nat_nano", kind, **options)
    one = {"stage_ious": (0.5,), "stage_box_weights": ((10.0, 10.0, 5.0, 5.0),), "stage_loss_weights": (1.0,)}
    cascade = create_detector(
        "nat_nano", f"cascade_{kind.replace('faster_', '')}", box_loss="smooth_l1", box_convs=0, **one, **options
    )
    state = plain.state_dict()
    cascade.load_state_dict({k.replace("model.roi_heads.", "model.roi_heads.stages.0."): v for k, v in state.items()})
    images = [torch.rand(3, 64, 80), torch.rand(3, 50, 64)]
    targets = []
    for image in images:
        masks = torch.zeros(1, *image.shape[1:])
        masks[:, 5:40, 8:30] = 1
        targets.append({"boxes": torch.tensor([[8.0, 5, 30, 40]]), "labels": torch.tensor([2]), "masks": masks})
    losses = []
    for model in (plain, cascade):
        torch.manual_seed(0)
        losses.append({name.removesuffix("_0"): loss for name, loss in model.train()(images, targets).items()})
    assert set(losses[0]) == set(losses[1])
    for name, loss in losses[0].items():
        torch.testing.assert_close(losses[1][name], loss, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(cascade.eval()(images), plain.eval()(images), rtol=0, atol=0)


def test_stages_share_no_weights() -> None:
    model: Detector = create_detector(
        "nat_nano", "cascade_mask_rcnn", num_classes=2, channels=32, box_features=16, mask_convs=1, mask_channels=8
    )
    names = [name for name, _ in model.named_parameters() if ".roi_heads." in name]
    by_stage = [{n.split(".stages.")[1][2:] for n in names if f".stages.{i}." in n} for i in range(3)]
    assert by_stage[0] == by_stage[1] == by_stage[2]
    assert len(names) == 3 * len(by_stage[0])
    with pytest.raises(ValueError, match="loss_weights has 3 entries for 2 stages: give one for each"):
        CascadeHeads(stages(2))
