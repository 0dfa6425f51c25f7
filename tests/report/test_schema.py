"""The made-up report, which the tests of pages and tables use, has the shape of a real one."""

import json

from pydantic import TypeAdapter
from report.made_up import made_up_report

from gpt2ft.report.schema import ModelReport, Report


def test_the_made_up_report_holds_every_key_and_no_other():
    report = made_up_report()
    TypeAdapter(Report).validate_python(report, extra="forbid")
    assert set(report) == set(Report.__annotations__)
    assert set().union(*report["models"]) == set(ModelReport.__annotations__)
    assert json.loads(json.dumps(report, allow_nan=False)).keys() == report.keys()
