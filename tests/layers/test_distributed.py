"""Two processes over gloo: an injected model under DDP and FSDP2 has the gradients of one process."""

import pytest
import torch.multiprocessing as mp
from distributed_training import WORLD, worker


@pytest.mark.parametrize("kind", ["ddp", "fsdp1", "fsdp2"])
def test_distributed_gradients_are_those_of_one_process(kind, tmp_path):
    """The worker asserts; mp.spawn raises its failures here."""
    mp.spawn(worker, (kind, str(tmp_path)), nprocs=WORLD)
