"""timm's model contract, for every registered model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import nearfield
import pytest
import timm
import torch
from model_helpers import randomise
from nearfield.models import Backbone
from timm.models._manipulate import group_parameters
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

MODELS = nearfield.list_models()
# what says where, or how sharply: free of weight decay. Parameters of each attention by the beginning of a model's name
TABLE = {"rel_pos_bias"}
TWO_TABLES = {"rel_pos_bias_y", "rel_pos_bias_x"}
POSITIONS = {
    **dict.fromkeys(("nat", "dinat", "swin", "hwt", "hnt", "maxvit"), TABLE),
    **dict.fromkeys(("halo", "sehalonet", "eca"), TWO_TABLES),
    "swinv2": {"logit_scale", "cpb_mlp.0.weight", "cpb_mlp.0.bias", "cpb_mlp.2.weight"},
    "maxvit_rmlp": {f"rel_pos_mlp.fc{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")},
    "biformer": set(),
}
NANO = [name for name in MODELS if name.endswith("_nano")]
every_model = pytest.mark.parametrize("name", MODELS)

Small = Callable[..., Backbone]


def image(height: int, width: int, channels: int = 3, batch: int = 1) -> Tensor:
    return torch.randn(batch, channels, height, width)


def halved(size: int, reduction: int) -> int:
    return -(-size // reduction)


def assert_maps(model: Backbone, maps: list[Tensor], indices: list[int], height: int, width: int) -> None:
    assert len(maps) == len(indices)
    for i, y in zip(indices, maps, strict=True):
        info = model.feature_info[i]
        reduction = info["reduction"]
        assert y.shape[1:] == (info["num_chs"], halved(height, reduction), halved(width, reduction))


def test_runs_at_its_own_size_and_at_odd_and_oblong_ones(member: str, small: Small) -> None:
    model = small(member)
    sizes = [model.img_size, (33, 47), (32, 32), (61, 97)]
    with torch.inference_mode():
        for height, width in sizes:
            maps = model.forward_intermediates(image(height, width), intermediates_only=True)
            assert_maps(model, maps, list(range(len(maps))), height, width)
            assert all(y.isfinite().all() for y in maps)
        assert model(image(33, 47, batch=2)).shape == (2, 7)


def test_backward_reaches_every_parameter(member: str, small: Small) -> None:
    # some families begin with residual branches of zero
    model = randomise(small(member))
    model(image(*model.img_size)).square().sum().backward()
    for key, p in model.named_parameters():
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key
        # a constant added to all scores changes nothing
        assert p.grad.abs().sum() > 0 or key.endswith("rel_pos_mlp.fc2.bias"), key


def test_evaluation_is_deterministic(member: str, small: Small) -> None:
    model, x = small(member, drop_path_rate=0.5, drop_rate=0.5, proj_drop_rate=0.5, attn_drop_rate=0.5), image(40, 52)
    with torch.inference_mode():
        assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("name", NANO)
def test_dynamically_quantised_layers_run(name: str) -> None:
    model = nearfield.create_model(name).eval()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    with torch.no_grad():
        assert quantised(image(32, 48)).isfinite().all()


@every_model
def test_constructs_on_meta_without_touching_memory(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert all(p.is_meta for p in model.parameters())
    assert all(b.is_meta for b in model.buffers())


def test_weights_made_on_meta_are_initialised_like_others(small: Small) -> None:
    with torch.device("meta"):
        model = small("nat_small")
    model.to_empty(device="cpu")
    for p in model.parameters():
        nn.init.constant_(p, float("nan"))
    model.init_weights()
    torch.manual_seed(0)
    for key, p in small("nat_small").named_parameters():
        q = dict(model.named_parameters())[key]
        assert q.isfinite().all(), key
        assert abs(q.std(correction=0) - p.std(correction=0)) <= 0.5 * p.std(correction=0), key
    assert model.stages[0].blocks[0].ls1.gamma.unique().tolist() == pytest.approx([1e-5])


def test_state_dict_round_trip_is_strict_and_exact(member: str, small: Small) -> None:
    model, other, x = randomise(small(member)), small(member), image(40, 52)
    other.load_state_dict(model.state_dict())
    with torch.inference_mode():
        assert torch.equal(model(x), other(x))


def test_copies_and_pickles(member: str, small: Small) -> None:
    model, x = randomise(small(member)), image(40, 40)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.inference_mode():
            assert torch.equal(model(x), other(x))
        # the loading hook belongs to the copy now
        other.load_state_dict(model.state_dict())


def test_features_only_at_every_stage(member: str, small: Small, small_kwargs: Callable[[str], dict[str, Any]]) -> None:
    whole, x = randomise(small(member)), image(47, 61)
    stages = len(whole.stages)

    def features(**indices: Any) -> nn.Module:
        model = timm.create_model(member, features_only=True, **indices, **small_kwargs(member)).eval()
        model.load_state_dict(whole.state_dict())
        return model

    # made outside inference mode: PyTorch may take another product for weights born there, and round differently
    single = [features(out_indices=[i]) for i in range(stages)]
    several = ((features(), range(stages)), (features(out_indices=(-2, -1)), (stages - 2, stages - 1)))
    with torch.inference_mode():
        expected = whole.forward_intermediates(x, intermediates_only=True)
        for i, model in enumerate(single):
            (y,) = model(x)
            assert torch.equal(y, expected[i])
            assert model.feature_info.channels() == [y.shape[1]]
            assert model.feature_info.reduction() == [whole.feature_info[i]["reduction"]]
        for model, indices in several:
            assert all(torch.equal(y, expected[i]) for i, y in zip(indices, model(x), strict=True))


def test_intermediates_agree_with_the_forward_pass(member: str, small: Small) -> None:
    model, x = randomise(small(member)), image(47, 61)
    last = len(model.stages) - 1
    with torch.inference_mode():
        features = model.forward_features(x)
        final, maps = model.forward_intermediates(x)
        assert torch.equal(final, features)
        assert len(maps) == last + 1
        nhwc = model.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
        assert all(torch.equal(a, b.permute(0, 3, 1, 2)) for a, b in zip(maps, nhwc, strict=True))
        (normed,) = model.forward_intermediates(x, [last], norm=True, output_fmt="NHWC", intermediates_only=True)
        assert torch.equal(normed, features)
        early, (first,) = model.forward_intermediates(x, [0], stop_early=True)
        assert torch.equal(first, maps[0])
        assert torch.equal(early.permute(0, 3, 1, 2), maps[0])
        assert len(model.forward_intermediates(x, 2, intermediates_only=True)) == 2
        assert torch.equal(model(x), model.forward_head(features))
        assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)
        assert features.shape[-1] == model.num_features


def test_pruning_keeps_what_the_stages_need(small: Small) -> None:
    model, x = randomise(small("swin_tiny")), image(64, 64)
    with torch.inference_mode():
        expected = model.forward_intermediates(x, [0, 1], intermediates_only=True)
        assert model.prune_intermediate_layers([0, -3]) == [0, 1]
        maps = model.forward_intermediates(x, [0, 1], intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))
    assert len(model.stages) == 2
    assert isinstance(model.norm, nn.Identity)
    assert model.num_features == model.feature_info[1]["num_chs"] == 32
    assert model.num_classes == 0


def test_classifier_is_replaced(member: str, small: Small) -> None:
    model, x = small(member), image(40, 40)
    assert model.get_classifier() is model.head.fc
    assert model.get_classifier().out_features == model.num_classes == 7
    model.reset_classifier(3)
    assert model(x).shape == (1, 3)
    model.reset_classifier(0)
    assert model(x).shape == (1, model.num_features)
    model.reset_classifier(0, "")
    assert model(x).shape[-1] == model.num_features
    assert model(x).ndim == 4
    # a hidden layer in the head fixes the width after pooling
    pool, width = ("avgmax", 1) if hasattr(model.head, "pre_logits") else ("catavgmax", 2)
    model.reset_classifier(5, pool)
    assert model(x).shape == (1, 5)
    assert model.head_hidden_size == width * model.num_features


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_takes_other_numbers_of_channels(member: str, channels: int, small: Small) -> None:
    model = small(member, in_chans=channels)
    assert model(image(32, 32, channels)).shape == (1, 7)
    first = model.get_submodule(model.first_conv)
    assert isinstance(first, nn.Conv2d)
    assert first.in_channels == channels


def test_checkpointing_changes_neither_output_nor_gradients(member: str, small: Small) -> None:
    first, x = randomise(small(member)).train(), image(40, 52)
    results = []
    for enable in (False, True):
        model = copy.deepcopy(first)
        model.set_grad_checkpointing(enable)
        torch.manual_seed(0)
        y = model(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in model.parameters()), *model.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_only_positions_and_scales_are_named_as_free_of_decay(member: str, small: Small) -> None:
    model = small(member)
    wanted = POSITIONS[max((start for start in POSITIONS if member.startswith(start)), key=len)]
    attentions = [name for name, _ in model.named_modules() if name.endswith(".attn")]
    assert attentions
    assert set(model.no_weight_decay()) == {f"{name}.{leaf}" for name in attentions for leaf in wanted}


def test_layer_groups_are_one_for_each_block(member: str, small: Small) -> None:
    model = small(member)
    depths = [len(stage.blocks) for stage in model.stages]
    fine = group_parameters(model, model.group_matcher(), reverse=True)
    assert fine.keys() == dict(model.named_parameters()).keys()
    # stem, blocks, head
    assert sorted(set(fine.values())) == list(range(sum(depths) + 2))
    assert {group for key, group in fine.items() if key.startswith("stem.")} == {0}
    assert {group for key, group in fine.items() if key.startswith("head.")} == {sum(depths) + 1}
    assert {group for key, group in fine.items() if key.startswith("norm.")} <= {sum(depths)}
    assert (
        len({group for key, group in fine.items() if key.startswith(("stages.1.downsample", "stages.1.blocks.0"))}) == 1
    )
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    for i in range(len(depths)):
        assert {group for key, group in coarse.items() if key.startswith(f"stages.{i}.")} == {i + 1}


@every_model
def test_pretrained_cfg_is_complete(name: str) -> None:
    with torch.device("meta"):
        model = nearfield.create_model(name)
    cfg = model.pretrained_cfg
    assert model.default_cfg is cfg
    assert cfg["architecture"] == name
    assert cfg["input_size"] == (3, *model.img_size)
    assert cfg["first_conv"] == model.first_conv
    assert cfg["classifier"] == "head.fc"
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    assert {"mean", "std", "crop_pct", "interpolation", "num_classes"} <= cfg.keys()
    if nearfield.checkpoints.entries(name):
        assert cfg["license"]
        assert cfg.get("url") or cfg.get("hf_hub_id")
    else:
        assert not cfg.get("url")


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((3, 40, 40), ("(3, 40, 40)", "batch")),
        ((1, 4, 40, 40), ("(1, 4, 40, 40)", "in_chans")),
        ((1, 3, 31, 40), ("31x40", "32x32")),
        ((1, 3, 40, 1), ("40x1", "32x32")),
    ],
)
def test_wrong_input_is_one_clear_error(
    member: str, shape: tuple[int, ...], words: tuple[str, ...], small: Small
) -> None:
    model = small(member)
    for call in (model, model.forward_intermediates):
        with pytest.raises(ValueError, match=words[1]) as error:
            call(torch.zeros(shape))
        assert all(word in str(error.value) for word in words)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("indices", [0, 5, [], [4], [-5, 0]])
def test_stages_that_do_not_exist_are_an_error(indices: int | list[int], small: Small) -> None:
    with pytest.raises(ValueError, match="indices="):
        small("nat_mini").forward_intermediates(image(32, 32), indices)


def test_unknown_output_format_is_an_error(small: Small) -> None:
    with pytest.raises(ValueError, match="output_fmt"):
        small("nat_mini").forward_intermediates(image(32, 32), output_fmt="NLC")


@pytest.mark.parametrize("name", NANO)
def test_small_image_models_are_small(name: str) -> None:
    model = nearfield.create_model(name, num_classes=10)
    assert model.img_size == (32, 32)
    assert 150_000 <= sum(p.numel() for p in model.parameters()) <= 250_000
    assert [info["reduction"] for info in model.feature_info] == [2, 4, 8]


@pytest.mark.parametrize("name", NANO)
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_as_one_graph(name: str, backend: str) -> None:
    model, x = randomise(nearfield.create_model(name, num_classes=10)), image(36, 44)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    y = model(x)
    # before the second pass moves the statistics of batch norms in place
    expected = torch.autograd.grad(y.square().sum(), list(model.parameters()))
    z = compiled(x)
    got = torch.autograd.grad(z.square().sum(), list(model.parameters()))
    torch.testing.assert_close(z, y, rtol=1e-4, atol=1e-5)
    # batch norms of few values lose digits; the gradient of what a norm takes away is a difference of large sums
    largest = max(float(b.norm()) for b in expected)
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm() + 1e-5 * largest


@pytest.mark.parametrize("name", NANO)
def test_images_enter_in_the_layout_of_the_maps(name: str) -> None:
    """Also where an image is one of a vectorized batch."""
    model, x = randomise(nearfield.create_model(name, num_classes=10)).eval(), image(36, 44)
    strides: list[tuple[int, ...]] = []
    hook = model.stem.register_forward_pre_hook(lambda _, args: strides.append(args[0].stride()))
    with torch.inference_mode():
        y = model(x)
        assert strides == [x.to(memory_format=torch.channels_last).stride()]
        hook.remove()
        torch.testing.assert_close(torch.func.vmap(model)(x[:, None])[:, 0], y, rtol=1e-4, atol=1e-5)


def test_exports(small: Small) -> None:
    model, x = small("dinat_mini"), image(40, 52)
    with torch.inference_mode():
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", NANO)
def test_traces_for_any_batch_of_one_size(name: str) -> None:
    model = randomise(nearfield.create_model(name, num_classes=10)).eval()
    with torch.inference_mode():
        traced = torch.jit.trace(model, image(40, 52), check_trace=False)
        for batch in (1, 3):
            x = image(40, 52, batch=batch)
            torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NANO)
def test_trains_under_autocast(name: str) -> None:
    model = nearfield.create_model(name, num_classes=10)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(image(32, 32, batch=2)).float().square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_runs_in_other_precisions(member: str, dtype: torch.dtype, small: Small) -> None:
    model, x = small(member), image(36, 36)
    with torch.inference_mode():
        expected = model(x)
        y = model.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=0.1, atol=0.02)


@pytest.mark.parametrize("name", NANO)
def test_timms_optimizers_take_its_groups(name: str) -> None:
    model = timm.create_model(name)
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(groups) == len(list(model.parameters()))
    for key, p in model.named_parameters():
        decayed = p.ndim > 1 and key not in model.no_weight_decay()
        assert groups[id(p)]["weight_decay"] == (0.1 if decayed else 0.0), key
    firsts = [next(module.parameters()) for module in (model.head.fc, model.norm, model.stem)]
    scales = [groups[id(p)]["lr_scale"] for p in firsts]
    blocks = sum(len(stage.blocks) for stage in model.stages)
    assert scales == [1.0, 0.5, 0.5 ** (blocks + 1)]
