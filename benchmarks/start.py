"""Measures what a small run costs before and after its captions: `smallcap caption` of a few images, and `search`.

Each command is a process of its own, as a person starts it, with a Ray of its own. The clock shows what that person
waits for; CPU time is that of the command and of all processes below it, looked at several times a second, which other
work on the machine changes less. The parts of a run end when its record is written (Ray has started, the cluster and
the precision are known), when its first part of captions is, and when the command ends.

    python -m benchmarks.start --images 48 --rounds 5
    python -m benchmarks.start --against ANOTHER-CHECKOUT

With `--against`, both checkouts are measured in turns, and their ratio is printed: this one's over the other's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.job_data import demo_model, repeat_images
from benchmarks.measuring import environment, say, tree_of
from smallcap.machine.description import describe_machine

_ROOT = Path(__file__).resolve().parents[1]
_LOOK_EVERY_S = 0.2
_QUERY = "two red boats"
_MARKS = {"starting_ray_s": "_run.json", "models_and_captions_s": "part-*.parquet"}  # files that end a part
Figures = dict[str, float]


def measure_command(command: list[str], checkout: Path, out: Path | None = None) -> Figures:
    """Runs a command of a checkout.

    Args:
        command: The words after `smallcap`.
        checkout: The checkout's folder.
        out: The output folder of a captioning run, whose parts are timed.

    Returns:
        `s` on the clock, and `cpu_s` of the whole tree of processes; for a run also the seconds of its parts, and the
        CPU time of each kind of process.

    Raises:
        subprocess.CalledProcessError: The command failed; its messages are on stderr.
    """
    words = [sys.executable, "-m", "smallcap", *command]
    env = environment() | {"PYTHONPATH": str(checkout)}
    began, seen = time.perf_counter(), dict[str, float]()
    cpu, names = dict[int, float](), dict[int, str]()
    with tempfile.TemporaryFile("w+") as messages:
        process = subprocess.Popen(words, env=env, cwd=checkout, stdout=messages, stderr=messages)
        while process.poll() is None:
            for pid in tree_of(process.pid):
                cpu[pid] = max(cpu.get(pid, 0.0), _cpu_seconds(pid))
                names[pid] = "driver" if pid == process.pid else _name(pid) or names.get(pid, "others")
            for name, pattern in _MARKS.items():
                if out is not None and name not in seen and any(out.glob(pattern)):
                    seen[name] = time.perf_counter() - began
            time.sleep(_LOOK_EVERY_S)
        seconds = time.perf_counter() - began
        if process.returncode:
            messages.seek(0)
            say(messages.read())
            raise subprocess.CalledProcessError(process.returncode, words)
    figures = {"s": seconds, "cpu_s": sum(cpu.values())}
    if out is not None:
        times = [0.0, *seen.values(), seconds]
        figures |= {name: end - start for name, start, end in zip([*seen, "ending_s"], times, times[1:], strict=False)}
        for pid, spent in cpu.items():
            name = f"cpu of {names[pid]}_s"
            figures[name] = figures.get(name, 0.0) + spent
    return figures


def _cpu_seconds(pid: int) -> float:
    """Returns the CPU time of a process so far; 0 where it has ended."""
    try:
        fields = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _name(pid: int) -> str:
    """Returns what a process of Ray is called: the task or the class of the actor that it ran last, or its program."""
    try:
        words = (Path("/proc") / str(pid) / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:  # it has ended
        return ""
    if words[0].startswith("ray::"):
        return f"worker {words[0][5:].strip()}".partition("(")[0].partition(".")[0]
    scripts = [Path(word).stem for word in words[:4] if word.endswith(".py")]
    return scripts[0] if scripts else Path(words[0]).name


def measure(options: argparse.Namespace, work: Path) -> dict[str, dict[str, Figures]]:
    """Measures every checkout in turns; returns the median of each figure, by checkout and command."""
    images = repeat_images(_ROOT / "demo" / "images", work / "images", options.images)
    checkouts = {"this": _ROOT} | ({"other": options.against.resolve()} if options.against else {})
    models = {name: demo_model(work / name, checkout) for name, checkout in checkouts.items()}
    rounds: dict[str, dict[str, list[Figures]]] = {name: {"caption": [], "search": []} for name in checkouts}
    for number in range(options.rounds + 1):
        for name, checkout in checkouts.items():
            out, model = work / f"out-{name}-{number}", models[name]
            caption = ["caption", str(images), "--index", model.index, "--model", model.model, "--out", str(out)]
            search = ["search", "--index", model.index, "--text", _QUERY]
            found = {
                "caption": measure_command([*caption, "--address", "local"], checkout, out),
                "search": measure_command(search, checkout),
            }
            say(f"round {number}, {name}: {json.dumps(found)}")
            for command, figures in found.items() if number else ():  # the first round fills caches
                rounds[name][command].append(figures)
    return {
        name: {command: _medians(figures) for command, figures in commands.items()} for name, commands in rounds.items()
    }


def _medians(rounds: list[Figures]) -> Figures:
    names = dict.fromkeys(name for figures in rounds for name in figures)
    return {name: statistics.median(figures.get(name, 0.0) for figures in rounds) for name in names}


def table(results: dict[str, dict[str, Figures]]) -> str:
    """Returns the results as text for people."""
    lines, other = [], results.get("other")
    for command, figures in results["this"].items():
        before = other[command] if other else {}
        for figure in dict.fromkeys([*figures, *before]):
            name = f"{command} {figure.removesuffix('_s').replace('_', ' ')}"
            line = f"{name:48} {figures.get(figure, 0.0):7.2f} s"
            if other:
                line += f"  {before.get(figure, 0.0):7.2f} s"
            if before.get(figure):
                line += f"  ratio {figures.get(figure, 0.0) / before[figure]:.2f}"
            lines.append(line)
    return "\n".join(lines)


def main() -> None:
    """Prints the figures; the last line is JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds, after one that is not; medians count")
    parser.add_argument("--against", type=Path, help="another checkout, measured in turns with this one")
    parser.add_argument("--json", type=Path, help="file for the JSON line")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="smallcap-start-") as work:
        results = measure(options, Path(work))
    print(table(results))
    line: dict[str, Any] = {"machine": describe_machine(os.cpu_count() or 1), "images": options.images, **results}
    print(json.dumps(line))
    if options.json:
        options.json.write_text(json.dumps(line, indent=2) + "\n")


if __name__ == "__main__":
    main()
