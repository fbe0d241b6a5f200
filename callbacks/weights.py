"""The weight monitor as a Lightning callback."""

from dynamon.callbacks.monitor import Monitor
from dynamon.monitoring import weight_monitor


class WeightMonitor(weight_monitor.WeightMonitor, Monitor):
    """The callback has the documentation of the monitor."""

    __doc__ = weight_monitor.WeightMonitor.__doc__
