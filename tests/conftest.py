# SPDX-License-Identifier: Apache-2.0
"""The device of a test; and assertions of shared helpers say what they compared, as tests' do."""

import pytest
import torch

pytest.register_assert_rewrite("accuracy", "pairs")

from devices import DEVICES  # noqa: E402 - after the line above, like all helpers


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)
