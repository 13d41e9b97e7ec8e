"""One of several processes of `torchrun` that train a recipe sharded on the CPU, in two parts, for `test_sharded.py`.

accelerate turns FSDP on for accelerators only. Here it is told that the processes have GPUs; everything after that is
the path that GPUs take: fully_shard, DTensor parameters, gathered checkpoints.
"""

import os
import sys
from typing import Any

import torch.distributed
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from zerodraft.training.recipe import load_recipe
from zerodraft.training.ztt.run import pretrain
from zerodraft.training.ztt.trainer import ZttTrainer

initialise, train = PartialState.__init__, ZttTrainer.training_step


def claim_gpus(self: PartialState, *args: Any, **kwargs: Any) -> None:
    initialise(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


def check_sharding(self: ZttTrainer, model: Any, *args: Any) -> Any:
    assert self.accelerator.is_fsdp2
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return train(self, model, *args)


PartialState.__init__ = claim_gpus
ZttTrainer.training_step = check_sharding
path, *overrides = sys.argv[1:]
pretrain(load_recipe(path, [*overrides, "training.steps=3"]), callbacks=[])
pretrain(load_recipe(path, overrides), resume=True, callbacks=[])
# none leaves while another still works
torch.distributed.barrier()
torch.distributed.destroy_process_group()
# threads of the backend may still run, and a normal exit aborts now and then when it finds one
os._exit(0)
