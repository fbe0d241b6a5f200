"""``python -m dynamon.cli``, for where the ``dynamon`` script is not on the path."""

import sys

from dynamon.cli import main

sys.exit(main())
