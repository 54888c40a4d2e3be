"""Names the checks of `smallcap doctor`, runs one after the other, and prints each finding as soon as it is known.

This process imports neither torch nor Ray, so that a broken installation is reported as well as a sound one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict

from jobs.cluster.start_errors import newest_logs
from jobs.screen import note, say_json, say_report
from jobs.terminal.call_options import DoctorOptions
from smallcap import storage
from smallcap.doctor.access import ENCODER_REMEDY
from smallcap.doctor.isolation import Check, Isolation
from smallcap.doctor.report import Finding, warn
from smallcap.phrasing import describe_count, one_line

_INSTALL = "Install smallcap again in a new virtual environment, with constraints.txt."
_FOLDER = "Give a folder that can be made and written to, on a disk that is mounted here."
_S3 = "Check the URI, the credentials, AWS_ENDPOINT_URL and the network."
_STORE = "Check the URI, the credentials and the network."
_INDEX = "Give the --out of a finished `smallcap build-index`, whole and readable."
_MODEL = "Give demo, the folder or prefix of a whole checkpoint, or a hub id that can be reached from here."
_CLUSTER = "Check the address, the firewall and the head node; there, ray status shows the cluster."
_DRIVER = "Look whether nvidia-smi answers, and whether torch alone finds the GPU."
_PROOF = "smallcap bench shows errors in full; where there is a GPU, try --device cpu as well."
_SUBJECT_WIDTH = 16


def list_checks(options: DoctorOptions) -> list[Check]:
    """Returns the checks in their order; another process imports a check's module and runs it."""
    device = (options.device,)
    checks = [
        Check("packages", "smallcap.doctor.installation:check_installation", (), 60, _INSTALL),
        Check("machine", "smallcap.doctor.machine:check_machine", (), 60, "Look at /proc and /sys/fs/cgroup."),
        Check("imports", "smallcap.doctor.installation:check_imports", (), 180, _INSTALL),
        Check("devices", "smallcap.doctor.devices:check_devices", device, 120, _DRIVER, ("imports",)),
        *(
            Check(
                f"storage {uri}", "smallcap.doctor.storage_access:check_storage", (uri,), 120, _remedy_for(uri, _FOLDER)
            )
            for uri in options.storage
        ),
        *_checks_of_models(options),
    ]
    if options.address:
        given = (options.address,)
        run = "jobs.cluster.nodes:check_cluster"
        checks.append(Check(f"cluster {given[0]}", run, given, 120, _CLUSTER, is_alone=True))
    elif not options.quick:
        logs = f"Look at the newest logs in {newest_logs()}."
        checks.append(Check("ray", "jobs.cluster.nodes:check_local_ray", (), 120, logs, is_alone=True))
    if not options.quick:
        needs = ("machine", "devices")
        checks += [
            Check("search", "smallcap.doctor.searching:prove_search", device, 300, _PROOF, needs),
            Check("captions", "smallcap.doctor.captioning:prove_captioning", device, 600, _PROOF, needs),
            Check("speed", "smallcap.doctor.speed:measure", device, 600, _PROOF, needs),
        ]
    return checks


def _checks_of_models(options: DoctorOptions) -> Iterator[Check]:
    """Yields the checks of the model, and of the index and the retrieval encoder that are named."""
    module, needs, encoder = "smallcap.doctor.access", ("imports",), options.retrieval_encoder
    yield Check("model", f"{module}:check_model", (options.model, options.cache_dir), 600, _MODEL, needs)
    if options.index:
        given = (options.index, options.model, encoder, options.cache_dir)
        yield Check("index", f"{module}:check_index", given, 600, _remedy_for(options.index, _INDEX), needs)
    elif encoder:
        yield Check(
            "retrieval encoder", f"{module}:check_encoder", (encoder, options.cache_dir), 600, ENCODER_REMEDY, needs
        )


def _remedy_for(uri: str, local: str) -> str:
    """Returns the remedy for a place that cannot be used, given that for one on this machine's disks."""
    return local if storage.is_local(uri) else _S3 if uri.startswith("s3://") else _STORE


def examine(checks: Iterable[Check]) -> Iterator[Finding]:
    """Runs checks and yields what they find; a check that needs a failed one is left out, which is a warning."""
    causes: dict[str, str] = {}  # of checks that failed or were left out: the line that says why
    with Isolation(_say_what_takes_long) as isolation:
        for check in checks:
            cause = next((causes[needed] for needed in check.needs if needed in causes), None)
            if cause is not None:
                causes[check.subject] = cause
                yield warn(check.subject, f"not looked at, because of {cause}", f"Mend {cause} first.")
                continue
            for finding in isolation.run(check):
                if finding.status == "fail":
                    causes.setdefault(check.subject, finding.subject)
                yield finding


def _say_what_takes_long(check: Check, seconds: float) -> None:
    note(f"      {check.subject}: at it for {seconds:.0f} s, of {check.limit_s:.0f} s at most")


def run(options: DoctorOptions) -> Counter[str]:
    """Examines and prints, as text or as one line of JSON per finding; returns how many findings have each status."""
    counts: Counter[str] = Counter()
    for finding in examine(list_checks(options)):
        counts[finding.status] += 1
        if options.as_json:
            say_json(asdict(finding))
        else:
            say_report(describe(finding), slice(0, 0 if finding.status == "ok" else None))
    return counts


def describe(finding: Finding) -> str:
    """Returns a finding as text: a line, and a second one with the remedy if one is needed."""
    remedy = f"\n      → {finding.remedy}" if finding.remedy else ""
    return f"{finding.status:<5} {finding.subject:<{_SUBJECT_WIDTH}}  {one_line(finding.found)}{remedy}"


def summarise(counts: Counter[str]) -> str:
    """Returns the last line of the report."""
    failures, warnings = describe_count(counts["fail"], "failure"), describe_count(counts["warn"], "warning")
    return f"{counts['ok']} ok, {warnings}, {failures}"
