"""What tests of this room share: tiny models, and one worker process for those that leave it whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from mycel.compute.model.tiny import tiny_model
from mycel.compute.process import WorkerOptions
from mycel.compute.worker import WorkerEngine, start_worker


@pytest.fixture(scope="session")
def tiny_llama_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 4 layers."""
    return tiny_model(tmp_path_factory.mktemp("llama") / "model", "llama", seed=1)


@pytest.fixture(scope="session")
def shared_worker() -> Iterator[WorkerEngine]:
    """A running worker; its imports take seconds, so tests that do not kill it share it."""
    worker = start_worker(WorkerOptions(environment=os.environ))
    yield worker
    trio.run(worker.aclose)
