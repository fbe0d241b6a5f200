"""The sharpness monitor: which curvature quantities there are, and what is measured by default."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from dynamon.health import Finding
from dynamon.isolation.preserve import LossFn
from dynamon.kernels.arguments import check_count
from dynamon.monitoring.arguments import check_arguments, check_number, check_probe, check_switches
from dynamon.monitoring.cadence import Cadence
from dynamon.monitoring.eigenvalues import EigenvalueMeter
from dynamon.monitoring.gauss_newton import OutputsFn
from dynamon.monitoring.meter import Meter
from dynamon.monitoring.monitor import Monitor
from dynamon.monitoring.planner import GRACE
from dynamon.monitoring.probe import ProbeMeter
from dynamon.monitoring.progress_meter import ProgressMeter
from dynamon.monitoring.update_curvature import UpdateCurvatureMeter
from dynamon.quantities import choices, quantities_of, with_tag_table

_OF_SPECTRUM, _OF_STEPS, _OF_PROGRESS = choices("sharpness"), choices("steps"), choices("progress")
QUANTITIES = (*_OF_SPECTRUM, *_OF_STEPS, *_OF_PROGRESS)
_DEFAULT = ("stability_ratio", "hessian", "bracket")


@with_tag_table(quantities_of("sharpness", "steps", "progress", "monitor"))
class SharpnessMonitor(Monitor):
    """The loss's curvature during training, and how close the step size is to the edge of stability.

    The training loss is evaluated on a held probe (a share of the first batches, in train mode, with the same
    dropout masks each time) through the module's own ``training_step``, or ``loss_fn``; nothing of that leaves a
    trace in the run; checkpoints hold the probe, so that a resumed run measures the same. A batch is cut only where
    several signs agree on what a sample is: the loader's batch size and the first dimensions of all tensors, or the
    length of lists; else the probe holds whole batches, and that is said. Where the first batch has no loss, the next
    one is taken. Eigenvalues come from
    warm-started Lanczos; every tenth run is cold and brings a 99 % upper bound. The value depends on the probe more
    than on the solver: a small probe is sharper than the whole training set. The bracket says by how much, in
    expectation: ``sharpness/hessian_max_bracket`` lies below the full loss's eigenvalue, which lies below
    ``sharpness/hessian_max``.

    The **stability ratio** (:func:`dynamon.stability.stability_ratio`) is the number to watch: 1 is the largest
    step the curvature allows for this optimizer with its present state and the rates in force. Hovering
    around 1 is normal training; under mini-batches a value below 1 is normal too, and ``sharpness/batch`` is what
    settles at the threshold there.

    ====================  ==============================================================  ==========================
    quantity              what it is                                                      cost a measurement
    ====================  ==============================================================  ==========================
    ``stability_ratio``   top eigenvalue of the update's own Hessian, threshold 1         5 to 10 products
    ``hessian``           top eigenvalue of the Hessian (with SGD: in the above)          5 to 10 products
    ``bracket``           the probe's top direction on other samples, every tenth time    1 product, 1 graph
    ``directional``       curvature along the last update, also in the optimizer's norm   1 product, 1 graph
    ``critical``          how far the last update could go before the loss rises          5 to 9 forward passes
    ``batch``             curvature of a training batch's own loss along its gradient     1 product on a full batch
    ``progress``          what the last step of every layer did to the next batch's loss  2 gradients on a full batch
    ``subspace``          share of gradient and update in the top eigenspace              20 to 40 products
    ``blocks``            top eigenvalue of every layer's own block                       5 to 10 products a layer
    ``next``              the ratio of the step that Adam or RMSprop would take next      5 to 10 products
    ``preconditioned``    top eigenvalue between P^-1/2, P of an Adam-type optimizer      5 to 10 products
    ``ggn``               top eigenvalue of the Gauss-Newton matrix                       5 to 10 products, 1 graph
    ``trace``             trace of the Hessian with its standard error                    16 products
    ``density``           outliers and bulk edge of the whole spectrum                    120 products
    ====================  ==============================================================  ==========================

    Tags (headlines are also in ``trainer.callback_metrics``):

    {tags}

    The stability ratio needs one optimizer of class SGD, Adam, AdamW or RMSprop; for others there is the Hessian, and
    ``directional`` in the layers' own norms.

    Under DDP and FSDP2 (``ModelParallelStrategy``) each process keeps its part of the probe, and what is measured is
    the curvature of the mean loss over all of them, weighed by samples; ``batch`` is that of the batches of all
    processes together. A measurement that fails on one process fails on all, and a probe that one has no memory for is
    halved on all. Sharpness is off with SyncBatchNorm, tensor parallelism, parameters offloaded to the host, and under
    other strategies of several processes.

    Parameters that FSDP2 has dealt out are gathered while they are measured where memory allows, and products are as
    exact as on one process. Where it does not, they stay sharded, each process holds its part of every vector, and
    products are differences of two gradients: about 1e-9 off in float64, and in float32 subject to the check at two
    step sizes. A loss that fails on one process alone then leaves the others waiting, as in training. ``ggn`` needs
    gathered parameters. Under a mixed precision policy of FSDP2 products are as coarse as its dtype, and ``critical``
    moves the shards. What is done is said at the start. A checkpoint holds no vectors of shards, so that the first
    solve after a resume is a cold one.

    Args:
        every_n_steps: Measure at every step that is a multiple of this; where a step was not taken, at the next one
            that is. None: as often as ``budget`` allows, every twentieth step at most.
        budget: Share of training time that monitoring may take; used when ``every_n_steps`` is None. Several monitors
            in one run share one budget and one grace, the largest that one of them has.
        quantities: What to measure, from the table above.
        loss_fn: ``loss_fn(module, batch) -> scalar``, instead of ``training_step``. Needed for manual
            optimisation and where ``training_step`` has effects outside the module (files, iterators, objects of your
            own classes). Before the first measurement ``training_step`` is tried twice; where the two losses differ, or
            something outside has changed both times, sharpness is off and a sentence says what was found.
        outputs: ``outputs(module, batch) -> (outputs, loss)`` for ``ggn``, both from one forward pass. None finds
            the outputs where they go into cross-entropy or squared error.
        probe_batches: How many of the first batches enter the probe.
        probe_fraction: Share of each batch's samples in the probe.
        probe_size: Samples in the probe (of each process, under DDP), from as many of the first batches as that takes;
            instead of the two above.
        probe_weight: Name of an entry (or attribute) of the batch whose sum weighs it among the probe's batches,
            a mask of tokens say. None weighs by samples.
        save_probe: Whether checkpoints hold the probe, which is a few training samples, and with ``every_n_steps`` the
            weights that are kept for a reading of ``progress``. Without it a resumed run takes another probe, says so,
            and leaves that reading out.
        save_vectors: Whether checkpoints hold the vectors that the next solve starts from: one to three copies of the
            parameters per quantity, up to 2^26 numbers each. Without them the first solve after a resume is a cold one.
        layers: Globs for the layers of ``blocks``, ``!`` excludes.
        tol: Relative tolerance of a solve on the change of the value and on its error (the residual, where tracked).
        max_matvecs: Most Hessian products a solve may take.
        memory_limit: GiB that the solver's vectors may take, and so the copies of weights that ``progress`` makes;
            None for half of what is free when training starts.
            Where they do not fit, critical sharpness is measured instead, and that is said. Where memory runs out
            in a measurement all the same, the probe is halved for the next one.
        loggers: Loggers to write to by part of the class name, class or object; None for all.
        strict: Raise where a measurement fails, instead of warning and going on.
        grace: Seconds that monitoring may take beyond ``budget``, once in a fit, so that a short run shows something.
        roles: Roles of layers by glob (``{"stem.*": "embedding"}``) where they are guessed wrongly, as ``overrides`` of
            :func:`dynamon.layers.describe_layers`. What was guessed from a name is logged once.
        geometry: ``"sign"``, ``"euclidean"`` or ``"spectral"``: the geometry in which the optimizers descend, which
            selects the norms of ``gradient/dual``, noise and steps. A mapping from class names states it of some. None:
            by their classes (:func:`dynamon.norms.optimizer_family`); what was guessed is logged once.
        on_finding: Function that is called with each new :class:`dynamon.health.Finding`, on a thread of its own.
        stop_on: Health rules (``"loss/nonfinite"``) and severities (``"fault"``) at which training stops; None never.

    Raises:
        ValueError: On an argument out of range, at construction.

    Cost: on a full-size probe a product takes 2 to 3.5 training steps, on a quarter of it about half a step; a
    tracked measurement takes 5 to 8 products.

    Memory, beyond the activations of a gradient on the probe, in copies of the parameters (vectors of their size): what
    a measurement takes at most, what one with an upper bound takes, and what is kept from one to the next. A solve for
    the k largest holds ``2 k + 7`` basis vectors, 22 and more with a bound, and k + 3 beside them; the rest is the copy
    that puts the module back, the gradient and its graph, and a product. Quantities are measured one after the other:
    the largest of their peaks counts, and the sum of what they keep. Under FSDP2 gathered parameters add one copy on
    each process, which keeps whole vectors too; where parameters stay sharded, a copy is one of the process's shards.

    ====================  =========  ============  ====
    quantity              at a peak  with a bound  kept
    ====================  =========  ============  ====
    ``stability_ratio``   27         37            3
    ``hessian``           24         37            3
    ``bracket``           24         37            3
    ``next``              26         39            3
    ``preconditioned``    28         38            3
    ``ggn``               24         37            3
    ``subspace``          46         73            8
    ``blocks``            12         12            3
    ``trace``             10         10            0
    ``density``           72         72            0
    ``directional``       12         12            1
    ``critical``          9          9             1
    ``batch``             9          9             0
    ``progress``          7          7             1
    ====================  =========  ============  ====
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        budget: float | None = 0.02,
        quantities: Sequence[str] = _DEFAULT,
        loss_fn: LossFn | None = None,
        outputs: OutputsFn | None = None,
        probe_batches: int = 1,
        probe_fraction: float = 0.25,
        probe_size: int | None = None,
        probe_weight: str | None = None,
        save_probe: bool = True,
        save_vectors: bool = True,
        layers: Sequence[str] | None = None,
        tol: float = 1e-2,
        max_matvecs: int = 40,
        memory_limit: float | None = None,
        loggers: Sequence[Any] | None = None,
        strict: bool = False,
        grace: float = GRACE,
        roles: Mapping[str, str] | None = None,
        geometry: str | Mapping[str, str] | None = None,
        on_finding: Callable[[Finding], object] | None = None,
        stop_on: Sequence[str] | None = None,
    ) -> None:
        """Check the arguments."""
        check_arguments(every_n_steps, budget, grace, quantities=quantities, layers=layers, loggers=loggers)
        check_probe(probe_batches, probe_fraction, loss_fn, probe_size, probe_weight)
        check_solver(quantities, outputs, tol, max_matvecs, memory_limit)
        check_switches(save_probe=save_probe, save_vectors=save_vectors)
        probe = partial(ProbeMeter, loss_fn, probe_batches, probe_fraction, probe_size, probe_weight, save=save_probe)
        self._every_n_steps = every_n_steps
        solver = (tol, max_matvecs, outputs, memory_limit, save_vectors)
        self._make_part = partial(
            sharpness_meters, interval=20, quantities=tuple(quantities), probe=probe, solver=solver
        )
        own_meters = partial(self._make_part, every_n_steps)
        super().__init__(own_meters, budget, layers, loggers, strict, grace, roles, geometry, on_finding, stop_on)


def sharpness_meters(
    every_n_steps: int | None,
    interval: int,
    quantities: Sequence[str],
    probe: partial[ProbeMeter],
    solver: tuple[float, int, OutputsFn | None, float | None, bool],
    may_shrink: bool = False,
) -> list[Meter]:
    """Make a probe and the meters that measure on it or on the next batch, in the order in which they are called."""
    kept = probe(second="bracket" in quantities, may_shrink=may_shrink)
    cadence = partial(Cadence, every_n_steps, interval)
    steps = UpdateCurvatureMeter(cadence(), kept, [q for q in quantities if q in _OF_STEPS])
    wanted = [q for q in quantities if q in _OF_SPECTRUM]
    meter = EigenvalueMeter(cadence(), kept, steps, wanted, *solver)
    kept.users = (steps, meter)
    found: list[Meter] = [kept, steps, meter]
    if set(quantities) & set(_OF_PROGRESS):
        found.append(ProgressMeter(cadence(), kept.loss_fn, kept.effects, solver[3], kept.saves))
    return found


def check_solver(
    quantities: Sequence[str], outputs: object, tol: float, max_matvecs: int, memory_limit: float | None
) -> None:
    """Raise TypeError or ValueError naming the argument that is wrong."""
    unknown = [q for q in quantities if q not in QUANTITIES]
    if unknown or not quantities:
        raise ValueError(f"quantities must be chosen from {', '.join(QUANTITIES)}; got {list(quantities)}.")
    if outputs is not None and not callable(outputs):
        raise ValueError(f"outputs must be a function of (module, batch), got {type(outputs).__name__}.")
    check_number("tol", tol, "0.01")
    check_count("max_matvecs", max_matvecs, least=8)
    if memory_limit is not None:
        check_number("memory_limit", memory_limit, "4.0 for 4 GiB")
    if not 0 < tol < 1:
        raise ValueError(f"tol must lie between 0 and 1, got {tol}.")
    if memory_limit is not None and not memory_limit > 0:
        raise ValueError(f"memory_limit must be a positive number of GiB, or None, got {memory_limit}.")
