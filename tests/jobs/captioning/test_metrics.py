"""The metrics arrive at Ray's metrics port, and the dashboard and the document name those that exist."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from jobs.captioning.metrics import record_batch
from jobs.captioning.stage_report import StageReport
from jobs.cluster.metrics import METRICS
from tests.job_processes import free_port

ROOT = Path(__file__).parents[3]
METRICS_TAGS = {tag for _, tags, _ in METRICS.values() for tag in tags}

EXPORT = """
import sys, time, urllib.request
import ray
from jobs.captioning.stage_report import StageReport
from jobs.captioning.watch import watch_run
from jobs.cluster.metrics import marked_as_running, record

port = int(sys.argv[1])
ray.init(
    address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _metrics_export_port=port,
    _system_config={"metrics_report_interval_ms": 500},
)

@ray.remote(num_cpus=0)
class Worker:
    def work(self, client):
        client.report(StageReport("load", 9, 1.0, retries=2, bytes=5000))
        searched = frozenset(["cpu"])
        client.report(StageReport("caption", 8, 1.0, tokens=40, halvings=2, searched_by=searched), [0.3, 0.4])
        client.report(StageReport("write", 7, 1.0, errors={"empty": 6}))
        client.record_index_cache(hits=3, misses=4)
        for name in ("build_items", "build_seconds"):
            record(f"smallcap_{name}_total", "run-1", 5, {"stage": "embed"})
        for name in ("steps", "tokens", "step_seconds"):
            record(f"smallcap_train_{name}_total", "run-1", 6)
        record("smallcap_train_loss", "run-1", 1.5)

@ray.remote(num_cpus=0, max_restarts=1, max_task_retries=1)
class Dying:
    def work(self, client):
        client.begin_process()
        if not ray.get_runtime_context().was_current_actor_reconstructed:
            client.end_by("cuda", RuntimeError("CUDA error: ECC"))

worker = Worker.remote()
with watch_run("run-1", 10, 1) as watch, marked_as_running("run-1", "caption"):
    ray.get(worker.work.remote(watch.monitor))
    ray.get(Dying.remote().work.remote(watch.fault_guard))
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
        except OSError:
            text = ""
        last = ("_index_cache_misses_total", "_actor_restarts_total", "_train_loss", "_job_running")
        if all(f"ray_smallcap{name}" in text for name in last):
            print(text)
            break
        time.sleep(0.5)
"""


def test_without_ray_nothing_is_counted_and_nothing_fails() -> None:
    script = (
        "from jobs.captioning.metrics import record_batch; from jobs.captioning.stage_report import StageReport; "
        "record_batch('run', StageReport('write', 5, 1.0, errors={'empty': 1}), [0.5])"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


@pytest.mark.own_ray
@pytest.mark.slow
def test_metrics_of_workers_are_at_the_metrics_port() -> None:
    pytest.importorskip("opentelemetry.exporter.prometheus", reason="ray[default] is not installed")
    done = subprocess.run(
        [sys.executable, "-c", EXPORT, str(free_port())],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=200,
    )
    values = {}
    for line in done.stdout.splitlines():
        if match := re.match(r"ray_(smallcap_\w+)\{(.*)\} ([\d.e+]+)$", line):
            tags = dict(re.findall(r'(\w+)="([^"]*)"', match[2]))
            assert tags["run_id"] == "run-1"
            (tag,) = {tags[name] for name in METRICS_TAGS & set(tags)} or {None}
            values[match[1], tag] = float(match[3])
    assert values["smallcap_images_total", "load"] == 9
    assert values["smallcap_images_total", "caption"] == 8
    assert values["smallcap_images_total", "write"] == 7
    assert values["smallcap_errors_total", "empty"] == 6
    assert values["smallcap_batch_seconds_count", "write"] == 1
    assert values["smallcap_neighbour_score_count", None] == 2
    assert values["smallcap_tokens_total", None] == 40
    assert values["smallcap_fetch_retries_total", None] == 2
    assert values["smallcap_fetched_bytes_total", None] == 5000
    assert values["smallcap_index_cache_hits_total", None] == 3
    assert values["smallcap_actor_faults_total", "cuda"] == 1
    assert values["smallcap_actor_restarts_total", None] == 1
    assert values["smallcap_job_running", "caption"] == 1
    assert values["smallcap_busy_seconds_total", "caption"] == 1
    assert values["smallcap_searched_images_total", "cpu"] == 8
    assert values["smallcap_memory_halvings_total", None] == 2
    assert values["smallcap_build_items_total", "embed"] == 5
    assert values["smallcap_train_loss", None] == 1.5
    assert {re.sub(r"_(bucket|count|sum)$", "", name) for name, _ in values} == set(METRICS)


RAYS_OWN = Path(ray.__file__).parent / "dashboard" / "modules" / "reporter" / "reporter_agent.py"


def drawn_metrics(text: str) -> set[str]:
    return {re.sub(r"_(bucket|count|sum)$", "", name) for name in re.findall(r"ray_(smallcap_\w+)", text)}


def test_the_dashboard_draws_every_metric_and_no_other() -> None:
    dashboard = json.loads((ROOT / "docs" / "grafana.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert set().union(*map(drawn_metrics, expressions)) == set(METRICS)
    promql = pytest.importorskip("promql_parser")
    for expression in expressions:
        promql.parse(expression.replace("$__rate_interval", "5m"))
        names = re.findall(r"ray_(smallcap_\w+)", expression)
        if not names:  # one of Ray's own
            (theirs,) = re.findall(r"ray_(\w+)", expression)
            assert f'"{theirs}"' in RAYS_OWN.read_text()
            continue
        assert expression.count('run_id=~"$run_id"') == len(names)
        tags = {"run_id", "le"}.union(*(METRICS[re.sub(r"_bucket$", "", name)][1] for name in names))
        for grouped in re.findall(r"by \(([^)]*)\)", expression):
            assert set(grouped.split(", ")) <= tags
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert set(variables) == {"datasource", "run_id"}
    assert drawn_metrics(variables["run_id"]["definition"]) <= set(METRICS)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in dashboard["panels"])


def test_the_document_names_every_metric() -> None:
    text = (ROOT / "docs" / "monitoring.md").read_text()
    for name in METRICS:
        assert name in text or name == "smallcap_index_cache_misses_total"


def test_a_batch_of_no_images_is_no_observation() -> None:
    record_batch("run", StageReport("caption", start_s=3.0))
