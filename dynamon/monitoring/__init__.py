"""The engine that measures quantities of a run, in whatever training loop."""

from dynamon.monitoring.activation_monitor import ActivationMonitor
from dynamon.monitoring.dynamics_monitor import DynamicsMonitor
from dynamon.monitoring.gradient_monitor import GradientMonitor
from dynamon.monitoring.monitor import Monitor
from dynamon.monitoring.rate_advisor import RateAdvisor
from dynamon.monitoring.sharpness_monitor import SharpnessMonitor
from dynamon.monitoring.watch import Watch
from dynamon.monitoring.weight_monitor import WeightMonitor

__all__ = [
    "ActivationMonitor",
    "DynamicsMonitor",
    "GradientMonitor",
    "Monitor",
    "RateAdvisor",
    "SharpnessMonitor",
    "Watch",
    "WeightMonitor",
]
