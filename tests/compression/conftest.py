import pytest
import torch

pytest.register_assert_rewrite("tests.compression.contract")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
