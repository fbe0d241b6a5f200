"""The dynamics monitor as a Lightning callback."""

from dynamon.callbacks.monitor import Monitor
from dynamon.monitoring import dynamics_monitor


class DynamicsMonitor(dynamics_monitor.DynamicsMonitor, Monitor):
    """The callback has the documentation of the monitor."""

    __doc__ = dynamics_monitor.DynamicsMonitor.__doc__
