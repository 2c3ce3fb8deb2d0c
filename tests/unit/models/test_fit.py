"""What fits this machine, and the reason that is told."""

from aivillage.models.library.fit import Candidate, Room, advise, published

GB = 1_000_000_000


def model(name, weights, *, memory=None, disk=0):
    return Candidate(
        name=name, source="file:/x", licence="", parameters=weights, active_parameters=weights,
        memory_bytes=4 * weights if memory is None else memory, disk_bytes=disk,
    )  # fmt: skip


def told(candidates, **room):
    here = {"memory_bytes": 4 * GB, "cores": 2, "disk_bytes": 10 * GB} | room
    return advise(candidates, Room(**here))


def test_memory_and_disk_hold_at_one_byte_more():
    at, above = model("at", 1, memory=4 * GB, disk=10 * GB), model("above", 1, memory=4 * GB + 1)
    wide = model("wide", 1, disk=10 * GB + 1)
    fits = {a.model.name: a.fits for a in told([at, above, wide])}
    assert fits == {"at": True, "above": False, "wide": False}


def test_the_largest_that_is_fast_enough_is_recommended():
    slow = model("slow", 3 * GB, memory=GB)
    advice = told([model("small", GB // 10), model("good", GB // 2), slow])
    assert [(a.model.name, a.recommended) for a in advice] == [
        ("slow", False), ("good", True), ("small", False),
    ]  # fmt: skip
    assert "slower than people read" in advice[0].reason


def test_where_all_are_slow_the_smallest_is_recommended_and_where_none_fits_none():
    two = [model("a", 4 * GB, memory=GB), model("b", 5 * GB, memory=GB)]
    assert [a.model.name for a in told(two) if a.recommended] == ["a"]
    assert not [a for a in told(two, memory_bytes=0) if a.recommended]


def test_a_reason_says_what_lacks():
    (advice,) = told([model("m", 1, memory=5 * GB, disk=11 * GB)])
    assert advice.reason == (
        "needs 5.0 GB of memory, 4.0 GB may go; needs 11.0 GB of disk, 10.0 GB are free"
    )


def test_published_models_are_all_pulled_from_somewhere():
    assert published()
    assert all(m.source.startswith("hf:") and m.licence and m.disk_bytes for m in published())
