"""The manifests for Kubernetes, by its own schemas."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.guest.conftest import ROOT

MANIFESTS = sorted((ROOT / "deploy").glob("*.yaml"))
VERSIONS = ("1.25", "1.37")  # of Kubernetes: the first and the last that the library has


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest(path: Path) -> None:
    library = pytest.importorskip("kubernetes_validate", reason="./check --engines installs it")
    yaml = pytest.importorskip("yaml")
    for manifest in yaml.safe_load_all(path.read_text()):
        for version in VERSIONS:
            library.validate(manifest, version, strict=True)
