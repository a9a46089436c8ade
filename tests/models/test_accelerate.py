"""nearfield.accelerate: timm's models keep keys and numbers, and what is not known exactly is left and named."""

from __future__ import annotations

import copy
import pickle
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nearfield
import pytest
import timm
import torch
from nearfield.models.accelerate import REPLACEMENTS, Report, davit, gcvit, halonet, maxvit, swin
from nearfield.models.accelerate.replacement import Replacement, source_digest
from nearfield.ops import local_attention
from timm.layers.halo_attn import HaloAttn
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.davit import DaVit
from timm.models.davit import WindowAttention as DaVitAttention
from timm.models.gcvit import GlobalContextVit, WindowAttentionGlobal
from timm.models.maxxvit import AttentionCl, MaxxVit, MaxxVitCfg, MaxxVitTransformerCfg
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, WindowAttention
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from torch import Tensor, nn

README = Path(__file__).resolve().parents[2] / "README.md"
SMALL: dict[str, Any] = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 5}


def small_swin(kind: Any = SwinTransformer, **options: Any) -> nn.Module:
    return kind(**{**SMALL, "img_size": 64, "patch_size": 4, "window_size": 4, **options})


def small_maxvit(block: str = "M", **transformer: Any) -> nn.Module:
    attention = MaxxVitTransformerCfg(dim_head=8, window_size=(4, 2), **transformer)
    config = MaxxVitCfg((16, 32), (1, 1), (block, block), stem_width=8, transformer_cfg=attention)
    return MaxxVit(config, img_size=64, num_classes=5)


def small_davit(**options: Any) -> nn.Module:
    return DaVit(embed_dims=(16, 32), depths=(1, 1), num_heads=(2, 4), window_size=4, num_classes=5, **options)


def small_gcvit(**options: Any) -> nn.Module:
    return GlobalContextVit(**{**SMALL, "img_size": 64, "window_ratio": (16, 16), **options})


def small_halonet(**options: Any) -> nn.Module:
    """Strides 1 and 2."""
    blocks = tuple(ByoBlockCfg("self_attn", d=1, c=c, s=s, gs=0, br=0.5) for c, s in ((32, 1), (64, 2)))
    attention = {"block_size": 4, "halo_size": 1, "num_heads": 2, **options}
    return ByobNet(
        ByoModelCfg(blocks, stem_chs=8, stem_pool="", self_attn_layer="halo", self_attn_kwargs=attention), num_classes=5
    )


Build = Callable[[], nn.Module]
BLOCK, BLOCK_V2 = "swin_transformer.SwinTransformerBlock", "swin_transformer_v2.SwinTransformerV2Block"
PARTITION = "maxxvit.PartitionAttentionCl"
# name: model, replaced modules by kind, number of modules left
CASES: dict[str, tuple[Build, dict[str, int], int]] = {
    "swin": (small_swin, {BLOCK: 4}, 0),
    "swin-rectangle": (lambda: small_swin(window_size=(4, 2), img_size=(64, 96), head_dim=6), {BLOCK: 4}, 0),
    "swin-no-bias": (lambda: small_swin(qkv_bias=False, drop_path_rate=0.5), {BLOCK: 4}, 0),
    # at one window a side, shifted all the same
    "swin-partition": (lambda: small_swin(img_size=32, window_size=8, always_partition=True), {BLOCK: 3}, 1),
    "swin-dynamic": (lambda: small_swin(strict_img_size=False), {BLOCK: 4}, 0),
    # maps of 15 and 8: padded where nothing is shifted, left where it is
    "swin-odd": (lambda: small_swin(img_size=60), {BLOCK: 3}, 1),
    "swinv2": (lambda: small_swin(SwinTransformerV2), {BLOCK_V2: 4}, 0),
    "swinv2-rectangle": (
        lambda: small_swin(SwinTransformerV2, window_size=(2, 4), img_size=(96, 64), pretrained_window_sizes=(6, 6)),
        {BLOCK_V2: 4},
        0,
    ),
    "swinv2-no-bias": (lambda: small_swin(SwinTransformerV2, qkv_bias=False, drop_path_rate=0.5), {BLOCK_V2: 4}, 0),
    "swinv2-odd": (lambda: small_swin(SwinTransformerV2, img_size=60), {BLOCK_V2: 3}, 1),
    "maxvit": (small_maxvit, {PARTITION: 4}, 0),
    "maxvit-tf": (lambda: small_maxvit(rel_pos_type="bias_tf", head_first=False, init_values=0.5), {PARTITION: 4}, 0),
    "maxvit-mlp": (lambda: small_maxvit(rel_pos_type="mlp"), {PARTITION: 4}, 0),
    "maxvit-no-table": (lambda: small_maxvit(rel_pos_type="", no_block_attn=True), {PARTITION: 2}, 0),
    "maxvit-nchw": (lambda: small_maxvit(use_nchw_attn=True), {"maxxvit.PartitionAttention2d": 4}, 0),
    "maxvit-parallel": (lambda: small_maxvit("PM"), {"maxxvit.ParallelPartitionAttention": 2}, 0),
    "maxvit-coatnet": (
        lambda: MaxxVit(
            MaxxVitCfg(
                (16, 32), (1, 1), ("M", "T"), 8, transformer_cfg=MaxxVitTransformerCfg(dim_head=8, window_size=(4, 4))
            ),
            img_size=64,
            num_classes=5,
        ),
        {PARTITION: 2},
        1,
    ),
    "davit": (lambda: small_davit(drop_path_rate=0.5), {"davit.SpatialBlock": 2}, 2),
    "davit-activations": (lambda: small_davit(cpe_act=True, channel_attn_v2=True), {"davit.SpatialBlock": 2}, 2),
    "gcvit": (small_gcvit, {"gcvit.GlobalContextVitBlock": 4}, 0),
    "gcvit-scaled": (
        lambda: small_gcvit(layer_scale=0.5, window_size=(8, 4), drop_path_rate=0.5),
        {"gcvit.GlobalContextVitBlock": 4},
        0,
    ),
    "halonet": (small_halonet, {"halo_attn.HaloAttn": 2}, 0),
    "halonet-scaled": (lambda: small_halonet(scale_pos_embed=True, dim_head=6), {"halo_attn.HaloAttn": 2}, 0),
    "halonet-pooled": (lambda: small_halonet(avg_down=True, qkv_bias=True, qk_ratio=0.5), {"halo_attn.HaloAttn": 2}, 0),
}
FAMILIES = ("swin", "swinv2", "maxvit", "davit", "gcvit", "halonet")
family = pytest.mark.parametrize("name", FAMILIES)


def filled(build: Build, seed: int = 0) -> nn.Module:
    """A model no parameter of which is at a special value; norms of residual branches start at zero otherwise."""
    torch.manual_seed(seed)
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def images(model: nn.Module, size: tuple[int, int] | None = None) -> Tensor:
    embed = getattr(model, "patch_embed", None)
    height, width = size or (embed.img_size if embed is not None else (64, 64))
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).detach().norm() / theirs.detach().norm())


def pair(name: str) -> tuple[nn.Module, nn.Module, Report]:
    """A timm model and its accelerated copy."""
    theirs = filled(CASES[name][0])
    ours = copy.deepcopy(theirs)
    return theirs, ours, nearfield.accelerate(ours)


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients, random choices from a fixed seed."""
    torch.manual_seed(2)
    x = x.clone().requires_grad_()
    out = model(x)
    loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()
    named = {name.removeprefix("_orig_mod."): p for name, p in model.named_parameters()} | {"input": x}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return out.detach(), {name: g for name, g in zip(named, found, strict=True) if g is not None}


def assert_same_step(ours: nn.Module, theirs: nn.Module, x: Tensor, tolerance: float = 1e-5) -> None:
    (out, gradients), (out_theirs, gradients_theirs) = step(ours, x), step(theirs, x)
    assert distance(out, out_theirs) < tolerance
    assert gradients.keys() == gradients_theirs.keys()
    for key, gradient in gradients.items():
        want = gradients_theirs[key]
        # some are zero but for rounding: a bias that is equal for all keys, or one before a batch norm
        size = max(float(want.norm()), 2e-2 * float(max(g.norm() for g in gradients_theirs.values())))
        assert float((gradient - want).norm()) < tolerance * size, key


# --- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_timm(name: str, training: bool) -> None:
    theirs, ours, report = pair(name)
    _, counts, left = CASES[name]
    assert (report.counts, len(report.left)) == (counts, left)
    assert_same_step(ours.train(training), theirs.train(training), images(theirs))


@pytest.mark.parametrize("name", CASES)
def test_an_error_of_one_percent_would_be_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours, _ = pair(name)
    want = ours(images(ours))
    for file in (davit, gcvit, halonet, maxvit, swin):
        monkeypatch.setattr(file, "local_attention", lambda *args, **options: 1.01 * local_attention(*args, **options))
    assert distance(ours(images(ours)), want) > 1e-4


@family
def test_timm_computes_no_attention_any_more(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours, _ = pair(name)

    def called(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("timm's attention was called")

    for kind in (WindowAttention, WindowAttentionV2, AttentionCl, DaVitAttention, WindowAttentionGlobal, HaloAttn):
        monkeypatch.setattr(kind, "forward", called)
    ours(images(ours))


@pytest.mark.parametrize(
    "build",
    [
        lambda: small_swin(attn_drop_rate=0.3),
        lambda: small_swin(SwinTransformerV2, attn_drop_rate=0.3),
        lambda: small_maxvit(attn_drop=0.3),
        lambda: small_gcvit(attn_drop_rate=0.3),
    ],
    ids=["swin", "swinv2", "maxvit", "gcvit"],
)
def test_attention_dropout_has_its_rate_in_training_only(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model = filled(build)
    nearfield.accelerate(model)
    rates = []

    def recorded(*args: Any, dropout_p: float, **options: Any) -> Tensor:
        rates.append(dropout_p)
        return local_attention(*args, dropout_p=dropout_p, **options)

    for file in (swin, maxvit, gcvit):
        monkeypatch.setattr(file, "local_attention", recorded)
    x = images(model)
    once, again = step(model.train(), x), step(model, x)
    assert set(rates) == {0.3}
    assert torch.equal(once[0], again[0])
    assert all(bool(g.isfinite().all()) for g in once[1].values())
    rates.clear()
    assert distance(once[0], model.eval()(x).detach()) > 1e-3
    assert set(rates) == {0.0}


@pytest.mark.parametrize("size", [(56, 72), (64, 64), (60, 44), (32, 48)])
def test_sizes_that_come_with_the_image(size: tuple[int, int]) -> None:
    """Multiples of the window, maps that wrap and maps smaller than the window."""
    for kind in (SwinTransformer, SwinTransformerV2):
        theirs = filled(lambda kind=kind: small_swin(kind, strict_img_size=False))
        ours = copy.deepcopy(theirs)
        assert len(nearfield.accelerate(ours).replaced) == 4
        assert_same_step(ours, theirs, images(theirs, size))
    theirs, ours, _ = pair("davit")
    assert_same_step(ours, theirs, images(theirs, size))


@pytest.mark.parametrize("size", [(96, 64), (60, 60), (32, 32)])
@pytest.mark.parametrize("name", ["swin", "swinv2", "maxvit-mlp", "maxvit-tf"])
def test_set_input_size_afterwards(name: str, size: tuple[int, int]) -> None:
    if name.startswith("maxvit") and size == (60, 60):
        pytest.skip("timm's MaxViT takes no map that is no multiple of its window")
    theirs, ours, _ = pair(name)
    for model in (theirs, ours):
        model.set_input_size(size)  # type: ignore[operator]
    assert [k for k, _ in ours.named_parameters()] == [k for k, _ in theirs.named_parameters()]
    assert_same_step(ours, theirs, images(theirs, size))


@pytest.mark.parametrize("name", CASES)
def test_float64_is_equal_to_its_rounding(name: str) -> None:
    theirs, ours, _ = pair(name)
    assert_same_step(ours.double(), theirs.double(), images(theirs).double(), 1e-12)


@family
def test_low_precision_and_autocast(name: str) -> None:
    theirs, ours, _ = pair(name)
    x = images(theirs)
    with torch.no_grad():
        want = theirs(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert distance(ours(x), want) < 3 * distance(theirs(x), want) + 1e-3
        half = theirs.bfloat16()(x.bfloat16()).float()
        assert distance(ours.bfloat16()(x.bfloat16()).float(), want) < 3 * distance(half, want) + 1e-3


def test_gradient_checkpointing() -> None:
    for name in ("swin", "maxvit", "gcvit", "davit"):
        theirs, ours, _ = pair(name)
        ours.set_grad_checkpointing(True)  # type: ignore[operator]
        assert_same_step(ours.train(), theirs.train(), images(theirs))


def test_sizes_that_timm_refuses_are_refused_by_timm() -> None:
    for name in ("maxvit", "gcvit", "halonet"):
        theirs, ours, _ = pair(name)
        x = images(theirs, (68, 68))
        with pytest.raises((AssertionError, RuntimeError)) as wanted:
            theirs(x)
        with pytest.raises((AssertionError, RuntimeError)) as found:
            ours(x)
        assert str(found.value) == str(wanted.value)


# --- one model before and after -------------------------------------------------------------------------------------


@family
def test_keys_and_order_stay_and_undo_is_exact(name: str) -> None:
    theirs, ours, report = pair(name)
    state, state_theirs = ours.state_dict(), theirs.state_dict()
    assert list(state) == list(state_theirs)
    assert all(torch.equal(state[key], state_theirs[key]) for key in state)
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
    assert [n for n, _ in ours.named_buffers()] == [n for n, _ in theirs.named_buffers()]
    # weights go both ways
    other = filled(CASES[name][0], seed=3)
    ours.load_state_dict(other.state_dict())
    x = images(theirs)
    assert distance(ours(x), other(x)) < 1e-5
    theirs.load_state_dict(state)
    report.undo()
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]
    assert torch.equal(ours(x), other(x))
    report.undo()


@family
def test_twice_is_once(name: str) -> None:
    theirs, ours, first = pair(name)
    types = [type(m) for m in ours.modules()]
    second = nearfield.accelerate(ours)
    assert (second.replaced, second.left) == (first.replaced, first.left)
    assert [type(m) for m in ours.modules()] == types
    second.undo()
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]


@family
def test_copies_and_pickles_are_accelerated_too(name: str) -> None:
    theirs, ours, report = pair(name)
    x = images(theirs)
    want = ours(x)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert [type(m) for m in twin.modules()] == [type(m) for m in ours.modules()]
        assert torch.equal(twin(x), want)
        nearfield.accelerate(twin).undo()
        assert torch.equal(twin(x), theirs(x))
    assert sum(isinstance(m, Replacement) for m in ours.modules()) == len(report.replaced)


@pytest.mark.parametrize("name", ["swin", "halonet", *(pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES[1:5])])
def test_compiles_without_a_break(name: str) -> None:
    theirs, ours, _ = pair(name)
    x = images(theirs)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_same_step(compiled, theirs, x)


def test_exports() -> None:
    theirs, ours, _ = pair("swin")
    x = images(theirs)
    with torch.no_grad():
        assert distance(torch.export.export(ours, (x,)).module()(x), theirs(x)) < 1e-5


def test_inside_other_models() -> None:
    backbone = timm.create_model(
        "swin_tiny_patch4_window7_224", features_only=True, img_size=56, embed_dim=12, depths=(1, 2), num_heads=(1, 2),
        out_indices=(0, 1),
    )  # fmt: skip
    detector = nn.ModuleDict({"backbone": backbone.eval(), "head": nn.Conv2d(24, 1, 1)})
    x = torch.randn(1, 3, 56, 56)
    want = backbone(x)
    report = nearfield.accelerate(detector)
    assert all(name.startswith("backbone.") for name in report.replaced)
    assert report.counts == {BLOCK: 3}
    assert all(distance(a, b) < 1e-5 for a, b in zip(backbone(x), want, strict=True))


def test_one_module_by_itself() -> None:
    attention = HaloAttn(16, block_size=4, halo_size=1, num_heads=2)
    x = torch.randn(1, 16, 8, 8)
    want = attention(x).detach()
    assert nearfield.accelerate(attention).replaced == {"": "halo_attn.HaloAttn"}
    assert distance(attention(x), want) < 1e-5


# --- what is left ---------------------------------------------------------------------------------------------------


class Louder(SwinTransformerBlock):
    """A subclass."""


class Adapter(nn.Module):
    """What an adapter library puts in place of a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def _hook(model: Any) -> None:
    model.layers[0].blocks[1].attn.qkv.register_forward_hook(lambda *_: None)


def _backward_hook(model: Any) -> None:
    model.layers[0].blocks[1].attn.register_full_backward_hook(lambda *_: None)


def _subclass(model: Any) -> None:
    model.layers[0].blocks[1].__class__ = Louder


def _exchange(model: Any) -> None:
    model.layers[0].blocks[1].attn.qkv = Adapter(model.layers[0].blocks[1].attn.qkv)


def _override(model: Any) -> None:
    block = model.layers[0].blocks[1]
    block.forward = lambda x, forward=block.forward: forward(x)


def _override_inside(model: Any) -> None:
    attention = model.layers[0].blocks[1].attn
    attention.forward = lambda *a, forward=attention.forward, **k: forward(*a, **k)


def _parametrize(model: Any) -> None:
    torch.nn.utils.parametrize.register_parametrization(
        model.layers[0].blocks[1].attn, "relative_position_bias_table", nn.Identity()
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_hook, "hooks inside attn would no longer be called"),
        (_backward_hook, "hooks inside attn would no longer be called"),
        (_subclass, "Louder is a subclass of timm's SwinTransformerBlock"),
        (_exchange, "attn.qkv is an Adapter, not a Linear"),
        (_override, "a method was replaced on this module or inside it"),
        (_override_inside, "a method was replaced on this module or inside it"),
        (_parametrize, "attn is a ParametrizedWindowAttention, not a WindowAttention"),
    ],
)
def test_what_is_not_known_is_left_and_named(change: Callable[[Any], None], reason: str) -> None:
    model: Any = filled(small_swin)
    x = images(model)
    want = model(x)
    change(model)
    report = nearfield.accelerate(model)
    assert report.left == {"layers.0.blocks.1": reason}
    assert len(report.replaced) == 3
    assert not isinstance(model.layers[0].blocks[1], Replacement)
    assert f"1 left as they are:\n  {reason}: layers.0.blocks.1" in str(report)
    assert distance(model(x), want) < 1e-5


def test_wrapping_windows_are_left_and_named() -> None:
    report = nearfield.accelerate(filled(CASES["swin-odd"][0]))
    assert list(report.left) == ["layers.0.blocks.1"]
    assert "timm rolls the 15x15 map before it pads it to multiples of 4x4" in str(report)


def test_a_better_size_lets_more_be_replaced() -> None:
    theirs, ours, first = pair("swin-odd")
    for model in (theirs, ours):
        model.set_input_size((64, 64))  # type: ignore[operator]
    second = nearfield.accelerate(ours)
    assert (len(first.replaced), len(second.replaced), second.left) == (3, 4, {})
    assert_same_step(ours, theirs, images(theirs))
    second.undo()
    assert not any(isinstance(m, Replacement) for m in ours.modules())


def test_hooks_that_come_later_are_called() -> None:
    modules = {"swin": "layers.0.blocks.1.attn", "swinv2": "layers.0.blocks.1.attn.softmax", "halonet": "pos_embed"}
    modules |= {"maxvit": "attn_grid.attn", "gcvit": "blocks.1.attn.qkv", "davit": "blocks.0.0.attn"}
    for name, ending in modules.items():
        theirs, ours, _ = pair(name)
        watched = next(m for n, m in ours.named_modules() if n.endswith(ending))
        shapes: list[torch.Size] = []
        handle = watched.register_forward_hook(lambda _, __, out, seen=shapes: seen.append(out.shape))
        x = images(theirs)
        assert distance(ours(x), theirs(x)) < 1e-5
        assert len(shapes) == 1, name
        handle.remove()
        ours(x)
        assert len(shapes) == 1, name


def test_hooks_of_all_modules_are_called() -> None:
    theirs, ours, _ = pair("swin")
    x = images(theirs)
    seen: list[str] = []

    def hook(module: nn.Module, *_: Any) -> None:
        seen.append(type(module).__name__)

    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    try:
        ours(x)
    finally:
        handle.remove()
    attended = sum(isinstance(module, WindowAttention) for module in ours.modules())
    assert seen.count("WindowAttention") == attended > 0
    seen.clear()
    assert distance(ours(x), theirs(x)) < 1e-5
    assert not seen


def test_attention_outside_timms_blocks_is_left() -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = WindowAttention(16, 2, window_size=4)
            self.block = SwinTransformerBlock(16, (8, 8), 2, window_size=4)

    report = nearfield.accelerate(Mine())
    assert report.replaced == {"block": BLOCK}
    assert list(report.left) == ["attn"]
    assert "a mask" in report.left["attn"]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Linear(2, 2), "nothing to accelerate in Linear: give a timm Swin, SwinV2, MaxViT, DaViT, GCViT"),
        (lambda: timm.create_model("test_coatnet"), "because it attends the whole map"),
        (lambda: nearfield.create_model("swin_nano"), "nothing to accelerate in Swin: give a timm"),
        (
            lambda: timm.create_model("swinv2_cr_tiny_224", embed_dim=8, depths=(1,), num_heads=(1,)),
            "1 module must stay, stages.0.blocks.0 because in training timm drops its position bias pair by pair",
        ),
    ],
)
def test_nothing_to_replace_is_one_line(build: Build, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        nearfield.accelerate(build())
    assert "\n" not in str(error.value)


def test_a_refused_model_is_untouched() -> None:
    model = filled(small_swin)
    for module in model.modules():
        if isinstance(module, WindowAttention):
            module.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=re.escape("4 modules must stay, layers.0.blocks.0 because hooks")):
        nearfield.accelerate(model)
    assert not any(isinstance(m, Replacement) for m in model.modules())


@pytest.mark.parametrize("kind", REPLACEMENTS, ids=lambda kind: kind.__name__)
def test_the_code_of_the_installed_timm_is_the_known_one(kind: type[Replacement]) -> None:
    assert source_digest(kind.code) == kind.digest


def test_another_timm_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swin.NearfieldSwinBlock, "digest", "0" * 16)
    with pytest.raises(ValueError, match=re.escape("its code is not that of timm 1.0.31, which is known")):
        nearfield.accelerate(filled(small_swin))


def test_a_patched_class_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = WindowAttention.forward
    monkeypatch.setattr(WindowAttention, "forward", lambda self, x, mask=None: forward(self, x, mask))
    with pytest.raises(ValueError, match="its code is not that of timm"):
        nearfield.accelerate(filled(small_swin))


@pytest.mark.slow
def test_every_model_of_these_files_in_timm() -> None:
    """On the meta device: all of its local attention is replaced."""
    expected = {"davit": "channels attend each other"}
    names = [
        n for m in ("swin_transformer", "swin_transformer_v2", "davit", "gcvit") for n in timm.list_models(module=m)
    ]
    names += [n for n in timm.list_models(module="maxxvit") if "coat" not in n]
    halo = [n for n in timm.list_models() if "halo" in n]  # ours are registered with timm too
    names += [n for n in halo if timm.model_entrypoint(n).__module__.startswith("timm.")]
    assert len(names) > 70
    for name in names:
        with torch.device("meta"):
            report = nearfield.accelerate(timm.create_model(name))
        reasons = Counter(reason.split(":")[0] for reason in report.left.values())
        assert set(reasons) <= {expected.get(name.split("_")[0])}, name


def test_report_prints_what_was_done() -> None:
    report = nearfield.accelerate(filled(small_davit))
    assert str(report) == repr(report)
    assert str(report).splitlines() == [
        "nearfield runs the attention of 2 modules:",
        "  2 x davit.SpatialBlock",
        "2 left as they are:",
        "  channels attend each other: this is no local attention: stages.0.blocks.0.1.attn, stages.1.blocks.0.1.attn",
    ]


def test_readme_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    section = README.read_text(encoding="utf-8").split("## Models of timm")[1]
    code = section.split("```python\n")[1].split("```")[0]
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create(name))
    exec(compile(code, "README.md", "exec"), {})
    assert "12 x swin_transformer.SwinTransformerBlock" in capsys.readouterr().out
