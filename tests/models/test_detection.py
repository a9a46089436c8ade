"""Detectors: training, results in the image's pixels and our labels, anchors and regions, sizes, published counts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import nearfield
import pytest
import torch
from nearfield.models.dense import Detector, create_detector
from nearfield.models.dense.detection import HEADS
from nearfield.models.dense.geometry import Anchors, RegionPool, Resize
from nearfield.models.dense.options import options_of
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from torchvision import tv_tensors
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign, box_iou

Target = dict[str, Tensor]
SMALL = {
    "channels": 32,
    "box_features": 32,
    "mask_convs": 1,
    "mask_channels": 16,
    "mask_size": 14,
    "min_size": 64,
    "max_size": 128,
    "samples": 64,
    "proposals": 50,
}


def small(head: str, **options: Any) -> Detector:
    torch.manual_seed(0)
    convs = {"box_convs": 1} if head.startswith("cascade") else {}
    return create_detector("nat_nano", head, **{"num_classes": 3, **SMALL, **convs, **options})


def scene(height: int = 64, width: int = 96, boxes: tuple[tuple[int, ...], ...] | None = None) -> tuple[Tensor, Target]:
    """A dark image with coloured boxes, the i-th of class i."""
    boxes = ((8, 8, 32, 32), (50, 20, 80, 50)) if boxes is None else boxes
    image = 0.3 * torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        masks[i, y0:y1, x0:x1] = True
        image[:, y0:y1, x0:x1] = torch.eye(3)[i, :, None, None]
    labels = torch.arange(len(boxes))
    return image, {"boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), "labels": labels, "masks": masks}


def batch(*samples: tuple[Tensor, Target]) -> tuple[list[Tensor], list[Target]]:
    return [image for image, _ in samples], [target for _, target in samples]


def total(model: Detector, images: list[Tensor], targets: list[Target]) -> Tensor:
    """The sum of all losses, with the same samples every time."""
    torch.manual_seed(1)
    losses = model.train()(images, targets)
    assert isinstance(losses, dict)
    return torch.stack(list(losses.values())).sum()


def results(model: Detector, *images: Tensor) -> list[Target]:
    with torch.no_grad():
        found = model.eval()(list(images))
    assert isinstance(found, list)
    return found


@pytest.mark.parametrize("head", HEADS)
def test_a_step_lowers_the_loss_and_every_parameter_learns(head: str) -> None:
    model = small(head)
    images, targets = batch(scene(), scene(61, 45, ((3, 4, 40, 50),)))
    before = total(model, images, targets)
    before.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.02 / norm * p.grad
    assert total(model, images, targets) < before


@pytest.mark.parametrize("head", HEADS)
def test_images_without_objects_and_images_of_a_pixel_train(head: str) -> None:
    model = small(head)
    empty, pixel, strip = scene(40, 50, ()), scene(1, 1, ((0, 0, 1, 1),)), scene(1, 70, ((2, 0, 9, 1),))
    for samples in ((empty, empty), (empty, scene()), (pixel, strip), (scene(1, 1, ()),)):
        model.zero_grad()
        loss = total(model, *batch(*samples))
        loss.backward()
        assert loss.isfinite()
        # as DistributedDataParallel wants it, whatever a process draws
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_proposal_network_has_the_published_settings() -> None:
    # rpn_proposal and rpn of detection/configs/_base_/models/mask_rcnn_nat.py
    rpn = create_detector("nat_nano", "faster_rcnn", num_classes=3, channels=32, box_features=8).model.rpn
    counts = []
    for mode in (True, False):
        rpn.train(mode)
        counts.append((rpn.pre_nms_top_n(), rpn.post_nms_top_n()))
    assert counts == [(2000, 1000), (1000, 1000)]
    assert rpn.anchor_generator.sizes == ((16,), (32,), (64,), (128,))


def test_group_norms_are_the_published_ones_and_fit_any_number_of_channels() -> None:
    for channels, groups in ((256, 32), (64, 32), (32, 16), (48, 16), (6, 2), (5, 1)):
        head = create_detector("nat_nano", "fcos", num_classes=3, channels=channels).model.head
        norms = [module for module in head.modules() if isinstance(module, torch.nn.GroupNorm)]
        assert [(norm.num_groups, norm.num_channels) for norm in norms] == [(groups, channels)] * 8


@pytest.mark.parametrize("head", HEADS)
def test_results_are_in_the_pixels_of_each_image_with_labels_from_zero(head: str) -> None:
    model = small(head, score_threshold=0.0, detections=7)
    sizes = [(61, 90), (1, 1), (1, 150), (200, 33), (64, 64)]
    found = results(model, *(torch.rand(3, *size) for size in sizes))
    assert len(found) == len(sizes)
    labels = set()
    for (height, width), result in zip(sizes, found, strict=True):
        assert set(result) == {"boxes", "labels", "scores"} | ({"masks"} if "mask" in head else set())
        count = len(result["boxes"])
        assert 0 < count <= 7
        assert result["boxes"].shape == (count, 4)
        assert result["boxes"].min() >= 0
        assert (result["boxes"].amax(0) <= torch.tensor([width, height] * 2) + 1e-4).all()
        assert result["labels"].dtype == torch.int64
        assert (result["scores"].diff() <= 0).all()
        labels |= set(result["labels"].tolist())
        if "mask" in head:
            assert result["masks"].shape == (count, height, width)
            assert result["masks"].dtype == torch.bool
    assert labels <= {0, 1, 2}
    assert results(model) == []


@pytest.mark.parametrize("head", HEADS)
def test_the_first_class_is_zero_and_the_last_is_the_last(head: str) -> None:
    model = small(head, score_threshold=0.0, detections=5)
    for label in (0, 2):
        for name, p in model.named_parameters():
            if name.endswith(("cls_score.bias", "cls_logits.bias")) and p.numel() % 3 == 0 and "rpn" not in name:
                p.data = torch.eye(3)[label].repeat(p.numel() // 3) * 20 - 10
            elif name.endswith("cls_score.bias"):
                p.data = torch.eye(4)[label + 1] * 20
        assert set(results(model, torch.rand(3, 64, 64))[0]["labels"].tolist()) == {label}


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_two_images_are_learned(head: str) -> None:
    model = small(head)
    image, target = scene()
    flipped = copy.deepcopy(target)
    flipped["boxes"][:, [0, 2]] = 96 - target["boxes"][:, [2, 0]]
    flipped["masks"] = target["masks"].flip(2)
    images, targets = [image, image.flip(2)], [target, flipped]
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    steps = 160
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        losses = model.train()(images, targets)
        assert isinstance(losses, dict)
        torch.stack(list(losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay.step()
    for result, wanted in zip(results(model, *images), targets, strict=True):
        for label, box in enumerate(wanted["boxes"]):
            best = int(torch.where(result["labels"] == label)[0][0])
            assert box_iou(result["boxes"][best, None], box[None]) > 0.7
            assert result["scores"][best] > 0.3
            if "mask" in head:
                overlap = result["masks"][best] & wanted["masks"][label]
                assert overlap.sum() > 0.7 * (result["masks"][best] | wanted["masks"][label]).sum()


def test_images_are_scaled_in_evaluation_alone() -> None:
    model = small("faster_rcnn", min_size=80, max_size=100)
    sizes = []
    model.backbone.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape)))
    images, targets = batch(scene(50, 70, ((1, 1, 30, 30),)))
    total(model, images, targets)
    results(model, *images)
    # padded to multiples of 32; 80 x 112 would be too wide, 71.4 x 100 it is
    assert sizes == [(1, 3, 64, 96), (1, 3, 96, 128)]
    resize = Resize(80, 100, [0.0] * 3, [1.0] * 3).eval()
    for (height, width), wanted in {
        (50, 70): (71, 100),
        (40, 40): (80, 80),
        (1, 1000): (1, 100),
        (1000, 2): (100, 1),
        (80, 90): (80, 90),
    }.items():
        assert resize([torch.rand(3, height, width)])[0].image_sizes == [wanted]


def test_the_size_of_evaluation_does_not_move_boxes() -> None:
    model = small("retinanet", score_threshold=0.0, detections=3, min_size=64, max_size=128)
    image = torch.nn.functional.interpolate(torch.rand(1, 3, 8, 12), size=(64, 96), mode="bilinear")[0]
    doubled = torch.nn.functional.interpolate(image[None], size=(128, 192), mode="nearest")[0]
    one, two = results(model, image, doubled)
    # half as large again in its own pixels: the doubled image is scaled down to what the other is
    assert box_iou(one["boxes"] * 2, two["boxes"]).amax(1).min() > 0.8


def test_masks_as_probabilities() -> None:
    model = small("mask_rcnn", mask_threshold=None, score_threshold=0.0, detections=4)
    plain = results(model, scene()[0])[0]["masks"]
    assert plain.dtype == torch.float32
    assert 0 < plain.max() <= 1
    model.mask_threshold = 0.5
    assert torch.equal(results(model, scene()[0])[0]["masks"], plain >= 0.5)


def test_other_channels_bytes_and_tv_tensors() -> None:
    model = small("mask_rcnn", in_chans=1)
    assert model.model.transform.image_mean == pytest.approx([(0.485 + 0.456 + 0.406) / 3])
    image, target = scene()
    typed = {
        "boxes": tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=(64, 96)),
        "labels": target["labels"],
        "masks": tv_tensors.Mask(target["masks"]),
        "image_id": 7,
    }
    whole = (image[:1] * 255).to(torch.uint8)
    losses = total(model, [tv_tensors.Image(whole)], [typed])
    torch.testing.assert_close(losses, total(model, [whole / 255], [target]))
    assert type(losses) is Tensor


def spoil(**changes: Any) -> Callable[[Target], Any]:
    return lambda target: {k: v for k, v in {**target, **changes}.items() if v is not None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoil(masks=None), "target 0 has no masks: it needs boxes, labels, masks"),
        (spoil(labels=torch.tensor([0, 3])), "target 0 has label 3: labels are 0 to 2"),
        (spoil(labels=torch.tensor([-1, 2])), "target 0 has label -1: labels are 0 to 2"),
        (spoil(labels=torch.tensor([1])), "target 0 has 2 boxes and 1 labels"),
        (
            spoil(boxes=torch.tensor([[1.0, 1, 5, 5], [9, 9, 9, 20]])),
            "box 1 of target 0 is [9.0, 9.0, 9.0, 20.0]: xyxy boxes need x1 < x2 and y1 < y2",
        ),
        (
            spoil(masks=torch.zeros(2, 32, 32)),
            "masks of target 0 have shape (2, 32, 32), expected (2, 64, 96)",
        ),
    ],
)
def test_wrong_targets_are_one_line(change: Callable[[Target], Any], message: str) -> None:
    model = small("mask_rcnn")
    image, target = scene()
    with pytest.raises(ValueError, match=r".") as caught:
        model([image], [change(target)])
    assert str(caught.value) == message


def test_wrong_images_and_options_are_one_line() -> None:
    model = small("fcos")
    for images, targets, message in (
        ([torch.rand(3, 8, 8)], None, "0 targets for 1 images: training needs one for each"),
        ([torch.rand(1, 8, 8)], [{}], "image 0 has shape (1, 8, 8), expected (3, height, width)"),
        ([torch.rand(3, 0, 8)], [{}], "image 0 has shape (3, 0, 8), expected (3, height, width)"),
    ):
        with pytest.raises(ValueError, match=r".") as caught:
            model(images, targets)
        assert str(caught.value) == message
    for options, message in (
        ({"head": "detr"}, f"head='detr' must be one of {', '.join(HEADS)}"),
        ({"num_classes": 0}, "num_classes=0 must be at least 1 (background is not counted)"),
        ({"box_loss": "giou"}, "box_loss='giou' must be smooth_l1 or giou, the second for cascades alone"),
        ({"mask_size": 15}, "mask_size=15 must be even: the last layer doubles it"),
        (
            {"anchor_sizes": (8, 16)},
            "anchor_sizes=(8, 16) must have an entry for each of the 4 maps, of strides 2, 4, 8, 16, with one number "
            "of sizes",
        ),
        ({"image_mean": (0.5, 0.5)}, "image_mean=(0.5, 0.5) has 2 values for images of 3 channels"),
        ({"out_indices": (0, 2)}, "strides (2, 8) must double from map to map: choose out_indices without a gap"),
        (
            {"head": "cascade_rcnn", "stage_ious": (0.5, 0.6)},
            "stage_ious, stage_box_weights and stage_loss_weights have 2, 3 and 3 entries: give one for each stage",
        ),
    ):
        with pytest.raises(ValueError, match=r".") as caught:
            create_detector("nat_nano", **{"num_classes": 3, **options})
        assert str(caught.value) == message


# ---- geometry


def test_anchors_are_torchvisions_where_it_rounds_nothing() -> None:
    maps = [torch.zeros(2, 8, 12, 16), torch.zeros(2, 8, 6, 8)]
    images = ImageList(torch.zeros(2, 3, 96, 128), [(96, 128), (90, 100)])
    ours = Anchors([8, 16], [(32,), (64,)], (0.25, 1.0, 4.0))(images, maps)
    theirs = AnchorGenerator(((32,), (64,)), ((0.25, 1.0, 4.0),) * 2)(images, maps)
    torch.testing.assert_close(ours, theirs)


def test_anchors_have_their_size_and_stride_whatever_the_image() -> None:
    anchors = Anchors([4, 64], [(5, 10), (40, 80)], (0.5, 2.0))
    images = ImageList(torch.zeros(1, 3, 32, 32), [(32, 32)])
    boxes = anchors(images, [torch.zeros(1, 8, 8, 8, dtype=torch.bfloat16), torch.zeros(1, 8, 2, 1)])[0]
    assert boxes.dtype == torch.float32
    sides = (boxes[:, 2:] - boxes[:, :2]).view(-1, 4, 2)
    torch.testing.assert_close(sides.prod(2)[:64], torch.tensor([25.0, 100, 25, 100]).expand(64, 4))
    torch.testing.assert_close(sides[0, :, 1] / sides[0, :, 0], torch.tensor([0.5, 0.5, 2, 2]))
    centres = (boxes[:, 2:] + boxes[:, :2]).view(-1, 4, 2)[:, 0] / 2
    torch.testing.assert_close(centres[1], torch.tensor([4.0, 0.0]))
    torch.testing.assert_close(centres[-1], torch.tensor([0.0, 64.0]))


@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_regions_are_cut_out_without_a_shift(sampling_ratio: int) -> None:
    """Maps whose value is the x (or y) of a cell's centre, so that a pooled cell must hold its own centre."""
    maps = {}
    for i, stride in enumerate((4, 8)):
        axis = (torch.arange(256 / stride) + 0.5) * stride
        maps[str(i)] = torch.stack(torch.meshgrid(axis, axis, indexing="xy"))[None].repeat(2, 1, 1, 1)
    boxes = [torch.tensor([[40.0, 60, 82, 95], [20, 20, 196, 230]]), torch.tensor([[33.0, 17, 61, 24]])]
    pooled = RegionPool([4, 8], 7, sampling_ratio)(maps, boxes)
    assert pooled.shape == (3, 2, 7, 7)
    for region, (x0, y0, x1, y1) in zip(pooled, torch.cat(boxes), strict=True):
        steps = (torch.arange(7) + 0.5) / 7
        torch.testing.assert_close(region[0], (x0 + steps * (x1 - x0)).expand(7, 7))
        torch.testing.assert_close(region[1], (y0 + steps * (y1 - y0))[:, None].expand(7, 7))


def test_regions_come_from_the_map_that_torchvision_takes() -> None:
    maps = {str(i): torch.full((1, 1, 256 // stride, 256 // stride), float(i)) for i, stride in enumerate((2, 4, 8))}
    boxes = [torch.tensor([[10.0, 10, 10 + side, 10 + side] for side in (3, 20, 27, 29, 55, 57, 111, 113, 200)])]
    ours = RegionPool([2, 4, 8], 1, 2)(maps, boxes)
    theirs = MultiScaleRoIAlign(["0", "1", "2"], 1, 2)(maps, boxes, [(256, 256)])
    torch.testing.assert_close(ours, theirs)
    assert set(ours.flatten().tolist()) == {0.0, 1.0, 2.0}


def test_a_tiny_image_changes_nothing_for_those_after_it() -> None:
    model, fresh = small("faster_rcnn", score_threshold=0.0), small("faster_rcnn", score_threshold=0.0)
    total(model, *batch(scene(1, 1, ((0, 0, 1, 1),))))
    images, targets = batch(scene())
    torch.testing.assert_close(total(model, images, targets), total(fresh, images, targets))


@pytest.mark.parametrize("head", HEADS)
def test_autocast_keeps_boxes_in_single_precision(head: str) -> None:
    model = small(head, score_threshold=0.0, detections=5)
    images, targets = batch(scene())
    with torch.autocast("cpu", torch.bfloat16):
        loss = total(model, images, targets)
        found = results(model, *images)[0]
    loss.backward()
    torch.testing.assert_close(loss, total(model, images, targets), rtol=0.1, atol=0.05)
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32
    # bfloat16 has 8 bits: between 64 and 96 it knows whole and half pixels only
    assert ((found["boxes"] * 2).frac() != 0).any()


# ---- the whole


@pytest.mark.parametrize(
    ("backbone", "head", "millions"),
    [
        # published with 80 classes: NAT.md and DiNAT.md of SHI-Labs/Neighborhood-Attention-Transformer, README.md of
        # SwinTransformer/Swin-Transformer-Object-Detection. Mask R-CNN has two linear layers of 1024; cascades have, in
        # each of three stages, four convolutions with batch norm, a linear layer, boxes for each class, a mask head.
        ("nat_mini", "mask_rcnn", 40),
        ("nat_tiny", "mask_rcnn", 48),
        ("nat_small", "mask_rcnn", 70),
        ("swin_tiny", "mask_rcnn", 48),
        ("swin_small", "mask_rcnn", 69),
        ("nat_mini", "cascade_mask_rcnn", 77),
        ("nat_tiny", "cascade_mask_rcnn", 85),
        ("nat_small", "cascade_mask_rcnn", 108),
        ("nat_base", "cascade_mask_rcnn", 147),
        ("dinat_large", "cascade_mask_rcnn", 258),
        ("swin_tiny", "cascade_mask_rcnn", 86),
        ("swin_small", "cascade_mask_rcnn", 107),
        ("swin_base", "cascade_mask_rcnn", 145),
    ],
)
def test_parameter_counts_are_the_published_ones(backbone: str, head: str, millions: int) -> None:
    with torch.device("meta"):
        model = create_detector(backbone, head, num_classes=80)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


@pytest.mark.parametrize(
    ("backbone", "head", "giga"),
    # same files; an image of 800 x 1280, 1000 regions of which 100 have masks, as mmdetection 2 counts
    [("nat_mini", "cascade_mask_rcnn", 704), ("nat_tiny", "mask_rcnn", 258), ("swin_tiny", "mask_rcnn", 267)],
)
def test_multiplications_are_the_published_ones(backbone: str, head: str, giga: int) -> None:
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = create_detector(backbone, head, num_classes=80).eval().model
        model.rpn.head(list(model.backbone(torch.empty(1, 3, 800, 1280)).values()))
        for stage in getattr(model.roi_heads, "stages", [model.roi_heads]):
            stage.box_predictor(stage.box_head(torch.empty(1000, 256, 7, 7)))
            stage.mask_predictor(stage.mask_head(torch.empty(100, 256, 14, 14)))
    assert counter.get_total_flops() / 2e9 == pytest.approx(giga, rel=0.01)


@pytest.mark.parametrize("head", HEADS)
def test_a_saved_detector_gives_the_same_results(head: str) -> None:
    model = small(head, score_threshold=0.0, detections=5)
    total(model, *batch(scene()))
    other = small(head, score_threshold=0.0, detections=5)
    with torch.no_grad():
        for p in other.parameters():
            p.normal_()
    assert other.load_state_dict(copy.deepcopy(model.state_dict())) is not None
    image = scene()[0]
    torch.testing.assert_close(results(other, image), results(model, image), rtol=0, atol=0)
    torch.testing.assert_close(results(copy.deepcopy(model), image), results(model, image), rtol=0, atol=0)


@pytest.mark.parametrize("head", ["mask_rcnn", "cascade_rcnn", "retinanet"])
def test_layer_decay_reaches_the_backbone_and_spares_the_heads(head: str) -> None:
    model = small(head)
    names = dict(model.named_parameters())
    assert model.no_weight_decay()
    assert model.no_weight_decay() <= set(names)
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    body = "model.backbone.body."
    inner = group_parameters(model.backbone, model.backbone.group_matcher(), reverse=True)
    assert {name.removeprefix(body): group for name, group in groups.items() if name.startswith(body)} == inner
    heads = {group for name, group in groups.items() if not name.startswith(body)}
    assert heads == {max(groups.values())} == {max(inner.values())}
    decayed = param_groups_layer_decay(
        model, weight_decay=0.1, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay()
    )
    assert sum(len(group["params"]) for group in decayed) == len(names)
    by_parameter = {id(p): group for group in decayed for p in group["params"]}
    assert by_parameter[id(names[f"{body}body.model.stem.conv1.weight"])]["lr_scale"] == 0.5 ** max(groups.values())
    for name in model.no_weight_decay():
        assert by_parameter[id(names[name])]["weight_decay"] == 0
    assert by_parameter[id(names["model.backbone.fpn.inner_blocks.0.0.weight"])]["lr_scale"] == 1


def test_the_maps_of_each_head() -> None:
    for head, strides in (("mask_rcnn", [4, 8, 16, 32, 64]), ("retinanet", [8, 16, 32, 64, 128])):
        with torch.device("meta"):
            assert create_detector("nat_mini", head, num_classes=3).model.backbone.strides == strides
    assert create_detector("nat_nano", "fcos", num_classes=3, channels=32).model.backbone.strides == [2, 4, 8, 16, 32]


def test_any_backbone_will_do_and_the_package_makes_detectors() -> None:
    assert nearfield.create_detector is create_detector
    for name in ("test_convnext", "biformer_nano"):
        model = nearfield.create_detector(name, "faster_rcnn", num_classes=2, **SMALL)
        assert total(model, *batch(scene())).isfinite()
    assert isinstance(model.backbone, nearfield.models.dense.DenseBackbone)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"channels": 0}, "channels=0 must be at least 1"),
        ({"max_size": 10}, "min_size=800, max_size=10: "),
        ({"proposals": 0}, "proposals=0 must be an int of at least 1"),
        ({"samples": 0}, "samples=0 must be an int of at least 1"),
        ({"mask_size": 0}, "mask_size=0 must be an int of at least 2"),
        ({"detections": -1}, "detections=-1 must be an int of at least 1"),
        ({"detections": True}, "detections=True must be an int of at least 1"),
        ({"score_threshold": 5}, "score_threshold=5 must be a number from 0 to 1"),
        ({"score_threshold": "0.5"}, "score_threshold='0.5' must be a number from 0 to 1"),
        ({"aspect_ratios": ()}, r"aspect_ratios=\(\) must be numbers above 0, at least one"),
        ({"aspect_ratios": 2.0}, r"aspect_ratios=2.0 must be numbers above 0"),
        ({"anchor_sizes": (0, -1)}, r"anchor_sizes=\(0, -1\) must be numbers above 0"),
        ({"class_agnostic": "no"}, r"class_agnostic='no' must be True or False"),
        ({"head": "cascade_rcnn", "stage_ious": 0.5}, r"stage_ious=0.5 must be numbers above 0, one entry"),
        ({"head": "cascade_rcnn", "stage_ious": (5, 6, 7)}, r"stage_ious=\(5, 6, 7\) must be overlaps"),
        (
            {"head": "cascade_rcnn", "stage_ious": (), "stage_box_weights": (), "stage_loss_weights": ()},
            "have 0, 0 and 0 entries: give one for each stage",
        ),
    ],
)
def test_numbers_out_of_range_are_one_line(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        create_detector("nat_nano", **{"num_classes": 3, **options})


def test_options_of_other_heads_are_named(caplog: pytest.LogCaptureFixture) -> None:
    small("fcos")
    assert caplog.messages == [
        "fcos does not read box_features, mask_channels, mask_convs, mask_size, proposals, samples"
    ]
    caplog.clear()
    small("mask_rcnn")
    assert not caplog.messages


def test_defaults_are_the_heads_own() -> None:
    given = {"nms_threshold": None, "box_convs": None, "box_loss": None}
    for head, nms, convs, loss in (("mask_rcnn", 0.5, 0, "smooth_l1"), ("cascade_mask_rcnn", 0.5, 4, "giou")):
        options, rest = options_of(head, {**given, "mask_threshold": None, "dilations": 2})
        assert (options.nms_threshold, options.box_convs, options.box_loss) == (nms, convs, loss)
        assert options.mask_threshold is None
        assert rest == {"dilations": 2}
    assert options_of("fcos", {})[0].nms_threshold == 0.6
