"""The rate advisor as a Lightning callback."""

from dynamon.callbacks.monitor import Monitor
from dynamon.monitoring import rate_advisor


class RateAdvisor(rate_advisor.RateAdvisor, Monitor):
    """The callback has the documentation of the monitor."""

    __doc__ = rate_advisor.RateAdvisor.__doc__
