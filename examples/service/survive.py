#!/usr/bin/env python3
"""Clients of another language against the service, which is killed and started again under them.

Starts the service over a directory of its own, and for `--seconds` has `--clients` threads that PUT bodies in chunks or with a
length, GET them whole and by ranges, and DELETE them; each compares every byte. Meanwhile the service gets `kill -9` `--kills`
times and is started again. At the end all is compared once more, after a last kill. Fails if a body was wrong or something that
was acknowledged is not there. Needs Python 3.9 and nothing else:

    cargo build --release -p vmem-service && examples/service/survive.py --seconds 60
"""

import argparse
import http.client
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time

ABSENT = None


def body(name, version, length):
    """The bytes of a version: the same for whoever asks."""
    return random.Random(f"{name} {version}").randbytes(length)


class Service:
    """The process, on a port that changes with each start."""

    def __init__(self, program, directory):
        self.program = program
        self.environment = {
            **os.environ,
            "VMEM_SERVICE_LISTEN": "127.0.0.1:0",
            "VMEM_SERVICE_STORE__DISK_PATH": os.path.join(directory, "store"),
            "VMEM_SERVICE_STORE__GPU": "off",
            "VMEM_SERVICE_STORE__HOST_CAPACITY": os.environ.get("HOST_CAPACITY", "64MiB"),
            "VMEM_SERVICE_STORE__DISK_CAPACITY": "4GiB",
            "RUST_LOG": os.environ.get("RUST_LOG", "warn"),
        }
        self.address = None
        self.process = None

    def start(self):
        self.process = subprocess.Popen([self.program], env=self.environment, stdout=subprocess.PIPE, text=True)
        for line in self.process.stdout:
            if line.startswith("listening on http://"):
                self.address = line.strip().removeprefix("listening on http://")
                # What it prints from now on is read by nobody else.
                threading.Thread(target=self.process.stdout.read, daemon=True).start()
                return
        raise SystemExit("the service did not start")

    def kill(self):
        self.address = None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


class Client(threading.Thread):
    """One thread with names of its own, so that it knows what each has."""

    def __init__(self, service, number, seed, until):
        super().__init__(daemon=True)
        self.service = service
        self.until = until
        self.random = random.Random(f"{seed} {number}")
        # What a name may have: one value, or several while an answer is missing.
        self.known = {f"client-{number}/object {index}": [ABSENT] for index in range(16)}
        self.versions = 0
        self.counts = {"acknowledged": 0, "compared": 0, "busy": 0, "broken off": 0}
        self.wrong = []
        self.connection = None
        self.connected_to = None

    def run(self):
        while time.monotonic() < self.until:
            name = self.random.choice(list(self.known))
            step = self.random.choice([self.put, self.put, self.get, self.get, self.get_range, self.delete])
            self.attempt(step, name)

    def attempt(self, step, name):
        """What the step returns; None if the service broke off."""
        try:
            return step(name)
        except (OSError, http.client.HTTPException):
            self.counts["broken off"] += 1
            self.connection = None
            time.sleep(0.05)
            return None

    def request(self, method, name, data=None, headers=None, chunked=False):
        address = self.service.address
        if address is None:
            raise OSError("it is being started")
        if self.connection is None or self.connected_to != address:
            self.connection = http.client.HTTPConnection(address, timeout=60)
            self.connected_to = address
        path = "/objects/" + name.replace(" ", "%20")
        self.connection.request(method, path, data, headers or {}, encode_chunked=chunked)
        answer = self.connection.getresponse()
        return answer, answer.read()

    def is_busy(self, answer):
        """A refusal that is none of the service's faults: nothing was changed."""
        if answer.status in (429, 503):
            if answer.getheader("Retry-After") is None:
                self.wrong.append(f"{answer.status} without Retry-After")
            self.counts["busy"] += 1
            time.sleep(0.05)
            return True
        return False

    def put(self, name):
        self.versions += 1
        length = self.random.choice([0, 1, 100, 4096, 65_537, 300_000, self.random.randrange(2_000_000)])
        new = (self.versions, length)
        data = body(name, *new)
        before = self.known[name]
        self.known[name] = [*before, new]
        if self.random.random() < 0.5:
            size = self.random.choice([1000, 16_384, 100_000])
            pieces = (data[at : at + size] for at in range(0, length, size))
            answer, _ = self.request("PUT", name, pieces, {"Transfer-Encoding": "chunked"}, chunked=True)
        else:
            answer, _ = self.request("PUT", name, data)
        if self.is_busy(answer):
            self.known[name] = before
        elif answer.status in (200, 201):
            self.known[name] = [new]
            self.counts["acknowledged"] += 1
        else:
            self.wrong.append(f"PUT {name}: {answer.status}")

    def delete(self, name):
        before = self.known[name]
        self.known[name] = [*before, ABSENT]
        answer, _ = self.request("DELETE", name)
        if self.is_busy(answer):
            self.known[name] = before
        elif answer.status in (204, 404):
            if answer.status == 404 and ABSENT not in before:
                self.wrong.append(f"DELETE {name}: 404")
            self.known[name] = [ABSENT]
        else:
            self.wrong.append(f"DELETE {name}: {answer.status}")

    def get(self, name):
        """Whether what came was compared, wrong or not; it is not while the service is busy."""
        answer, got = self.request("GET", name)
        if self.is_busy(answer):
            return False
        if answer.status == 404:
            found = ABSENT if ABSENT in self.known[name] else "missing"
        else:
            could_be = (version for version in self.known[name] if version is not ABSENT)
            found = next((version for version in could_be if got == body(name, *version)), "wrong")
        if answer.status not in (200, 404) or found in ("missing", "wrong"):
            self.wrong.append(f"GET {name}: {answer.status}, {len(got)} bytes, {found}; expected {self.known[name]}")
        else:
            # Whatever was not certain is now.
            self.known[name] = [found]
            self.counts["compared"] += 1
        return True

    def get_range(self, name):
        known = self.known[name]
        if len(known) != 1 or known[0] is ABSENT or known[0][1] == 0:
            return
        data = body(name, *known[0])
        first = self.random.randrange(len(data))
        last = self.random.randrange(first, len(data) + 1000)
        answer, got = self.request("GET", name, headers={"Range": f"bytes={first}-{last}"})
        if self.is_busy(answer):
            return
        expected = data[first : last + 1]
        place = f"bytes {first}-{first + len(expected) - 1}/{len(data)}"
        if answer.status != 206 or got != expected or answer.getheader("Content-Range") != place:
            self.wrong.append(f"GET {name} {place}: {answer.status}, {len(got)} bytes")
        else:
            self.counts["compared"] += 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--service", default="target/release/vmem-service", help="the program")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", default=str(time.time_ns()))
    chosen = parser.parse_args()
    print(f"seed {chosen.seed}")
    with tempfile.TemporaryDirectory() as directory:
        service = Service(chosen.service, directory)
        service.start()
        until = time.monotonic() + chosen.seconds
        clients = [Client(service, number, chosen.seed, until) for number in range(chosen.clients)]
        for client in clients:
            client.start()
        for _ in range(chosen.kills):
            time.sleep(chosen.seconds / (chosen.kills + 1))
            service.kill()
            service.start()
        for client in clients:
            client.join(chosen.seconds + 120)
        stuck = sum(client.is_alive() for client in clients)
        # What nobody asked for since it was acknowledged is asked for by another process of the service.
        service.kill()
        service.start()
        for client in clients:
            for name in client.known:
                if not any(client.attempt(client.get, name) for _ in range(20)):
                    client.wrong.append(f"GET {name}: nothing to compare came")
        code = service.stop()
    wrong = [line for client in clients for line in client.wrong]
    counts = {key: sum(client.counts[key] for client in clients) for key in clients[0].counts}
    print(", ".join(f"{value} {key}" for key, value in counts.items()))
    print(f"{chosen.kills + 1} kills, {len(wrong)} wrong or lost, {stuck} stuck, the service ended with {code}")
    print("\n".join(wrong[:20]))
    is_fine = not wrong and not stuck and code == 0 and counts["acknowledged"] > 0 and counts["compared"] > 0
    sys.exit(0 if is_fine else 1)


main()
