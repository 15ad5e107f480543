"""Lightning's FSDP1 strategy on the CPU: what keeps it to CUDA is only how it names its device."""

import torch
import torch.distributed as dist
import torch.distributed.fsdp as fsdp
from lightning.pytorch.strategies import FSDPStrategy

Wrapper = fsdp.FullyShardedDataParallel


class OnCpu(Wrapper):
    """FSDP that computes on the CPU, whatever device it is told."""

    def __init__(self, module, *args, device_id=None, **kwargs):
        super().__init__(module, *args, device_id=torch.device("cpu"), **kwargs)


class CpuFSDPStrategy(FSDPStrategy):
    """`FSDPStrategy` for gloo processes; only for tests."""

    def __init__(self, **kwargs):
        super().__init__(process_group_backend="gloo", **kwargs)

    def _setup_model(self, model):
        fsdp.FullyShardedDataParallel = OnCpu
        try:
            return super()._setup_model(model)
        finally:
            fsdp.FullyShardedDataParallel = Wrapper

    def configure_ddp(self):
        """Nothing: Lightning calls it for every parallel strategy on the CPU."""

    def barrier(self, name=None):
        """Wait without the device number that a CPU has not."""
        dist.barrier()
