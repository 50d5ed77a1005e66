# SPDX-License-Identifier: Apache-2.0
"""Assertions of shared helpers say what they compared, as those of tests do."""

import pytest

pytest.register_assert_rewrite("accuracy", "pairs")
