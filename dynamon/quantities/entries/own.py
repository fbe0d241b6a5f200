"""What dynamon says of itself: its cost, its failures, and the loss its readings were taken for."""

from dynamon.quantities.registry import Condition, Quantity

DYNAMON = (
    Quantity(
        "dynamon/loss",
        "the loss that ``training_step`` returned for the step's last batch",
        "loss",
        condition=Condition.RETURNED_LOSS,
    ),
    Quantity(
        "dynamon/overhead",
        "time of monitoring over training time without it",
        "share",
        chart="share of training time",
        row="overhead",
    ),
    Quantity("dynamon/failures", "measurements that failed so far", "measurements", chart="failures"),
    Quantity(
        "dynamon/steering_overhead",
        "time of reading gradients and of the rule over training time without it",
        "share",
        cadence="steering",
    ),
)
