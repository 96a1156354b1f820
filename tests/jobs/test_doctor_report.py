"""A job's report comes back in its log, as one line among those of others."""

import pytest

from cluster.look.preflight import Check
from jobs.doctor import Report, report_in

REPORT = Report(healthy=True, seconds=1.5, checks=(Check(name="clock", where="head", ok=True, found="a {brace}\n}"),))


def test_a_report_is_read_from_the_log_of_a_job():
    log = f'{{\n"healthy": "of another program"\n}}\nRay says something\n{REPORT.model_dump_json()}\nand more\n'
    assert report_in(log) == REPORT


@pytest.mark.parametrize("log", ["", "Traceback\n", REPORT.model_dump_json()[:-20]])
def test_a_log_without_a_whole_report_has_none(log: str):
    assert report_in(log) is None
