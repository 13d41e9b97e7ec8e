"""What drafters that read hidden states share."""

import numpy as np
import torch

from zerodraft.drafters.tapped import in_one_piece, on_host, reach


def test_one_transfer_brings_every_tensor() -> None:
    ids, log_q = torch.tensor([[3, 2**40], [-1, 0]]), torch.randn(2, 3)
    halves, nothing = torch.randn(4, 3).half().T, torch.zeros(0, 5, dtype=torch.int64)
    tensors = log_q, halves, ids, nothing
    for found, tensor, same in zip(in_one_piece(*tensors), tensors, on_host(*tensors), strict=True):
        assert found.dtype == same.dtype
        assert np.array_equal(found, tensor.numpy())
        assert np.array_equal(same, tensor.numpy())


def test_a_cpu_attends_to_what_is_there_and_a_gpu_to_the_whole_cache() -> None:
    assert reach(torch.device("cpu"), 9, 256) == 9
    assert reach(torch.device("cuda"), 9, 256) == 256
