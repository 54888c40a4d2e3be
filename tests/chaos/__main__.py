"""Disturbs jobs by seeded schedules, and looks whether each still does its whole work once. Run it by `make chaos`.

A trial has S3 (SeaweedFS) on the loopback, a Ray cluster of three nodes with caches of their own, and a job with small
models. Things happen to it as its seed says; where the command stops, the same command is given again. At the end the
output must be what an undisturbed job writes: nothing lost, nothing twice, the same captions, index or weights.

    python -m tests.chaos                     27 schedules, two at a time, and a table of what was seen
    python -m tests.chaos --seeds 0-31        all, of which some are alike
    python -m tests.chaos --seeds 7           one schedule again
    python -m tests.chaos --seeds 0-9,40-49   others
    python -m tests.chaos --list              what the seeds stand for
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from tests.chaos.disturbances import KINDS
from tests.chaos.schedule import draw
from tests.chaos.trial import NotHereError, Outcome, prepared
from tests.chaos.world import Verdict, make_world

WORLD = Path("out/chaos/world")
SEEDS = "0,3-9,11-21,24-31"  # every kind of disturbance, in a time that one waits for


def run_one(seed: int, world: Path) -> Outcome:
    """Runs the schedule of a seed."""
    schedule, start = draw(seed), time.perf_counter()
    print(f"[{seed}] {schedule}", flush=True)
    with prepared(schedule, world) as trial:
        trial.disturb(KINDS)
        trial.finish()
        trial.judge()
        trial.keep_logs(world.parent / f"seed-{seed}")
    trial.outcome.seconds = time.perf_counter() - start
    return trial.outcome


def run_apart(seed: int, world: Path) -> Outcome | str:
    """Runs the schedule of a seed in a process of its own; returns why not where this machine can't."""
    result = world.parent / f"result-{seed}.json"
    result.unlink(missing_ok=True)
    options = ["--seeds", str(seed), "--result", str(result), "--world", str(world)]
    subprocess.run([sys.executable, "-m", "tests.chaos", *options], check=False)
    if not result.exists():
        return Outcome(faults=["the trial itself failed"])
    values = json.loads(result.read_text())
    if "not_here" in values:
        return str(values["not_here"])
    verdict = values.pop("verdict")
    return Outcome(**values, verdict=verdict and Verdict(**verdict))


def write_row(seed: int, outcome: Outcome | str) -> str:
    """Returns a row of the table."""
    schedule = draw(seed)
    if isinstance(outcome, str):
        return f"| {seed} | {schedule} | not run: {outcome} | | | | |"
    verdict = outcome.verdict
    counts = [verdict.lost, verdict.twice, verdict.changed] if verdict else ["?"] * 3
    seen = "; ".join([f"exits {', '.join(map(str, outcome.exits))}", *outcome.notes, *outcome.faults])
    seen = seen.replace("|", "/").replace("\n", " ")
    return f"| {seed} | {schedule} | {seen} | {' | '.join(map(str, counts))} | {outcome.seconds:.0f} s |"


def main() -> None:
    """Runs the schedules, prints the table, and fails if any work is not right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default=SEEDS, help="such as 3 or 0-9,12; each kind has its turn")
    parser.add_argument("--at-a-time", type=int, default=2, help="trials that run side by side")
    parser.add_argument("--world", type=Path, default=WORLD, help="folder of inputs and undisturbed outputs")
    parser.add_argument("--list", action="store_true", help="only say what the seeds stand for")
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    seeds = parse_seeds(options.seeds)
    if options.list:
        for seed in seeds:
            print(f"{seed}: {draw(seed)}")
        return
    world = options.world.resolve()
    if options.result:
        try:
            values = asdict(run_one(seeds[0], world))
        except NotHereError as reason:
            values = {"not_here": str(reason)}
        options.result.write_text(json.dumps(values))
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    make_world(world)
    start = time.perf_counter()
    with ThreadPoolExecutor(options.at_a_time) as pool:
        outcomes = list(pool.map(lambda seed: run_apart(seed, world), seeds))
    print("\n| seed | what was done | what was seen | lost | twice | changed | time |\n|---|---|---|---|---|---|---|")
    for seed, outcome in zip(seeds, outcomes, strict=True):
        print(write_row(seed, outcome))
    run = [outcome for outcome in outcomes if isinstance(outcome, Outcome)]
    right = sum(outcome.is_right for outcome in run)
    skipped = f", {len(outcomes) - len(run)} not run here" if len(run) < len(outcomes) else ""
    print(f"\n{right} of {len(run)} schedules right{skipped}; {(time.perf_counter() - start) / 60:.0f} min.")
    sys.exit(right < len(run))


def parse_seeds(text: str) -> list[int]:
    """Returns the seeds that a list such as `0-9,12` names."""
    seeds: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        seeds += range(int(first), int(last or first) + 1)
    return seeds


if __name__ == "__main__":
    main()
