"""The activation monitor as a Lightning callback."""

from dynamon.callbacks.monitor import Monitor
from dynamon.monitoring import activation_monitor


class ActivationMonitor(activation_monitor.ActivationMonitor, Monitor):
    """The callback has the documentation of the monitor."""

    __doc__ = activation_monitor.ActivationMonitor.__doc__
