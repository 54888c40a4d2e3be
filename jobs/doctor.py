"""Names the checks of `smallcap doctor`, runs one after the other, and prints each finding as soon as it is known.

This process imports neither torch nor Ray, so that a broken installation is reported as well as a sound one.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict

from jobs.terminal.call_options import DoctorOptions
from smallcap.doctor.isolation import Check, run_check
from smallcap.doctor.report import Finding, warn
from smallcap.phrasing import describe_count

_INSTALL = "Install smallcap again in a new virtual environment, with constraints.txt."
_STORE = "Check the URI, the credentials, AWS_ENDPOINT_URL and the network."
_MODEL = "Give demo, the folder of a checkpoint, or a hub id that can be reached from here."
_CLUSTER = "Check the address, the firewall and the head node; there, ray status shows the cluster."
_RAY = "Look at the newest logs in /tmp/ray/session_latest/logs."
_DRIVER = "Look whether nvidia-smi answers, and whether torch alone finds the GPU."
_PROOF = "Try --device cpu; smallcap bench shows errors in full."
_SUBJECT_WIDTH = 16


def list_checks(options: DoctorOptions) -> list[Check]:
    """Returns the checks in their order; a check runs in a process that imports its module."""
    access = (options.index, options.model, options.retrieval_encoder, options.cache_dir)
    device = (options.device,)
    checks = [
        Check("packages", "smallcap.doctor.installation:check_installation", (), 60, _INSTALL),
        Check("machine", "smallcap.doctor.machine:check_machine", (), 60, "Look at /proc and /sys/fs/cgroup."),
        Check("imports", "smallcap.doctor.installation:check_imports", (), 180, _INSTALL),
        Check("devices", "smallcap.doctor.devices:check_devices", device, 120, _DRIVER, needs="imports"),
        *(
            Check(f"storage {uri}", "smallcap.doctor.storage_access:check_storage", (uri,), 120, _STORE)
            for uri in options.storage
        ),
        Check("model", "smallcap.doctor.access:check_model", (options.model,), 600, _MODEL, needs="imports"),
    ]
    if options.index:
        checks.append(Check("index", "smallcap.doctor.access:check_index", access, 600, _STORE, needs="imports"))
    if options.address:
        given = (options.address,)
        checks.append(Check(f"cluster {given[0]}", "jobs.cluster.nodes:check_cluster", given, 120, _CLUSTER))
    elif not options.quick:
        checks.append(Check("ray", "jobs.cluster.nodes:check_local_ray", (), 120, _RAY))
    if not options.quick:
        checks += [
            Check("search", "smallcap.doctor.searching:prove_search", device, 300, _PROOF, needs="devices"),
            Check("captions", "smallcap.doctor.captioning:prove_captioning", device, 600, _PROOF, needs="devices"),
            Check("speed", "smallcap.doctor.speed:measure", device, 600, _PROOF, needs="devices"),
        ]
    return checks


def examine(checks: Iterable[Check]) -> Iterator[Finding]:
    """Runs checks and yields what they find; a check that needs a failed one is left out, which is a warning."""
    failed: set[str] = set()
    for check in checks:
        if check.needs in failed:
            failed.add(check.subject)
            yield warn(check.subject, f"not looked at, because of {check.needs}", f"Mend {check.needs} first.")
            continue
        for finding in run_check(check, _say_what_takes_long):
            if finding.status == "fail":
                failed.add(check.subject)
            yield finding


def _say_what_takes_long(check: Check, seconds: float) -> None:
    print(
        f"      {check.subject}: at it for {seconds:.0f} s, of {check.limit_s:.0f} s at most",
        file=sys.stderr,
        flush=True,
    )


def run(options: DoctorOptions) -> Counter[str]:
    """Examines and prints, as text or as one line of JSON per finding; returns how many findings have each status."""
    counts: Counter[str] = Counter()
    for finding in examine(list_checks(options)):
        counts[finding.status] += 1
        print(json.dumps(asdict(finding)) if options.as_json else describe(finding), flush=True)
    return counts


def describe(finding: Finding) -> str:
    """Returns a finding as text: a line, and a second one with the remedy if one is needed."""
    remedy = f"\n      → {finding.remedy}" if finding.remedy else ""
    return f"{finding.status:<5} {finding.subject:<{_SUBJECT_WIDTH}}  {finding.found}{remedy}"


def summarise(counts: Counter[str]) -> str:
    """Returns the last line of the report."""
    failures, warnings = describe_count(counts["fail"], "failure"), describe_count(counts["warn"], "warning")
    return f"{counts['ok']} ok, {warnings}, {failures}"
