"""Layerwise learning rates by the noise of the gradients."""

from collections.abc import Sequence
from typing import Any

from dynamon.callbacks.layerwise_lr import LayerwiseLR
from dynamon.rates import NoiseAdaptiveRates


class NoiseAdaptiveLR(LayerwiseLR):
    r"""Layers with noisier gradients take smaller steps: LANTON's rule on top of your optimizer.

    With H the noise of a layer in the dual norm of its update, per group of layers of one role,
    :math:`r_l = ((a^2 + H_{min}) / (a^2 + H_l))^{1/4}`: the quietest layer keeps your learning rate, the others
    go below it, never under ``floor``. Noise is measured as the change between successive gradients, before
    clipping. See :class:`dynamon.rates.NoiseAdaptiveRates` for the formula in full and the reasons for the
    defaults, and :class:`LayerwiseLR` for how rates are applied and the tags that are written.

    Args:
        lag: 1: readings of a step act at the next. 0: they act at once, as published.
        save_gradient: Keep the previous gradient in checkpoints.
        layers: Globs for the layers shown one by one.
        loggers: Loggers to write to by part of the class name, class or object; None for all.
        apply: False for a dry run, which computes and logs and changes nothing.
        scale_weight_decay: Decoupled weight decay scales with the rate; False keeps it at the base rate.
        read_every: Read the noise at every so many-th step only.
        max_groups: Groups of parameters in a step at most: near ratios are brought together. None as published.
        **rule: The rule's own arguments, those of :class:`dynamon.rates.NoiseAdaptiveRates`: ``alpha``, ``beta2``,
            ``group_by``, ``normalize_shape``, ``floor``, ``warmup`` and, where the paper leaves a choice open,
            ``exponent``, ``relative_to``, ``cap``, ``dead_band``, ``refresh``, ``source``, ``bias_correction``.

    Raises:
        ValueError: Naming the argument that is out of range, or the optimizer that cannot be steered.
        TypeError: On an argument that the rule does not have.

    Cost: one pass over the gradients at each step that is read. Memory: 2 copies of the parameters at a peak, 1 in
    between, the previous gradient. Under FSDP2 these are of this process's part, and reading sends one small all-reduce
    without a host read; for orthogonalised steps it gathers each hidden gradient's change on one process.

    Reference: Hao et al., "Noise-Adaptive Layerwise Learning Rates", arXiv 2510.14009.
    """

    def __init__(
        self,
        *,
        lag: int = 1,
        save_gradient: bool = True,
        layers: Sequence[str] | None = None,
        loggers: Sequence[Any] | None = None,
        apply: bool = True,
        scale_weight_decay: bool = True,
        read_every: int = 1,
        max_groups: int | None = 16,
        **rule: Any,
    ) -> None:
        """Make the rule."""
        super().__init__(
            NoiseAdaptiveRates(**rule),
            lag,
            save_gradient,
            layers,
            loggers,
            apply=apply,
            scale_weight_decay=scale_weight_decay,
            read_every=read_every,
            max_groups=max_groups,
        )
