"""Compares the rates of the captioning job, of a bare loop over the same captioner, and of plain Ray Data.

All sides caption the same images with the same model, precision, batch size and threads, one after another, each in a
separate process. What counts is the rate of a warm job: the time of 2N images minus that of N images, each the fastest
of several runs in one Ray, so that starting, loading and draining drop out. Compared with the loop "beside" (a second
thread decodes while captions are generated), a job can only lose. Compared with the loop "sequence", it can win by
doing both at the same time.

Plain Ray Data reads all images at 256 px, which makes cropping easier than on the other sides, and writes only paths
and captions.

    python -m benchmarks.job --images 512 --json demo.json
    python -m benchmarks.job --real-size --photos FOLDER-OF-PHOTOS --images 256 --json real.json
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.job_data import demo_model, real_size_model, repeat_images
from benchmarks.job_sides import SIDES, Settings
from benchmarks.measuring import run_watched, say
from smallcap.machine.description import describe_machine
from smallcap.machine.precision import resolve_dtype

_SCENES = Path(__file__).resolve().parents[1] / "demo" / "images"


def measure(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Runs every side, and prints the result of each to stderr as soon as it is there."""
    model = real_size_model(work) if options.real_size else demo_model(work)
    settings = Settings(
        model=model.model,
        index=model.index,
        small=str(repeat_images(options.photos, work / "small", options.images)),
        large=str(repeat_images(options.photos, work / "large", 2 * options.images)),
        work=str(work / "out"),
        device=options.device,
        dtype=resolve_dtype(options.dtype, options.device),
        threads=options.threads,
        actors=1,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        rounds=options.rounds,
    )
    results: dict[str, Any] = {
        "machine": describe_machine(options.threads, options.device),
        "model": "real-size" if options.real_size else "demo",
        "images": options.images,
        "batch_size": options.batch_size,
        "dtype": settings.dtype,
        "max_new_tokens": options.max_new_tokens,
    }
    cores = os.cpu_count() or 1
    for name in options.sides:
        arguments = {"side": name, "settings": asdict(replace(settings, work=f"{settings.work}-{name}"))}
        env = {"OMP_NUM_THREADS": str(options.threads)}
        rates, peak = run_watched("benchmarks.job_sides:run_side", arguments, cores, env=env)
        results[name] = rates | {"memory_bytes": peak.sum_own}
        say(f"{name}: {json.dumps(results[name])}")
    return results


def table(results: dict[str, Any]) -> str:
    """Returns the results as text for people."""
    batches = f"batches of {results['batch_size']}, N = {results['images']:,} images"
    lines = [
        ", ".join(f"{name} {value}" for name, value in results["machine"].items()),
        f"model: {results['model']}, {results['dtype']}, {batches}",
    ]
    rates: dict[str, float | None] = {}
    if "bare" in results:
        rates["bare loop, in sequence"] = results["bare"]["sequence_images_per_s"]
        rates["bare loop, decoding in a second thread"] = results["bare"]["beside_images_per_s"]
    for name, title in (("smallcap", "smallcap's job"), ("plain", "plain Ray Data")):
        if name in results:
            rates[f"{title}, once warm"] = results[name]["warm_images_per_s"]
            rates[f"{title}, 2N images with its start"] = results[name]["whole_images_per_s"]
    ceiling = max((rate for name, rate in rates.items() if rate and name.startswith("bare")), default=None)
    lines.append(f"{'':40} {'images/s':>9}" + ("  ratio to the better bare loop" if ceiling else ""))
    for name, rate in rates.items():
        ratio = f" {rate / ceiling:6.2f}" if rate and ceiling else ""
        lines.append(
            f"{name:40} " + (f"{rate:9.2f}{ratio}" if rate else "N is too small: starting takes most of the time")
        )
    return "\n".join(lines)


def main() -> None:
    """Prints the rates; the last line is JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=512, help="N; jobs run over N and 2N images, the loop over N")
    parser.add_argument(
        "--photos", type=Path, default=_SCENES, help="folder of images to repeat; by default the demo's scenes"
    )
    parser.add_argument("--real-size", action="store_true", help="the published sizes with random weights")
    parser.add_argument("--max-new-tokens", type=int, help="by default the checkpoint's; random weights use all of it")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of one captioner on a CPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=2, help="runs over N images; the fastest counts")
    parser.add_argument("--sides", nargs="+", choices=tuple(SIDES), default=list(SIDES))
    parser.add_argument("--json", type=Path, help="file for the JSON line")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="smallcap-job-") as work:
        results = measure(options, Path(work))
    print(table(results))
    print(json.dumps(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
