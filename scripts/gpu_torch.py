#!/usr/bin/env python3
"""What PyTorch reaches on this card, to stand beside the figures of vmem.

    scripts/gpu_torch.py                          everything: JSON on stdout, a table on stderr
    scripts/gpu_torch.py --only copies,latency    some of: copies, duplex, gather, file, latency
    scripts/gpu_torch.py --json FILE              the JSON into a file as well
    scripts/gpu_torch.py --seconds 2              for each figure; 0.5 unless told
    scripts/gpu_torch.py --file-dir DIR           where the file of `file` is written; the disk under it is what is measured

Needs torch with CUDA, and nothing else. Every buffer that a copy wrote is compared with what it should hold, before the
timed repetitions and after them: a copy that is wrong has no figure. Medians; GB is 10^9 bytes.

Exits with 0 if all was measured, 1 if bytes were wrong or something failed, 2 if there is no torch or no CUDA.
"""

import argparse
import ctypes
import itertools
import json
import mmap
import os
import statistics
import sys
import tempfile
import threading
import time

KIB, MIB = 1 << 10, 1 << 20
SIZES = [64 * KIB, MIB, 16 * MIB, 64 * MIB]
DEPTHS = [1, 8]
ROWS, ROW_BYTES, TABLE_ROWS = 4096, 16 * KIB, 32768
PIECE_BYTES = 4 * MIB
READERS = [1, 8]
REPETITIONS_MIN = 5
SECTIONS = ["copies", "duplex", "gather", "file", "latency"]

torch = None  # Set by `find_torch`: its absence is told, not raised.


class WrongBytes(Exception):
    """A copy that was to be timed did not copy."""


def missing(reason):
    print(f"gpu_torch: nothing was measured: {reason}", file=sys.stderr)
    sys.exit(2)


def find_torch():
    """Ends the script where there is no torch, or no device for it."""
    global torch
    try:
        import torch as found
    except ImportError as error:
        missing(f"there is no torch for this Python ({sys.executable}): {error}")
    except OSError as error:
        missing(f"torch does not load: {error}")
    if found.version.cuda is None:
        missing(f"torch {found.__version__} was built without CUDA")
    if not found.cuda.is_available():
        missing(f"torch {found.__version__} (CUDA {found.version.cuda}) finds no CUDA device or no driver")
    torch = found


# ---------------------------------------------------------------- tools


def named(size):
    return f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB"


def check(what, got, expected):
    # On the host: the check is not to rest on the device alone.
    if not torch.equal(got.cpu(), expected.cpu()):
        raise WrongBytes(f"{what}: the bytes are not those of the source")


def random_bytes(size, seed):
    """The same for the same seed, never all zeros."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)


def pinned(size, seed=None):
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    if seed is None:
        buffer.zero_()
    else:
        buffer.copy_(random_bytes(size, seed))
    return buffer


def on_device(size, seed=None):
    buffer = torch.zeros(size, dtype=torch.uint8, device="cuda")
    if seed is not None:
        buffer.copy_(random_bytes(size, seed))
    return buffer


def repeated(seconds, once):
    """What `once` returns, again and again: for so long, and often enough for a median."""
    results, end = [], time.perf_counter() + seconds
    while len(results) < REPETITIONS_MIN or time.perf_counter() < end:
        results.append(once())
    return results


def checked(what, seconds, once, written, expected):
    """Times `once`, whose every repetition fills `written`; both before and after it holds what is expected."""
    for round_seconds in (0, seconds):
        for buffer in written:
            buffer.zero_()
        torch.cuda.synchronize()
        # The first round warms up too.
        results = repeated(round_seconds, once)
        torch.cuda.synchronize()
        for buffer, right in zip(written, expected):
            check(what, buffer, right)
    return results


def gb_per_s(size, seconds):
    return round(size / seconds / 1e9, 3)


def percentile(values, part):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))]


# ---------------------------------------------------------------- copies


def timed_batch(pairs, stream):
    """One batch of copies: the seconds by the device's clock, and by ours with one synchronise at its end."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began = time.perf_counter()
    with torch.cuda.stream(stream):
        first.record(stream)
        for to, source in pairs:
            to.copy_(source, non_blocking=True)
        last.record(stream)
    stream.synchronize()
    wall = time.perf_counter() - began
    return first.elapsed_time(last) / 1e3, wall


def copies(seconds, _options):
    """Pinned memory to the device and back, 1 and 8 copies in flight on one stream."""
    rows, stream = [], torch.cuda.Stream()
    for direction, size, depth in itertools.product(["to device", "to host"], SIZES, DEPTHS):
        up = direction == "to device"
        sources = [(pinned if up else on_device)(size, seed) for seed in range(1, depth + 1)]
        targets = [(on_device if up else pinned)(size) for _ in range(depth)]
        torch.cuda.synchronize()
        pairs = list(zip(targets, sources))
        what = f"{direction}, {named(size)}, {depth} in flight"
        times = checked(what, seconds, lambda: timed_batch(pairs, stream), targets, sources)
        rows.append({
            "direction": direction,
            "bytes": size,
            "in_flight": depth,
            "gb_per_s_events": gb_per_s(size * depth, statistics.median(t[0] for t in times)),
            "gb_per_s_wall": gb_per_s(size * depth, statistics.median(t[1] for t in times)),
            "repetitions": len(times),
        })
    return rows


def duplex(seconds, _options):
    """Both directions at once, on two streams: the sum of both."""
    rows = []
    up, down = torch.cuda.Stream(), torch.cuda.Stream()
    for size, depth in itertools.product(SIZES, DEPTHS):
        host_sources = [pinned(size, seed) for seed in range(1, depth + 1)]
        device_sources = [on_device(size, seed) for seed in range(101, depth + 101)]
        device_targets = [on_device(size) for _ in range(depth)]
        host_targets = [pinned(size) for _ in range(depth)]
        torch.cuda.synchronize()

        def both():
            first, *last = (torch.cuda.Event(enable_timing=True) for _ in range(3))
            began = time.perf_counter()
            first.record(up)
            down.wait_event(first)  # Neither has a start on the other.
            for slot in range(depth):
                with torch.cuda.stream(up):
                    device_targets[slot].copy_(host_sources[slot], non_blocking=True)
                with torch.cuda.stream(down):
                    host_targets[slot].copy_(device_sources[slot], non_blocking=True)
            last[0].record(up)
            last[1].record(down)
            up.synchronize()
            down.synchronize()
            wall = time.perf_counter() - began
            return max(first.elapsed_time(end) for end in last) / 1e3, wall

        what = f"both directions, {named(size)}, {depth} in flight"
        written, expected = device_targets + host_targets, host_sources + device_sources
        times = checked(what, seconds, both, written, expected)
        total = 2 * size * depth
        rows.append({
            "direction": "both",
            "bytes": size,
            "in_flight": 2 * depth,
            "gb_per_s_events": gb_per_s(total, statistics.median(t[0] for t in times)),
            "gb_per_s_wall": gb_per_s(total, statistics.median(t[1] for t in times)),
            "repetitions": len(times),
        })
    return rows


# ---------------------------------------------------------------- gather


def gather(seconds, _options):
    """4,096 rows of 16 KiB, scattered over a pinned table, into one buffer on the device. By the wall clock."""
    table = pinned(TABLE_ROWS * ROW_BYTES, 1).view(TABLE_ROWS, ROW_BYTES)
    picks = torch.randperm(TABLE_ROWS, generator=torch.Generator().manual_seed(2))[:ROWS]
    expected = table[picks]
    staging = pinned(ROWS * ROW_BYTES).view(ROWS, ROW_BYTES)
    target = on_device(ROWS * ROW_BYTES).view(ROWS, ROW_BYTES)
    # Views made beforehand: what is timed is the copies, not the slicing.
    sources, targets = [table[pick] for pick in picks.tolist()], list(target.unbind(0))

    def selected():
        torch.index_select(table, 0, picks, out=staging)
        target.copy_(staging, non_blocking=True)

    def row_by_row():
        for to, source in zip(targets, sources):
            to.copy_(source, non_blocking=True)

    def in_one_call():
        torch._foreach_copy_(targets, sources, non_blocking=True)

    ways = [("index_select on the host, one copy", selected), ("a copy for each row", row_by_row)]
    # Not public, and not in every version: the loop over the rows without Python in it.
    if hasattr(torch, "_foreach_copy_"):
        ways.append(("a copy for each row, one call (_foreach_copy_)", in_one_call))
    rows = []
    for name, way in ways:

        def once():
            began = time.perf_counter()
            way()
            torch.cuda.current_stream().synchronize()
            return time.perf_counter() - began

        times = checked(name, seconds, once, [target], [expected])
        rows.append({
            "way": name,
            "rows": ROWS,
            "row_bytes": ROW_BYTES,
            "gb_per_s_wall": gb_per_s(ROWS * ROW_BYTES, statistics.median(times)),
            "repetitions": len(times),
            "host_threads": torch.get_num_threads(),
        })
    return rows


# ---------------------------------------------------------------- file


def window(buffer):
    """The memory of a pinned tensor, for the system to read into. The tensor has to outlive it."""
    return memoryview((ctypes.c_char * buffer.numel()).from_address(buffer.data_ptr())).cast("B")


def read_fully(fd, into, offset):
    done = 0
    while done < len(into):
        count = os.preadv(fd, [into[done:]], offset + done)
        if count == 0:
            raise OSError(f"the file ends at {offset + done}")
        done += count


def write_file(path, expected):
    source = window(expected)
    with open(path, "wb", buffering=0) as file:
        done = 0
        while done < len(source):
            done += file.write(source[done : done + 64 * MIB])
        os.fsync(file.fileno())


def open_direct(path, probe):
    """A descriptor, and whether reads bypass the page cache. Found out by a trial."""
    direct = getattr(os, "O_DIRECT", 0)
    if direct and probe.data_ptr() % mmap.PAGESIZE == 0:
        try:
            fd = os.open(path, os.O_RDONLY | direct)
        except OSError:
            return os.open(path, os.O_RDONLY), False
        try:
            read_fully(fd, window(probe), 0)
            return fd, True
        except OSError:
            os.close(fd)
    return os.open(path, os.O_RDONLY), False


class Loader:
    """Reads pieces into its two pinned buffers in turn, and copies each to the device while it reads the next."""

    def __init__(self):
        self.stream = torch.cuda.Stream()
        self.buffers = [pinned(PIECE_BYTES) for _ in range(2)]
        self.windows = [window(buffer) for buffer in self.buffers]
        self.copied = [torch.cuda.Event() for _ in self.buffers]

    def load(self, fd, target, offsets):
        for turn, offset in enumerate(offsets):
            slot = turn % len(self.buffers)
            self.copied[slot].synchronize()  # The copy before has read the buffer.
            read_fully(fd, self.windows[slot], offset)
            with torch.cuda.stream(self.stream):
                target[offset : offset + PIECE_BYTES].copy_(self.buffers[slot], non_blocking=True)
                self.copied[slot].record(self.stream)
        self.stream.synchronize()


def load_all(loaders, fd, target):
    """All pieces of the file, each by the next of the threads."""
    offsets = range(0, target.numel(), PIECE_BYTES)
    failures = []

    def work(index, loader):
        try:
            loader.load(fd, target, offsets[index :: len(loaders)])
        except Exception as error:  # Told by the thread that waits.
            failures.append(error)

    began = time.perf_counter()
    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(loaders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return time.perf_counter() - began


def file(seconds, options):
    """4 MiB pieces of a file into one buffer on the device, through pinned buffers. By the wall clock."""
    size = options.file_mib * MIB // PIECE_BYTES * PIECE_BYTES
    expected, target, rows = pinned(size, 3), on_device(size), []
    with tempfile.TemporaryDirectory(prefix="gpu_torch-", dir=options.file_dir) as folder:
        path = os.path.join(folder, "pieces")
        write_file(path, expected)
        fd, direct = open_direct(path, pinned(PIECE_BYTES))
        try:
            for readers in READERS:
                loaders = [Loader() for _ in range(readers)]

                def once():
                    if not direct:  # Else the memory of the machine is measured.
                        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                    return load_all(loaders, fd, target)

                what = f"file, {readers} readers"
                times = checked(what, seconds, once, [target], [expected])
                rows.append({
                    "piece_bytes": PIECE_BYTES,
                    "file_bytes": size,
                    "readers": readers,
                    "bypasses_page_cache": direct,
                    "gb_per_s_wall": gb_per_s(size, statistics.median(times)),
                    "repetitions": len(times),
                })
        finally:
            os.close(fd)
    return rows


# ---------------------------------------------------------------- latency


def cycles_per_us():
    """How long the device's sleep is."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(2):  # The first warms up.
        first.record()
        torch.cuda._sleep(10_000_000)
        last.record()
        last.synchronize()
    return 10_000_000 / (first.elapsed_time(last) * 1e3)


def latency(seconds, _options):
    """From the end of a small kernel until Python runs again.

    The clocks of the device and of the host are set against each other by an event that the host is polling when it comes. So
    the figure is short by the delay with which polling sees an event, some µs; the way `polled` shows how much is left of
    it. Before the kernel the device is busy for 100 µs, so that the host is truly waiting when it ends.
    """
    if not hasattr(torch.cuda, "_sleep"):
        raise RuntimeError("this torch has no torch.cuda._sleep")
    per_us, cell = cycles_per_us(), torch.zeros(1, device="cuda")
    lead, wait = int(200 * per_us), int(100 * per_us)

    def polled(event):
        while not event.query():
            pass

    def synchronised(event):
        event.synchronize()

    ways = [
        ("event.synchronize, spinning", synchronised, False),
        ("event.synchronize, blocking", synchronised, True),
        ("polled", polled, False),
    ]
    rows = []
    for name, until, blocking in ways:

        def once():
            anchor = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True, blocking=blocking)
            torch.cuda._sleep(lead)
            anchor.record()
            torch.cuda._sleep(wait)
            cell.add_(1)
            end.record()
            if anchor.query():
                return None  # It came while the rest was queued: when is not known.
            polled(anchor)
            seen = time.perf_counter_ns()
            until(end)
            running = time.perf_counter_ns()
            return (running - seen) / 1e3 - anchor.elapsed_time(end) * 1e3

        repeated(0, once)
        cell.zero_()
        samples = repeated(max(seconds, 1), once)
        if cell.item() != len(samples):
            raise WrongBytes(f"{name}: {cell.item()} kernels of {len(samples)} ran")
        known = [sample for sample in samples if sample is not None]
        if len(known) < REPETITIONS_MIN:
            raise RuntimeError(f"{name}: the host was too slow to see the anchor {len(samples)} times")
        rows.append({
            "way": name,
            "p50_us": round(percentile(known, 0.50), 2),
            "p99_us": round(percentile(known, 0.99), 2),
            "repetitions": len(known),
        })
    return rows


# ---------------------------------------------------------------- telling


def described():
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "device": properties.name,
        "device_bytes": properties.total_memory,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
    }


def told(section, rows):
    """A table on stderr."""
    print(f"\n{section}: {globals()[section].__doc__.splitlines()[0]}", file=sys.stderr)
    columns = list(rows[0])
    cells = [columns] + [
        [named(row[key]) if key.endswith("bytes") else str(row[key]) for key in columns] for row in rows
    ]
    widths = [max(len(line[at]) for line in cells) for at in range(len(columns))]
    for line in cells:
        print("  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths)), file=sys.stderr)


def parsed():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help="of " + ", ".join(SECTIONS))
    parser.add_argument("--seconds", type=float, default=0.5, help="for each figure (0.5)")
    parser.add_argument("--json", metavar="FILE", help="writes the JSON there too")
    parser.add_argument("--file-dir", metavar="DIR", help="for the file that is read (the temporary directory)")
    parser.add_argument("--file-mib", type=int, default=1024, help="its size, and twice that in pinned and device memory (1024)")
    options = parser.parse_args()
    options.only = [name.strip() for name in options.only.split(",") if name.strip()]
    unknown = [name for name in options.only if name not in SECTIONS]
    if unknown or not options.only:
        parser.error(f"--only takes some of {', '.join(SECTIONS)}, not {', '.join(unknown) or 'nothing'}")
    if options.file_mib * MIB < PIECE_BYTES:
        parser.error("--file-mib: at least 4, one piece")
    return options


def main():
    options = parsed()
    find_torch()
    report, failed = described(), {}
    print(", ".join(f"{key} {value}" for key, value in report.items()), file=sys.stderr)
    for section in SECTIONS:
        if section not in options.only:
            continue
        try:
            report[section] = globals()[section](options.seconds, options)
            told(section, report[section])
        except (WrongBytes, RuntimeError, OSError) as error:
            # The others may be measured still: out of memory, or a directory that will not do.
            failed[section] = f"{type(error).__name__}: {error}"
            print(f"\n{section}: FAILED: {failed[section]}", file=sys.stderr)
    report["failed"] = failed
    text = json.dumps(report, indent=2)
    print(text)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as into:
            into.write(text + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
