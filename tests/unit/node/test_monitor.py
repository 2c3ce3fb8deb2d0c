"""What a node says of its own health."""

import trio
import trio.lowlevel

from aivillage.node import monitor
from aivillage.node.monitor import Monitor


def test_the_loops_lag_is_that_of_the_last_seconds_asked_for(tmp_path):
    found = Monitor(tmp_path)
    assert found.loop_lag_ms() == {"p50": 0.0, "p99": 0.0}
    found._lags.extend([0.5] * 100 + [0.001] * 50)
    assert found.loop_lag_ms()["p99"] == 500
    beats = 50 * monitor.BEAT_SECONDS
    assert found.loop_lag_ms(beats) == {"p50": 1.0, "p99": 1.0}
    assert found.loop_lag_ms(beats + monitor.BEAT_SECONDS)["p99"] == 500
    assert found.loop_lag_ms(0.0) == {"p50": 1.0, "p99": 1.0}


async def test_it_counts_the_loops_tasks(tmp_path):
    found = Monitor(tmp_path)
    before = found.tasks()
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(trio.sleep_forever)
        await trio.lowlevel.checkpoint()
        assert found.tasks() == before + 3
        nursery.cancel_scope.cancel()
    assert found.tasks() == before
