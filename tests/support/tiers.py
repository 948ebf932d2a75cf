"""How much a run of the suite proves: `make test` every kind of case, `make test-all` (TESTS_THOROUGH=1) every case."""

import os

THOROUGH = os.environ.get("TESTS_THOROUGH") == "1"
