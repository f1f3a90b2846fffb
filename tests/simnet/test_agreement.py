"""Whole daemons and the light mesh tell the same of Kademlia."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mycel.simnet.agreement import AgreementOptions, agreement


@pytest.mark.slow
def test_reads_among_daemons_go_as_on_the_light_mesh():
    report = agreement(AgreementOptions(seed=1, nodes=9, records=6, reads=40))
    assert report.daemons.calm.tried == report.mesh.silent.tried == 40
    assert report.agrees
    slow = replace(report.mesh.calm, p50_s=2 * report.mesh.calm.p50_s)
    assert not replace(report, mesh=replace(report.mesh, calm=slow)).agrees
