"""doctor: what it finds on this machine, and what it says when something is missing."""

import json

import pytest

from mone_edge import cli, doctor
from mone_edge.runtime import toolchain


@pytest.mark.usefixtures("built_runtime")
def test_a_complete_machine_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["doctor", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["ok"]
    names = {finding["name"] for finding in document["findings"]}
    assert {"python", "torch", "compilers", "patched llama.cpp", "memory"} <= names


def test_missing_programs_are_named_with_their_packages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MONE_EDGE_CACHE", str(tmp_path))
    monkeypatch.setattr(toolchain.shutil, "which", lambda *_, **__: None)
    assert cli.run(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "MISSING  compilers" in said
    assert "sudo apt install cmake gcc g++ make" in said
    assert "mone-edge runtime build" in said


def test_an_old_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: "1.13.1")
    findings = {finding.name: finding for finding in doctor.examine()}
    assert not findings["torch"].ok
    assert findings["torch"].fix == "pip install 'torch>=2.6'"


def test_what_only_some_need_is_optional(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A machine without cross compilers is well, and is told what they would be."""
    found = doctor.shutil.which
    monkeypatch.setattr(
        doctor.shutil, "which", lambda name, **k: None if "aarch64" in name else found(name, **k)
    )
    cli.run(["doctor", "--json"])
    findings = {f["name"]: f for f in json.loads(capsys.readouterr().out)["findings"]}
    target = findings["aarch64-linux target"]
    assert not target["ok"] and target["optional"]
    assert target["fix"] == "sudo apt install gcc-aarch64-linux-gnu g++-aarch64-linux-gnu"
    assert findings["aarch64 emulator"]["fix"] == "sudo apt install qemu-user-static"
