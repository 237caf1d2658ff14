"""The tables of the documentation are those that the command gives."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hillinfer.commands import app
from hillinfer.simulate import configurations
from hillinfer.simulate.machine import CONSTANTS
from hillinfer.simulate.report import as_markdown, constants_table
from hillinfer.simulate.wear import month
from hillinfer.simulate.workload import QWEN_7B, SHAPE_8B, Work

TABLES = (Path(__file__).parents[2] / "docs" / "simulation-tables.md").read_text()


def told_of(work):
    return {
        "config": "test",
        "rows": configurations.rows(work),
        "applications": configurations.applications(work),
        "sensitivity": {
            "of": configurations.named(work),
            "nominal": configurations._ratios(work, configurations.Machine()),
            "rows": [],
        },
        "sweep": configurations.sweep(work),
        "unequal_shares": configurations.unequal_shares(work.model, work.batch, work.tokens),
        "wear": month(work.model),
    }


def rows_of(markdown):
    return [line for line in markdown.splitlines() if line.startswith("| ")]


def test_the_documented_tables_reproduce():
    printed = rows_of(as_markdown(told_of(Work(SHAPE_8B, 1, 131_072, 0.02, configurations.OUR_HELD))))
    assert len(printed) > 40
    assert [row for row in printed if row not in TABLES] == []
    paper = configurations.rows(Work(QWEN_7B, 8, 12_288, 0.2, configurations.PAPER_HELD))
    assert all(f"| {row['step_ms']:,.0f} | {row['speedup_of_hillinfer']:.2f} |" in TABLES for row in paper)
    assert constants_table(configurations.constants()) in TABLES


def test_what_a_month_writes_is_what_is_appended():
    told = month(SHAPE_8B)
    assert told["bytes_per_token"] == 32 * 8 * 128 * (2 * 2 + 0.5)
    assert told["bytes_per_month"] == pytest.approx(30 * told["drive_writes_per_day"] * 3.84e12)
    assert told["rated_drive_writes_per_day"] is None


def test_the_command_prints_one_json_object():
    result = CliRunner().invoke(app, ["simulate", "--constants", "--json"])
    assert [each["name"] for each in json.loads(result.stdout)] == [each.name for each in CONSTANTS]
    assert CliRunner().invoke(app, ["simulate", "--config", "other"]).exit_code == 2
