"""The alarms watch metrics that are exported, fire when they should, and are explained."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from jobs.cluster.metrics import METRICS
from tests.python_process import ROOT

ALARMS = ROOT / "deploy" / "alarms.yaml"
RULES = [rule for group in yaml.safe_load(ALARMS.read_text())["groups"] for rule in group["rules"]]
NEEDS_PROMTOOL = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool comes with Prometheus")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alarm_is_promql_over_metrics_and_tags_that_exist(rule: dict[str, str]) -> None:
    promql = pytest.importorskip("promql_parser")
    promql.parse(rule["expr"])
    names = re.findall(r"ray_(smallcap_\w+)", rule["expr"])
    assert names
    tags = {"run_id"}.union(*(METRICS[name][1] for name in names))
    used = [name for group in re.findall(r"(?:by|on) \(([^)]*)\)", rule["expr"]) for name in group.split(", ")]
    used += re.findall(r"[{,](\w+)=", rule["expr"])
    assert set(used) <= tags
    for name in names:
        assert (METRICS[name][0] == "counter") == bool(re.search(rf"(rate|increase)\(ray_{name}\b", rule["expr"]))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alarm_names_its_place_in_the_runbook(rule: dict[str, dict[str, str]]) -> None:
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    titles = re.findall(r"^### (?:`(\w+)`|(\w+))$", (ROOT / page).read_text(), re.M)
    assert anchor in {"".join(title).lower() for title in titles}
    assert anchor == str(rule["alert"]).lower()


@NEEDS_PROMTOOL
def test_alarms_fire_for_runs_that_go_badly_and_for_no_others(tmp_path: Path) -> None:
    subprocess.run(["promtool", "check", "rules", ALARMS], check=True, capture_output=True)
    tests = tmp_path / "alarms.yaml"
    tests.write_text((ROOT / "tests" / "alarms.yaml").read_text().replace("RULES", str(ALARMS)))
    done = subprocess.run(["promtool", "test", "rules", tests], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alarm_is_seen_to_fire() -> None:
    cases = yaml.safe_load((ROOT / "tests" / "alarms.yaml").read_text())["tests"]
    checks = [check for case in cases for check in case["alert_rule_test"]]
    names = {rule["alert"] for rule in RULES}
    assert {check["alertname"] for check in checks if check.get("exp_alerts")} == names
    assert {check["alertname"] for check in checks if not check.get("exp_alerts")} == names
