"""The loop: accumulation, clipping, averaging, schedules, groups, losses that are not finite, state."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import nearfield
import pytest
import torch
from nearfield.engine import data, door, fit, hardware, loop
from nearfield.engine.config import AugConfig, ModelConfig, TaskConfig, TrainConfig, TrainerConfig
from nearfield.engine.errors import ConfigError, DivergedError, Interrupted
from nearfield.engine.metrics import ClassificationMetrics
from nearfield.engine.optim import create_optimizer, create_scheduler
from nearfield.engine.state import TrainState, seed_everything
from nearfield.engine.tasks.classification import Classification
from torch import nn

CPU = torch.device("cpu")
Batches = list[tuple[torch.Tensor, torch.Tensor]]


def tiny_model(classes: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, classes))


def tiny_batches(sizes: list[int], classes: int = 5) -> Batches:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 3, 2, 2, generator=generator), torch.randint(classes, (size,), generator=generator))
        for size in sizes
    ]


def plain_task(**config: object) -> Classification:
    return Classification(TaskConfig(**config), AugConfig(no_aug=True), 5)  # type: ignore[arg-type]


def sgd_state(model: nn.Module, lr: float = 0.1) -> TrainState:
    return TrainState(model, torch.optim.SGD(model.parameters(), lr=lr))


@pytest.mark.parametrize("sizes", [[4, 4], [4, 4, 4], [4, 2]], ids=["whole", "ragged group", "ragged batch"])
def test_accumulated_halves_give_the_gradients_of_the_whole_batch(sizes: list[int]) -> None:
    batches = tiny_batches(sizes)
    halves = sgd_state(tiny_model())
    whole = sgd_state(tiny_model())
    loop.train_epoch(halves, plain_task(), batches, TrainerConfig(accumulate=2), batch_size=4)
    groups = [batches[i : i + 2] for i in range(0, len(batches), 2)]
    joined = [(torch.cat([x for x, _ in group]), torch.cat([y for _, y in group])) for group in groups]
    for inputs, targets in joined:
        loop.train_epoch(whole, plain_task(), [(inputs, targets)], TrainerConfig(), batch_size=len(inputs))
    assert halves.step == len(groups)
    for mine, theirs in zip(halves.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


class Short(list):  # type: ignore[type-arg]
    """Batches that promise one more than there are."""

    def __len__(self) -> int:
        return super().__len__() + 1


def test_a_loader_that_ends_early_still_gives_its_last_update_and_leaves_no_gradients() -> None:
    short, exact = sgd_state(tiny_model()), sgd_state(tiny_model())
    batches = tiny_batches([4, 4, 4])
    for state, given in ((short, Short(batches)), (exact, batches)):
        loop.train_epoch(state, plain_task(), given, TrainerConfig(accumulate=2), batch_size=4)
    assert (short.step, short.epoch) == (2, 1)
    for mine, theirs in zip(short.model.parameters(), exact.model.parameters(), strict=True):
        assert mine.grad is None
        torch.testing.assert_close(mine, theirs)


def test_a_pass_starts_without_gradients() -> None:
    fresh, stale = sgd_state(tiny_model()), sgd_state(tiny_model())
    for parameter in stale.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for state in (fresh, stale):
        loop.train_epoch(state, plain_task(), tiny_batches([4]), TrainerConfig(), batch_size=4)
    for mine, theirs in zip(stale.model.parameters(), fresh.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(("at", "complete"), [(1, False), (2, True)])
def test_a_stop_at_the_last_batch_completes_the_pass(at: int, complete: bool) -> None:
    state, stop = sgd_state(tiny_model()), loop.StopSignal()

    def on_step(done: int, *_: object) -> None:
        stop.asked = "SIGTERM" if done == at else stop.asked

    result = loop.train_epoch(
        state, plain_task(), tiny_batches([4, 4]), TrainerConfig(), batch_size=4, stop=stop, on_step=on_step
    )
    assert (result.complete, state.epoch, state.step) == (complete, int(complete), at)


FDR = ["debug=fdr", "hardware=cpu", "trainer.plots=false"]


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_stop_at_the_end_of_an_epoch_keeps_the_epoch(
    epochs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_epoch = loop.train_epoch

    def stopped(*args: Any, **kwargs: Any) -> loop.EpochResult:
        result = train_epoch(*args, **kwargs)
        kwargs["stop"].asked = "SIGTERM"
        return result

    monkeypatch.setattr(loop, "train_epoch", stopped)
    config = door.compose("train", TrainConfig, [*FDR, f"trainer.epochs={epochs}", f"paths.runs={tmp_path}"])
    if epochs == 1:
        assert fit.train(config)["epochs"] == 1
    else:
        with pytest.raises(Interrupted, match="after 1 of 2 epochs"):
            fit.train(config)
    assert len(next(tmp_path.glob("*/*/metrics.csv")).read_text().splitlines()) == 2


def test_weights_carry_the_metrics_of_their_own_epoch_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []

    def record(_: object, name: str, __: object, about: dict[str, object]) -> None:
        saved.append((name, about["epoch"], "top1" in about))

    monkeypatch.setattr(fit.runs.RunFolder, "write_weights", record)
    overrides = [*FDR, "trainer.epochs=4", "trainer.eval_every=2", f"paths.runs={tmp_path}"]
    summary = fit.train(door.compose("train", TrainConfig, overrides))
    assert [s for s in saved if s[0] == "last"] == [("last", e, e % 2 == 0) for e in (1, 2, 3, 4)]
    assert "top1" in summary


def test_the_loss_of_an_epoch_is_the_mean_over_its_images() -> None:
    batches = tiny_batches([4, 4, 2])
    state = sgd_state(tiny_model(), lr=0.0)
    task = plain_task(smoothing=0.0)
    result = loop.train_epoch(state, task, batches, TrainerConfig(accumulate=2), batch_size=4)
    inputs, targets = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    with torch.no_grad():
        expected = float(nn.functional.cross_entropy(state.model(inputs), targets))
    assert result.loss == pytest.approx(expected, rel=1e-5)
    assert result.images == 10


@pytest.mark.parametrize("mode", ["norm", "value", "agc"])
def test_gradients_are_clipped(mode: str) -> None:
    batches = tiny_batches([8])
    free, held = sgd_state(tiny_model(), lr=1.0), sgd_state(tiny_model(), lr=1.0)
    before = [p.clone() for p in held.model.parameters()]
    loop.train_epoch(free, plain_task(), batches, TrainerConfig(), batch_size=8)
    loop.train_epoch(held, plain_task(), batches, TrainerConfig(clip_grad=1e-3, clip_mode=mode), batch_size=8)
    moved = torch.cat([(p - q).detach().flatten() for p, q in zip(held.model.parameters(), before, strict=True)])
    moved_free = torch.cat([(p - q).detach().flatten() for p, q in zip(free.model.parameters(), before, strict=True)])
    assert 0 < moved.norm() < moved_free.norm()
    if mode == "norm":
        assert float(moved.norm()) == pytest.approx(1e-3, rel=1e-3)


def test_the_schedule_moves_at_every_update_and_ends_at_min_lr() -> None:
    config = TrainConfig()
    config.trainer.epochs, config.sched.warmup_epochs, config.sched.warmup_lr, config.sched.min_lr = 4, 1, 1e-4, 1e-5
    config.sched.cooldown_epochs = 1
    model = tiny_model()
    optimizer = create_optimizer(config.optim, model, global_batch=4)
    scheduler, epochs = create_scheduler(
        config.sched, config.optim, config.trainer, optimizer, updates_per_epoch=3, global_batch=4
    )
    assert epochs == 5
    state = TrainState(model, optimizer, scheduler)
    rates = [state.lr]
    for _ in range(epochs):
        loop.train_epoch(
            state,
            plain_task(),
            tiny_batches([4] * 3),
            config.trainer,
            batch_size=4,
            on_step=lambda *_: rates.append(state.lr),
        )
    assert rates[0] == pytest.approx(1e-4)
    assert rates[3] == pytest.approx(max(rates)) or rates[4] == pytest.approx(max(rates), rel=0.2)
    assert len(set(rates[:13])) == 13
    assert rates[12:] == pytest.approx([1e-5] * 4)


def test_the_warm_up_is_part_of_the_epochs_with_and_without_prefix() -> None:
    for prefix in (False, True):
        config = TrainConfig()
        config.trainer.epochs, config.sched.warmup_epochs, config.sched.warmup_prefix = 10, 2, prefix
        config.sched.min_lr = 1e-6
        optimizer = create_optimizer(config.optim, tiny_model(), global_batch=1)
        scheduler, epochs = create_scheduler(
            config.sched, config.optim, config.trainer, optimizer, updates_per_epoch=7, global_batch=1
        )
        scheduler.step_update(70)
        assert epochs == 10
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-6)
        scheduler.step_update(14)
        peak = 1.0 if prefix else 0.5 * (1 + math.cos(math.pi * 0.2))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * peak, rel=1e-2)


@pytest.mark.parametrize("name", ["cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "none"])
def test_every_schedule_that_is_allowed_can_be_made(name: str) -> None:
    config = TrainConfig()
    config.sched.name, config.sched.warmup_epochs = name, 2
    optimizer = create_optimizer(config.optim, tiny_model(), global_batch=1)
    scheduler, epochs = create_scheduler(
        config.sched, config.optim, config.trainer, optimizer, updates_per_epoch=5, global_batch=1
    )
    assert epochs == 30
    assert (scheduler is None) == (name == "none")
    if scheduler is not None:
        scheduler.step_update(30)
        assert 0 <= optimizer.param_groups[0]["lr"] <= config.optim.lr


def groups_of(model: nn.Module, **changes: object) -> dict[str, dict[str, object]]:
    """The parameter group of every parameter, by name."""
    config = TrainConfig().optim
    for key, value in changes.items():
        setattr(config, key, value)
    optimizer = create_optimizer(config, model, global_batch=1)
    by_id = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    return {name: by_id[id(p)] for name, p in model.named_parameters()}


def test_biases_norms_and_tables_are_not_decayed_unless_the_recipe_says_so() -> None:
    model = nearfield.create_model("nat_nano", num_classes=4)
    tables = [name for name, p in model.named_parameters() if name.endswith("rel_pos_bias")]
    assert tables
    groups, decayed = groups_of(model), groups_of(model, decay_bias_tables=True)
    for name, parameter in model.named_parameters():
        table = name in tables
        assert (groups[name]["weight_decay"] == 0) == (parameter.ndim == 1 or table), name
        assert (decayed[name]["weight_decay"] == 0) == (parameter.ndim == 1), name


@pytest.mark.parametrize("tables", [False, True])
def test_layer_decay_lowers_the_rate_towards_the_input(tables: bool) -> None:
    model = nearfield.create_model("nat_nano", num_classes=4)
    groups = groups_of(model, layer_decay=0.5, decay_bias_tables=tables)
    scale = {name: group["lr_scale"] for name, group in groups.items()}
    assert scale["head.fc.weight"] == 1.0
    assert scale["stem.conv1.weight"] == min(scale.values())  # type: ignore[type-var]
    assert scale["stages.0.blocks.0.attn.qkv.weight"] < scale["stages.2.blocks.0.attn.qkv.weight"]  # type: ignore[operator]
    table = next(name for name in groups if name.endswith("rel_pos_bias"))
    assert (groups[table]["weight_decay"] > 0) == tables  # type: ignore[operator]


def test_rates_scale_with_the_batch_when_the_recipe_names_one() -> None:
    model = tiny_model()
    config = TrainConfig()
    config.optim.lr, config.optim.lr_base_size = 1e-3, 1024
    assert create_optimizer(config.optim, model, global_batch=256).param_groups[0]["lr"] == pytest.approx(2.5e-4)


def test_the_moving_average_follows_the_weights() -> None:
    from timm.utils import ModelEmaV3

    model = tiny_model()
    state = sgd_state(model, lr=0.5)
    state.ema = ModelEmaV3(model, decay=0.9)
    batches = tiny_batches([4] * 3)
    expected = None
    for batch in batches:
        loop.train_epoch(state, plain_task(), [batch], TrainerConfig(), batch_size=4)
        now = model[1].weight.detach().clone()  # type: ignore[index, union-attr, operator]
        # timm's first update copies
        expected = now if expected is None else 0.9 * expected + 0.1 * now
    torch.testing.assert_close(state.ema.module[1].weight, expected)
    assert state.weights is state.ema.module


def poisoned(batches: Batches, at: set[int]) -> Batches:
    return [(x * float("nan") if i in at else x, y) for i, (x, y) in enumerate(batches)]


def test_an_update_without_a_finite_loss_is_skipped_and_counted() -> None:
    clean, dirty = sgd_state(tiny_model()), sgd_state(tiny_model())
    batches = tiny_batches([4] * 4)
    loop.train_epoch(clean, plain_task(), batches[:1] + batches[2:], TrainerConfig(), batch_size=4)
    result = loop.train_epoch(dirty, plain_task(), poisoned(batches, {1}), TrainerConfig(), batch_size=4)
    assert (dirty.skipped, dirty.skipped_in_a_row, dirty.step) == (1, 0, 4)
    assert math.isfinite(result.loss)
    for mine, theirs in zip(dirty.model.parameters(), clean.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_training_that_diverges_is_given_up_with_a_diagnosis() -> None:
    state = sgd_state(tiny_model())
    batches = poisoned(tiny_batches([4] * 8), {2, 3, 4, 5, 6, 7})
    with pytest.raises(DivergedError, match=r"update 5 of epoch 1: 3 updates in a row .* lower optim\.lr") as caught:
        loop.train_epoch(state, plain_task(), batches, TrainerConfig(max_nonfinite=3), batch_size=4)
    assert "\n" not in str(caught.value)
    assert "the data holds NaN" in str(caught.value)


def test_broken_weights_are_named_in_the_diagnosis() -> None:
    state = sgd_state(tiny_model())
    with torch.no_grad():
        state.model[1].weight[0, 0] = float("nan")  # type: ignore[index, union-attr, operator]
    with pytest.raises(DivergedError, match=r"not finite, first 1\.weight"):
        loop.train_epoch(state, plain_task(), tiny_batches([4]), TrainerConfig(max_nonfinite=1), batch_size=4)


def test_state_taken_down_and_put_back_goes_on_as_if_nothing_had_been() -> None:
    def fresh() -> tuple[TrainState, data.Batches, Classification]:
        config = door.compose(
            "train", TrainConfig, ["data=synthetic", "model=nat_nano", "data.num_images=32", "trainer.epochs=4"]
        )
        seed_everything(0)
        source = data.open_source(config.data)
        model = nearfield.create_model("nat_nano", num_classes=10, drop_path_rate=0.2)
        how = data.prepare(config.data, model, img_size=None, in_chans=3)
        batches = data.train_batches(config.data, config.aug, source, how, CPU)
        state, _ = fit.create_state(config, model, len(batches), torch.float32, CPU)
        return state, batches, Classification(config.task, config.aug, 10)

    straight, batches, task = fresh()
    for _ in range(2):
        loop.train_epoch(straight, task, batches, TrainerConfig(), batch_size=16)
    saved = copy.deepcopy(straight.state_dict())
    for _ in range(2):
        loop.train_epoch(straight, task, batches, TrainerConfig(), batch_size=16)

    resumed, batches, task = fresh()
    resumed.load_state_dict(saved)
    assert (resumed.epoch, resumed.step) == (2, 4)
    for _ in range(2):
        loop.train_epoch(resumed, task, batches, TrainerConfig(), batch_size=16)
    for mine, theirs in ((resumed.model, straight.model), (resumed.weights, straight.weights)):
        for a, b in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True):
            assert torch.equal(a, b)
    assert resumed.lr == straight.lr


def test_evaluation_counts_every_image_once_and_restores_the_mode() -> None:
    model = tiny_model()
    model.train()
    batches = tiny_batches([4, 4, 3])
    result = loop.evaluate(model, plain_task(), batches)
    inputs, targets = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    logits = model(inputs).detach()
    assert result["n"] == 11
    assert result["top1"] == pytest.approx(100 * float((logits.argmax(1) == targets).float().mean()))
    assert result["top5"] == 100.0
    assert result["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, targets)), rel=1e-5)
    assert model.training


def test_top5_of_more_classes_is_counted_as_timm_counts_it() -> None:
    from timm.utils import accuracy

    logits, targets = torch.randn(50, 12), torch.randint(12, (50,))
    metrics = ClassificationMetrics()
    metrics.add(logits[:20].bfloat16().float(), targets[:20])
    metrics.add(logits[20:].bfloat16().float(), targets[20:])
    top1, top5 = accuracy(logits.bfloat16().float(), targets, topk=(1, 5))
    assert metrics.result()["top1"] == pytest.approx(float(top1), abs=1e-3)
    assert metrics.result()["top5"] == pytest.approx(float(top5), abs=1e-3)


@pytest.mark.parametrize(
    "aug", [AugConfig(mixup=0.8), AugConfig(cutmix=1.0), AugConfig(mixup=0.2, cutmix=1.0, mixup_mode="elem")]
)
@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_mixing_goes_with_every_loss_and_is_switched_off_at_the_end(aug: AugConfig, loss: str) -> None:
    aug.mixup_off_epochs = 1
    task = Classification(TaskConfig(loss=loss), aug, 5)
    model = tiny_model()
    inputs, targets = tiny_batches([8])[0]
    task.start_epoch(0, 2)
    mixed = task.loss(model, inputs.clone(), targets)
    mixed.backward()
    assert torch.isfinite(mixed)
    task.start_epoch(1, 2)
    assert task.mixup.mixup_enabled is False
    plain = [task.loss(model, inputs.clone(), targets).detach() for _ in range(2)]
    assert plain[0] == plain[1]


def test_bf16_autocast_trains_and_keeps_float32_weights() -> None:
    state = sgd_state(tiny_model())
    autocast = hardware.autocast_in(torch.bfloat16, CPU)
    result = loop.train_epoch(
        state, plain_task(), tiny_batches([8] * 2), TrainerConfig(), batch_size=8, autocast=autocast
    )
    assert math.isfinite(result.loss)
    assert all(p.dtype == torch.float32 for p in state.model.parameters())


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    from nearfield.engine import network

    gradients = []
    for checkpointing in (False, True):
        config = ModelConfig(name="nat_nano", grad_checkpointing=checkpointing)
        torch.manual_seed(0)
        model = network.build(config, num_classes=4, in_chans=3)
        torch.manual_seed(1)
        model(torch.randn(2, 3, 32, 32)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)
    config.name = "alexnet"
    with pytest.raises(ConfigError):
        network.build(config, num_classes=4, in_chans=3)


def test_one_batch_can_be_learned_by_heart(tmp_path: Path) -> None:
    overrides = [
        "debug=overfit",
        "data=synthetic",
        "data.overfit_batches=1",
        "trainer.epochs=40",
        "trainer.eval_every=40",
    ]
    config = door.compose(
        "train", TrainConfig, [*overrides, "trainer.plots=false", f"paths.runs={tmp_path}", "hardware=cpu"]
    )
    summary = fit.train(config)
    assert summary["top1"] == 100.0
    assert summary["n"] == 16


def test_digits_are_learned_within_a_few_epochs(tmp_path: Path) -> None:
    overrides = ["trainer.epochs=3", "trainer.eval_every=3", "trainer.plots=false", "hardware=cpu"]
    summary = fit.train(door.compose("train", TrainConfig, [*overrides, f"paths.runs={tmp_path}"]))
    assert summary["n"] == 360
    assert summary["top1"] > 60


def test_the_profiler_writes_a_table_and_a_trace(tmp_path: Path) -> None:
    overrides = ["debug=profiler", "data=synthetic", "trainer.plots=false", f"paths.runs={tmp_path}", "hardware=cpu"]
    summary = fit.train(door.compose("train", TrainConfig, [*overrides, "data.batch_size=4"]))
    folder = Path(summary["run_dir"]) / "profile"
    assert "aten::" in (folder / "table.txt").read_text()
    assert (folder / "trace.json").stat().st_size > 1000


@pytest.mark.slow
def test_a_compiled_model_trains_and_writes_plain_keys(tmp_path: Path) -> None:
    import shutil

    from nearfield.checkpoints import read
    from torch._dynamo.utils import counters

    if shutil.which("g++") is None:
        pytest.skip("compile=true on a CPU needs g++, which is not installed")
    overrides = ["debug=fdr", "compile=true", "trainer.plots=false", f"paths.runs={tmp_path}", "hardware=cpu"]
    counters["stats"].clear()
    summary = fit.train(door.compose("train", TrainConfig, overrides))
    assert counters["stats"]["unique_graphs"] == 1
    state = read(Path(summary["run_dir"]) / "last.safetensors")
    assert set(state) == set(nearfield.create_model("nat_nano", num_classes=10).state_dict())
