"""What torch runs on."""

import pytest
import torch

from cvmatch.runtime import hardware


def test_one_thread_gives_the_threads_back_after_a_failure_too():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ZeroDivisionError), hardware.one_thread():
            _ = 1 / (torch.get_num_threads() - 1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
