"""The faults: how each is injected, and what is true of it."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.faults.subjects import Subject

Batch = tuple[Tensor, Tensor, Tensor]  # inputs, targets, weights of the samples
ABRUPT, LASTING, SLOW = 20, 100, 200  # steps from the fault within which the stated step must lie


@dataclass
class Fault:
    """A fault, injected from a step on. The hooks do nothing unless a kind of fault overrides them.

    Attributes:
        subject: What it is injected into.
        onset: The first step that it concerns, counted from 0.
        strength: See each kind.
        layers: The layers at fault; none where it concerns the whole run.
    """

    subject: Subject
    onset: int
    strength: float

    name = ""
    words = ""
    strengths: tuple[float, ...] = (1.0,)  # the weakest first; one: there is only this
    measure = ""  # what the strength counts
    within = ABRUPT
    needs = ""  # the entry of the subject's layers without which the model cannot have it
    from_start = False

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers at fault."""
        return self.subject.layers[self.needs] if self.needs else ()

    def network(self, network: nn.Module) -> nn.Module:
        """Change the network before training."""
        return network

    def batch(self, step: int, batch: Batch) -> Batch:
        """Change a batch."""
        return batch

    def rate(self, step: int) -> float:
        """Factor of the rate."""
        return 1.0

    def before(self, step: int, network: nn.Module, optimizer: Optimizer) -> None:
        """Change something before a step."""

    def after_backward(self, step: int, network: nn.Module) -> None:
        """Change the gradient."""

    def clip(self, step: int, limit: float | None) -> float | None:
        """Change the limit of the gradient's norm."""
        return limit

    def _images(self, inputs: Tensor) -> bool:
        return inputs.is_floating_point()


class Labels(Fault):
    """The targets of some batches in a row are shuffled."""

    name, words, measure = "labels", "labels shuffled", "batches"
    strengths = (1, 4, 16, 64)

    def batch(self, step: int, batch: Batch) -> Batch:
        """Shuffle."""
        inputs, targets, weights = batch
        if self.onset <= step < self.onset + self.strength:
            order = torch.randperm(targets.numel(), generator=torch.Generator().manual_seed(step))
            targets = targets.flatten()[order].view_as(targets)
        return inputs, targets, weights


class Scale(Fault):
    """One batch of images is multiplied; tokens have no size, so one batch's sample weights are."""

    name, words, measure = "scale", "one batch multiplied (images, or sample weights)", "factor"
    strengths = (4, 64, 1024, 16384)

    def batch(self, step: int, batch: Batch) -> Batch:
        """Multiply."""
        inputs, targets, weights = batch
        if step != self.onset:
            return batch
        if self._images(inputs):
            return inputs * self.strength, targets, weights
        return inputs, targets, weights * self.strength


class Token(Fault):
    """Some batches in a row hold one token (one image) over and over."""

    name, words, measure = "token", "one token or image throughout", "batches"
    strengths = (1, 4, 16, 64)

    def batch(self, step: int, batch: Batch) -> Batch:
        """Repeat the first."""
        inputs, targets, weights = batch
        if not self.onset <= step < self.onset + self.strength:
            return batch
        if self._images(inputs):
            return inputs[:1].expand_as(inputs).clone(), targets[:1].expand_as(targets).clone(), weights
        token = inputs[0, 0]
        return token.expand_as(inputs).clone(), token.expand_as(targets).clone(), weights


class Rate(Fault):
    """The rate is multiplied from a step on."""

    name, words, measure = "rate", "learning rate multiplied from a step on", "factor"
    strengths = (4, 16, 64, 256)

    def rate(self, step: int) -> float:
        """Multiply."""
        return self.strength if step >= self.onset else 1.0


class Moments(Fault):
    """The first moment (the momentum) of one layer is multiplied, once."""

    name, words, measure, needs = "moments", "one layer's first moment multiplied, once", "factor", "moments"
    strengths = (4, 32, 256, 2048)

    def before(self, step: int, network: nn.Module, optimizer: Optimizer) -> None:
        """Multiply."""
        if step == self.onset:
            state = optimizer.state[network.get_parameter(self.layers[0])]
            state["exp_avg" if "exp_avg" in state else "momentum_buffer"].mul_(self.strength)


class Logits(Fault):
    """Query and key weights of one block grow at each step, so the logits of attention grow twice as fast."""

    name, words, measure, needs = "logits", "query and key weights of one block grow", "growth per step", "logits"
    strengths = (0.0025, 0.005, 0.01, 0.02, 0.04)
    within = SLOW

    @torch.no_grad()
    def before(self, step: int, network: nn.Module, optimizer: Optimizer) -> None:
        """Grow."""
        if step >= self.onset:
            weight = network.get_parameter(self.layers[0])
            weight[: 2 * len(weight) // 3].mul_(1 + self.strength)


class Dead(Fault):
    """Biases shut the units of one layer: ReLUs, or the output gates of an LSTM."""

    name, words, measure, needs = "dead", "one layer's units shut by their biases (ReLU, output gate)", "shift", "dead"
    strengths = (1, 2, 4, 8, 16, 32)
    within = LASTING

    @torch.no_grad()
    def before(self, step: int, network: nn.Module, optimizer: Optimizer) -> None:
        """Shift."""
        if step == self.onset:
            bias = network.get_parameter(next(name for name in self.layers if "bias" in name))
            part = bias if "lstm" not in self.layers[0] else bias[3 * len(bias) // 4 :]
            part.sub_(self.strength)


class Rounded(Fault):
    """The whole model is trained in bfloat16: small updates leave weights as they are. From the first step on."""

    name, words, within, from_start = "bf16", "weights in bfloat16 that do not move", SLOW, True

    def network(self, network: nn.Module) -> nn.Module:
        """Round."""
        return network.to(torch.bfloat16)

    def batch(self, step: int, batch: Batch) -> Batch:
        """Round images."""
        inputs, targets, weights = batch
        return inputs.bfloat16() if self._images(inputs) else inputs, targets, weights


class Frozen(Fault):
    """Layers get no gradient any more, as if their forward pass stood under ``no_grad``."""

    name, words, measure, needs = "frozen", "layers frozen in mid-run by a forgotten no_grad", "layers", "frozen"
    strengths = (1, 2, 4, 10)
    within = LASTING

    @property
    def layers(self) -> tuple[str, ...]:
        """As many as the strength says."""
        return super().layers[: round(self.strength)]

    def after_backward(self, step: int, network: nn.Module) -> None:
        """Leave no gradient."""
        if step >= self.onset:
            for name in self.layers:
                network.get_parameter(name).grad = None


class Clipping(Fault):
    """The limit of clipping becomes so low that it eats every step."""

    name, words, measure, within = "clipping", "clipping eats every step", "limit", LASTING
    strengths = tuple(10.0**-k for k in range(0, 13, 2))

    def after_backward(self, step: int, network: nn.Module) -> None:
        """Change the gradient."""

    def clip(self, step: int, limit: float | None) -> float | None:
        """Lower it."""
        return self.strength if step >= self.onset else limit


class NotANumber(Fault):
    """One sample holds NaN."""

    name, words = "nan", "NaN in one sample"

    def batch(self, step: int, batch: Batch) -> Batch:
        """Put it into the image, or into the sample's weight."""
        inputs, targets, weights = batch
        if step == self.onset:
            (inputs if self._images(inputs) else weights)[0] = math.nan
        return inputs, targets, weights


class Repeat(Fault):
    """One batch is repeated for ever."""

    name, words, within = "repeat", "one batch repeated for ever", LASTING

    _kept: Batch | None = None

    def batch(self, step: int, batch: Batch) -> Batch:
        """Repeat."""
        if step == self.onset:
            self._kept = batch
        return batch if self._kept is None else self._kept


KINDS: Mapping[str, type[Fault]] = {
    kind.name: kind
    for kind in (
        Labels,
        Scale,
        Token,
        Rate,
        Moments,
        Logits,
        Dead,
        Rounded,
        Frozen,
        Clipping,
        NotANumber,
        Repeat,
    )
}


def kinds_of(subject: Subject) -> Iterator[type[Fault]]:
    """The faults that a model can have."""
    return (kind for kind in KINDS.values() if not kind.needs or kind.needs in subject.layers)


def onset_of(kind: type[Fault], seed: int, steps: int) -> int:
    """The step of a fault: around the middle of the run, another one for each seed."""
    return 0 if kind.from_start else steps // 2 + 7 * (seed % 10)


def stream(batches: Iterator[Any], fault: Fault | None, steps: int) -> Iterator[Batch]:
    """Batches with weights of samples, changed by a fault."""
    for step, (inputs, targets) in zip(range(steps), batches, strict=False):
        batch = (inputs, targets, torch.ones(len(inputs)))
        yield batch if fault is None else fault.batch(step, batch)
