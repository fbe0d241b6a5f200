"""All thresholds of the rules.

They are round numbers, neither from a paper nor fitted. Each was chosen so that the healthy runs of
``tests/dynamon/health/test_findings.py`` (synthetic ones with noise of up to 60 % and a correlation of up to 0.9
between readings, Cauchy noise, random walks), ``tests/callbacks/test_health_runs.py`` (six real networks, gradient
descent at the edge of stability) and ``tests/cases/test_rules.py`` give no finding, and that the faults injected there
are found. The comments give further reasons.
"""

# Readings.
FEW = 3  # readings from the first one on, when nothing else is known
CONSECUTIVE = 5  # readings that must agree: three consecutive bad batches happen and pass
LONG = 10  # readings to the end, for what may be a pause
PAST = 20  # readings that a jump is compared with, and from which noise is known
SETTLING = 20  # consecutive overflows from the start: a gradient scaler halves its scale of 2^16 to below 1

# Factors.
RATE_JUMP = 2.1  # of a learning rate at once: BackboneFinetuning doubles one at each epoch
STEP_JUMP = 3.0  # of the updates of all layers, beside rate and gradient
JUMP = 10.0  # of a norm; learning alone changes gradients by a few times within a few readings
MOVED_TIMES = 100  # above what rounding moves, for a layer that "moved": the bias before a BatchNorm moves by rounding
GRADIENT_GROWTH = 3.0  # of the gradient's norm, beside a loss that rises: less than that is noise of batches
LARGE_UPDATE = 0.5  # of the weight in one step; usual is 1e-3, and 0.1 under high rates at the start
HARD_CLIPPING = 1e-3  # what clipping leaves; sums over tokens come to a hundredth
FAR_ABOVE = 2.0  # stability ratio: a probe's may well read some tenths above 1

# Cosines of successive gradients.
ALIKE_GRADIENTS = 0.9  # of one batch again and again, until it is learned by heart
UNLIKE_GRADIENTS = 0.5  # median before: batches of healthy runs are below it once the first steps are over

# Activations, on the probe.
DEAD_UNITS = (
    0.6  # of an activation function's units; narrow ReLU layers under the default initialisation begin with half
)
STILL_ALIVE = (
    0.25  # of the units or entries that lived at the readings before: learning takes more than one to get there
)
LEAST_DEATH = 0.1  # of all units or entries, from one reading to the next
OUTLIER_KURTOSIS = 50.0  # normal entries have 3, those after a ReLU 6 to 20; ten times this is too much from the start
OUTLIER_PEAK = 30.0  # largest entry over the root mean square; that of a million normal entries is 5
LARGE_LOGIT = 100.0  # of attention: neighbouring bfloat16 numbers are 0.5 apart, and exp(100) leaves one key
SHARP_ENTROPY, FLAT_ENTROPY = 0.05, 0.25  # of attention, in parts of that of equal weights: collapsed, and not so
RESIDUAL_FACTOR, BLOCK_FACTOR = 100.0, 2.0  # of the residual stream over all blocks, and in each
LEAST_BLOCKS = 4  # fewer tell no trend with depth
VANISHED_GRADIENT = 1e-6  # of an output, in parts of the largest; sizes of outputs alone make 1e-3

# Standard deviations of a single reading.
SPIKE = 7.0  # of a step above its usual level: one number in 100,000 is above it where noise has exponential tails
INPUT_SIZE, INPUT_SPREAD = 3.0, 0.1  # times the usual size and spread of a batch, from which these are spikes
EVERYWHERE = 0.9  # of all layers, about as far above their levels as the farthest one
LOSS_SHIFT = 7.0  # of the cumulative sum of deviations, each less 3/4: once in 180,000 independent normal numbers
LASTING_SHIFT = 100  # steps after which a loss that has shifted is a warning
NOISE_SIGMAS = 6.0
LOSS_NOISE_SIGMAS = 8.0  # for the loss, whose batches come in an order and may resemble their neighbours
CLEAR_SIGMAS = 3.0  # where nine tenths of many readings agree already
GROWING_NOISE_SIGMAS = 2.5  # where noise grew with the loss: four standard errors of a median of five

# Rounding.
ROUNDING = 1e-6  # relative, of float32
DEAD_GRADIENT = 1e-12  # share of the median layer's gradient; rounding where a gradient is zero in theory leaves 1e-9
ROUNDING_GRADIENT = 1e-6  # share of the median layer's gradient that such rounding never reaches, in float32
STILL_UPDATE = 1e-8  # update over weight that float32 does not resolve
ZERO_RATIO = 1e-6  # that steering gives a layer: float32 weights then hardly move
LOSS_ROUNDING = 1e-6  # of the loss's size: float32 and a mean over a batch
MOST_LOST = 0.9  # of a layer's updates or decay, in entries; steps of half precision under a good rate lose up to half
HALF_PRECISION_BITS = 11  # significant bits of float16
ENDING_RATE = 0.1  # of the largest rate so far: what a schedule ends in loses more and more
RISING_RATE = 1.01  # growth within the last readings, in a warm-up
SINGLE_DIRECTION = 1.01  # stable rank of a matrix of rank one, with room for the rounding of sigma_max
WIDE_SIDE = 8  # the smaller side of a matrix from which rank one means something
