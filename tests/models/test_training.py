"""The public training code, unmodified, on our models: parameter groups, drop path, checkpointing, steps, an epoch."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from oracles import public
from oracles.pairs import assert_close, assert_gradients_close, fast_copy, pair, relative_error
from torch import nn

import beit3_fast.models as fast


def released_groups(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """(weight decay, lr scale) of every released key in optimiser parameter groups."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    released = None if isinstance(model, tuple(public.CLASSES.values())) else fast.released_names(model)
    settings: dict[str, tuple[float, float]] = {}
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            for key in released[name] if released else [name]:
                assert key not in settings, f"{key} is in two groups"
                settings[key] = (group["weight_decay"], group["lr_scale"])
    return settings


@pytest.mark.parametrize("head", [None, *public.HEADS])
def test_released_names(head: str | None) -> None:
    """Every parameter has its released keys, every key one parameter, and they hold the same number of values."""
    _, ours = pair(head)
    released = fast.released_names(ours)
    parameters = dict(ours.named_parameters())
    state = ours.state_dict()
    assert released.keys() == parameters.keys()
    assert sorted(key for keys in released.values() for key in keys) == sorted(state)
    for name, keys in released.items():
        assert parameters[name].numel() == sum(state[key].numel() for key in keys), name


# ----------------------------------------------------------------------------------------------------- optim_factory


@pytest.mark.parametrize("layer_decay", [None, 0.65])
@pytest.mark.parametrize("head", public.HEADS)
def test_parameter_groups(head: str, layer_decay: float | None) -> None:
    """Weight decay and learning-rate scale of each released parameter, as the public script asks for them."""
    factory = public.optim_factory
    settings = []
    for model in pair(head):
        assigner = None
        if layer_decay is not None:
            layers = model.get_num_layers()
            assigner = factory.LayerDecayValueAssigner([layer_decay ** (layers + 1 - i) for i in range(layers + 2)])
        optimizer = factory.create_optimizer(
            types.SimpleNamespace(opt="adamw", lr=1e-3, weight_decay=0.05, opt_eps=1e-8, opt_betas=[0.9, 0.98]),
            model,
            skip_list=model.no_weight_decay(),
            get_num_layer=assigner.get_layer_id if assigner else None,
            get_layer_scale=assigner.get_scale if assigner else None,
        )
        settings.append(released_groups(model, optimizer.param_groups))
    assert settings[1] == settings[0]
    assert {decay for decay, _ in settings[0].values()} == {0.0, 0.05}


def test_parameter_groups_with_a_larger_head_rate() -> None:
    """VQA trains its head 20 times faster: names that start with "head"."""
    factory = public.optim_factory
    settings = []
    for model in pair("vqav2"):
        assigner = factory.LayerDecayValueAssigner([1.0, 20.0], scale_handler=factory.get_is_head_flag_for_vit)
        groups = factory.get_parameter_groups(
            model, 0.01, model.no_weight_decay(), assigner.get_layer_id, assigner.get_scale
        )
        settings.append(released_groups(model, groups))
    assert settings[1] == settings[0]
    assert {scale for _, scale in settings[0].values()} == {1.0, 20.0}


def test_parameter_groups_without_a_skip_list() -> None:
    """`create_optimizer` then asks the model itself."""
    settings = []
    for model in pair("retrieval"):
        optimizer = public.optim_factory.create_optimizer(
            types.SimpleNamespace(opt="adamw", lr=1e-3, weight_decay=0.05), model
        )
        settings.append(released_groups(model, optimizer.param_groups))
    assert settings[1] == settings[0]


def test_frozen_parameters_stay_out_of_the_groups() -> None:
    _, ours = pair("vqav2")
    for parameter in ours.beit3.parameters():
        parameter.requires_grad_(False)
    groups = public.optim_factory.get_parameter_groups(ours, 0.01, ours.no_weight_decay())
    assert set(released_groups(ours, groups)) == {key for key in ours.state_dict() if not key.startswith("beit3.")}


# --------------------------------------------------------------------------------------- drop path and checkpointing


def loss_of(model: nn.Module, head: str, batch: dict[str, Any], seed: int = 5) -> torch.Tensor:
    torch.manual_seed(seed)
    return public.handler(head).train_batch(model, **batch)["loss"]


@pytest.mark.parametrize("padding", ["padded", "unpadded"])
@pytest.mark.parametrize("head", public.HEADS)
def test_drop_path_draws_as_the_public_model(head: str, padding: str) -> None:
    """Same seed, same samples dropped in the same branches: loss and gradients agree."""
    reference, ours = pair(head, drop_path_rate=0.5, encoder_layers=4)
    reference.train(), ours.train()
    batch = public.training_batch(head, batch=5, padding=padding)
    losses = set()
    for seed in range(3):
        for model in (reference, ours):
            model.zero_grad(set_to_none=True)
        expected = loss_of(reference, head, batch, seed)
        actual = loss_of(ours, head, batch, seed)
        assert_close(actual, expected, f"seed {seed} loss")
        expected.backward(), actual.backward()
        assert_gradients_close(ours, reference)
        losses.add(round(expected.item(), 5))
    assert len(losses) == 3, "the seeds drop different samples"


@pytest.mark.parametrize("drop_path_rate", [0.1, 0.7])
def test_drop_path_rates_rise_with_depth(drop_path_rate: float) -> None:
    """The state of the random generator after a forward tells how many draws were made: none in the first layer."""
    states = []
    for model in pair(None, drop_path_rate=drop_path_rate):
        model.train()
        data = public.inputs()
        torch.manual_seed(0)
        model(data["tokens"], data["image"], data["mask"])
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_drop_path_is_off_in_eval_mode() -> None:
    reference, ours = pair("vqav2", drop_path_rate=0.5)
    plain = fast_copy(public.public_model("vqav2"), "vqav2")
    batch = public.training_batch("vqav2")
    with torch.no_grad():
        actual = public.outputs(ours, "vqav2", batch)["logits"]
        assert torch.equal(actual, public.outputs(plain, "vqav2", batch)["logits"])
        assert_close(actual, public.outputs(reference, "vqav2", batch)["logits"], "eval")


@pytest.mark.parametrize("drop_path_rate", [0.0, 0.5])
@pytest.mark.parametrize("head", public.HEADS)
def test_checkpointing_gives_identical_gradients(head: str, drop_path_rate: float) -> None:
    reference = public.public_model(head, drop_path_rate=drop_path_rate)
    plain = fast_copy(reference, head).train()
    saving = fast_copy(
        public.public_model(head, drop_path_rate=drop_path_rate, checkpoint_activations=True), head
    ).train()
    batch = public.training_batch(head)
    losses = []
    for model in (plain, saving):
        loss = loss_of(model, head, batch)
        loss.backward()
        losses.append(loss.detach())
    assert torch.equal(*losses)
    expected, actual = fast.released_gradients(plain), fast.released_gradients(saving)
    for key, grad in expected.items():
        assert (grad is None) == (actual[key] is None), key
        assert grad is None or torch.equal(grad, actual[key]), key


def test_checkpointing_keeps_fewer_activations() -> None:
    """What autograd saves, counted in bytes by PyTorch's own hooks: a layer's inputs instead of its insides."""
    saved = []
    for checkpointing in (False, True):
        _, ours = pair("vqav2", checkpoint_activations=checkpointing, encoder_layers=6)
        ours.train()
        size = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal size
            size += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss_of(ours, "vqav2", public.training_batch("vqav2"))
        saved.append(size)
    assert saved[1] < saved[0] / 3


def test_checkpointing_in_eval_mode_and_without_grad() -> None:
    reference, ours = pair("vqav2", checkpoint_activations=True)
    batch = public.training_batch("vqav2")
    with torch.no_grad():
        expected = public.outputs(reference, "vqav2", batch)["logits"]
        assert_close(public.outputs(ours, "vqav2", batch)["logits"], expected, "eval")
    assert_close(public.outputs(ours, "vqav2", batch)["logits"].detach(), expected, "eval with grad")


@pytest.mark.parametrize("frozen", ["text embedding", "backbone"])
def test_frozen_parameters(frozen: str) -> None:
    """What does not require grad gets none, the rest what it gets in the public model."""
    reference, ours = pair("vqav2")
    for model in (reference, ours):
        (model.beit3.text_embed if frozen == "text embedding" else model.beit3).requires_grad_(False)
        loss_of(model, "vqav2", public.training_batch("vqav2")).backward()
    assert_gradients_close(ours, reference)


# -------------------------------------------------------------------------------------------------- steps and epochs


@pytest.mark.parametrize("head", public.HEADS)
def test_three_optimiser_steps_of_the_public_handler(head: str) -> None:
    """The first loss to 2e-5; then AdamW divides noise by noise where a gradient is zero, hence the wider bound."""
    losses: list[list[float]] = []
    for model in pair(head):
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98))
        handler = public.handler(head)
        losses.append([])
        for step in range(3):
            loss = handler.train_batch(model, **public.training_batch(head, seed=step))["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    expected, actual = losses
    assert actual[0] == pytest.approx(expected[0], rel=2e-5)
    assert actual == pytest.approx(expected, rel=1e-3)


def test_training_with_weight_decay_groups_moves_the_weights_as_in_public() -> None:
    """SGD with the public groups: linear in the gradients, so that every weight can be compared afterwards."""
    states = []
    for model in pair("retrieval"):
        model.train()
        groups = public.optim_factory.get_parameter_groups(model, 0.05, model.no_weight_decay())
        optimizer = torch.optim.SGD(groups, lr=0.05)
        for step in range(3):
            loss = public.handler("retrieval").train_batch(model, **public.training_batch("retrieval", seed=step))
            optimizer.zero_grad()
            loss["loss"].backward()
            optimizer.step()
        states.append(model.state_dict())
    for key, value in states[0].items():
        assert relative_error(states[1][key], value) <= 1e-5, key


class Scaler:
    """A loss scaler with the public one's call, whose GradScaler is CUDA's and reports no scale on a CPU."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def __call__(
        self,
        loss: torch.Tensor,
        optimizer: torch.optim.Optimizer,
        clip_grad: float | None,
        parameters: Any,
        create_graph: bool,
        update_grad: bool,
    ) -> torch.Tensor:
        loss.backward(create_graph=create_graph)
        norm = public.utils.get_grad_norm_(parameters)
        optimizer.step()
        self.norms.append(norm.item())
        return norm

    def state_dict(self) -> dict[str, float]:
        return {"scale": 1.0}


@pytest.mark.parametrize("head", public.HEADS)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # torch.cuda.amp without CUDA
def test_an_epoch_of_the_unmodified_public_engine(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train_one_epoch` with the public optimiser, layer decay, weight averaging and cosine schedule, two steps."""
    import timm.utils

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    stats, norms, states = [], [], []
    for model in pair(head):
        layers = model.get_num_layers()
        assigner = public.optim_factory.LayerDecayValueAssigner([0.65 ** (layers + 1 - i) for i in range(layers + 2)])
        optimizer = public.optim_factory.create_optimizer(
            types.SimpleNamespace(opt="adamw", lr=1e-4, weight_decay=0.05),
            model,
            skip_list=model.no_weight_decay(),
            get_num_layer=assigner.get_layer_id,
            get_layer_scale=assigner.get_scale,
        )
        batches = [public.training_batch(head, seed=step) for step in range(2)]
        for batch in batches:
            batch.pop("global_step", None)  # the engine adds it
        scaler = Scaler()
        average = timm.utils.ModelEma(model, decay=0.5)
        stats.append(
            public.engine().train_one_epoch(
                model,
                batches,
                optimizer,
                torch.device("cpu"),
                public.handler(head),
                epoch=0,
                start_steps=0,
                lr_schedule_values=public.utils.cosine_scheduler(1e-4, 1e-6, 1, 2),
                loss_scaler=scaler,
                model_ema=average,
                task="coco_captioning" if head == "captioning" else head,
            )
        )
        norms.append(scaler.norms)
        states.append(average.ema.state_dict())
    expected, actual = stats
    assert actual.keys() == expected.keys()
    assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    for key in ("lr", "min_lr", "weight_decay"):
        assert actual[key] == pytest.approx(expected[key], rel=1e-9)
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
    for key, value in states[0].items():  # a sign flipped by noise moves a weight by twice the learning rate
        assert (states[1][key] - value).abs().max() <= 4e-4, key


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("head", ["vqav2", "imageclassification", "nlvr2", "retrieval"])
def test_evaluation_by_the_unmodified_public_engine(head: str) -> None:
    """With labels: accuracies and recalls. VQA without them: answers, its score is missing from the packaged code."""

    class Loader(list):
        dataset = types.SimpleNamespace(split="test", label2ans=[f"answer {i}" for i in range(11)])

    results = []
    for model in pair(head):
        batches = Loader(public.training_batch(head, seed=step, batch=6) for step in range(2))
        for step, batch in enumerate(batches):
            if head == "retrieval":
                batch["image_id"] = torch.arange(6) + 6 * step
            if head == "vqav2":
                batch.pop("labels")
                batch["qid"] = torch.arange(6) + 6 * step
        results.append(public.engine().evaluate(batches, model, torch.device("cpu"), public.handler(head)))
    assert results[1] == results[0]


def test_gradients_of_the_image_and_through_a_custom_loss() -> None:
    """The inputs' gradient, for users who put something in front of the model."""
    reference, ours = pair("vqav2")
    batch = public.training_batch("vqav2")
    images = []
    for model in (reference, ours):
        image = batch["image"].clone().requires_grad_()
        public.outputs(model, "vqav2", {**batch, "image": image})["logits"].tanh().sum().backward()
        images.append(image.grad)
    assert_close(images[1], images[0], "gradient of the image")


@pytest.mark.parametrize("head", public.HEADS)
def test_gradients_accumulate(head: str) -> None:
    _, ours = pair(head)
    ours.train()
    batch = public.training_batch(head)
    loss_of(ours, head, batch).backward()
    once = {key: None if g is None else g.clone() for key, g in fast.released_gradients(ours).items()}
    loss_of(ours, head, batch).backward()
    for key, grad in fast.released_gradients(ours).items():
        if once[key] is None:
            assert grad is None or not grad.count_nonzero(), key
        elif once[key].count_nonzero():
            assert relative_error(grad, 2 * once[key]) <= 1e-6, key
