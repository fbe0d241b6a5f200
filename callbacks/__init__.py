"""Lightning callbacks: when to measure, where to log, what to save."""

from dynamon.callbacks.dynamics import DynamicsMonitor
from dynamon.callbacks.gradients import GradientMonitor
from dynamon.callbacks.layerwise_lr import LayerwiseLR, NoiseAdaptiveLR
from dynamon.callbacks.sharpness import SharpnessMonitor
from dynamon.callbacks.weights import WeightMonitor

__all__ = [
    "DynamicsMonitor",
    "GradientMonitor",
    "LayerwiseLR",
    "NoiseAdaptiveLR",
    "SharpnessMonitor",
    "WeightMonitor",
]
