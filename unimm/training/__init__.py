"""Training: Lightning tasks for codecs and language models, and the launcher of `unimm fit`."""

from unimm.training.callbacks import WriteReconstructions
from unimm.training.codec import CodecTask
from unimm.training.language import LanguageTask
from unimm.training.optim import OptimizerConfig

__all__ = ["CodecTask", "LanguageTask", "OptimizerConfig", "WriteReconstructions"]
