"""The measures of fuzzing and of a cold boot offline run from end to end; and what the socket guard counts."""

import os
import shutil

import pytest

from bench import node_fuzz_executions, node_offline_answered
from bench.settings import Settings


@pytest.mark.llama
def test_every_parser_is_fuzzed_and_the_least_run_one_is_the_figure(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_fuzz_executions, "NAMES", dict.fromkeys(("frames", "run-file")))

    found = node_fuzz_executions.measure(settings)

    assert (found["figure"], found["executions"]) == (200, {"frames": 200, "run-file": 200})
    assert not found["crashes"]


@pytest.mark.namespace
@pytest.mark.llama
def test_a_cold_boot_with_only_loopback_in_1970_answers_and_reaches_out_by_no_thread_of_a_request(settings: Settings) -> None:
    missing = [tool for tool in node_offline_answered.TOOLS if shutil.which(tool) is None]
    if missing or os.geteuid():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"needs root and {', '.join(missing) or 'namespaces'}")

    found = node_offline_answered.measure(settings)

    assert (found["figure"], found["kept_on_disk"], found["clock_of_the_answers"]) == (1.0, found["n"], "1970-01-02")
    assert found["connections_off_loopback"]["by threads of the link"] > 0, "the guard saw the attempts that there must be"


def test_the_guard_tells_loopback_from_elsewhere_and_names_the_thread() -> None:
    trace = [
        '12  connect(7, {sa_family=AF_INET, sin_port=htons(1883), sin_addr=inet_addr("10.66.66.66")}, 16) = -1 ENETUNREACH (x)',
        '13 connect(8, {sa_family=AF_INET, sin_port=htons(80), sin_addr=inet_addr("127.0.0.1")}, 16) = 0',
        '14 connect(9, {sa_family=AF_INET6, sin6_port=htons(80), inet_pton(AF_INET6, "2001:db8::1", &sin6_addr)}, 28) = -1 ENETUNREACH (x)',
        '15 connect(9, {sa_family=AF_INET6, sin6_port=htons(80), sin6_flowinfo=htonl(0), inet_pton(AF_INET6, "::1", &sin6_addr)}, 28) = 0',
        '16 sendto(3, "x", 1, 0, {sa_family=AF_INET, sin_port=htons(53), sin_addr=inet_addr("9.9.9.9")}, 16) = 1',
        '17 connect(4, {sa_family=AF_UNIX, sun_path="/run/x"}, 110) = 0',
    ]

    found = node_offline_answered.connections(trace, ["12\tmqtt-esteli\t10.66.66.66\n"])

    assert found == [(12, "mqtt-esteli", "10.66.66.66"), (14, "?", "2001:db8::1"), (16, "?", "9.9.9.9")]
