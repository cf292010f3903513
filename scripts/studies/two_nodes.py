#!/usr/bin/env python3
"""Measure what PowerSGD does to the loss, traffic and update time of two nodes with a slow network between them.

    sudo .venv/bin/python scripts/studies/two_nodes.py --tokens runs/quickstart/tokens.zarr
    .venv/bin/python scripts/studies/two_nodes.py --tokens runs/quickstart/tokens.zarr --mbit 0 --updates 100

The script runs ``dalle train-prior`` on two nodes of two processes each: once without compression, and once with each
PowerSGD rank of --ranks. The nodes are network namespaces of this machine, joined by a link of --mbit; this needs root
and Debian's iproute2. Without those, or with --mbit 0, all processes share the loopback interface: losses and bytes are
the same, but times say nothing about a network. The script writes study.json into --out and prints a table. It takes
about ten minutes on two cores. Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median

from dalle_cli.errors import UserError
from dalle_cli.progress import log
from dalle_cli.stores.files import write_json

NODES, LOCAL_SIZE = 2, 2
INTERFACE = "veth"


@dataclass(frozen=True)
class Network:
    """The network between the nodes, and what a process needs to join it."""

    description: str
    address: str = "127.0.0.1"
    prefixes: tuple[tuple[str, ...], ...] = ((), ())
    """Words that each node's commands start with."""
    environment: dict[str, str] = field(default_factory=dict)

    def bytes_sent(self) -> int | None:
        """Return the bytes that the first node's interface has sent, by the kernel's count; None on the loopback."""
        if not self.prefixes[0]:
            return None
        file = f"/sys/class/net/{INTERFACE}/statistics/tx_bytes"
        return int(subprocess.run([*self.prefixes[0], "cat", file], check=True, capture_output=True, text=True).stdout)


@dataclass(frozen=True)
class Outcome:
    """Figures of one training run."""

    name: str
    loss: float
    """Mean training loss of the last tenth of the updates, in nats."""
    validation_loss: float
    """Loss on held-out rows with the raw weights after the last update, in nats."""
    bytes_between_nodes: int
    """Bytes that one process hands to collectives between nodes in an update (the median over updates)."""
    link_bytes: int | None
    """Bytes that the first node sends over its interface in an update; None on the loopback interface."""
    update_seconds: float
    """Median seconds of an update."""


@contextmanager
def network(mbit: int) -> Iterator[Network]:
    """Join two network namespaces by a link of ``mbit`` Mbit/s each way, or fall back to the loopback interface."""
    if not mbit:
        yield Network("loopback interface")
        return
    spaces = [f"dalle-{os.getpid()}-{i}" for i in range(NODES)]
    first, second = spaces
    commands = [
        *(f"ip netns add {space}" for space in spaces),
        f"ip link add {INTERFACE} netns {first} type veth peer name {INTERFACE} netns {second}",
        *(f"ip -n {space} address add 10.213.0.{i + 1}/24 dev {INTERFACE}" for i, space in enumerate(spaces)),
        *(f"ip -n {space} link set {name} up" for space in spaces for name in ("lo", INTERFACE)),
        *(f"tc -n {space} qdisc add dev {INTERFACE} root tbf rate {mbit}mbit burst 64kb latency 400ms" for space in spaces),  # noqa: E501
    ]  # fmt: skip
    try:
        try:
            for command in commands:
                subprocess.run(command.split(), check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = str(getattr(error, "stderr", "") or error).strip()
            log(f"two_nodes: no network namespaces here ({reason}); using the loopback interface instead")
            found = Network("loopback interface")
        else:
            prefixes = tuple(("ip", "netns", "exec", space) for space in spaces)
            found = Network(f"link of {mbit} Mbit/s", "10.213.0.1", prefixes, {"GLOO_SOCKET_IFNAME": INTERFACE})
        yield found
    finally:
        for space in spaces:
            if Path("/run/netns", space).exists():
                subprocess.run(["ip", "netns", "delete", space], check=False)


def train(command: list[str], found: Network) -> None:
    """Run ``command`` on all ranks of the two nodes; if one rank fails, end the others.

    Raises:
        UserError: a rank failed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    size, processes = NODES * LOCAL_SIZE, []
    try:
        for rank in range(size):
            node, local_rank = divmod(rank, LOCAL_SIZE)
            launch = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": LOCAL_SIZE,
                      "GROUP_RANK": node, "MASTER_ADDR": found.address, "MASTER_PORT": port}  # fmt: skip
            environment = {**os.environ, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in launch.items()}}
            program = [*found.prefixes[node], sys.executable, "-m", "dalle_cli", *command]
            processes.append(subprocess.Popen(program, env={**environment, **found.environment}, stdout=sys.stderr))
        while None in (codes := [process.poll() for process in processes]) and not any(codes):
            time.sleep(0.1)
        if failed := [rank for rank, code in enumerate(codes) if code]:
            raise UserError(f"rank {failed[0]} failed; read its last lines above")
    finally:
        for process in processes:
            process.kill()
            process.wait()


def read_outcome(name: str, run: Path, batch_size: int, link_bytes: int | None) -> Outcome:
    """Read the figures of a finished run from its metrics.jsonl, which has a line for each update."""
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in lines if "loss" in line]
    validations = [line["val_raw_loss"] for line in lines if "val_raw_loss" in line]
    return Outcome(
        name,
        mean(line["loss"] for line in updates[-max(1, len(updates) // 10) :]),
        validations[-1],
        round(median(line["bytes_between_nodes"] for line in updates)),
        None if link_bytes is None else link_bytes // len(updates),
        median(batch_size / line["samples_per_second"] for line in updates),
    )


def table(outcomes: list[Outcome]) -> str:
    """Return a table of each run's figures, beside their ratio to the first run's, which has no compression."""
    whole = outcomes[0]
    lines = [
        f"{'gradients':<12}{'training loss':>14}{'held-out':>10}{'vs whole':>10}{'KB a process':>14}{'vs whole':>10}"
        f"{'KB on link':>12}{'s an update':>13}{'vs whole':>10}"
    ]
    for found in outcomes:
        link = "" if found.link_bytes is None else f"{found.link_bytes / 1000:.0f}"
        lines.append(
            f"{found.name:<12}{found.loss:>14.4f}{found.validation_loss:>10.4f}"
            f"{found.validation_loss / whole.validation_loss - 1:>+10.1%}{found.bytes_between_nodes / 1000:>14.1f}"
            f"{found.bytes_between_nodes / whole.bytes_between_nodes:>10.1%}{link:>12}{found.update_seconds:>13.3f}"
            f"{found.update_seconds / whole.update_seconds:>10.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, train with each setting and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, required=True, help="token store to train on")
    parser.add_argument(
        "--recipe",
        type=Path,
        default=Path("recipes/quickstart.yaml"),
        help="recipe of the prior [recipes/quickstart.yaml]",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/two-nodes"), help="folder of the runs [runs/two-nodes]")
    parser.add_argument(
        "--mbit",
        type=int,
        default=50,
        help="Mbit/s of the link between the nodes, each way; 0 for the loopback interface [50]",
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 16, 4], help="PowerSGD ranks [64 16 4]")
    parser.add_argument("--updates", type=int, default=300, help="updates of each run [300]")
    parser.add_argument("--batch-size", type=int, default=16, help="samples of an update, all ranks together [16]")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting; repeatable")
    options = parser.parse_args()
    # Turn SIGTERM into an exception, so that the namespaces and processes are removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    runs = {"whole": 0, **{f"rank {rank}": rank for rank in options.ranks}}
    try:
        settings = {
            "threads": 1, "prior.sharding.zero": 1, "prior.sharding.node_size": LOCAL_SIZE,
            "prior.training.log_every": 1, "prior.training.updates": options.updates,
            "prior.training.batch_size": options.batch_size,
            "prior.training.validate_every": options.updates, "prior.training.save_every": options.updates,
        }  # fmt: skip
        outcomes = []
        with network(options.mbit) as found:
            for name, rank in runs.items():
                run = options.out / name.replace(" ", "-")
                changes = settings | {"prior.powersgd.rank": rank}
                overrides = [*(f"{key}={value}" for key, value in changes.items()), *options.set]
                words = [word for override in overrides for word in ("--set", override)]
                before = found.bytes_sent()
                train(
                    ["train-prior", str(options.recipe), "--tokens", str(options.tokens), "--out", str(run), *words],
                    found,
                )
                sent = None if before is None else (found.bytes_sent() or 0) - before
                outcomes.append(read_outcome(name, run, options.batch_size, sent))
    except UserError as error:
        parser.exit(2, f"two_nodes: {error}\n")
    write_json(options.out / "study.json", {"network": found.description, "outcomes": [asdict(o) for o in outcomes]})
    print(f"two nodes of {LOCAL_SIZE} processes, {found.description}, {options.updates} updates")
    print(table(outcomes))


if __name__ == "__main__":
    main()
