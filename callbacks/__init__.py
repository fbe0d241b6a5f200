"""Lightning callbacks: when to measure, where to log, what to save."""

from dynamon.callbacks.dynamics import DynamicsMonitor
from dynamon.callbacks.gradients import GradientMonitor
from dynamon.callbacks.layerwise_lr import LayerwiseLR, NoiseAdaptiveLR
from dynamon.callbacks.sharpness import SharpnessMonitor
from dynamon.callbacks.weights import WeightMonitor
from dynamon.monitoring.cadence import Cadence
from dynamon.monitoring.meter import Meter
from dynamon.monitoring.monitor import Monitor
from dynamon.monitoring.run_context import RunContext
from dynamon.monitoring.run_context import RunContext as Run

__all__ = [
    "Cadence",
    "DynamicsMonitor",
    "GradientMonitor",
    "LayerwiseLR",
    "Meter",
    "Monitor",
    "NoiseAdaptiveLR",
    "Run",
    "RunContext",
    "SharpnessMonitor",
    "WeightMonitor",
]
