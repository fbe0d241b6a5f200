"""Lightning callbacks: when to measure, where to log, what to save."""

from dynamon.callbacks.dynamics import DynamicsMonitor
from dynamon.callbacks.gradients import GradientMonitor
from dynamon.callbacks.layerwise_lr import LayerwiseLR, NoiseAdaptiveLR
from dynamon.callbacks.meter import Cadence, Meter, Run
from dynamon.callbacks.monitor import Monitor
from dynamon.callbacks.sharpness import SharpnessMonitor
from dynamon.callbacks.weights import WeightMonitor

__all__ = [
    "Cadence",
    "DynamicsMonitor",
    "GradientMonitor",
    "LayerwiseLR",
    "Meter",
    "Monitor",
    "NoiseAdaptiveLR",
    "Run",
    "SharpnessMonitor",
    "WeightMonitor",
]
