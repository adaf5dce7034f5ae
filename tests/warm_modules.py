"""Imports what a run imports, before the server of `warm_start.py` forks any program."""

from __future__ import annotations

from importlib import import_module

import cpuinfo

for name in (
    *("tests.warm_start", "train", "accelerate.commands.launch", "torch.distributed.run", "torch.utils.cpp_extension"),
    *("deepspeed.launcher.runner", "deepspeed.compile.backend", "deepspeed.module_inject.auto_ep_layer"),
    *("deepspeed.ops.op_builder.all_ops", "functorch.compile", "networkx", "sentencepiece.sentencepiece_model_pb2"),
):
    import_module(name)

# DeepSpeed asks for it three times per rank that offloads, and each time takes more than a second.
_CPU_INFO = cpuinfo.get_cpu_info()
cpuinfo.get_cpu_info = lambda: _CPU_INFO
