"""Lightning callbacks: monitors and steering that a Trainer calls."""

from dynamon.callbacks.activations import ActivationMonitor
from dynamon.callbacks.dynamics import DynamicsMonitor
from dynamon.callbacks.gradients import GradientMonitor
from dynamon.callbacks.layerwise_lr import LayerwiseLR
from dynamon.callbacks.monitor import Monitor
from dynamon.callbacks.noise_adaptive_lr import NoiseAdaptiveLR
from dynamon.callbacks.rate_advisor import RateAdvisor
from dynamon.callbacks.sharpness import SharpnessMonitor
from dynamon.callbacks.spike_guard import SpikeGuard
from dynamon.callbacks.weights import WeightMonitor
from dynamon.monitoring.cadence import Cadence
from dynamon.monitoring.meter import Meter
from dynamon.monitoring.run_context import RunContext
from dynamon.monitoring.run_context import RunContext as Run

__all__ = [
    "ActivationMonitor",
    "Cadence",
    "DynamicsMonitor",
    "GradientMonitor",
    "LayerwiseLR",
    "Meter",
    "Monitor",
    "NoiseAdaptiveLR",
    "RateAdvisor",
    "Run",
    "RunContext",
    "SharpnessMonitor",
    "SpikeGuard",
    "WeightMonitor",
]
