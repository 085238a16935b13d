"""Snapshots: the documented bytes, on every backend; and nothing else is ever taken for one."""

import pickle
import struct
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import xxhash

from autoclip_core import NormHistory, SnapshotError

from .reference import PERCENTILES, SHAPES, assert_same_bits, make_norms

HEADER = struct.Struct("<8sHHIQQQ16s")
FIELDS = ("magic", "major", "minor", "length", "flags", "count", "window", "zero")

# One line for each golden file. Those of 10,000 norms and more are not kept: they are made again, to the same checksum.
GOLDEN = Path(__file__).parent / "golden"
GOLDEN_SUMS = {name: digest for digest, name in map(str.split, (GOLDEN / "SHA256SUMS").read_text().splitlines())}


def snapshot_of(norms, window=0, **lies):
    """The snapshot of these norms as autoclip.h draws it, with both checksums right whatever the header says."""
    values = (b"\x89ACH\r\n\x1a\n", 1, 0, 64, int(window > 0), len(norms), window, bytes(16))
    header = HEADER.pack(*(dict(zip(FIELDS, values, strict=True)) | lies).values())
    body = np.asarray(norms, dtype="<f8").tobytes()
    return header + xxhash.xxh64_digest(header)[::-1] + body + xxhash.xxh64_digest(body)[::-1]


def history_of(norms, window=None, backend=None):
    history = NormHistory(window, backend)
    history.extend(norms)
    return history


def golden(name):
    """The bytes of a golden file, its norms in the order in which they came, and its window."""
    _, kind, pushed = name.split("-")
    count = int(pushed)
    norms = np.arange(count) * 7919 % 104_729 / 1000  # no libm and no generator: the same for ever
    window = max(3, count // 2) if kind == "window" else None
    if count < 10_000:
        return (GOLDEN / name).read_bytes(), norms, window
    return snapshot_of(norms[-window:], window) if window else snapshot_of(np.sort(norms)), norms, window


def refused(snapshot, match="not a snapshot"):
    with pytest.raises(SnapshotError, match=match) as caught:
        NormHistory.from_bytes(snapshot)
    assert isinstance(caught.value, ValueError)


def made_later(norms, window=0, more=b"", **lies):
    """The snapshot of a version that does not exist yet: a minor of 1, and `more` header after the 64 bytes."""
    values = (b"\x89ACH\r\n\x1a\n", 1, 1, 64 + len(more), int(window > 0), len(norms), window, bytes(16))
    header = HEADER.pack(*(dict(zip(FIELDS, values, strict=True)) | lies).values())
    body = more + np.asarray(norms, dtype="<f8").tobytes()
    return header + xxhash.xxh64_digest(header)[::-1] + body + xxhash.xxh64_digest(body)[::-1]


@pytest.mark.parametrize("window", [0, 3, 100])
@pytest.mark.parametrize(
    "additions",
    [
        {},
        {"minor": 65535},
        {"zero": bytes(range(16))},
        {"more": bytes(range(8))},
        {"more": bytes(range(40)), "zero": b"x" * 16},
        {"more": b"\xff" * 4096},
    ],
)
def test_snapshot_of_a_later_minor_is_read_without_what_it_adds(additions, window):
    norms = [1.0, 2.0, 3.0]
    for flags in (0, 1 << 32, 1 << 63):
        later = made_later(norms, window, **{"flags": flags | (window > 0)} | additions)
        history = NormHistory.from_bytes(later)
        history.check()
        assert history.to_bytes() == snapshot_of(norms, window)  # this release's own, which has nothing else


@pytest.mark.parametrize("minor", [1, 7])
@pytest.mark.parametrize("bit", range(1, 32))
def test_flag_that_no_reader_may_ignore_is_a_later_format(bit, minor):
    later = made_later([1.0, 2.0], minor=minor, flags=1 << bit)
    refused(later, "later release")
    refused(later[:-1] + bytes([later[-1] ^ 1]))  # damaged, not later


@pytest.mark.parametrize("minor", [0, 1])
@pytest.mark.parametrize(
    "lies",
    [
        {"length": 0},
        {"length": 8},
        {"length": 56},
        {"length": 65},
        {"length": 68},
        {"length": 72},
        {"length": 64 + 8 * 3},
        {"length": 64 + 8 * 4},
        {"length": 2**32 - 8},
        {"count": 2},
        {"count": 4},
        {"count": 2**61},
        {"window": 5, "flags": 0},
        {"flags": 1},
        {"flags": 1, "window": 2},
        {"major": 0},
    ],
)
def test_snapshot_whose_header_lies_is_refused(lies, minor):
    refused(made_later([1.0, 2.0, 3.0], **{"minor": minor} | lies))


@pytest.mark.parametrize(
    "additions", [{"zero": b"x" + bytes(15)}, {"flags": 2}, {"flags": 1 << 32}, {"flags": 1 << 63}, {"more": bytes(8)}]
)
def test_snapshot_of_this_minor_has_no_additions(additions):
    refused(made_later([1.0], minor=0, **additions))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 31, 128, 257, 6000])
def test_snapshot_is_the_documented_bytes(shape, count):
    norms = make_norms(shape, count) + 0.0
    assert history_of(norms).to_bytes() == snapshot_of(np.sort(norms))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [1, 4, 257, 6000])
@pytest.mark.parametrize("count", [0, 1, 4, 5, 600, 7001])
def test_snapshot_of_a_window_has_the_oldest_first(count, window, shape):
    norms = make_norms(shape, count) + 0.0
    history = NormHistory(window)
    for part in np.array_split(norms, 3):
        history.extend(part)
    assert history.to_bytes() == snapshot_of(norms[-window:], window)


@pytest.mark.parametrize("which", ["backend", "other_backend"])
@pytest.mark.parametrize("name", GOLDEN_SUMS)
def test_golden_snapshot_is_read_and_written_as_ever(name, which, request):
    backend = request.getfixturevalue(which)
    snapshot, norms, window = golden(name)
    assert sha256(snapshot).hexdigest() == GOLDEN_SUMS[name]
    history = NormHistory.from_bytes(snapshot, backend)
    history.check()
    kept = norms[-(window or 0) :]
    assert (history.backend, history.window) == (backend, window)
    assert_same_bits(history.values(), np.sort(kept))
    if len(kept) > 0:
        assert_same_bits([history.percentile(p) for p in PERCENTILES], np.percentile(kept, PERCENTILES))
    assert history.to_bytes() == snapshot
    assert history_of(norms, window, backend).to_bytes() == snapshot


def test_golden_snapshots_are_all_there():
    sizes = [0, *(10**k for k in range(7)), 2]
    assert set(GOLDEN_SUMS) == {f"1.0-{kind}-{size}" for kind in ("full", "window") for size in sizes}
    kept = {name for name in GOLDEN_SUMS if int(name.split("-")[2]) < 10_000}
    assert {file.name for file in GOLDEN.iterdir()} == kept | {"SHA256SUMS", "big-endian"}


@pytest.mark.parametrize("which", ["backend", "other_backend"])
def test_snapshot_of_the_other_byte_order_is_refused(which, request):
    # As a machine would write one that forgot that the format is little-endian on every machine.
    snapshot = (GOLDEN / "big-endian").read_bytes()
    with pytest.raises(SnapshotError, match=f"These {len(snapshot)} bytes are not a snapshot"):
        NormHistory.from_bytes(snapshot, request.getfixturevalue(which))


@pytest.mark.parametrize("window", [None, 1, 300, 2**62])
@pytest.mark.parametrize("count", [0, 1, 2, 127, 128, 129, 256, 257, 5376, 5377, 5632, 11_000])
def test_snapshot_loads_as_the_same_history(count, window):
    norms = make_norms("log-normal", count)
    history = history_of(norms, window)
    loaded = NormHistory.from_bytes(history.to_bytes())
    loaded.check()
    assert (len(loaded), loaded.window) == (len(history), window)
    assert_same_bits(loaded.values(), history.values())
    more = make_norms("drifting", 700)
    assert_same_bits(loaded.observe_many(more, [10.0]), history.observe_many(more, [10.0]))
    assert loaded.to_bytes() == history.to_bytes()
    loaded.check()


KINDS_OF_BYTES = {
    "bytes": bytes,
    "bytearray": bytearray,
    "memoryview": memoryview,
    "pickle buffer": pickle.PickleBuffer,
    "bytes of an array": lambda snapshot: np.frombuffer(snapshot, np.uint8),
    "words": lambda snapshot: memoryview(snapshot).cast("Q"),
    "every other byte": lambda snapshot: memoryview(np.repeat(np.frombuffer(snapshot, np.uint8), 2))[::2],
}


@pytest.mark.parametrize("kind", KINDS_OF_BYTES.values(), ids=KINDS_OF_BYTES)
@pytest.mark.parametrize("window", [None, 2])
def test_snapshot_loads_from_every_kind_of_bytes(kind, window):
    snapshot = history_of([3.0, 1.0], window).to_bytes()
    given = kind(bytearray(snapshot))
    assert NormHistory.from_bytes(given).values().tolist() == [1.0, 3.0]
    assert memoryview(given).tobytes() == snapshot


def test_snapshot_may_travel_beside_the_pickle():
    history = history_of(make_norms("log-normal", 1000))
    beside = []
    pickled = pickle.dumps(history, protocol=5, buffer_callback=beside.append)
    assert len(pickled) < 200
    assert [buffer.raw().tobytes() for buffer in beside] == [history.to_bytes()]
    for buffers in (beside, [buffer.raw().tobytes() for buffer in beside], [bytearray(beside[0].raw())]):
        assert pickle.loads(pickled, buffers=buffers).to_bytes() == history.to_bytes()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_history_is_pickled_by_every_protocol(protocol):
    history = history_of(make_norms("log-normal", 1000), 300)
    assert pickle.loads(pickle.dumps(history, protocol)).to_bytes() == history.to_bytes()


def test_snapshot_made_by_hand_loads():
    # Ours agree with our own reader; this one agrees with the header file alone.
    assert NormHistory.from_bytes(snapshot_of([1.0, 2.0])).values().tolist() == [1.0, 2.0]
    assert NormHistory.from_bytes(snapshot_of([2.0, 1.0], window=5)).to_bytes() == snapshot_of([2.0, 1.0], window=5)


def test_snapshot_with_negative_zeros_loads_as_zeros():
    for snapshot in (snapshot_of([-1.0, 0.0, -0.0]), snapshot_of([0.0, -0.0, -1.0], window=3)):
        history = NormHistory.from_bytes(snapshot)
        assert_same_bits(history.values(), [-1.0, 0.0, 0.0])
        history.check()


def test_snapshot_of_a_later_minor_format_loads():
    assert NormHistory.from_bytes(snapshot_of([1.0], minor=7)).values().tolist() == [1.0]


def test_snapshot_of_a_later_major_format_names_the_way_out():
    refused(snapshot_of([1.0], major=2), "later release of autoclip-core; install")


@pytest.mark.parametrize("window", [None, 3, 9])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_snapshot_with_any_flipped_bit_is_refused(count, window):
    snapshot = history_of(make_norms("log-normal", count), window).to_bytes()
    for bit in range(8 * len(snapshot)):
        damaged = bytearray(snapshot)
        damaged[bit // 8] ^= 1 << bit % 8
        refused(bytes(damaged), "not a snapshot|later release")


@pytest.mark.parametrize("window", [None, 9])
def test_snapshot_cut_at_any_byte_is_refused(window):
    snapshot = history_of(make_norms("log-normal", 5), window).to_bytes()
    for size in range(len(snapshot)):
        refused(snapshot[:size], f"These {size} bytes")
        refused(snapshot[size + 1 :])
    for more in range(1, 20):
        refused(snapshot + bytes(more))
    refused(snapshot + snapshot)


@pytest.mark.parametrize("count", [2**60, 2**61, 2**63, 2**64 - 1, 2**61 + 2, 0, 1, 3])
@pytest.mark.parametrize("window", [0, 2, 2**60, 2**64 - 1])
def test_snapshot_that_lies_about_its_count_is_refused(window, count):
    refused(snapshot_of([1.0, 2.0], window, count=count))


@pytest.mark.parametrize(
    "snapshot",
    [
        snapshot_of([2.0, 1.0]),
        snapshot_of([1.0, np.nextafter(1.0, 0.0)]),
        snapshot_of([1.0, 2.0, 3.0], window=2),
        snapshot_of([1.0], flags=1),
        snapshot_of([1.0], flags=2),
        snapshot_of([1.0], flags=2**63),
        snapshot_of([1.0], window=3, flags=0),
        snapshot_of([1.0], window=3, flags=3),
        snapshot_of([1.0], major=0),
        snapshot_of([1.0], length=72),
        snapshot_of([1.0], length=0),
        snapshot_of([1.0], zero=b"\x01" + bytes(15)),
        snapshot_of([1.0], zero=bytes(15) + b"\x80"),
        snapshot_of([1.0], magic=b"\x89ACH\n\x1a\n\x00"),
        *(snapshot_of(sorted([value, 1.0]), window) for value in (np.nan, np.inf, -np.inf) for window in (0, 5)),
        snapshot_of(np.r_[np.arange(1000.0), 998.0]),
        snapshot_of(np.r_[np.arange(6000.0), np.inf]),
    ],
)
def test_snapshot_that_holds_what_no_history_can_is_refused(snapshot):
    refused(snapshot)


@pytest.mark.parametrize(
    "foreign",
    [
        b"",
        b"\x89",
        bytes(72),
        bytes(1000),
        b"\xff" * 1000,
        b"a line of text\n" * 20,
        b"\x89PNG\r\n\x1a\n" + bytes(64),
        b"\x93NUMPY\x01\x00" + bytes(120),
        snapshot_of([1.0, 2.0]).replace(b"\r\n", b"\n"),
        snapshot_of([1.0, 2.0])[::-1],
        snapshot_of([1.0, 2.0]).hex().encode(),
        np.arange(72, dtype=np.uint8).tobytes(),
    ],
)
def test_snapshot_that_is_foreign_bytes_is_refused(foreign):
    refused(foreign, f"These {len(foreign)} bytes")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("count", [0, 1, 5, 257, 6000])
def test_backends_write_the_same_bytes_and_read_each_other(count, window, shape, backend, other_backend):
    norms = make_norms(shape, count)
    ours, theirs = (history_of(norms, window, name) for name in (backend, other_backend))
    assert (ours.backend, theirs.backend) == (backend, other_backend)
    assert ours.to_bytes() == theirs.to_bytes()
    from_theirs = NormHistory.from_bytes(theirs.to_bytes(), backend)
    from_ours = NormHistory.from_bytes(ours.to_bytes(), other_backend)
    assert (from_theirs.backend, from_ours.backend) == (backend, other_backend)
    more = make_norms(shape, 300, seed=1)
    thresholds = [h.observe_many(more, [0.0, 10.0, 99.999]) for h in (ours, theirs, from_ours, from_theirs)]
    for other in thresholds[1:]:
        assert_same_bits(other, thresholds[0])
    assert ours.to_bytes() == theirs.to_bytes() == from_ours.to_bytes() == from_theirs.to_bytes()
    from_ours.check()
    from_theirs.check()


def test_backends_merge_into_each_other(backend, other_backend):
    for into, other in ((backend, other_backend), (other_backend, backend)):
        history = history_of([2], backend=into)
        history.merge(history_of([3, 1], backend=other))
        history.merge(history_of([5, 4, 0], 2, other))
        assert history.values().tolist() == [0, 1, 2, 3, 4]
        assert history.backend == into
