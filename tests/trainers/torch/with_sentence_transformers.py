"""sentence-transformers: `AutoClipMixin` in front of its trainer, which is made from the Hugging Face Trainer."""

import torch
from autoclip_torch.transformers import AutoClipMixin
from checks import PERCENTILE
from datasets import Dataset
from harness import play
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import CosineSimilarityLoss
from sentence_transformers.models import Pooling, Transformer
from transformers import BertConfig, BertModel
from with_transformers import run_trainer
from with_trl import WORDS, make_tokenizer, sentences


# page
class AutoClipTrainer(AutoClipMixin, SentenceTransformerTrainer):
    pass


# end of page

UPDATES, HALF = 8, 4


def make_sentence_model(folder):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(WORDS), **sizes, max_position_embeddings=64)).save_pretrained(folder / "bert")
    make_tokenizer().save_pretrained(folder / "bert")
    transformer = Transformer(str(folder / "bert"), max_seq_length=32)
    return SentenceTransformer(modules=[transformer, Pooling(16)], device="cpu")


def train(folder, *, resume):
    model = make_sentence_model(folder)
    args = SentenceTransformerTrainingArguments(
        folder,
        learning_rate=0.01,
        per_device_train_batch_size=8,
        num_train_epochs=1,
        logging_steps=1,
        save_steps=HALF,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    count = 8 * UPDATES
    pairs = {
        "sentence1": sentences(5)[:count],
        "sentence2": sentences(7)[:count],
        "score": [number % 3 / 2 for number in range(count)],
    }
    trainer = AutoClipTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict(pairs),
        loss=CosineSimilarityLoss(model),
        autoclip={"percentile": PERCENTILE},
    )
    return run_trainer(trainer, HALF, resume=resume)


if __name__ == "__main__":
    play("sentence-transformers", train)
