"""Stop with one sentence where the package is not installed: two of its folders lie outside `dynamon/`."""

import importlib.util

try:
    missing = "" if importlib.util.find_spec("dynamon.callbacks") else "the package is not installed"
except ModuleNotFoundError as error:
    missing = str(error)

if missing:
    raise SystemExit(
        f"dynamon.callbacks cannot be imported ({missing}): run `make test`, or `pip install -e '.[test]'`."
    )
