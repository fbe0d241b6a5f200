"""Recurrent layers with dropout on CUDA: what cuDNN and the generators know of evaluations, played on the CPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_unary
from torch.utils.checkpoint import checkpoint

from dynamon import measure
from dynamon.callbacks import DynamicsMonitor, SharpnessMonitor
from dynamon.curvature import GGNOperator, HessianOperator, critical_sharpness
from dynamon.isolation.preserve import preserve_state
from tests.helpers import Classifier, batches, fit, same_weights


class Generator:
    """A default generator of CUDA, as torch 2.11 and 2.13 write it: ``heard`` is what cuDNN looks at."""

    device = torch.device("cuda", 0)

    def __init__(self, state: list[int] | None = None) -> None:
        self.state = [11, 0] if state is None else state
        self.heard, self.calls = True, list[str]()

    def get_state(self) -> Tensor:
        return torch.tensor(self.state)

    def set_state(self, state: Tensor) -> None:
        self.calls.append("set_state")
        self.state[:], self.heard = state.tolist(), True

    def manual_seed(self, seed: int) -> "Generator":
        self.calls.append("manual_seed")
        self.state[:], self.heard = [seed, 0], True
        return self

    def graphsafe_get_state(self) -> "Generator":
        return Generator(self.state)

    def graphsafe_set_state(self, other: "Generator") -> None:
        self.state = other.state

    def draw(self) -> int:
        self.state[1] += 4
        return hash(tuple(self.state)) % 2**31


class Card:
    """One GPU: its generator, and the state of dropout that cuDNN keeps."""

    def __init__(self) -> None:
        self.generator = Generator()
        self.dropout = [0, 0]
        self.used_cudnn: list[bool] = []

    def masks(self, like: Tensor) -> Tensor:
        """Of one forward pass."""
        self.used_cudnn.append(torch.backends.cudnn.enabled)
        seed = self._of_cudnn() if torch.backends.cudnn.enabled else self.generator.draw()
        noise = torch.rand(like.shape, generator=torch.Generator().manual_seed(seed))
        return (noise > 0.3).to(like) / 0.7

    def _of_cudnn(self) -> int:
        if self.generator.heard:
            self.dropout, self.generator.heard = [self.generator.draw(), 0], False
        self.dropout[1] += 1
        return hash(tuple(self.dropout)) % 2**31


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    """CUDA is in use, as far as random streams and cuDNN go."""
    played = Card()
    monkeypatch.setattr(torch.cuda, "default_generators", (played.generator,), raising=False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [played.generator.get_state()])
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", lambda states: [played.generator.set_state(s) for s in states])
    kind = torch.device("cuda")  # only where nobody asks whether it is really there
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *a, **k: None if a or k else kind)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", played.generator.manual_seed)
    return played


class Recurrent(nn.Module):
    """A recurrent layer between two linear ones, with dropout by the card."""

    def __init__(self, card: Card, checkpoints: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.masks, self.checkpoints = card.masks, checkpoints
        self.first, self.last = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        if self.checkpoints is None:
            return self.last(lstm(hidden, self.masks))
        again = {"use_reentrant": self.checkpoints, "preserve_rng_state": False}
        return self.last(checkpoint(lstm, hidden, self.masks, **again))


def lstm(x: Tensor, masks: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of torch's, by its name and by how it can be overridden."""
    if has_torch_function_unary(x):
        return handle_torch_function(lstm, (x,), x, masks)
    return x * masks(x)


def trained(card: Card, callbacks: list[Any]) -> tuple[nn.Module, list[int], list[int]]:
    card.generator = Generator()
    card.dropout = [0, 0]
    torch.cuda.default_generators = (card.generator,)
    module = Classifier(Recurrent(card))
    fit(module, callbacks, batches(), steps=6)
    return module, card.generator.state, card.dropout


MONITORS = {
    "probe and steps": lambda: SharpnessMonitor(
        every_n_steps=2,
        budget=None,
        quantities=["stability_ratio", "directional", "critical", "batch", "ggn"],
        loss_fn=lambda module, batch: module.training_step(batch, 0),
        strict=True,
    ),
    "everything": lambda: DynamicsMonitor("full", every_n_steps=2, budget=None),
}


@pytest.mark.parametrize("monitor", MONITORS)
def test_masks_and_streams_of_training_are_those_without_a_monitor(card, monitor):
    plain, stream, dropout = trained(card, [])
    watcher = MONITORS[monitor]()
    watched, stream_then, dropout_then = trained(card, [watcher])
    assert len(watcher.history["sharpness/stability_ratio"].values) > 0
    assert same_weights(plain, watched) and stream == stream_then and dropout == dropout_then


def evaluated(how: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
    def loss() -> Tensor:
        return cross_entropy(module(x), y)

    params = list(module.parameters())
    if how == "measure":
        measure(module, (x, y), loss_fn=lambda m, b: cross_entropy(m(b[0]), b[1]))
    elif how == "preserve_state":
        with preserve_state(module, seed=3):
            loss()
    elif how == "critical":
        critical_sharpness(loss, params, -1e-2 * torch.cat([p.detach().flatten() for p in params]))
    elif how == "ggn":
        GGNOperator(lambda: module(x), lambda z: cross_entropy(z, y), params)
    else:
        operator = HessianOperator(loss, params, backend=how)
        operator @ operator.gradient


WAYS = ("measure", "preserve_state", "critical", "ggn", "double_backward", "finite_difference")


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("checkpoints", [None, False])
def test_no_evaluation_goes_to_cudnn_or_sets_a_generator_of_cuda(card, how, checkpoints):
    module, x = Recurrent(card, checkpoints), torch.randn(5, 8)
    y = torch.randint(3, (5,))
    card.generator.calls.clear()  # that was this test
    evaluated(how, module, x, y)
    assert card.used_cudnn and not any(card.used_cudnn)
    assert card.generator.calls == [] and torch.backends.cudnn.enabled
    assert card.dropout == [0, 0]


def test_only_seeded_evaluations_have_the_same_masks(card):
    module, x = Recurrent(card), torch.ones(2, 8)
    card.generator.state[:] = [11, 4]
    with preserve_state(module, seed=5):
        one = module(x)
        assert card.generator.state[0] == 5
    with preserve_state(module, seed=5):
        other = module(x)
    assert torch.equal(one, other)
    assert card.generator.state == [11, 4]


def test_cudnn_is_on_again_after_a_failure(card):
    module = Recurrent(card)
    module.masks = None  # nothing to draw masks from
    with pytest.raises(TypeError), preserve_state(module):
        module(torch.ones(2, 8))
    assert torch.backends.cudnn.enabled


def test_cudnn_that_is_off_stays_off(card, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    with preserve_state(nn.Linear(2, 2)):
        assert not torch.backends.cudnn.enabled
        lstm(torch.ones(2), card.masks)
    assert not torch.backends.cudnn.enabled


def test_a_generator_that_a_module_keeps_is_put_back_unheard(card):
    module = nn.Linear(2, 2)
    kept = torch.Generator()
    module.streams = [kept]
    torch.rand(3, generator=kept)
    before = kept.get_state()
    with preserve_state(module):
        torch.rand(3, generator=kept)
    assert torch.equal(kept.get_state(), before)


class Sees(TorchFunctionMode):
    """Whether cuDNN was allowed in each function, as it was called in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, set[bool]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        self.found.setdefault(name, set()).add(torch.backends.cudnn.enabled)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("packed", [False, True])
def test_layers_of_torch_are_kept_from_cudnn_and_convolutions_are_not(card, layer, packed):
    torch.manual_seed(0)
    module, conv, x = layer(3, 4, num_layers=2), nn.Conv1d(3, 3, 1), torch.randn(5, 2, 3)

    def loss() -> Tensor:
        inside = conv(x.mT.contiguous().mT.transpose(1, 2)).transpose(1, 2)
        given = nn.utils.rnn.pack_sequence([inside[:, 0], inside[:3, 1]]) if packed else inside
        found = module(given)[0]
        return mse_loss(found.data if packed else found, torch.zeros(()).expand_as(found.data if packed else found))

    with Sees() as seen:
        operator = HessianOperator(loss, list(module.parameters()))
    assert operator.backend == "double_backward"
    name = "rnn_tanh" if layer is nn.RNN else layer.__name__.lower()
    assert seen.found[name] == {False} and seen.found["conv1d"] == {True}
