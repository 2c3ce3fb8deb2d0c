"""What many answers at once leave behind, on real daemons."""

import pytest

from aivillage.models.inference import catalogue
from aivillage.protocols.errors import ConfigError
from tests.integration import serving_soak

try:
    catalogue.weights_path(catalogue.MODELS[catalogue.DEFAULT])
    MISSING = ""
except ConfigError as reason:
    MISSING = str(reason)
needs_model = pytest.mark.skipif(bool(MISSING), reason=MISSING or "present")


@pytest.mark.slow
@needs_model
@pytest.mark.timeout(300)
def test_a_hundred_requests_with_cancels_and_a_killed_worker_leave_nothing_behind():
    found = serving_soak.run(requests=100, kills=2, seed=7)
    assert found["ok"], found
    assert found["kills"] == 2
