"""A stand-in for a vLLM server, and prompts for it; see ``vllm_stand_in``."""

import functools
import threading

import pytest


@pytest.fixture
def vllm_server(open_tiny):
    """A running stand-in with a copy of the family's tiny model."""
    from tests.unit.vllm_stand_in import StandIn

    served = StandIn(open_tiny())
    threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield served
    served.shutdown()
    served.server_close()


@pytest.fixture
def vllm_library(monkeypatch):
    """Function that installs the stand-in for the library."""
    from tests.unit.vllm_stand_in import install_library

    return functools.partial(install_library, monkeypatch)


@pytest.fixture
def open_vllm(tiny_model, vllm_server):
    """Function that opens the engine of the stand-in server."""
    from mmpost.rollout.engine import Setup, open_engine
    from tests.unit.vllm_stand_in import section

    def make(model=tiny_model, **options):
        engine = open_engine(Setup(section(vllm_server, **options), model.policy, model.adapter, "tiny", 64))
        engine.client.pause_s = 0.01
        return engine

    return make


@pytest.fixture
def engine_prompts(tiny_model, mixed_rows):
    """The rows of ``mixed_rows`` without their answers, numbered from 10."""
    from mmpost.rollout.engine import Prompt

    samples = [sample.prompt() for sample in mixed_rows]
    return [Prompt(tiny_model.adapter.encode_prompt(sample), 10 + i, sample) for i, sample in enumerate(samples)]
