"""The file of endpoints: what cannot be asked is refused, and says why."""

from pathlib import Path

import pytest
import yaml

from psychocounsel.endpoints import read_endpoint
from psychocounsel.errors import UserError


def test_the_endpoints_of_the_project_can_be_read():
    path = Path("config/endpoints.yaml")
    for name in yaml.safe_load(path.read_text()):
        read_endpoint(path, name)


def test_an_unknown_endpoint_or_key_is_named(tmp_path):
    path = tmp_path / "endpoints.yaml"
    path.write_text("openai: {kind: openai, base_url: http://x/v1, requests_per_minut: 3}")
    with pytest.raises(UserError, match="requests_per_minut"):
        read_endpoint(path, "openai")
    with pytest.raises(UserError, match="Did you mean 'openai'"):
        read_endpoint(path, "opnai")


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("{kind: openai}", "openai: the kind openai needs base_url"),
        ("{kind: batch, base_url: null}", "openai: .*base_url"),
        ("{kind: serve, start_timeout_s: 5}", "openai: .*server"),
        ("{kind: serve, server: vllm}", "openai: .*start_timeout_s"),
        ("{kind: openai, base_url: http://x/v1, concurrency: 0}", "openai: concurrency: "),
        ("{kind: openai, base_url: http://x/v1, requests_per_minute: 0}", "openai: requests_per_minute: "),
    ],
)
def test_an_endpoint_that_cannot_be_asked_is_refused(tmp_path, entry, says):
    """Programs run by hand, too: without an address the openai package would send everything to its own."""
    path = tmp_path / "endpoints.yaml"
    path.write_text(f"openai: {entry}")
    with pytest.raises(UserError, match=says):
        read_endpoint(path, "openai")
