"""The sharpness monitor as a Lightning callback."""

from dynamon.callbacks.monitor import Monitor
from dynamon.monitoring import sharpness_monitor


class SharpnessMonitor(sharpness_monitor.SharpnessMonitor, Monitor):
    """The callback has the documentation of the monitor."""

    __doc__ = sharpness_monitor.SharpnessMonitor.__doc__
