"""TRL and peft: `AutoClipMixin` in front of their trainers, which are made from the Hugging Face Trainer."""

import torch
from autoclip_torch.transformers import AutoClipMixin
from checks import PERCENTILE
from datasets import Dataset
from harness import play
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from with_transformers import run_trainer


# page
class AutoClipSFTTrainer(AutoClipMixin, SFTTrainer):
    pass


# end of page


class AutoClipDPOTrainer(AutoClipMixin, DPOTrainer):
    pass


WORDS = ["[PAD]", "[UNK]", "<s>", "</s>", *(f"w{number}" for number in range(60))]
LORA = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
UPDATES, HALF = 8, 4


def make_tokenizer():
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "<s>", "eos_token": "</s>"}
    numbers = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **special)


def make_language_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=len(WORDS), pad_token_id=0, bos_token_id=2, eos_token_id=3, **sizes, **heads)
    )


def sentences(words):
    chosen = torch.randint(4, len(WORDS), (8 * UPDATES, words), generator=torch.Generator().manual_seed(0))
    return [" ".join(WORDS[number] for number in row) for row in chosen.tolist()]


def train_with(kind, config, data, **options):
    def train(folder, *, resume):
        torch.manual_seed(1)
        args = config(
            folder,
            learning_rate=0.01,
            max_length=32,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            num_train_epochs=1,
            logging_steps=1,
            save_steps=HALF,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            disable_tqdm=True,
        )
        trainer = kind(
            model=make_language_model(),
            args=args,
            train_dataset=Dataset.from_dict(data),
            processing_class=make_tokenizer(),
            autoclip={"percentile": PERCENTILE},
            **options,
        )
        return run_trainer(trainer, HALF, resume=resume)

    return train


if __name__ == "__main__":
    texts = {"text": sentences(10)}
    play("trl", train_with(AutoClipSFTTrainer, SFTConfig, texts), "SFT")
    play("trl", train_with(AutoClipSFTTrainer, SFTConfig, texts, peft_config=LORA), "SFT with LoRA")
    pairs = {"prompt": sentences(3), "chosen": sentences(4), "rejected": sentences(5)}
    play("trl", train_with(AutoClipDPOTrainer, DPOConfig, pairs, ref_model=make_language_model()), "DPO")
