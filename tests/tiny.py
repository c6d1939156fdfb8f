"""The smallest run with all parts; most tests use it."""

from lmlight import TextDataModule, Transformer
from lmlight.data.tokenizer import TokenizerConfig

FLAGS = [
    "--data.tokenizer.vocab_size=400",
    "--data.block_size=16",
    "--data.batch_size=8",
    "--model.net.n_layer=1",
    "--model.net.n_head=2",
    "--model.net.n_embd=32",
    "--trainer.log_every_n_steps=1",
    "--trainer.accelerator=cpu",
]
# Trainer arguments for no output and no files
QUIET = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
}


def data(path):
    return TextDataModule(str(path), block_size=16, batch_size=8, tokenizer=TokenizerConfig(vocab_size=400))


def net(vocab_size, block_size, **options):
    return Transformer(vocab_size, block_size, n_layer=1, n_head=2, n_embd=32, **options)
