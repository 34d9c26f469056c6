"""The tasks a model can be fine-tuned for, by name."""

from pretrain.config.schema import ModelConfig, ObjectiveConfig, TaskConfig
from pretrain.examples.tables import Table
from pretrain.tasks.classification import Classification
from pretrain.tasks.embedding import Embedding
from pretrain.tasks.extractive_qa import ExtractiveQA
from pretrain.tasks.instruct import Instruct
from pretrain.tasks.language_model import LanguageModel
from pretrain.tasks.task import Task
from pretrain.tasks.token_classification import TokenClassification
from pretrain.tokenizer.tokenizer import Tokenizer

TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "extractive_qa": ExtractiveQA,
    "token_classification": TokenClassification,
    "instruct": Instruct,
    "language_model": LanguageModel,
    "embedding": Embedding,
}


def make_task(
    config: TaskConfig, tokenizer: Tokenizer, model: ModelConfig, seq_len: int, packing: str, seed: int,
    table: Table | None, objective: ObjectiveConfig,
) -> Task:  # fmt: skip
    """The task by its name. What `config` leaves open, as labels, is as the training `table` has it."""
    kind = TASKS[config.name]
    config = config if table is None else kind.settled(config, table)
    return kind(config, tokenizer, model, seq_len, packing, seed, objective)
