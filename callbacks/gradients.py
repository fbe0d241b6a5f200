"""The gradient monitor as a Lightning callback."""

from dynamon.callbacks.monitor import Monitor
from dynamon.monitoring import gradient_monitor


class GradientMonitor(gradient_monitor.GradientMonitor, Monitor):
    """The callback has the documentation of the monitor."""

    __doc__ = gradient_monitor.GradientMonitor.__doc__
