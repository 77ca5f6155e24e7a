"""Training: Lightning tasks for codecs and language models, and the launcher of `unimm fit`."""

from unimm.training.adapt import AdaptTask, LoRAConfig
from unimm.training.callbacks import WriteReconstructions
from unimm.training.checkpoints import RunCheckpoints
from unimm.training.codec import CodecTask
from unimm.training.expected import ExpectedLosses
from unimm.training.language import LanguageTask
from unimm.training.optim import GroupRule, OptimizerConfig
from unimm.training.scale import ScaleConfig
from unimm.training.semantic import SemanticTask
from unimm.training.sharded import ShardedStrategy
from unimm.training.spikes import SpikeRewind
from unimm.training.stops import NonFinite, Preempted, RunStopped
from unimm.training.throughput import Throughput

__all__ = [
    "AdaptTask",
    "CodecTask",
    "ExpectedLosses",
    "GroupRule",
    "LanguageTask",
    "LoRAConfig",
    "NonFinite",
    "OptimizerConfig",
    "Preempted",
    "RunCheckpoints",
    "RunStopped",
    "ScaleConfig",
    "SemanticTask",
    "ShardedStrategy",
    "SpikeRewind",
    "Throughput",
    "WriteReconstructions",
]
